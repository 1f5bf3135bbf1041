"""Decoded images in a training mini-batch of Avalanche, and in its loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from avalanche.core import BasePlugin
from avalanche.training.templates.common_templates import SupervisedTemplate
from torch import Tensor, nn

from hmn_replay.avalanche.streams import Normalization, split_class_keys
from hmn_replay.budget import as_int
from hmn_replay.errors import ConfigError, DataError

__all__ = [
    "LOSSES",
    "MODES",
    "PARTED_LOSSES",
    "DecodedImages",
    "Loss",
    "add_to_minibatch",
    "can_be_parted",
    "check_loss",
    "check_settings",
    "finish_images",
    "is_plain_cross_entropy",
    "log_shares",
    "part_loss",
]

MODES = ("replay", "memory_only")
Loss: TypeAlias = Literal["plain", "balanced", "asymmetric", "auto"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
PARTED_LOSSES: tuple[Loss, ...] = ("balanced", "asymmetric")
"""Those that change the logits: their criterion must be a cross-entropy."""


@dataclass(frozen=True, eq=False)
class DecodedImages:
    """A memory's images, decoded once and kept on the device that trains.

    Attributes:
        memory: What they were decoded from.
        device: Where they are.
        images: uint8 ``(N, C, H, W)``: a quarter of the bytes that floats would take.
        labels: int64 ``(N,)``.
        tasks: int64 ``(N,)``, the task labels.
        known: int64 ``(K,)``, the labels that occur; none where task labels tell classes apart.
        counts: float32 ``(K,)``, how often they do.
    """

    memory: Any
    device: torch.device
    images: Tensor
    labels: Tensor
    tasks: Tensor
    known: Tensor
    counts: Tensor

    @classmethod
    def of(cls, memory: Any, device: torch.device) -> DecodedImages:
        """Decode a memory where it is, and bring its images to a device."""
        images, keys = memory.decode(dtype=torch.uint8)
        labels, tasks = split_class_keys(keys)
        alike = labels if not bool(tasks.any()) else labels[:0]
        known, counts = alike.unique(return_counts=True)
        parts = images, labels, tasks, known, counts.float()
        return cls(memory, device, *(part.to(device) for part in parts))

    def __len__(self) -> int:
        return len(self.images)

    def draw(
        self, count: int, dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw images at random, none twice.

        Args:
            count: How many; all, where there are fewer.
            dtype: Of the images: a floating one.
            generator: On the CPU.

        Returns:
            Images ``(n, C, H, W)`` in [0, 1], labels and task labels.

        Raises:
            DataError: ``dtype`` is another.
        """
        if not dtype.is_floating_point:
            raise DataError(
                f"expected a mini-batch of floats, came {dtype}; give the benchmark transforms "
                "that end in floats"
            )
        indices = torch.randperm(len(self), generator=generator)[:count]
        indices = indices.to(self.device, non_blocking=True)
        images = self.images[indices].to(dtype).div_(255)
        return images, self.labels[indices], self.tasks[indices]


def finish_images(
    images: Tensor,
    transform: Callable[[Tensor], Tensor] | None,
    normalization: Normalization | None,
) -> Tensor:
    """Augment and normalise images ``(N, C, H, W)`` in [0, 1].

    Raises:
        DataError: ``transform`` changed their shape.
    """
    if transform is not None:
        shape = images.shape
        images = transform(images)
        if images.shape != shape:
            raise DataError(
                f"replay_transform returned {tuple(images.shape)} for {tuple(shape)}; expected as "
                "many images of the same shape"
            )
    return images if normalization is None else normalization.apply(images)


def add_to_minibatch(mbatch: list[Tensor], images: Tensor, labels: Tensor, tasks: Tensor) -> None:
    """Append images to a mini-batch of images, labels, and task labels or none, in place.

    Raises:
        DataError: The mini-batch has other parts, or images of another size.
    """
    if len(mbatch) > 3 or mbatch[0].shape[1:] != images.shape[1:]:
        raise DataError(
            f"the memory's images are {tuple(images.shape[1:])}; expected a mini-batch of images "
            "as large, labels, and task labels or none, came shapes "
            f"{[tuple(part.shape) for part in mbatch]}; the train transforms must give the size "
            "that the eval transforms give"
        )
    # A plain zip: without task labels, the third part is left out.
    for position, (part, replayed) in enumerate(zip(mbatch, (images, labels, tasks), strict=False)):
        mbatch[position] = torch.cat([part, replayed])


def check_settings(
    mode: str,
    batch_size_mem: int | None,
    max_raw_images: int,
    replay_weight: float | None,
    loss: str,
) -> None:
    """Raise a ConfigError for settings of a plugin outside their ranges."""
    for name, value, known in (("mode", mode, MODES), ("loss", loss, LOSSES)):
        if value not in known:
            raise ConfigError(f"{name} is one of {known}; got {value!r}")
    for name, size in (("batch_size_mem", batch_size_mem), ("max_raw_images", max_raw_images)):
        if size is not None and (as_int(size) or 0) < 1:
            raise ConfigError(f"{name} is a whole number of 1 or more; got {size!r}")
    if replay_weight is not None and not 0 <= replay_weight <= 1:
        raise ConfigError(f"replay_weight is in [0, 1]; got {replay_weight!r}")
    if mode == "memory_only" and (replay_weight is not None or loss in PARTED_LOSSES):
        raise ConfigError(
            "replay_weight and loss tell a memory from raw data, which "
            'mode="memory_only" does not train on; leave them out'
        )


def can_be_parted(strategy: Any) -> bool:
    """Return whether a strategy's loss is its criterion of output and labels."""
    kind = type(strategy)
    return (
        kind.training_epoch is SupervisedTemplate.training_epoch
        and kind.criterion is SupervisedTemplate.criterion
        and not isinstance(strategy._criterion, BasePlugin)
    )


def is_plain_cross_entropy(strategy: Any) -> bool:
    """Return whether a strategy's loss can leave classes out of the softmax."""
    criterion = strategy._criterion
    return (
        can_be_parted(strategy)
        and isinstance(criterion, nn.CrossEntropyLoss)
        and not criterion.label_smoothing
    )


def check_loss(strategy: Any, loss: str) -> None:
    """Raise a ConfigError unless a strategy's loss can be parted as is asked for."""
    if loss in PARTED_LOSSES and can_be_parted(strategy) and not is_plain_cross_entropy(strategy):
        raise ConfigError(
            f'loss="{loss}" changes the logits of a softmax: the criterion must be '
            f"nn.CrossEntropyLoss without label smoothing; got {strategy._criterion}"
        )
    if not can_be_parted(strategy):
        kind = type(strategy)
        raise ConfigError(
            f"replay_weight and loss change the parts of strategy.criterion(), but {kind.__name__} "
            "has a loss of its own; leave them out, and choose batch_size_mem instead"
        )


def log_shares(current: Tensor, decoded: DecodedImages, weight: float) -> Tensor:
    """Return the logarithm of each class's share of the loss, ``(K,)``.

    A class that neither has is given the lowest share of those that one has.

    Args:
        current: float32 ``(K,)``, how often each class occurs among the current images.
        decoded: The memory's images.
        weight: Their share of the loss, in [0, 1].
    """
    replayed = decoded.counts * (weight / decoded.counts.sum())
    shares = current * ((1 - weight) / current.sum())
    shares = shares.index_add(0, decoded.known, replayed)
    is_absent = shares <= 0
    lowest = shares.masked_fill(is_absent, math.inf).min()
    return torch.where(is_absent, lowest, shares).log()


def part_loss(
    strategy: Any,
    num_replayed: int,
    weight: float,
    *,
    known: Tensor | None = None,
    shift: Tensor | None = None,
) -> None:
    """Replace the criterion's part of a strategy's loss by one of current and of replayed images.

    Args:
        strategy: After its forward pass; the replayed images are the last of the mini-batch.
        num_replayed: How many they are, 1 or more.
        weight: The replayed images' share of the loss.
        known: int64, labels that the current images are not to be told apart from, but for those
            that are theirs; None for none.
        shift: ``(K,)``, added to the logits of all; None for nothing.
    """
    output, labels, criterion = strategy.mb_output, strategy.mb_y, strategy._criterion
    if shift is not None:
        output = output + shift
    current, replayed = output[:-num_replayed], output[-num_replayed:]
    own, replayed_labels = labels[:-num_replayed], labels[-num_replayed:]
    if known is not None:
        left_out = torch.zeros(current.shape[1], dtype=torch.bool, device=current.device)
        left_out = left_out.index_fill(0, known, True).index_fill(0, own, False)
        # The lowest number rather than -inf, which a criterion may multiply by zero.
        current = current.masked_fill(left_out, torch.finfo(current.dtype).min)
    loss = torch.lerp(
        criterion(current, own),
        criterion(replayed, replayed_labels),
        weight,
    )
    # Another plugin may have added a term of its own before: only the criterion's is taken out.
    strategy.loss = strategy.loss - strategy.criterion() + loss
