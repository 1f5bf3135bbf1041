"""The containers by name, and what condensation makes of each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hmn_replay.condensation import loop, steps
from hmn_replay.condensation.condense import condense
from hmn_replay.condensation.loop import Condensation
from hmn_replay.condensation.pruning import double_ended_prune
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.memory.base import Container
from hmn_replay.memory.file import load, serialise
from hmn_replay.memory.haba import HaBa
from hmn_replay.memory.hierarchical import HierarchicalMemory
from hmn_replay.memory.linba import LinBa
from hmn_replay.memory.pixels import IDCLayout, PixelContainer, RawLayout
from hmn_replay.memory.registry import CONTAINERS, get_layout_type, make_container, read_layout
from tests.support import LAYOUTS, TINY, made, tiny

MakeSet = Callable[..., LabelledImages]

pytestmark = pytest.mark.usefixtures("untouched_random_state")
RIVALS = ("raw", "idc", "haba", "linba")
every_rival = pytest.mark.parametrize("container", RIVALS)


def condensed(data: LabelledImages, container: str, **options: Any) -> Container:
    """Condense to three groups a class, and one over."""
    layout = LAYOUTS[container](data.image_shape, "int8")
    num_images = layout.group_size * (3 * data.num_classes + 1)
    budget = layout.file_bytes(data.num_classes, num_images, 10**4)
    return tiny(data, layout, **{"budget": budget, **options})


def check(memory: Container, data: LabelledImages) -> None:
    """Check what holds for every container that was condensed."""
    size = memory.layout.group_size
    assert memory.budget_bytes is not None
    assert len(serialise(memory)) == memory.file_bytes <= memory.budget_bytes
    assert memory.num_images == memory.layout.max_images(memory.budget_bytes, data.num_classes)
    assert memory.classes.equal(data.classes)
    counts = memory.images_per_class
    assert all(count % size == 0 for count in counts)
    assert max(counts) - min(counts) <= size
    images, labels = memory.decode()
    assert bool(images.isfinite().all())
    assert labels.tolist() == memory.labels.tolist()
    assert all(parameter.requires_grad for parameter in memory.parameters())


# By name.


def test_every_container_has_a_name_and_a_type() -> None:
    assert tuple(CONTAINERS) == ("hmn", *RIVALS)
    types = {"raw": PixelContainer, "idc": PixelContainer, "haba": HaBa, "linba": LinBa}
    for name in CONTAINERS:
        layout = get_layout_type(name).choose("1 MiB", (3, 8, 8), 2)
        assert layout.container == name
        memory = make_container(layout, [5, 3], layout.group_size, seed=2)
        assert type(memory) is types.get(name, HierarchicalMemory)
        assert memory.layout is layout
        text = layout.metadata(10, "0123456789abcdef")
        assert read_layout(text) == (layout, 10, "0123456789abcdef")


@pytest.mark.parametrize("name", ["HMN", "", "dsa", None])
def test_another_name_is_refused_with_those_there_are(make_set: MakeSet, name: Any) -> None:
    with pytest.raises(ConfigError, match="container is one of hmn, raw, idc, haba, linba; got"):
        get_layout_type(name)
    with pytest.raises(ConfigError, match="container is one of hmn, raw, idc, haba, linba; got"):
        condense(make_set(), "1 MiB", container=name, **TINY)


def test_a_layout_of_another_container_is_refused(make_set: MakeSet) -> None:
    data, layout = make_set(), RawLayout((3, 8, 8), "int8")
    with pytest.raises(ConfigError, match="is one for 'raw', not for 'idc'; leave container= out"):
        condense(data, "1 MiB", layout=layout, container="idc", **TINY)
    memory = condensed(data, "raw")
    with pytest.raises(ConfigError, match="is one for 'raw', not for 'haba'; leave container="):
        condense(make_set(labels=(8, 9)), "1 MiB", memory=memory, container="haba", **TINY)
    budget = layout.file_bytes(3, 9, 10**4)
    assert condense(data, budget, layout=layout, container="raw", **TINY).layout == layout


# From end to end.


@every_rival
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "distribution", "precision": "bfloat16"},
        {"warm_start_steps": 0},
        {"over_budget": 0},
        {"warm_start_batch": 1000, "real_batch": 1000, "decoded_batch": 1000},
    ],
    ids=str,
)
def test_a_set_becomes_a_container_within_its_budget(
    make_set: MakeSet, container: str, options: dict[str, Any]
) -> None:
    data = make_set()
    memory = condensed(data, container, **options)
    check(memory, data)
    assert memory.report["container"] == container


@every_rival
def test_the_layout_is_chosen_for_the_container(
    make_set: MakeSet, container: str, tmp_path: Path
) -> None:
    data = make_set(image_shape=(3, 32, 32), num_images=60)
    options = {**TINY, "outer_steps": 0, "over_budget": 0, "warm_start_steps": 1}
    memory = condense(data, "90 KiB", container=container, number_format="float16", **options)
    check(memory, data)
    assert memory.layout == CONTAINERS[container].choose("90 KiB", (3, 32, 32), 3, "float16")
    memory.save(tmp_path / "memory.hmn")
    loaded = load(tmp_path / "memory.hmn")
    assert type(loaded) is type(memory)
    assert loaded.decode()[0].numpy().tobytes() == memory.decode()[0].numpy().tobytes()


@every_rival
def test_a_budget_too_small_is_refused_with_one_that_does(
    make_set: MakeSet, container: str
) -> None:
    with pytest.raises(BudgetError, match=r"of each of 3 classes; .* the smallest that does is"):
        condense(make_set(), 400, container=container, **TINY)


@every_rival
def test_matching_moves_the_images(make_set: MakeSet, container: str) -> None:
    data = make_set()
    still = condensed(data, container, outer_steps=0, over_budget=0)
    moved = condensed(data, container, over_budget=0)
    changed = (still.decode()[0] != moved.decode()[0]).flatten(1).any(dim=1)
    assert bool(changed.any())


def test_raw_images_begin_as_real_ones_or_as_noise(make_set: MakeSet) -> None:
    data = make_set(num_images=90)
    options: dict[str, Any] = {"outer_steps": 0, "over_budget": 0}
    memory = condensed(data, "raw", warm_start_steps=1, **options)
    assert float(str(memory.report["warm_start_psnr"])) > 50
    pixels, labels = memory.decode()
    for label in data.classes.tolist():
        real = data.floats(data.of_class(label))
        distances = (pixels[labels == label, None] - real[None]).abs().amax(dim=(2, 3, 4))
        nearest = distances.min(dim=1)
        assert float(nearest.values.max()) < 0.003  # half a step of int8
        assert len(nearest.indices.unique()) == len(nearest.indices)
    noise = condensed(data, "raw", warm_start_steps=0, **options)
    assert noise.report["warm_start_psnr"] is None
    assert noise.decode()[0].std() > 0.15
    assert not noise.decode()[0].equal(
        condensed(data, "raw", warm_start_steps=0, seed=1, **options).decode()[0]
    )


def test_the_warm_start_teaches_hallucinators_to_tell_images_apart(make_set: MakeSet) -> None:
    data = make_set(num_images=90)
    few, many = (
        condensed(data, "haba", warm_start_steps=number, outer_steps=0).report["warm_start_psnr"]
        for number in (1, 100)
    )
    assert isinstance(few, float)
    assert isinstance(many, float)
    assert many > few + 3


@pytest.mark.parametrize(
    ("container", "module", "name"),
    [
        ("haba", steps, "warm_start_step"),
        *((container, steps, "match_step") for container in RIVALS),
        ("idc", loop, "score"),
        ("haba", loop, "score"),
    ],
)
def test_a_run_goes_on_from_its_checkpoint_to_the_same_bytes(
    make_set: MakeSet,
    container: str,
    module: ModuleType,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, path = make_set(), tmp_path / "run.checkpoint"
    expected = serialise(condensed(data, container))
    monkeypatch.setattr("hmn_replay.condensation.run._CHECKPOINT_SECONDS", 0.0)
    function, calls = getattr(module, name), list[int]()

    def stop_at_the_second_call(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return function(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop_at_the_second_call)
        with pytest.raises(KeyboardInterrupt):
            condensed(data, container, checkpoint=path)
    assert serialise(condensed(data, container, checkpoint=path)) == expected


@every_rival
def test_new_classes_look_like_their_real_images(make_set: MakeSet, container: str) -> None:
    layout = LAYOUTS[container]((3, 8, 8), "int8")
    options: dict[str, Any] = {"outer_steps": 0, "warm_start_steps": 60}
    options["budget"] = layout.file_bytes(5, 20 * layout.group_size, 10**4)
    memory = tiny(make_set(labels=(0, 1, 2)), layout, **options)
    second = make_set(labels=(5, 6), seed=1)
    images, labels = tiny(second, layout, memory=memory, **options).decode()
    for label in (5, 6):
        own = second.floats(second.of_class(label)).mean()
        assert float(images[labels == label].mean()) == pytest.approx(float(own), abs=0.1)


@every_rival
def test_classes_may_come_after_all_old_images_went(make_set: MakeSet, container: str) -> None:
    """The basis is then another one, and its int8 scales must be too."""
    old = made(container)
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.mul_(0.01)
    old.update_scales()
    old.keep([])
    data = make_set(labels=(5, 6))
    budget = old.layout.file_bytes(4, 20 * old.layout.group_size, 10**4)
    grown = tiny(data, old.layout, budget=budget, memory=old, outer_steps=0, warm_start_steps=60)
    images, labels = grown.decode()
    for label in (5, 6):
        own = data.floats(data.of_class(label)).mean()
        if container != "haba":  # whose hallucinators stay as they are
            assert float(images[labels == label].mean()) == pytest.approx(float(own), abs=0.1)


@pytest.mark.parametrize("container", ["idc", "haba"])
def test_images_that_share_values_are_pruned_together_by_their_mean(
    make_set: MakeSet, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_set()
    seen: dict[str, torch.Tensor] = {}

    def scored(self: Condensation, images: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(4)
        seen["images"], seen["classes"] = images, self.memory.class_index
        seen["scores"] = torch.randn(len(images), generator=generator)
        return seen["scores"]

    monkeypatch.setattr(Condensation, "_score_images", scored)
    memory = condensed(data, container, beta_grid=(0.5,), over_budget=1.0)
    size = memory.layout.group_size
    means = torch.stack([scores.mean() for scores in seen["scores"].split(size)])
    held = seen["classes"].bincount() // size
    drops = (held - torch.tensor(memory.images_per_class) // size).tolist()
    assert sum(drops) > 4
    groups = double_ended_prune(means, seen["classes"][::size], drops, 0.5)
    stays = [size * group + j for group in groups.tolist() for j in range(size)]
    assert memory.decode()[0].equal(seen["images"][stays])


def test_idc_decodes_four_images_a_stored_one_at_the_bytes_of_raw_ones(make_set: MakeSet) -> None:
    raw, idc = RawLayout((3, 32, 32), "int8"), IDCLayout((3, 32, 32), "int8")
    assert idc.max_images("120 KiB", 10) == 4 * raw.max_images("120 KiB", 10)
