"""Avalanche's buffers, measured, and the two ways to replay them.

A buffer holds positions in the data sets that it saw, which stay in memory too. What counts as
stored is what its images would take if they alone were kept.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from avalanche.core import SupervisedPlugin
from avalanche.training.plugins.replay import ReplayPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer, ReservoirSamplingBuffer

from strategies.settings import Settings

if TYPE_CHECKING:
    from avalanche.training.storage_policy import ExemplarsBuffer

    _Buffer = ExemplarsBuffer
else:
    _Buffer = object

__all__ = ["BalancedBuffer", "MeasuredBuffer", "ReservoirBuffer", "replay_plugin"]


class MeasuredBuffer(_Buffer):
    """Mixed into a buffer of Avalanche: sums up the seconds that its updates take.

    Attributes:
        seconds: Spent on updates so far.
        batch_size_mem: Where it is set, the strategy's own is lowered to what the buffer can fill:
            DER and ER-ACE of Avalanche replay nothing from a buffer below one batch.
    """

    seconds: float = 0.0
    batch_size_mem: int | None = None

    def update(self, strategy: Any, **kwargs: Any) -> None:
        """Take in the current experience of a strategy."""
        started = time.perf_counter()
        self.renew(strategy, **kwargs)
        if self.batch_size_mem is not None:
            strategy.batch_size_mem = min(self.batch_size_mem, len(self.buffer))
        self.seconds += time.perf_counter() - started

    def renew(self, strategy: Any, **kwargs: Any) -> None:
        """Do what Avalanche's ``update`` does, without the warning that it is deprecated."""
        self.post_adapt(strategy, strategy.experience)  # type: ignore[no-untyped-call]


class ReservoirBuffer(MeasuredBuffer, ReservoirSamplingBuffer):
    """A uniform draw from all images seen (Vitter 1985)."""


class BalancedBuffer(MeasuredBuffer, ClassBalancedBuffer):
    """A uniform draw from the images of each class, as many of every class."""


def replay_plugin(settings: Settings, buffer: MeasuredBuffer) -> SupervisedPlugin[Any]:
    """Return the plugin that trains on a buffer in the mode that is asked for."""
    if settings.mode == "memory_only":
        return _MemoryOnly(buffer)
    return ReplayPlugin(
        mem_size=buffer.max_size,
        batch_size_mem=settings.batch_size_mem,
        storage_policy=buffer,
    )


class _MemoryOnly(SupervisedPlugin[Any], supports_distributed=False):
    """Trains on a buffer alone from the second experience on, as ``MemoryReplay`` does."""

    def __init__(self, storage_policy: MeasuredBuffer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storage_policy = storage_policy
        self.is_renewed = False

    def after_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Take in the experience, and put the buffer in its place."""
        self.is_renewed = len(self.storage_policy.buffer) > 0
        if self.is_renewed:
            self.storage_policy.update(strategy)
            strategy.adapted_dataset = self.storage_policy.buffer

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Take in the first experience, which is trained on as it is."""
        if not self.is_renewed:
            self.storage_policy.update(strategy)
