"""What the loop does between its steps: which images it scores, and which it keeps."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hmn_replay.data.images import LabelledImages
from hmn_replay.memory.file import serialise
from hmn_replay.memory.layout import Layout
from hmn_replay.training.train import TrainingConfig
from tests.support import LAYOUTS, tiny

MakeLayout = Callable[..., Layout]
MakeSet = Callable[..., LabelledImages]

# Any: what this module imports is replaced in tests.
loop: Any = importlib.import_module("hmn_replay.condensation.loop")

pytestmark = pytest.mark.usefixtures("untouched_random_state")


def test_old_and_new_images_are_scored_by_one_network(
    make_set: MakeSet, make_layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = make_layout()
    budget = layout.file_bytes(4, 16, 9999)
    memory = tiny(make_set(labels=(0, 1)), layout, budget=budget)
    trained_on: list[Any] = []
    train = loop.train_network

    def watched(images: Any, labels: Any, num_classes: int, **options: Any) -> Any:
        trained_on.append((len(images), labels.unique().tolist(), num_classes))
        return train(images, labels, num_classes, **options)

    monkeypatch.setattr(loop, "train_network", watched)
    tiny(make_set(labels=(2, 3)), layout, budget=budget, memory=memory, beta_grid=(0.5,))
    # All the old images, and the new ones with two a class that are over the budget.
    assert trained_on == [(memory.num_images + 2 * (4 + 2), [0, 1, 2, 3], 4)]


def test_a_few_new_images_are_warmed_up_as_often_as_many(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    layout = make_layout()
    budget = layout.file_bytes(6, 60, 9999)
    options: dict[str, Any] = {"warm_start_steps": 60, "outer_steps": 0, "over_budget": 0}
    memory = tiny(make_set(labels=(0, 1, 2, 3, 4)), layout, budget=budget, **options)
    grown = tiny(make_set(labels=(5,)), layout, budget=budget, memory=memory, **options)
    shown = [
        mem.report["phases"]["warm_start"]["images"] / num_new  # type: ignore[index]
        for mem, num_new in ((memory, memory.num_images), (grown, grown.images_per_class[-1]))
    ]
    assert shown[1] == pytest.approx(shown[0], rel=0.15)


@pytest.mark.parametrize(("container", "times"), [("hmn", 3.0), ("haba", 1.0)])
def test_added_classes_are_warmed_up_at_a_rate_of_their_own(
    container: str, times: float, make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(loop.steps, "set_rate", lambda _, rate: rates.append(rate))
    layout = LAYOUTS[container]((3, 8, 8), "int8")
    budget = layout.file_bytes(4, 4 * 3 * layout.group_size, 10**5)
    options: dict[str, Any] = {"budget": budget, "warm_start_steps": 4, "outer_steps": 0}
    memory = tiny(make_set(labels=(0, 1)), layout, **options)
    first = rates[0]
    rates.clear()
    tiny(make_set(labels=(2, 3)), layout, memory=memory, **options)
    assert rates[0] == pytest.approx(times * first)


def test_seconds_end_a_phase_and_bring_its_rate_down(
    make_set: MakeSet, make_layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    set_rate = loop.steps.set_rate

    def watched(optimizer: Any, rate: float) -> None:
        rates.append(rate)
        set_rate(optimizer, rate)

    clock = itertools.count()
    fake = SimpleNamespace(monotonic=lambda: float(next(clock)))  # a second passes at every look
    monkeypatch.setattr(loop.steps, "set_rate", watched)
    monkeypatch.setattr(importlib.import_module("hmn_replay.condensation.run"), "time", fake)
    bounds = {"warm_start_seconds": 20.0, "max_seconds": 50.0}
    many: dict[str, Any] = {"warm_start_steps": 10**6, "outer_steps": 10**6, "over_budget": 0}
    report: dict[str, Any] = tiny(make_set(), make_layout(), **bounds, **many).report
    warm_start, matching = (
        report["phases"][name]["seconds"] for name in ("warm_start", "matching")
    )
    assert 20 <= warm_start <= 23 and 50 <= warm_start + matching <= 53
    # Along a cosine each: all of the warm start's, and of matching's what follows 20 of 50 seconds.
    begin = next(i for i in range(1, len(rates)) if rates[i] > rates[i - 1])
    assert rates[0] == 0.01 and rates[begin - 1] < 0.001
    assert 0.0005 < rates[begin] < 0.0007 and rates[-1] < 0.00002


def test_beta_is_the_one_whose_images_teach_most_about_held_out_ones(
    make_set: MakeSet, make_layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = (0.0, 0.5, 1.0)
    trained_on: list[Any] = []
    train = loop.train_network

    def watched(images: Any, labels: Any, *args: Any, **options: Any) -> Any:
        trained_on.append((images, labels))
        return train(images, labels, *args, **options)

    pruned: dict[float, Any] = {}
    prune = loop.double_ended_prune

    def watched_prune(scores: Any, labels: Any, drops: Any, beta: float) -> Any:
        pruned[beta] = prune(scores, labels, drops, beta)
        return pruned[beta]

    accuracies = iter([0.2, 0.9, 0.4])
    monkeypatch.setattr(loop, "train_network", watched)
    monkeypatch.setattr(loop, "double_ended_prune", watched_prune)
    monkeypatch.setattr(loop, "score", lambda *_: next(accuracies))
    memory = tiny(make_set(num_images=60), make_layout(), beta_grid=grid, over_budget=1.0)
    everything, owners = trained_on[0]
    for (images, labels), beta in zip(trained_on[1:], grid, strict=True):
        assert images.equal(everything[pruned[beta]])
        assert labels.equal(owners[pruned[beta]])
    assert len({tuple(stays.tolist()) for stays in pruned.values()}) == 3
    assert memory.report["beta"] == 0.5
    assert memory.report["beta_accuracies"] == {"0.0": 0.2, "0.5": 0.9, "1.0": 0.4}
    assert memory.decode()[0].equal(everything[pruned[0.5]])


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made, views left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                self.num_bytes = max(self.num_bytes, storage.nbytes())
        return made


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def test_what_is_held_at_once_does_not_grow_with_images_and_classes(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, at_once = (3, 32, 32), 4
    layout = make_layout(
        image_shape=shape, stride=8, instance_channels=1, decoder_channels=(5, 4, 4)
    )
    for name, value in {
        "config.TrainingConfig": partial(TrainingConfig, batch_size=2 * at_once),
        "container._KEPT_BYTES": 0,
        "container._PIXELS_PER_CHUNK": at_once * 32 * 32,
        "convnet_derivatives._BYTES_PER_CHUNK": 1,
        "data.CHUNK": at_once,
        "lookup._IMAGES_AT_ONCE": at_once,
        "memory._FITTED_FROM": at_once * 4 * 4,
        "steps._PIXELS_PER_GROUP": at_once * 32 * 32,
    }.items():
        monkeypatch.setattr(f"hmn_replay.{name}", value)
    largest = []
    for num_classes, num_images in ((2, 12), (6, 60)):
        first = make_set(num_images, shape, tuple(range(num_classes)))
        # One class comes again.
        second = make_set(num_images, shape, tuple(range(num_classes - 1, 2 * num_classes - 1)))
        options: dict[str, Any] = {
            "budget": layout.file_bytes(2 * num_classes - 1, num_images, 10**6),
            "outer_steps": 1,
        }
        with Largest() as held:
            path = tmp_path / f"{num_classes}.checkpoint"
            memory = tiny(first, layout, checkpoint=path, **options)
            tiny(second, layout, memory=memory, **options)
        largest.append(held.num_bytes)
    image_bytes = 4 * 3 * 32 * 32
    assert at_once * image_bytes < largest[0] < 60 * image_bytes / 4
    assert largest[1] == largest[0]


def test_images_decoded_when_asked_for_are_pruned_alike(
    make_set: MakeSet, make_layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, made = make_layout(), []
    budget = layout.file_bytes(5, 20, 9999)
    for kept_bytes in (2**30, 0):
        monkeypatch.setattr("hmn_replay.memory.base._KEPT_BYTES", kept_bytes)
        memory = tiny(make_set(), layout, budget=budget)
        grown = tiny(make_set(labels=(2, 3, 4)), layout, budget=budget, memory=memory)
        made.append((serialise(memory), serialise(grown), grown.report["beta_accuracies"]))
    assert made[0] == made[1]
