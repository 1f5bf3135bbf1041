"""Fine-tuning, which forgets."""

from __future__ import annotations

import torch

from tests.strategies.support import accuracy, build, make_stream


def test_old_classes_are_forgotten() -> None:
    torch.manual_seed(0)
    strategy = build("naive", epochs=2)
    for experience in make_stream():
        strategy.train(experience)
    assert 0.25 < accuracy(strategy) < 0.45
