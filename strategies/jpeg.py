"""JPEG replay: real images as JPEG under one shared header, the rival that papers leave out."""

from __future__ import annotations

from avalanche.training.supervised import Naive

from hmn_replay import JPEGReplay
from strategies.settings import Settings, Strategy

__all__ = ["build"]


def build(settings: Settings) -> Strategy:
    """Build it.

    Options are ``quality``, 1 to 100, or None to choose it on the first experience (the default);
    and ``training``, the :class:`hmn_replay.TrainingConfig` of that choice.

    Raises:
        ConfigError: ``quality`` is outside its range, or the option is unknown.
    """
    replay = JPEGReplay(
        settings.budget_bytes,
        expected_classes=settings.expected_classes,
        **settings.replay_options(),
        **settings.choose(quality=None, training=None),
    )
    return Naive(**settings.common(replay))
