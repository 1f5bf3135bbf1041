"""Subsampled replay: real images drawn at random, as uint8 pixels of a coarser grid."""

from __future__ import annotations

from avalanche.training.supervised import Naive

from hmn_replay import SubsampledReplay
from strategies.settings import Settings, Strategy

__all__ = ["build"]


def build(settings: Settings) -> Strategy:
    """Build it.

    An option is ``factor``, 2 to 8 pixels for one, along each side (default: 2).

    Raises:
        ConfigError: ``factor`` is outside its range, or the option is unknown.
    """
    replay = SubsampledReplay(
        settings.budget_bytes,
        expected_classes=settings.expected_classes,
        **settings.replay_options(),
        **settings.choose(factor=2),
    )
    return Naive(**settings.common(replay))
