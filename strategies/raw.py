"""Raw replay: real images drawn at random, as many of every class, as uint8 pixels."""

from __future__ import annotations

from avalanche.training.supervised import Naive

from hmn_replay import RawReplay
from strategies.settings import Settings, Strategy

__all__ = ["build"]


def build(settings: Settings) -> Strategy:
    """Build it."""
    settings.choose()
    replay = RawReplay(
        settings.budget_bytes,
        expected_classes=settings.expected_classes,
        **settings.replay_options(),
    )
    return Naive(**settings.common(replay))
