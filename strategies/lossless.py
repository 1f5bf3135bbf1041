"""Lossless replay: real images drawn at random, as lossless WebP, without artefacts."""

from __future__ import annotations

from avalanche.training.supervised import Naive

from hmn_replay import LosslessReplay
from strategies.settings import Settings, Strategy

__all__ = ["build"]


def build(settings: Settings) -> Strategy:
    """Build it."""
    settings.choose()
    replay = LosslessReplay(
        settings.budget_bytes,
        expected_classes=settings.expected_classes,
        **settings.replay_options(),
    )
    return Naive(**settings.common(replay))
