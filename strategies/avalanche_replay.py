"""Avalanche's own replay: its ``ReplayPlugin`` over a reservoir of real images, and plain loss.

A buffer of uint8 pixels; labels are not counted, nor is any file around the pixels: in its favour.
"""

from __future__ import annotations

from avalanche.training.plugins.replay import ReplayPlugin
from avalanche.training.supervised import Naive

from strategies.buffers import ReservoirBuffer
from strategies.settings import Settings, Strategy

__all__ = ["build"]


def build(settings: Settings) -> Strategy:
    """Build it.

    Raises:
        BudgetError: The budget does not hold one image.
        ConfigError: ``mode`` is ``"memory_only"``, which it does not have.
    """
    settings.choose()
    settings.refuse_memory_only()
    buffer = ReservoirBuffer(settings.num_images())
    plugin = ReplayPlugin(
        mem_size=buffer.max_size,
        batch_size_mem=settings.batch_size_mem,
        storage_policy=buffer,
    )
    return Naive(**settings.common(plugin))
