"""Raw replay: Avalanche's ``ReplayPlugin`` over a reservoir of real images, as uint8 pixels.

Labels are not counted, nor is any file around the pixels: in its favour.
"""

from __future__ import annotations

from avalanche.training.supervised import Naive

from strategies.buffers import ReservoirBuffer, replay_plugin
from strategies.settings import Settings, Strategy

__all__ = ["build"]


def build(settings: Settings) -> Strategy:
    """Build it.

    Raises:
        BudgetError: The budget does not hold one image.
    """
    settings.choose()
    buffer = ReservoirBuffer(settings.num_images())
    return Naive(**settings.common(replay_plugin(settings, buffer)))
