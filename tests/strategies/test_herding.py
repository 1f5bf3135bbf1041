"""Herding: the features, and the buffer that keeps the order of the choice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import strategies
from hmn_replay.errors import ConfigError
from tests.strategies.support import BUDGET, build, make_model, make_stream


def test_old_classes_keep_the_images_that_were_chosen_first() -> None:
    torch.manual_seed(0)
    strategy = build("herding")
    kept: dict[int, list[bytes]] = {}
    for number, experience in enumerate(make_stream(), 1):
        strategy.train(experience)
        assert all(module.training for module in strategy.model.modules())
        images, labels = strategies.memory_images(strategy)
        counts = labels.bincount().tolist()
        assert len(counts) == 2 * number and max(counts) - min(counts) <= 1
        now = {
            label: [image.numpy().tobytes() for image in images[labels == label]]
            for label in labels.unique().tolist()
        }
        for label, before in kept.items():
            assert now[label] == before[: len(now[label])]
        kept = now


def test_a_class_may_come_again_within_the_budget() -> None:
    strategy = build("herding")
    first, second = make_stream(num_per_class=8, num_experiences=2)
    for experience in (first, second, first):
        strategy.train(experience)
        assert strategies.memory_use(strategy).num_bytes <= BUDGET
    counts = strategies.memory_images(strategy)[1].bincount().tolist()
    assert len(counts) == 4 and max(counts) - min(counts) <= 1


def test_a_model_without_a_linear_layer_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 8), nn.Flatten())
    with pytest.raises(ConfigError, match=r"Sequential has no nn.Linear, which would be its head"):
        strategies.build("herding", model, 10**4, num_classes=6)
    assert strategies.build("herding", make_model(), 10**4, num_classes=6, device="cpu")
