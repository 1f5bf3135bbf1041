"""Replay of real images, as many of every class, in each way to store them.

Options of all are ``selection``, which images of a class stay longest, by a name in
``hmn_replay.SELECTIONS`` (default: at random), and ``training``, the
:class:`hmn_replay.TrainingConfig` of the network that a selection by name needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from avalanche.training.supervised import Naive

from hmn_replay import JPEGReplay, LosslessReplay, MemoryReplay, RawReplay, SubsampledReplay
from strategies.settings import Settings, Strategy

__all__ = ["build_jpeg", "build_lossless", "build_of", "build_raw", "build_subsampled"]

_SELECTED: dict[str, Any] = {"selection": "random", "training": None}


def build_raw(settings: Settings) -> Strategy:
    """Build raw replay: images as uint8 pixels."""
    return build_of(settings, RawReplay, **_SELECTED)


def build_lossless(settings: Settings) -> Strategy:
    """Build lossless replay: images as lossless WebP, without artefacts."""
    return build_of(settings, LosslessReplay, **_SELECTED)


def build_subsampled(settings: Settings) -> Strategy:
    """Build subsampled replay: images as uint8 pixels of a coarser grid.

    A further option is ``factor``, 2 to 8 pixels for one, along each side (default: 2).

    Raises:
        ConfigError: ``factor`` is outside its range, or the option is unknown.
    """
    return build_of(settings, SubsampledReplay, factor=2, **_SELECTED)


def build_jpeg(settings: Settings) -> Strategy:
    """Build JPEG replay: images as JPEG under one shared header, the rival that papers leave out.

    A further option is ``quality``, 1 to 100, or None to choose it on the first experience (the
    default) by a network of ``training``, too.

    Raises:
        ConfigError: ``quality`` is outside its range, or the option is unknown.
    """
    return build_of(settings, JPEGReplay, quality=None, **_SELECTED)


def build_of(
    settings: Settings, make_replay: Callable[..., MemoryReplay], **defaults: Any
) -> Strategy:
    """Build a strategy of a replay plugin, whose own options have these defaults."""
    own = settings.choose(**defaults)
    replay = make_replay(
        settings.budget_bytes,
        expected_classes=settings.expected_classes,
        **settings.replay_options(),
        **own,
    )
    return Naive(**settings.common(replay))
