"""What a strategy's memory takes and looks like, and the loss it was replayed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from avalanche.training.supervised import JointTraining, Naive
from torch import Tensor

from hmn_replay import MemoryReplay
from hmn_replay.avalanche.plugin import replay_of
from hmn_replay.data.images import as_labelled_images
from strategies.settings import Strategy

__all__ = [
    "MemoryUse",
    "memory_images",
    "memory_use",
    "protocol_used",
]


@dataclass(frozen=True)
class MemoryUse:
    """What a memory takes at the moment.

    Attributes:
        num_bytes: Size of the whole file, where the memory has one; else of the images in the
            buffer, a byte a value, and of the float32 numbers beside them. 0 without a memory.
        num_images: How many images it gives.
        seconds: Spent on making and renewing it so far; 0 for a buffer that does not measure it.
    """

    num_bytes: int
    num_images: int
    seconds: float


def memory_use(strategy: Strategy) -> MemoryUse:
    """Measure the memory of a strategy that :func:`strategies.build` made."""
    memory = _find_memory(strategy)
    if isinstance(memory, MemoryReplay):
        num_images = 0 if memory.memory is None else memory.memory.num_images
        seconds = sum(entry["seconds"] for entry in memory.report)
        return MemoryUse(memory.memory_bytes, num_images, seconds)
    if memory is None:
        return MemoryUse(0, 0, 0.0)
    samples = [memory.buffer[position] for position in range(len(memory.buffer))]
    num_bytes = sum(_sample_bytes(*sample) for sample in samples)
    return MemoryUse(num_bytes, len(samples), getattr(memory, "seconds", 0.0))


def protocol_used(strategy: Strategy) -> dict[str, Any]:
    """Return what a strategy's last experience was trained and remembered by.

    Returns:
        ``loss_used``: one of ``hmn_replay.LOSSES`` for memories of this package; the class of a
        strategy with a loss of its own; else ``"plain"``, the criterion.
        ``renew_used``: ``"before"`` or ``"after"`` training, when the memory was renewed; None for
        a strategy without a memory of this package.
        ``distill_used``: the weight of the distillation, 0 for a strategy without such a memory;
        DER++ keeps logits of its own.
    """
    memory = _find_memory(strategy)
    if isinstance(memory, MemoryReplay):
        loss, renewal, weight = memory.loss_used or "plain", memory.renew_used, memory.distill_used
    else:
        is_plain = type(strategy) in (Naive, JointTraining)
        loss, renewal, weight = "plain" if is_plain else type(strategy).__name__, None, 0.0
    return {"loss_used": loss, "renew_used": renewal, "distill_used": weight}


def memory_images(strategy: Strategy) -> tuple[Tensor, Tensor]:
    """Return the images of a strategy's memory as it would replay them.

    Returns:
        Images, uint8 ``(N, C, H, W)``, and labels, int64 ``(N,)``, by label; none without a memory.

    Raises:
        DataError: A buffer's images are not in [0, 1]: the benchmark's transforms normalise them.
    """
    memory = _find_memory(strategy)
    if isinstance(memory, MemoryReplay) and memory.memory is not None:
        images, labels = memory.memory.decode(dtype=torch.uint8)
    elif (buffer := getattr(memory, "buffer", None)) is not None and len(buffer):
        data = as_labelled_images(buffer.eval())
        images, labels = data.images, data.labels
    else:
        return torch.empty(0, 3, 0, 0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    order = labels.argsort(stable=True)
    return images[order].cpu(), labels[order].cpu()


def _find_memory(strategy: Any) -> Any:
    """Return the plugin that replays from a memory, or a buffer of Avalanche; None without."""
    owners = (strategy, *strategy.plugins)
    policies = (getattr(owner, "storage_policy", None) for owner in owners)
    buffers = (policy for policy in policies if hasattr(policy, "buffer"))
    return replay_of(strategy) or next(buffers, None)


def _sample_bytes(
    image: Tensor, label: object, task: object = 0, logits: Tensor | None = None
) -> int:
    return image.numel() + (0 if logits is None else logits.numel() * logits.element_size())
