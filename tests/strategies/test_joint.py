"""Training on all experiences at once."""

from __future__ import annotations

import torch

from tests.strategies.support import accuracy, build, make_stream


def test_all_classes_are_learnt_together() -> None:
    torch.manual_seed(0)
    strategy = build("joint", epochs=2)
    strategy.train(make_stream())
    assert accuracy(strategy) > 0.9
