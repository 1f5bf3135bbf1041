"""Bits in the loss: the weight with which a memory that is entropy-coded meets its budget.

Training minimises, in place of a distance d alone,

    log d + w bits / target,

where bits are those of an instance memory, with its share of what all images share, and target is
what the budget leaves for it. Both terms are free of units, so one way of finding w serves the warm
start and every objective of matching: w rises while the memory takes more than its target, and
falls while it takes less (a proportional-integral controller of log w). It is known no better
beforehand: what a bit is worth depends on the images, their number and the objective.

What training leaves is within a hundredth of the target or so. :func:`fit_code` then makes sure of
the budget, by rounding towards zero some of the values that are between two integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmn_replay.errors import BudgetError
from hmn_replay.memory import HierarchicalMemory

__all__ = ["RateControl", "fit_code"]

# Of the code that a budget leaves room for, what is aimed at.
_AIM = 0.993
_PROPORTIONAL, _INTEGRAL, _SMOOTHING = 1.0, 0.02, 0.9
_MAX_ERROR = 1.0
_NUM_HALVINGS = 20


class RateControl:
    """Adds bits to losses, and keeps them near a target.

    Args:
        memory: One that is entropy-coded, with more images than will be kept, maybe.
        code_bytes: What the code may take in the end.
        kept_images: How many images will be kept.
        num_old: The images before this position are not trained.
        kept_old: How many of them will be kept.

    Attributes:
        state: Three numbers, float32 on the memory's device: the integral of log w, the smoothed
            bits of an image, and the number of steps. What a checkpoint keeps.
    """

    def __init__(
        self,
        memory: HierarchicalMemory,
        code_bytes: int,
        kept_images: int,
        num_old: int = 0,
        kept_old: int = 0,
    ) -> None:
        self.bits, self.kept_new = 8 * _AIM * code_bytes, kept_images - kept_old
        self.state = torch.zeros(3, device=memory.class_index.device)
        if num_old:
            with torch.no_grad():
                old = torch.arange(num_old, device=memory.class_index.device)
                self.bits -= float(memory.rate(old)[0]) * kept_old

    def penalty(self, memory: HierarchicalMemory, indices: Tensor, distance: Tensor) -> Tensor:
        """Return what to add to a distance; its gradient goes to what is coded.

        Args:
            memory: The memory.
            indices: int64 ``(B,)``, on its device: positions of the images in the distance.
            distance: A scalar, above 0; its gradient is not read.
        """
        image_bits, shared_bits = memory.rate(indices)
        target = (self.bits - shared_bits.detach()) / self.kept_new
        target = target.clamp_min(1.0)
        integral, smoothed, count = self.state.unbind()
        smoothed = torch.where(
            count > 0,
            _SMOOTHING * smoothed + (1 - _SMOOTHING) * image_bits.detach(),
            image_bits.detach(),
        )
        error = (smoothed / target).log().clamp(-_MAX_ERROR, _MAX_ERROR)
        integral = integral + _INTEGRAL * error
        self.state = torch.stack([integral, smoothed, count + 1])
        weight = (integral + _PROPORTIONAL * error).exp() * distance.detach() / target
        penalty: Tensor = weight * (image_bits + shared_bits / self.kept_new)
        return penalty


@torch.no_grad()
def fit_code(memory: HierarchicalMemory, budget_bytes: int, first_image: int = 0) -> None:
    """Let the file of an entropy-coded memory be within a budget.

    The integers of instance memories are |y| rounded, toward zero by a margin that is 0 where the
    budget holds already, and otherwise the least that makes it hold.

    Args:
        memory: The memory; its values become the rounded ones.
        budget_bytes: Of the file.
        first_image: The images before it stay as they are, to the bit.

    Raises:
        BudgetError: Even with the largest margin, a half, the file is over the budget.
    """
    latent = memory.instance_memory
    scale = memory.instance_scale[memory.class_index[first_image:]]
    values = latent[first_image:] / scale

    def takes(margin: float) -> int:
        rounded = values.sign() * (values.abs() + 0.5 - margin).floor()
        latent[first_image:] = rounded * scale
        return memory.layout.file_bytes(
            memory.num_classes, memory.num_images, budget_bytes, memory.code_bytes
        )

    if takes(0.0) <= budget_bytes:
        return
    low, high = 0.0, 0.5
    if (smallest := takes(high)) > budget_bytes:
        raise BudgetError(
            f"the memory's code takes {smallest:,} bytes at least, over its budget of "
            f"{budget_bytes:,}; give a larger budget, or a layout of more image_bytes"
        )
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if takes(middle) <= budget_bytes else (middle, high)
    takes(high)
