"""The choice of a JPEG quality, by trainings on what fits the share of these classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hmn_replay.baselines.fill import QUALITIES, choose_quality, jpeg_images, next_quality
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import BudgetError
from hmn_replay.training.train import TrainingConfig
from tests.strategies.support import easy_set

TRAINING: dict[str, Any] = {"training": TrainingConfig(width=4, num_passes=40), "device": "cpu"}


def classes_of(*labels: int) -> LabelledImages:
    data = easy_set(60)
    return data.take(torch.isin(data.labels, torch.tensor(labels)))


def fits(data: LabelledImages, share: int, quality: int) -> bool:
    try:
        jpeg_images(data, share, quality=quality)
    except BudgetError:
        return False
    return True


def test_the_quality_is_chosen_by_real_trainings() -> None:
    quality, accuracies = choose_quality(classes_of(0, 1, 2), 40_000, **TRAINING)
    found = {int(each): accuracy for each, accuracy in accuracies.items()}
    # Of those at which all images fit only the highest is tried.
    train, _ = classes_of(0, 1, 2).split(0.2, 0)
    whole = [q for q in QUALITIES if len(jpeg_images(train, 4000, quality=q)) == 144]
    assert len(train) == 144 and len(whole) > 1
    assert list(found) == sorted(found) and min(found) == max(whole)
    tried = {q: found[q] for q in QUALITIES if q >= max(whole)}
    while (further := next_quality(tried)) in found:
        tried[further] = found[further]
    assert tried == found and (further is None or further < max(whole))
    assert all(0 <= accuracy <= 1 for accuracy in accuracies.values())
    assert quality == min(q for q in found if found[q] == max(found.values()))
    assert choose_quality(classes_of(0, 1, 2), 40_000, **TRAINING) == (quality, accuracies)


def test_where_all_images_fit_at_any_quality_no_lower_one_is_tried() -> None:
    quality, accuracies = choose_quality(classes_of(0, 1), "10 MB", **TRAINING)
    assert [*accuracies] == [str(quality)] == [str(max(QUALITIES))]


def test_any_images_are_taken() -> None:
    data, options = classes_of(0, 1), {**TRAINING, "qualities": (20, 50)}
    pair = data.images.numpy(), data.labels.numpy()
    assert choose_quality(pair, 40_000, **options) == choose_quality(data, 40_000, **options)


@pytest.mark.parametrize("expected_classes", [None, 4, 1])
def test_each_quality_is_given_the_bytes_that_the_classes_will_have(
    expected_classes: int | None,
) -> None:
    # A header and one image take more bytes the better the quality: what was tried shows the share.
    data = classes_of(0, 1)
    smallest, largest = (
        next(share for share in range(200, 2000, 10) if fits(data, share, quality))
        for quality in (QUALITIES[0], 100)
    )
    share = (smallest + largest) // 2
    budget = share * {None: 10, 4: 2, 1: 1}[expected_classes]
    qualities = (QUALITIES[0], 100)
    _, accuracies = choose_quality(
        data, budget, expected_classes=expected_classes, qualities=qualities, **TRAINING
    )
    assert list(accuracies) == [str(QUALITIES[0])]
    _, accuracies = choose_quality(
        data, 3 * budget, expected_classes=expected_classes, qualities=qualities, **TRAINING
    )
    assert list(accuracies) == [str(quality) for quality in qualities]


def test_where_there_is_nothing_to_choose_by_the_quality_is_20() -> None:
    assert choose_quality(classes_of(0), 4000) == (20, {})
    assert choose_quality(easy_set(1), 4000) == (20, {})
    assert choose_quality(classes_of(0, 1), 100) == (20, {})


@pytest.mark.parametrize(
    ("accuracies", "further"),
    [
        ({5: 0.5, 10: 0.4, 95: 0.3}, 2),
        ({2: 0.5, 5: 0.5}, 1),
        ({1: 0.5, 5: 0.4}, None),
        ({5: 0.4, 10: 0.5, 95: 0.3}, None),
        ({5: 0.4, 95: 0.5}, 98),
        ({5: 0.4, 99: 0.5}, 100),
        ({5: 0.4, 100: 0.5}, None),
        ({}, None),
    ],
)
def test_past_the_edge_where_the_best_is_a_quality_is_tried(
    accuracies: dict[int, float], further: int | None
) -> None:
    assert next_quality(accuracies) == further


def test_qualities_that_are_given_are_all_that_are_tried() -> None:
    _, accuracies = choose_quality(classes_of(0, 1, 2), 40_000, qualities=(20, 50), **TRAINING)
    assert list(accuracies) == ["20", "50"]
