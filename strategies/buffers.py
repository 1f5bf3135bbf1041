"""Avalanche's buffers, measured.

A buffer holds positions in the data sets that it saw, which stay in memory too. What counts as
stored is what its images would take if they alone were kept.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from avalanche.training.storage_policy import ClassBalancedBuffer, ReservoirSamplingBuffer

if TYPE_CHECKING:
    from avalanche.training.storage_policy import ExemplarsBuffer

    _Buffer = ExemplarsBuffer
else:
    _Buffer = object

__all__ = ["BalancedBuffer", "MeasuredBuffer", "ReservoirBuffer"]


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
