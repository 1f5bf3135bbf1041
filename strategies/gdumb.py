"""GDumb (Prabhu et al. 2020): a balanced memory, and a network trained afresh on it alone.

It learns from the images of its memory alone, so `epochs` over them would be next to nothing. It
is given what a replaying rival is shown: `epochs` times the images of the experience, and from the
second experience on as many replayed images beside them as `batch_size_mem` brings.
"""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins.gdumb import GDumbPlugin
from avalanche.training.supervised import Naive

from strategies.buffers import BalancedBuffer
from strategies.settings import Settings, Strategy

__all__ = ["build"]


def build(settings: Settings) -> Strategy:
    """Build it; the network of the moment is ``strategy.model``, no longer the caller's.

    Images are stored as uint8 pixels; labels are not counted, in its favour.

    Raises:
        BudgetError: The budget does not hold one image.
    """
    settings.choose()
    plugin = _GDumb(
        settings.num_images(), settings.epochs, settings.batch_size_mem / settings.batch_size
    )
    return Naive(**settings.common(plugin))


class _GDumb(GDumbPlugin, supports_distributed=False):
    """Avalanche's plugin, trained for as many image passes as its rivals."""

    def __init__(self, mem_size: int, epochs: int, replay_share: float) -> None:
        super().__init__(mem_size=mem_size)
        self.storage_policy = BalancedBuffer(mem_size)
        self.epochs = epochs
        self.replay_share = replay_share

    def after_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Put the memory in the place of the data, and set the epochs."""
        passes = self.epochs * len(strategy.experience.dataset)
        if len(self.storage_policy.buffer):
            passes = round(passes * (1 + self.replay_share))
        super().after_train_dataset_adaptation(strategy, **kwargs)
        strategy.train_epochs = max(1, round(passes / len(strategy.adapted_dataset)))
