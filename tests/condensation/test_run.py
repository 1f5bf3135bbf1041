"""A run goes on where it was stopped, and ends with the same bits."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors import safe_open

from hmn_replay.condensation import steps
from hmn_replay.condensation.rate import RateControl
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import CheckpointError
from hmn_replay.memory.file import load, serialise
from hmn_replay.memory.formats import NumberFormat
from hmn_replay.memory.layout import Layout
from tests.support import TINY, TINY_MTT, tiny

MakeLayout = Callable[..., Layout]
MakeSet = Callable[..., LabelledImages]

# Any: what these modules import is replaced in tests.
loop: Any = importlib.import_module("hmn_replay.condensation.loop")
run: Any = importlib.import_module("hmn_replay.condensation.run")
experts: Any = importlib.import_module("hmn_replay.objectives.trajectories")

pytestmark = pytest.mark.usefixtures("untouched_random_state")


class Interruption(Exception):
    pass


def count_calls(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[int]:
    """Count the calls of a function that a module uses."""
    function, calls = getattr(module, name), [0]

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        return function(*args, **options)

    monkeypatch.setattr(module, name, counted)
    return calls


def interrupt(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    name: str,
    number: int,
    error: BaseException | None = None,
) -> None:
    """Let the call of that number, counted from 0, raise."""
    function, calls = getattr(module, name), [0]

    def interrupted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > number:
            raise error or Interruption
        return function(*args, **options)

    monkeypatch.setattr(module, name, interrupted)


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_CHECKPOINT_SECONDS", 0.0)


def test_checkpoints_change_nothing(
    make_set: MakeSet,
    make_layout: MakeLayout,
    tmp_path: Path,
    every_step: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, layout = make_set(), make_layout()
    path = tmp_path / "run.checkpoint"
    memory = tiny(data, layout, checkpoint=path)
    assert serialise(memory) == serialise(tiny(data, layout))
    assert os.listdir(tmp_path) == [path.name]
    # What was done is not done again.
    for module, name in ((steps, "warm_start_step"), (steps, "match_step"), (loop, "score")):
        interrupt(monkeypatch, module, name, 0)
    interrupt(monkeypatch, loop, "train_network", 0)
    again = tiny(data, layout, checkpoint=str(path))
    assert serialise(again) == serialise(memory)
    # What is left, to drop the images that go, is measured anew.
    before, after = dict[str, Any](memory.report), dict[str, Any](again.report)
    del before["seconds"], after["seconds"]
    for name in ("seconds", "images_per_second", "peak_memory_bytes"):
        before["phases"]["pruning"].pop(name)
        after["phases"]["pruning"].pop(name)
    assert after == before


@pytest.mark.parametrize(
    ("options", "number_format"),
    [({}, "int8"), ({}, "entropy"), (TINY_MTT, "int8")],
    ids=["gradient", "entropy", "mtt"],
)
def test_interrupted_at_any_checkpoint_it_ends_as_if_it_had_not_been(
    make_set: MakeSet,
    make_layout: MakeLayout,
    tmp_path: Path,
    every_step: None,
    options: dict[str, Any],
    number_format: NumberFormat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, layout = make_set(), make_layout(number_format)
    with monkeypatch.context() as patch:
        calls = count_calls(patch, run, "write_checkpoint")
        expected = serialise(tiny(data, layout, checkpoint=tmp_path / "whole", **options))
    num_writes = calls[0]
    assert num_writes > 4 + 2 * 3 + 2
    for number in [*random.Random(0).sample(range(num_writes - 2), 8), num_writes - 2]:
        path = tmp_path / f"interrupted at {number}"
        with monkeypatch.context() as patch:
            interrupt(patch, run, "write_checkpoint", number)
            with pytest.raises(Interruption):
                tiny(data, layout, checkpoint=path, **options)
        assert serialise(tiny(data, layout, checkpoint=path, **options)) == expected, number


@pytest.mark.parametrize("grows", [False, True])
def test_interrupted_at_any_step_the_rate_goes_on_as_if_it_had_not_been(
    make_set: MakeSet,
    make_layout: MakeLayout,
    tmp_path: Path,
    every_step: None,
    grows: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, layout = make_set(), make_layout("entropy")
    options: dict[str, Any] = {"beta_grid": (0.5,), "budget": 3000}
    if grows:
        options["memory"] = tiny(make_set(labels=(7, 8), seed=1), layout, budget=3000)
    states: list[list[float]] = []
    add_gradients = RateControl.add_gradients

    def recorded(self: RateControl, *args: Any) -> None:
        states.append(self.state.tolist())
        add_gradients(self, *args)

    monkeypatch.setattr(RateControl, "add_gradients", recorded)
    tiny(data, layout, **options)
    expected, phases = states.copy(), [state[2] for state in states].count(0.0)
    assert phases == 2 and len(expected) >= 6
    # The checkpoint after the warm start's last step is one of them.
    for number in range(len(expected) - 1):
        path = tmp_path / f"interrupted at {number}"
        with monkeypatch.context() as patch:
            interrupt(patch, run, "write_checkpoint", number)
            with pytest.raises(Interruption):
                tiny(data, layout, checkpoint=path, **options)
        states.clear()
        tiny(data, layout, checkpoint=path, **options)
        assert states == expected[-len(states) :], number


@pytest.mark.parametrize("number_format", ["float32", "int8", "entropy"])
@pytest.mark.parametrize("objective", ["gradient", "distribution"])
def test_interrupted_again_and_again_between_rare_checkpoints_it_ends_the_same(
    make_set: MakeSet,
    make_layout: MakeLayout,
    tmp_path: Path,
    number_format: NumberFormat,
    objective: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, layout = make_set(), make_layout(number_format)
    options: dict[str, Any] = {"objective": objective, "network_images": 4, "seed": 3}
    expected = serialise(tiny(data, layout, **options))
    rng = random.Random(0)
    ticks = [0.0]

    def monotonic() -> float:
        ticks[0] += rng.choice((0.0, 30.0))
        return ticks[0]

    monkeypatch.setattr("time.monotonic", monotonic)
    path, num_interruptions = tmp_path / "run.checkpoint", 0
    places = [
        (loop, "cosine_rate", 3),
        (steps, "draw_batch", 3),
        (steps, "draw_augmentation", 7),
        (loop, "margins", 1),
        (loop, "score", 1),
    ]
    for module, name, latest in places * 2:
        with monkeypatch.context() as patch:
            interrupt(patch, module, name, rng.randrange(latest), KeyboardInterrupt())
            try:
                memory = tiny(data, layout, checkpoint=path, **options)
            except KeyboardInterrupt:
                num_interruptions += 1
                continue
        assert serialise(memory) == expected
    assert num_interruptions >= 5
    assert serialise(tiny(data, layout, checkpoint=path, **options)) == expected


def test_an_error_while_writing_leaves_the_checkpoint_before(
    make_set: MakeSet,
    make_layout: MakeLayout,
    tmp_path: Path,
    every_step: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, layout, path = make_set(), make_layout(), tmp_path / "run.checkpoint"
    replace, calls = os.replace, [0]

    def full(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise OSError(28, "No space left on device")
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="No space left"):
            tiny(data, layout, checkpoint=path)
    assert os.listdir(tmp_path) == [path.name]
    memory = tiny(data, layout, checkpoint=path)
    assert serialise(memory) == serialise(tiny(data, layout))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"budget": 2222},
        {"real_batch": 4},
        {"beta_grid": (0.0, 0.5)},
        {"objective": "distribution"},
    ],
    ids=str,
)
def test_the_checkpoint_of_another_run_is_refused(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path, change: dict[str, Any]
) -> None:
    data, layout, path = make_set(), make_layout(), tmp_path / "run.checkpoint"
    tiny(data, layout, checkpoint=path, outer_steps=0)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="belongs to a run with other data, budget, seed or"):
        tiny(data, layout, checkpoint=path, outer_steps=0, **change)
    assert path.read_bytes() == before


def test_the_checkpoint_of_other_data_or_shapes_is_refused(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    data, path = make_set(), tmp_path / "run.checkpoint"
    options: dict[str, Any] = {"checkpoint": path, "outer_steps": 0, "budget": 3000}
    tiny(data, make_layout(), **options)
    images = data.images.clone()
    images[-1, -1, -1, -1] ^= 1
    others = [
        LabelledImages(images, data.labels),
        LabelledImages(data.images, data.labels.flip(0)),
    ]
    for other in others:
        with pytest.raises(CheckpointError, match="other data"):
            tiny(other, make_layout(), **options)
    with pytest.raises(CheckpointError, match="other data"):
        tiny(data, make_layout(class_channels=1), **options)


def test_a_damaged_checkpoint_is_refused(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    data, layout, path = make_set(), make_layout(), tmp_path / "run.checkpoint"
    tiny(data, layout, checkpoint=path, outer_steps=0)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-9] ^= 1
    for damaged in (b"", whole[:50], whole[:-1], bytes(flipped), b"\0" * 999):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"delete '.*' to start anew"):
            tiny(data, layout, checkpoint=path, outer_steps=0)
        assert path.read_bytes() == damaged


KILLED = """
    import json, os, random, signal, sys, time
    import torch, torch._dynamo
    from hmn_replay.condensation import run
    from hmn_replay.condensation.condense import condense
    from hmn_replay.memory.layout import Layout

    torch.set_num_threads(1)
    run._CHECKPOINT_SECONDS = 0.0
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    layout = Layout((3, 8, 8), "int8", 4, 3, 2, 2, 2, (5, 4))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(24) % 3

    def start(name):
        # Torch is imported once: each run is a process of its own all the same.
        child = os.fork()
        if child:
            return child
        try:
            path = os.path.join(folder, name)
            memory = condense(
                (images, labels), 1900, layout=layout, checkpoint=path + ".checkpoint", **options
            )
            memory.save(path)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def wait(child):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    begun = time.monotonic()
    assert wait(start("whole")) == 0
    seconds = time.monotonic() - begun
    rng, kills = random.Random(int(sys.argv[3])), 0
    for _ in range(7):
        child = start("killed")
        time.sleep(rng.uniform(0.05, 0.5) * seconds)
        os.kill(child, signal.SIGKILL)
        code = wait(child)
        assert code in (0, -signal.SIGKILL), code
        if code == 0:
            break
        kills += 1
        assert not os.path.exists(os.path.join(folder, "killed"))
    else:
        assert wait(start("killed")) == 0
    print(json.dumps({"kills": kills, "seconds": seconds}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.timeout(120)
def test_a_process_killed_at_random_moments_ends_with_the_same_file(tmp_path: Path) -> None:
    options = json.dumps({**TINY, "inner_steps": 6})
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), options, "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["kills"] >= 1
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert load(tmp_path / "killed").num_classes == 3


INTERRUPTED = """
    import os, signal, sys, threading, time
    import torch
    from hmn_replay.condensation import steps
    from hmn_replay.condensation.condense import condense
    from hmn_replay.memory.layout import Layout

    torch.set_num_threads(1)
    path, where = sys.argv[1], sys.argv[2]
    name = {"warm_start": "warm_start_step", "matching": "train_step"}[where]
    function, calls = getattr(steps, name), [0]

    def slow(*args):
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step
        return function(*args)

    setattr(steps, name, slow)
    layout = Layout((3, 8, 8), "int8", 4, 3, 2, 2, 2, (5, 4))
    images = torch.arange(24 * 192).remainder(251).to(torch.uint8).view(24, 3, 8, 8)
    options = dict(outer_steps=2, inner_steps=3, warm_start_steps=5, network_width=3, device="cpu")
    options |= dict(pruning_passes=20, pruning_width=3, network_images=8)
    whole = sys.argv[3:] == ["whole"]
    if whole:
        setattr(steps, name, function)
    try:
        memory = condense(
            (images, torch.arange(24) % 3), 1900, layout=layout, checkpoint=path, **options
        )
    except KeyboardInterrupt:
        raise SystemExit(130)
    memory.save(path + ".hmn")
"""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("phase", ["warm_start", "matching"])
def test_ctrl_c_keeps_the_work_up_to_the_end_of_the_step(tmp_path: Path, phase: str) -> None:
    def run(name: str, *whole: str) -> int:
        return subprocess.run(
            [
                sys.executable,
                "-c",
                textwrap.dedent(INTERRUPTED),
                str(tmp_path / name),
                phase,
                *whole,
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ).returncode

    assert run("stopped") == 130
    with safe_open(tmp_path / "stopped", framework="pt") as file:
        state = json.loads(file.metadata()["hmn_replay_checkpoint"])["state"]
    assert (state["phase"], state["step"]) == (phase, 3)
    assert run("stopped", "whole") == run("whole", "whole") == 0
    assert (tmp_path / "stopped.hmn").read_bytes() == (tmp_path / "whole.hmn").read_bytes()


def test_ctrl_c_during_a_training_of_the_pruning_keeps_what_came_before(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, layout, path = make_set(), make_layout(), tmp_path / "run.checkpoint"
    expected = serialise(tiny(data, layout))
    train, trainings = loop.train_network, [0]

    def stopped(*args: Any, **options: Any) -> Any:
        trainings[0] += 1
        if trainings[0] == 3:  # AUM and the first beta are done
            signal.raise_signal(signal.SIGINT)
        return train(*args, **options)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_network", stopped)
        with pytest.raises(KeyboardInterrupt):
            tiny(data, layout, checkpoint=path)
    assert signal.getsignal(signal.SIGINT) is handler
    calls = count_calls(monkeypatch, loop, "train_network")
    assert serialise(tiny(data, layout, checkpoint=path)) == expected
    assert calls[0] == 1


def test_ctrl_c_during_a_recording_keeps_the_experts_that_are_done(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, layout, path = make_set(), make_layout(), tmp_path / "run.checkpoint"
    expected = tiny(data, layout, **TINY_MTT)
    train, trainings = experts.train_network, [0]

    def stopped(*args: Any, **options: Any) -> Any:
        trainings[0] += 1
        if trainings[0] == 2:
            signal.raise_signal(signal.SIGINT)
        return train(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(experts, "train_network", stopped)
        with pytest.raises(KeyboardInterrupt):
            tiny(data, layout, checkpoint=path, **TINY_MTT)
    assert os.listdir(tmp_path / "run.checkpoint.experts") == ["expert-0000.safetensors"]
    calls = count_calls(monkeypatch, experts, "train_network")
    memory = tiny(data, layout, checkpoint=path, **TINY_MTT)
    assert calls[0] == 1
    assert serialise(memory) == serialise(expected)
    phases: list[Any] = [found.report["phases"] for found in (memory, expected)]
    assert phases[0]["experts"]["images"] == phases[1]["experts"]["images"] == 48


def test_a_second_ctrl_c_does_not_wait(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one was not heard")

    monkeypatch.setattr(steps, "match_step", impatient)
    with pytest.raises(KeyboardInterrupt):
        tiny(make_set(), make_layout(), checkpoint=tmp_path / "run.checkpoint")
