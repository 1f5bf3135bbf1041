"""The choice of a JPEG quality, by trainings on what fits the share of these classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hmn_replay.baselines.fill import QUALITIES, choose_quality, jpeg_images
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
    assert list(accuracies) == [str(each) for each in QUALITIES]
    assert all(0 <= accuracy <= 1 for accuracy in accuracies.values())
    best = max(accuracies.values())
    assert quality == min(int(each) for each, found in accuracies.items() if found == best)
    assert choose_quality(classes_of(0, 1, 2), 40_000, **TRAINING) == (quality, accuracies)


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
