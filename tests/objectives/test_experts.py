"""Experts are recorded once, epoch by epoch, and only used for what they were recorded for."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from hmn_replay.data.images import LabelledImages
from hmn_replay.data.lookup import ImageLookup
from hmn_replay.distributed import Team
from hmn_replay.errors import ExpertError, TrainingError
from hmn_replay.files import digest_tensors
from hmn_replay.objectives.trajectories import (
    EXPERT_TRAINING,
    Experts,
    delete_experts,
    experts_beside,
    record_experts,
)
from hmn_replay.runtime import derive_seed
from hmn_replay.training.train import train_network

MakeSet = Callable[..., LabelledImages]

CONFIG = EXPERT_TRAINING.replace(width=3, batch_size=4, learning_rate=0.1, augmentations=("flip",))

pytestmark = pytest.mark.usefixtures("untouched_random_state")


def record(folder: Path, data: LabelledImages, **options: Any) -> Experts:
    usual: dict[str, Any] = {"num_experts": 2, "num_epochs": 2, "config": CONFIG, "device": "cpu"}
    return record_experts(
        folder, data.images, data.class_indices, data.num_classes, **{**usual, **options}
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(value.equal(two[name]) for name, value in one.items())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the numbers of the experts that are recorded."""
    numbers: list[int] = []
    usual = Experts.record

    def watched(self: Experts, number: int, *args: Any) -> None:
        numbers.append(number)
        usual(self, number, *args)

    monkeypatch.setattr(Experts, "record", watched)
    return numbers


def test_an_expert_is_kept_as_it_is_after_every_epoch(make_set: MakeSet, tmp_path: Path) -> None:
    data = make_set()
    recorded = record(tmp_path, data)
    assert recorded.num_images == 2 * 24
    for number in range(2):
        beginning, *later = recorded.read(number, 0, 1, 2)
        assert same(beginning, dict(recorded.network(number).named_parameters()))
        for epoch, found in enumerate(later, start=1):
            # Without a schedule, a longer training begins as a shorter one.
            trained = train_network(
                data.images,
                data.class_indices,
                3,
                config=CONFIG.replace(num_passes=24 * epoch),
                seed=derive_seed(0, "expert", number),
                device="cpu",
            )
            assert same(found, dict(trained.named_parameters()))
    assert not same(recorded.read(0, 0)[0], recorded.read(1, 0)[0])
    assert all(value.dtype == torch.float32 for value in recorded.read(0, 2)[0].values())


def test_the_images_are_measured_once(make_set: MakeSet, tmp_path: Path) -> None:
    data, num_read = make_set(), 0

    def fetch(positions: Tensor) -> Tensor:
        nonlocal num_read
        num_read += len(positions)
        return data.images[positions]

    images = ImageLookup(fetch, data.images.shape, data.images.dtype)
    options: dict[str, Any] = {"num_epochs": 1, "config": CONFIG, "device": "cpu"}
    read = []
    for num_experts in (1, 3):
        num_read, folder = 0, tmp_path / str(num_experts)
        classes = data.class_indices, data.num_classes
        record_experts(folder, images, *classes, num_experts=num_experts, **options)
        read.append(num_read)
    assert read[1] - read[0] == 2 * len(images)  # an epoch of two experts more
    both = (tmp_path / str(n) / "expert-0000.safetensors" for n in (1, 3))
    assert len({path.read_bytes() for path in both}) == 1


def test_both_ends_may_be_all_that_is_kept(make_set: MakeSet, tmp_path: Path) -> None:
    data = make_set()
    usual = data.images, data.class_indices, data.num_classes
    options: dict[str, Any] = {"num_experts": 1, "num_epochs": 5, "config": CONFIG}
    ends = Experts(tmp_path / "ends", *usual, **options, every_epoch=False)
    ends.record(0, "cpu")
    every = record(tmp_path / "every", data, num_experts=1, num_epochs=5)
    assert 2.5 * ends.path(0).stat().st_size < every.path(0).stat().st_size
    assert all(map(same, ends.read(0, 0, 5), every.read(0, 0, 5)))
    with pytest.raises(ExpertError, match="cannot read the expert"):
        ends.read(0, 1)
    again = Experts(tmp_path / "ends", *usual, **options, every_epoch=False)
    assert not again.missing()
    Experts(tmp_path / "every", *usual, **options, every_epoch=False)
    with pytest.raises(ExpertError, match="has not the parameters of epoch 1; delete"):
        record(tmp_path / "ends", data, num_experts=1, num_epochs=5)
    fewer = {**options, "num_epochs": 4}
    with pytest.raises(ExpertError, match="has not the parameters of epoch 4; delete"):
        Experts(tmp_path / "ends", *usual, **fewer, every_epoch=False)


def test_an_epoch_may_be_of_some_images(make_set: MakeSet, tmp_path: Path) -> None:
    config = CONFIG.replace(epoch_images=6)
    few = record(tmp_path / "few", make_set(), config=config)
    assert few.num_images == 2 * 6
    seen: list[tuple[int, int]] = []
    few.record(0, "cpu", lambda *images: seen.append(images))
    assert seen[-1] == (12, 12)
    config = CONFIG.replace(epoch_images=1000)
    assert record(tmp_path / "many", make_set(), config=config).num_images == 2 * 24


def test_experts_have_their_architectures_in_turn(make_set: MakeSet, tmp_path: Path) -> None:
    data = make_set(num_images=6)
    networks = ("convnet", "resnet18")
    recorded = record(tmp_path, data, networks=networks, num_experts=3, num_epochs=1)
    for number in range(3):
        expected = [name for name, _ in recorded.network(number).named_parameters()]
        assert sorted(recorded.read(number, 0)[0]) == sorted(expected)
    lengths = [len(recorded.read(number, 0)[0]) for number in range(3)]
    assert lengths[0] == lengths[2] < lengths[1]


def test_what_is_there_is_used_and_what_is_missing_recorded(
    make_set: MakeSet, tmp_path: Path, recorded: list[int]
) -> None:
    data = make_set()
    record(tmp_path, data, num_experts=3)
    assert recorded == [0, 1, 2]
    whole = files(tmp_path)
    assert list(whole) == [f"expert-000{number}.safetensors" for number in range(3)]
    record(tmp_path, data, num_experts=3)
    record(tmp_path, data, num_experts=2, num_epochs=1)
    assert recorded == [0, 1, 2]
    (tmp_path / "expert-0001.safetensors").unlink()
    record(tmp_path, data, num_experts=3)
    assert recorded == [0, 1, 2, 1]
    record(tmp_path / "anew" / "and deeper", data, num_experts=3)
    assert files(tmp_path / "anew" / "and deeper") == whole
    shutil.rmtree(tmp_path / "anew")
    assert files(tmp_path) == whole


def test_a_recording_that_was_stopped_goes_on(make_set: MakeSet, tmp_path: Path) -> None:
    data = make_set()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    classes = (data.images, data.class_indices, data.num_classes)
    stopped = Experts(tmp_path / "stopped", *classes, num_experts=2, num_epochs=2, config=CONFIG)
    stopped.record(0, "cpu")
    with pytest.raises(KeyboardInterrupt):
        stopped.record(1, "cpu", stop)
    assert list(files(tmp_path / "stopped")) == ["expert-0000.safetensors"]
    record(tmp_path / "stopped", data)
    record(tmp_path / "whole", data)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_a_file_is_written_whole_or_not_at_all(
    make_set: MakeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        record(tmp_path, make_set())
    assert os.listdir(tmp_path) == []


def test_a_training_that_diverges_leaves_no_file(make_set: MakeSet, tmp_path: Path) -> None:
    config = CONFIG.replace(learning_rate=1e30)
    with pytest.raises(TrainingError, match="learning rate"):
        record(tmp_path, make_set(), config=config)
    assert os.listdir(tmp_path) == []


def test_nothing_but_the_epochs_asked_for_is_read(
    make_set: MakeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, opened = record(tmp_path, make_set(), num_epochs=4), list[str]()
    safe_open = safetensors.safe_open

    class Watched:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.file: Any = safe_open(*args, **options)

        def __enter__(self) -> Watched:
            self.file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def keys(self) -> list[str]:
            return list(self.file.keys())

        def metadata(self) -> dict[str, str]:
            found: dict[str, str] = self.file.metadata()
            return found

        def get_tensor(self, name: str) -> Tensor:
            opened.append(name)
            tensor: Tensor = self.file.get_tensor(name)
            return tensor

    monkeypatch.setattr("safetensors.safe_open", Watched)
    start, target = recorded.read(1, 1, 3)
    assert opened == [f"1/{name}" for name in start] + [f"3/{name}" for name in target]


def test_an_altered_value_is_not_used(make_set: MakeSet, tmp_path: Path) -> None:
    recorded = record(tmp_path, make_set())
    path, expected = recorded.path(1), recorded.read(1, 0, 1, 2)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    for _ in range(40):
        changed = bytearray(whole)
        changed[rng.randrange(start, len(whole))] ^= 1 << rng.randrange(8)
        path.unlink()  # it may be mapped
        path.write_bytes(changed)
        with pytest.raises(ExpertError, match=r"epoch \d was altered or damaged"):
            recorded.read(1, 0, 1, 2)
    path.write_bytes(whole)
    assert all(map(same, recorded.read(1, 0, 1, 2), expected))


def crafted(path: Path, rng: random.Random) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and tensors of an expert, something of which is as nobody would write it."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, names = file.metadata(), list(file.keys())
        tensors = {name: file.get_tensor(name).clone() for name in names}
    description: Any = json.loads(metadata["hmn_replay_expert"])
    name = rng.choice(names)
    junk: Any = rng.choice([None, 3, -1, 1e308, "x", [], {}, [[]], {"0": 1}])
    what = rng.randrange(6)
    if what == 0:
        tensors[name] = tensors[name].flatten()[:1]
    elif what == 1:
        tensors[name] = tensors[name].double()
    elif what == 2:
        del tensors[name]
    elif what == 3:
        description[rng.choice(list(description))] = junk
    elif what == 4:
        description["digests"][rng.randrange(3)] = junk
    else:
        description = junk
    if isinstance(description, dict) and what < 3:
        description["digests"] = [
            digest_tensors("", {k[2:]: v for k, v in tensors.items() if k.startswith(f"{epoch}/")})
            for epoch in range(3)
        ]
    return {"hmn_replay_expert": json.dumps(description)}, tensors


def test_a_crafted_expert_is_refused_whatever_it_says(make_set: MakeSet, tmp_path: Path) -> None:
    data, rng = make_set(), random.Random(0)
    path = record(tmp_path, data).path(0)
    whole = path.read_bytes()
    for _ in range(60):
        metadata, tensors = crafted(path, rng)
        path.unlink()
        path.write_bytes(safetensors.torch.save(tensors, metadata))
        with pytest.raises(ExpertError):
            record(tmp_path, data).read(0, 0, 1, 2)
        path.unlink()
        path.write_bytes(whole)


def test_what_is_deleted_is_what_was_written(make_set: MakeSet, tmp_path: Path) -> None:
    folder = tmp_path / "run.checkpoint.experts"
    record(folder, make_set())
    (folder / "notes.txt").write_text("mine")
    (folder / "sub").mkdir()
    (folder / ".expert-0000.safetensors.0123456789abcdef.tmp").touch()
    delete_experts(folder)
    assert sorted(os.listdir(folder)) == ["notes.txt", "sub"]
    (folder / "notes.txt").unlink()
    (folder / "sub").rmdir()
    record(folder, make_set())
    delete_experts(folder)
    assert not folder.exists()
    delete_experts(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "with seed 0, not 1"),
        ({"networks": ("resnet18",)}, "with network 'convnet', not 'resnet18'"),
        ({"config": CONFIG.replace(width=4)}, "with width 3, not 4"),
        ({"config": CONFIG.replace(epoch_images=6)}, "with epoch_images None, not 6"),
        (
            {"config": CONFIG.replace(augmentations=())},
            r"with augmentations \['flip'\], not \[\]",
        ),
        ({"num_epochs": 3}, "has 2 epochs, not 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_experts_of_other_settings_are_refused_and_left(
    make_set: MakeSet, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    record(tmp_path, make_set())
    before = files(tmp_path)
    advice = r"; delete '.*' to record its experts anew, or give another folder$"
    with pytest.raises(ExpertError, match=f"expert-0000.* {message}{advice}") as one:
        record(tmp_path, make_set(), **options)
    assert repr(str(tmp_path)) in str(one.value)
    assert files(tmp_path) == before


def test_experts_of_another_function_of_one_name_are_refused(
    make_set: MakeSet, tmp_path: Path
) -> None:
    def with_activation(activation: type[nn.Module]) -> Any:
        def network(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
            layers = nn.Flatten(), nn.Linear(math.prod(image_shape), 4), activation()
            return nn.Sequential(*layers, nn.Linear(4, num_classes))

        return network

    record(tmp_path, make_set(), networks=(with_activation(nn.ReLU),))
    before = files(tmp_path)
    record(tmp_path, make_set(), networks=(with_activation(nn.ReLU),))
    assert files(tmp_path) == before
    with pytest.raises(ExpertError, match="was recorded with network's code"):
        record(tmp_path, make_set(), networks=(with_activation(nn.Tanh),))


class Second(Team):
    """Process 1 of two, which decides nothing."""

    rank, size = 1, 2

    def agree(self, decide: Callable[[], Any]) -> Any:
        """Return what process 0 says: nothing."""


def test_the_first_process_alone_reads_the_files(make_set: MakeSet, tmp_path: Path) -> None:
    data = make_set()
    record(tmp_path, data)
    wanted = data.images, data.class_indices, data.num_classes
    options: dict[str, Any] = {"num_experts": 2, "num_epochs": 2, "config": CONFIG, "seed": 1}
    with pytest.raises(ExpertError, match="with seed 0, not 1"):
        Experts(tmp_path, *wanted, **options)
    assert Experts(tmp_path, *wanted, **options, team=Second()).num_experts == 2


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_told_before_a_training(make_set: MakeSet) -> None:
    with pytest.raises(OSError, match="/proc"):
        record(Path("/proc"), make_set(), num_epochs=10**9)


def test_experts_of_other_data_are_refused(make_set: MakeSet, tmp_path: Path) -> None:
    data = make_set()
    record(tmp_path, data)
    images = data.images.clone()
    images[-1, -1, -1, -1] ^= 1
    for other in (
        LabelledImages(images, data.labels),
        LabelledImages(data.images, data.labels.flip(0)),
    ):
        with pytest.raises(ExpertError, match="with other images or labels, not these; delete"):
            record(tmp_path, other)
    with pytest.raises(ExpertError, match="with other images or labels"):
        record_experts(
            tmp_path,
            data.images,
            data.class_indices,
            4,
            num_experts=1,
            num_epochs=2,
            config=CONFIG,
        )


def test_an_expert_under_another_name_is_refused(make_set: MakeSet, tmp_path: Path) -> None:
    record(tmp_path, make_set())
    shutil.copy(tmp_path / "expert-0000.safetensors", tmp_path / "expert-0001.safetensors")
    with pytest.raises(ExpertError, match=r"expert-0001.* was recorded with number 0, not 1"):
        record(tmp_path, make_set())


def damaged(whole: bytes) -> list[bytes]:
    tensors = {"0/weight": torch.zeros(3)}
    strange: list[Any] = [
        None,
        {"format": "pt"},
        *({"hmn_replay_expert": text} for text in ("", "{", "3", "{}", '{"settings": 3}')),
    ]
    return [
        b"",
        whole[:50],
        whole[:-1],
        b"\0" * 999,
        *(safetensors.torch.save(tensors, metadata) for metadata in strange),
    ]


def test_a_file_that_is_no_expert_is_refused(make_set: MakeSet, tmp_path: Path) -> None:
    record(tmp_path, make_set())
    path = tmp_path / "expert-0001.safetensors"
    for content in damaged(path.read_bytes()):
        path.unlink()  # it may be mapped
        path.write_bytes(content)
        with pytest.raises(ExpertError, match=r"cannot read the expert '.*' \(.*\); delete that"):
            record(tmp_path, make_set())
        assert path.read_bytes() == content


def test_what_cannot_be_read_later_is_told(make_set: MakeSet, tmp_path: Path) -> None:
    recorded = record(tmp_path, make_set())
    with pytest.raises(ExpertError, match=r"cannot read the expert .*9/"):
        recorded.read(0, 9)
    recorded.path(0).unlink()
    assert recorded.missing() == [0]
    with pytest.raises(ExpertError, match="cannot read the expert"):
        recorded.read(0, 0)


def test_a_folder_that_is_a_file_is_refused(make_set: MakeSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        record(tmp_path / "file", make_set())


def test_experts_lie_beside_a_checkpoint() -> None:
    assert experts_beside("folder/run.checkpoint") == Path("folder/run.checkpoint.experts")


def test_the_defaults_are_those_of_mtt() -> None:
    config = EXPERT_TRAINING
    assert (config.learning_rate, config.schedule, config.batch_size) == (0.01, "constant", 256)
    assert (config.momentum, config.weight_decay, config.cutmix_probability) == (0, 0, 0)
    assert config.epoch_images is None
