"""Checkpoints give back every bit, and only to the run that they belong to."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from hmn_replay.condensation.checkpoint import (
    Checkpoint,
    flatten_state,
    load_state,
    read_checkpoint,
    write_checkpoint,
)
from hmn_replay.errors import CheckpointError

MINE = {"data": "0123", "seed": "0", "layout": "x" * 99, "torch": "2.9.0"}
THEIRS = {"data": "4567", "seed": "1", "layout": "y" * 99, "torch": "2.9.0"}
STATE: dict[str, Any] = {
    "phase": "matching",
    "step": 3,
    "phases": {"matching": {"seconds": 0.1, "images": 7}},
    "beta_accuracies": {"0.5": 1 / 3},
    "psnr": None,
}


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "memory/a": torch.randn(3, 4, generator=generator),
        "memory/b.c": torch.tensor([1, -(2**60)]),
        "memoryless/a": torch.zeros(0, 5),
        "optimizer/0/step": torch.tensor(7.0),
        "scores": torch.randn(4, 4, generator=generator).t(),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.checkpoint"


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        value.dtype == two[name].dtype and value.equal(two[name]) for name, value in one.items()
    )


def test_state_and_tensors_are_read_back(path: Path) -> None:
    write_checkpoint(path, MINE, STATE, some_tensors())
    checkpoint = read_checkpoint(path, MINE)
    assert checkpoint is not None
    assert checkpoint.state == STATE
    assert same(checkpoint.tensors, some_tensors())
    assert os.listdir(path.parent) == [path.name]


def test_what_cannot_be_written_is_the_systems_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_checkpoint(path, MINE, STATE, some_tensors())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(path, MINE, {"step": 4}, {})
    checkpoint = read_checkpoint(path, MINE)
    assert checkpoint is not None
    assert checkpoint.state == STATE


def test_a_later_checkpoint_takes_the_place_of_an_earlier_one(path: Path) -> None:
    write_checkpoint(path, MINE, STATE, some_tensors())
    write_checkpoint(path, MINE, {"step": 4}, {})
    assert read_checkpoint(path, MINE) == Checkpoint({"step": 4}, {})
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_it_is_the_file_that_was_locked_while_it_was_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No library replaces it by one of its own, unlocked and of other permissions."""
    seen: list[tuple[int, list[str]]] = []
    replace = os.replace

    def note(source: str, target: str | Path) -> None:
        with open(source, "rb+") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append((os.stat(source).st_ino, os.listdir(path.parent)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    old = os.umask(0o027)
    try:
        write_checkpoint(path, MINE, STATE, some_tensors())
    finally:
        os.umask(old)
    ((inode, names),) = seen
    assert len(names) == 1 and path.stat().st_ino == inode
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_without_a_checkpoint_there_is_none(path: Path) -> None:
    assert read_checkpoint(path, MINE) is None


def test_a_group_is_what_begins_with_its_name_and_a_slash() -> None:
    checkpoint = Checkpoint({}, some_tensors())
    assert set(checkpoint.group("memory")) == {"a", "b.c"}
    assert set(checkpoint.group("optimizer")) == {"0/step"}
    assert checkpoint.group("scores") == {}


def test_a_name_that_is_missing_is_as_one_that_says_nothing(path: Path) -> None:
    write_checkpoint(path, MINE, STATE, some_tensors())
    found = read_checkpoint(path, {**MINE, "teacher": ""})
    assert found is not None and found.state == STATE


def test_the_checkpoint_of_another_run_is_refused_and_left(path: Path) -> None:
    write_checkpoint(path, THEIRS, STATE, some_tensors())
    before = path.read_bytes()
    with pytest.raises(
        CheckpointError, match=r"with other data, seed 1 in place of 0, other layout; delete '"
    ):
        read_checkpoint(path, MINE)
    assert path.read_bytes() == before


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"hello", b"\xff" * 100, b"{}" * 50])
def test_a_file_that_is_no_checkpoint_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint \(.*\); delete '.*' to"):
        read_checkpoint(path, MINE)


@pytest.mark.parametrize(
    "metadata", [None, {}, {"format": "pt"}, {"hmn_replay_checkpoint": "{}"}, {"digest": "0"}]
)
def test_another_safetensors_file_is_refused(path: Path, metadata: Any) -> None:
    path.write_bytes(safetensors.torch.save({"weight": torch.zeros(3)}, metadata))
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        read_checkpoint(path, MINE)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder, where the checkpoint is to be; move"):
        read_checkpoint(tmp_path, MINE)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes of POSIX")
@pytest.mark.timeout(20)
def test_a_pipe_is_refused_at_once(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="is no file, where the checkpoint is to be; move"):
        read_checkpoint(path, MINE)


def test_no_damage_gets_through(path: Path) -> None:
    write_checkpoint(path, MINE, STATE, some_tensors())
    data, rng = path.read_bytes(), random.Random(0)
    tensors = some_tensors()
    for number in range(600):
        at = rng.randrange(len(data))
        changed = bytearray(data)
        if number % 4 == 0:
            changed = changed[:at]
        elif number % 4 == 1:
            changed[at : at + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
        else:
            changed[at] ^= 1 << rng.randrange(8)
        path.unlink()  # it may be mapped
        path.write_bytes(changed)
        try:
            checkpoint = read_checkpoint(path, MINE)
        except CheckpointError:
            continue
        assert checkpoint is not None
        assert checkpoint.state == STATE
        assert same(checkpoint.tensors, tensors)


@pytest.mark.parametrize("kind", ["adam", "adam by group", "sgd", "sgd before its first step"])
def test_a_module_and_its_optimizer_go_on_where_they_were(kind: str, path: Path) -> None:
    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if kind == "adam":
            return network, torch.optim.Adam(network.parameters(), lr=0.1)
        if kind == "adam by group":
            first, *rest = network.parameters()
            return network, torch.optim.Adam([{"params": rest}, {"params": [first]}], lr=0.1)
        return network, torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)

    def step(network: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        torch.autograd.backward(network(inputs).square().mean())
        optimizer.step()

    network, optimizer = start(0)
    for number in range(0 if "before" in kind else 3):
        step(network, optimizer, number)
    tensors = flatten_state("network", network) | flatten_state("optimizer", optimizer)
    write_checkpoint(path, MINE, {}, tensors)
    checkpoint = read_checkpoint(path, MINE)
    assert checkpoint is not None
    again, again_optimizer = start(1)
    load_state(again, checkpoint.group("network"))
    load_state(again_optimizer, checkpoint.group("optimizer"))
    for number in range(3, 6):
        step(network, optimizer, number)
        step(again, again_optimizer, number)
    assert same(network.state_dict(), again.state_dict())
    assert same(flatten_state("o", optimizer), flatten_state("o", again_optimizer))
