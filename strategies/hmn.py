"""HMN replay: condensed images, from a hierarchical memory that grows under a fixed budget."""

from __future__ import annotations

from typing import Any

from avalanche.training.supervised import Naive

from hmn_replay import HMNReplay
from strategies.settings import Settings, Strategy

__all__ = ["build"]


def build(settings: Settings, **more: Any) -> Strategy:
    """Build it.

    Options are those of :class:`hmn_replay.HMNReplay`: ``kind``, ``matching_networks``, and the
    fields of :class:`hmn_replay.CondenseConfig`; ``more`` stand beside those of the settings.

    Raises:
        ConfigError: An unknown option, or a value outside its range.
    """
    replay = HMNReplay(
        settings.budget_bytes,
        expected_classes=settings.expected_classes,
        effort=settings.effort,
        **settings.replay_options(),
        **settings.options,
        **more,
    )
    return Naive(**settings.common(replay))
