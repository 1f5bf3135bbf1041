"""HMN replay: condensed images, from a hierarchical memory that grows under a fixed budget."""

from __future__ import annotations

from avalanche.training.supervised import Naive

from hmn_replay.avalanche.plugin import HMNReplay
from strategies.settings import Settings, Strategy

__all__ = ["build"]


def build(settings: Settings) -> Strategy:
    """Build it; its whole file counts, header and decoder among it.

    Options are those of :class:`hmn_replay.HMNReplay`: the fields of
    :class:`hmn_replay.CondenseConfig` among them.

    Raises:
        ConfigError: An unknown option, or a value outside its range.
    """
    replay = HMNReplay(
        settings.budget_bytes,
        batch_size_mem=settings.batch_size_mem,
        mode=settings.mode,
        expected_classes=settings.expected_classes,
        effort=settings.effort,
        seed=settings.seed,
        device=settings.device,
        progress=settings.progress,
        **settings.options,
    )
    return Naive(**settings.common(replay))
