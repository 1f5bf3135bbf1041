"""Budgets, and how a network is trained, for any data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.tables.settings import SCALES
from experiments.tables.store import Store
from experiments.tables.study import KINDS, Study, file_budget, fit, training
from hmn_replay.budget import Budget
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import BudgetError

CIFAR = ((3, 32, 32), 10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ipc", [1, 10, 50])
def test_in_float32_as_many_values_as_the_budget_has(kind: str, ipc: int) -> None:
    if (kind, ipc) == ("haba", 1):
        # A hallucinator beside ten bases is more than ten images.
        with pytest.raises(BudgetError, match="does not hold one image"):
            fit(kind, ipc, *CIFAR, "float32", 5000)
        return
    layout, budget = fit(kind, ipc, *CIFAR, "float32", 5000)
    num_images = KINDS[kind].max_images(layout, budget, 10)
    values, limit = KINDS[kind].num_floats_of(layout, 10, num_images), ipc * 10 * 3072
    assert values <= limit < KINDS[kind].num_floats_of(layout, 10, num_images + layout.group_size)
    assert KINDS[kind].file_bytes_of(layout, 10, num_images, budget.num_bytes) == budget.num_bytes


@pytest.mark.parametrize(("kind", "images"), [("pixels", 1), ("idc", 4), ("linba", 115)])
def test_the_papers_kinds_hold_as_many_images_as_in_their_papers(kind: str, images: int) -> None:
    layout, budget = fit(kind, 1, *CIFAR, "float32", 5000)
    assert KINDS[kind].max_images(layout, budget, 10) // 10 == images


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number_format", ["float16", "int8"])
def test_in_other_formats_the_file_is_within_the_budget(kind: str, number_format: str) -> None:
    layout, budget = fit(kind, 1, *CIFAR, number_format, 5000)
    assert budget == Budget.ipc(1, *CIFAR) and layout.number_format == number_format
    assert (
        KINDS[kind].file_bytes_of(
            layout, 10, KINDS[kind].max_images(layout, budget, 10), budget.num_bytes
        )
        <= 122_880
    )


@pytest.mark.parametrize("num_images", [10, 77, 96, 97, 98, 99, 1000])
def test_a_files_budget_holds_just_as_many_images(num_images: int) -> None:
    kind = "hmn"
    layout = KINDS[kind].choose_layout("100 KiB", *CIFAR)
    budget = file_budget(kind, layout, 10, num_images)
    assert KINDS[kind].max_images(layout, budget, 10) == num_images


@pytest.fixture
def make_study(
    make_set: Callable[..., LabelledImages], tmp_path: Path
) -> Callable[[str, str], Study]:
    """Return a function that makes a study of three classes, of a name and a scale."""

    def make(name: str, scale: str) -> Study:
        images = make_set(image_shape=(3, 32, 32))
        return Study(name, images, images, SCALES[scale], Store(tmp_path, {}))

    return make


def test_networks_are_shown_as_many_images_as_by_idc(
    make_study: Callable[[str, str], Study],
) -> None:
    study = make_study("cifar10", "paper")
    # 1000 epochs of IDC's 4 k images of each of 3 classes.
    assert training(study, 1).num_passes == 12_000
    assert training(study, 10, "vgg16").num_passes == 120_000
    assert training(study, 1, "vgg16").network == "vgg16"
    settings = dataclasses.replace(study.settings, passes=77)
    assert training(dataclasses.replace(study, settings=settings), 10).num_passes == 77
    settings = dataclasses.replace(study.settings, most_passes=50_000)
    bounded = dataclasses.replace(study, settings=settings)
    assert [training(bounded, ipc).num_passes for ipc in (1, 10)] == [12_000, 50_000]


@pytest.mark.parametrize("name", ["cifar10", "fashionmnist", "svhn", "mnist", "digits"])
def test_no_digit_is_mirrored(make_study: Callable[[str, str], Study], name: str) -> None:
    names = training(make_study(name, "quick"), 1).augmentations
    assert ("flip" in names) == (name in ("cifar10", "fashionmnist"))
    assert {"color", "crop", "scale", "rotate"} <= set(names)
