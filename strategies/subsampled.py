"""Subsampled replay: real images drawn at random, as uint8 pixels of a coarser grid."""

from __future__ import annotations

from avalanche.training.supervised import Naive

from hmn_replay import SubsampledReplay
from strategies.settings import Settings, Strategy

__all__ = ["build"]


def build(settings: Settings) -> Strategy:
    """Build it.

    Options are ``factor``, 2 to 8 pixels for one, along each side (default: 2); and
    ``recode_share``, as :class:`hmn_replay.MemoryReplay` takes it.

    Raises:
        ConfigError: ``factor`` is outside its range, or the option is unknown.
    """
    options = settings.choose(factor=2, recode_share=0.0)
    replay = SubsampledReplay(settings.budget_bytes, **settings.replay_options(), **options)
    return Naive(**settings.common(replay))
