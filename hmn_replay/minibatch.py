"""Decoded images in a training mini-batch of Avalanche, and in its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.core import BasePlugin
from avalanche.training.templates.common_templates import SupervisedTemplate
from torch import Tensor

from hmn_replay.errors import ConfigError, DataError
from hmn_replay.experiences import Normalization, split_class_keys

__all__ = ["DecodedImages", "add_to_minibatch", "check_loss", "finish_images", "weighted_loss"]


@dataclass(frozen=True, eq=False)
class DecodedImages:
    """A memory's images, decoded once and kept on the device that trains.

    Attributes:
        memory: What they were decoded from.
        images: uint8 ``(N, C, H, W)``: a quarter of the bytes that floats would take.
        labels: int64 ``(N,)``.
        tasks: int64 ``(N,)``, the task labels.
    """

    memory: Any
    images: Tensor
    labels: Tensor
    tasks: Tensor

    @classmethod
    def of(cls, memory: Any, device: torch.device) -> DecodedImages:
        """Decode a memory where it is, and bring its images to a device."""
        images, keys = memory.decode(dtype=torch.uint8)
        labels, tasks = split_class_keys(keys)
        return cls(memory, images.to(device), labels.to(device), tasks.to(device))

    def __len__(self) -> int:
        return len(self.images)

    def is_of(self, memory: Any, device: torch.device) -> bool:
        """Tell whether these are a memory's images, on a device."""
        return self.memory is memory and self.images.device == torch.empty(0, device=device).device

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
        indices = indices.to(self.images.device, non_blocking=True)
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


def check_loss(strategy: Any) -> None:
    """Raise a ConfigError unless a strategy's loss is its criterion of output and labels."""
    kind = type(strategy)
    if (
        kind.training_epoch is not SupervisedTemplate.training_epoch
        or kind.criterion is not SupervisedTemplate.criterion
        or isinstance(strategy._criterion, BasePlugin)
    ):
        raise ConfigError(
            f"replay_weight weighs the parts of strategy.criterion(), but {kind.__name__} has a "
            "loss of its own; leave replay_weight out, and choose batch_size_mem instead"
        )


def weighted_loss(strategy: Any, num_replayed: int, weight: float) -> Tensor:
    """Return ``(1 - weight)`` of the loss of current images and ``weight`` of the last ones'."""
    output, labels, criterion = strategy.mb_output, strategy.mb_y, strategy._criterion
    current: Tensor = criterion(output[:-num_replayed], labels[:-num_replayed])
    replayed: Tensor = criterion(output[-num_replayed:], labels[-num_replayed:])
    return (1 - weight) * current + weight * replayed
