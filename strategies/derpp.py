"""DER++ (Buzzega et al. 2020): replayed images keep their labels, and the logits they once had.

Avalanche's ``DER`` with ``beta`` above 0, over a class-balanced buffer. An image takes its uint8
pixels and a float32 a logit; labels are not counted, in its favour. The replayed images join the
batch after every plugin's ``before_forward``: what augments there sees the new images alone, so
augment in the model, as a forward pre-hook.
"""

from __future__ import annotations

from typing import Any

from avalanche.training.supervised.der import DER, ClassBalancedBufferWithLogits

from hmn_replay.budget import as_number
from hmn_replay.errors import ConfigError, DataError
from strategies.buffers import MeasuredBuffer
from strategies.settings import Settings, Strategy

__all__ = ["build"]

_LOGIT_BYTES = 4


def build(settings: Settings) -> Strategy:
    """Build it, for a model that has all its logits from the beginning.

    Options are ``alpha``, the weight of the logits' squared error (default: 0.1), and ``beta``, of
    the replayed labels' cross-entropy (default: 0.5).

    Raises:
        ConfigError: ``mode`` is ``"memory_only"``, which it does not have; or a weight is below 0.
        BudgetError: The budget does not hold one image and its logits.
    """
    weights = settings.choose(alpha=0.1, beta=0.5)
    settings.refuse_memory_only()
    for name, weight in weights.items():
        if (number := as_number(weight)) is None or number < 0:
            raise ConfigError(f"{name} must be a number of 0 or more; got {weight!r}")
    num_images = settings.num_images(_LOGIT_BYTES * settings.num_classes)
    batch_size_mem = settings.batch_size_mem
    strategy = DER(
        mem_size=num_images, batch_size_mem=batch_size_mem, **weights, **settings.common()
    )
    strategy.storage_policy = _LogitBuffer(num_images)
    strategy.storage_policy.batch_size_mem = batch_size_mem
    return strategy


class _LogitBuffer(MeasuredBuffer, ClassBalancedBufferWithLogits):
    """Avalanche's buffer of images and logits, for samples ``(image, label, task label)``."""

    def renew(self, strategy: Any, **kwargs: Any) -> None:
        """Take in the current experience of a strategy."""
        sample = strategy.experience.dataset[0]
        if len(sample) != 3:
            raise DataError(
                "DER++ needs samples (image, label, task label), as nc_benchmark makes them; got "
                f"samples of {len(sample)}"
            )
        ClassBalancedBufferWithLogits.update(self, strategy, **kwargs)
