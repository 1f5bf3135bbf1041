"""Bits in the loss: the weight with which a memory that is entropy-coded meets its budget.

Training minimises, in place of a distance d alone,

    log d + w bits / target,

where bits are those of an instance memory, with its share of what all images share, and target is
what the budget leaves for it. Both terms are free of units, so one way of finding w serves the warm
start and every objective of matching: w rises while the memory takes more than its target, and
falls while it takes less (a proportional-integral controller of log w). It is known no better
beforehand: what a bit is worth depends on the images, their number and the objective.

The controller aims at a fortieth more than there is, and :func:`fit_code` rounds towards zero what
is over. To end below the budget would be worse: bits not taken are lost, while of the values that
are rounded most lie right between two integers, where training leaves very many, and cost little.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hmn_replay.budget import largest, smallest
from hmn_replay.distributed import ALONE, Team
from hmn_replay.errors import BudgetError
from hmn_replay.memory.learned import LearnedMemory

__all__ = ["RateControl", "fit_code", "most_that_fit"]

# Of the code that a budget leaves room for, what is aimed at.
_AIM = 1.025
_PROPORTIONAL, _INTEGRAL, _SMOOTHING = 3.0, 0.05, 0.9
_MAX_ERROR, _MAX_INTEGRAL = 0.5, 10.0
_NUM_HALVINGS = 24


class RateControl:
    """Adds the gradient of bits to that of a distance, and keeps the bits near a target.

    Args:
        memory: One that is entropy-coded, maybe with more images than will be kept.
        code_bytes: What the code may take in the end.
        kept_images: How many images will be kept.
        num_old: The images before this position are not trained.
        kept_old: How many of them will be kept.
        most_image_bytes: What an image may take at most, however few there are. Default: no bound.

    Raises:
        BudgetError: What all images share takes more already.

    Attributes:
        state: float32 ``(4,)`` on the memory's device, which a checkpoint keeps: the integral of
            log w, the smoothed bits of an image, the number of steps, and the bits that all new
            images and what they share may take.
    """

    def __init__(
        self,
        memory: LearnedMemory,
        code_bytes: int,
        kept_images: int,
        num_old: int = 0,
        kept_old: int = 0,
        most_image_bytes: float = math.inf,
    ) -> None:
        self.memory, self.most_image_bits = memory, max(1.0, 8 * most_image_bytes)
        self.first_class = int(memory.class_index[num_old])
        self.kept_new = kept_images - kept_old
        device = memory.class_index.device
        self.state = torch.zeros(4, dtype=torch.float32, device=device)
        self.state[3] = 8 * _AIM * code_bytes
        if num_old:
            with torch.no_grad():
                old_bits, shared_bits = memory.rate(torch.arange(num_old, device=device))
            if (shared_bytes := float(shared_bits) / 8) > code_bytes:
                left = f"leaves {max(0, code_bytes):,} bytes for the code of values"
                fewer = ", or a layout of fewer channels" if shared_bytes >= 1 else ""
                raise BudgetError(
                    f"the budget {left}, and what all images share takes {shared_bytes:,.0f}; give "
                    f"a larger budget{fewer}"
                )
            self.state[3] -= old_bits * kept_old

    def add_gradients(self, indices: Tensor, distance: Tensor, team: Team = ALONE) -> None:
        """Add the gradient of the bits of some images, and of all that images share.

        Args:
            indices: int64 ``(B,)``, positions of the images in the distance, the same in every
                process of a team.
            distance: A scalar, 0 or more and without a graph: of this process's share.
            team: The processes that share the distance, whose gradients are summed already.
        """
        team.add_up(distance)
        indices = indices.to(self.state.device, non_blocking=True)
        image_bits, shared_bits = self.memory.rate(indices, self.first_class)
        integral, smoothed, count, bits = self.state.unbind()
        target = (bits - shared_bits.detach()) / self.kept_new
        target = target.clamp(1.0, self.most_image_bits)
        now = image_bits.detach()
        smoothed = torch.where(count > 0, _SMOOTHING * smoothed + (1 - _SMOOTHING) * now, now)
        error = (smoothed / target).log().clamp(-_MAX_ERROR, _MAX_ERROR)
        integral = (integral + _INTEGRAL * error).clamp(-_MAX_INTEGRAL, _MAX_INTEGRAL)
        self.state = torch.stack([integral, smoothed, count + 1, bits])
        weight = (integral + _PROPORTIONAL * error).exp() * distance.clamp_min(0) / target
        torch.autograd.backward(weight * (image_bits + shared_bits / self.kept_new))


@torch.no_grad()
def most_that_fit(
    memory: LearnedMemory,
    budget_bytes: int,
    choose: Callable[[int], Tensor],
    fewest: int,
    most: int,
) -> Tensor:
    """Return the images of a memory that stay, pruned in bytes.

    Those that are pruned may take more than others, and all may take less than was planned, where
    they are entropy-coded or have soft labels.

    Args:
        memory: The memory.
        budget_bytes: Of the file.
        choose: From a number of images to the positions of those that would stay, int64. The more
            images, the more stay.
        fewest: Their number at least, though they be over the budget: :func:`fit_code` mends that.
        most: Their number at most, no less than ``fewest``.

    Returns:
        What ``choose`` returns for the largest number whose file is within the budget.
    """
    device = memory.class_index.device

    def fits(num_images: int) -> bool:
        chosen = choose(num_images)
        code_bytes = None
        if memory.layout.is_coded:
            image_bits, shared_bits = memory.rate(chosen.to(device))
            code_bytes = math.ceil((float(image_bits) * len(chosen) + float(shared_bits)) / 8)
        labels = memory.label_specs(chosen)
        needed = memory.file_bytes_with(len(chosen), code_bytes, budget_bytes, labels)
        return needed <= budget_bytes

    return choose(largest(fewest, most, fits))


@torch.no_grad()
def fit_code(memory: LearnedMemory, budget_bytes: int, first_image: int = 0) -> None:
    """Let the file of an entropy-coded memory be within a budget.

    Integers that only one image is decoded from are brought nearer to zero, by one and then by one
    more, those first whose values are nearest to the next integer down: none where the budget holds
    already, and otherwise as few as make it hold. It is their order that counts, not how near they
    are: training leaves very many right at the border between two integers.

    Args:
        memory: The memory; its values become the rounded ones.
        budget_bytes: Of the file.
        first_image: The images before it stay as they are, to the bit.

    Raises:
        BudgetError: The file is over the budget even if all of them are zero; they are only
            rounded then.
    """
    first_row = first_image // memory.layout.group_size
    own = [tensor for tensor in memory.tensors.values() if tensor.rows == "image"]
    own = [tensor for tensor in own if not tensor.is_bias]
    latents = [memory.get_parameter(tensor.name)[first_row:] for tensor in own]
    sizes = [latent.numel() for latent in latents]
    values = torch.cat([x.flatten() / t.step for x, t in zip(latents, own, strict=True)])
    magnitudes = (values.abs() + 0.5).floor()
    order = (values.abs() - magnitudes).argsort(stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device)
    shares = ranks.double() / max(1, len(order))

    def takes(steps: float) -> int:
        rounded = (magnitudes + shares - steps).floor().clamp_min(0).to(values.dtype)
        rounded = rounded * values.sign()
        for tensor, latent, new in zip(own, latents, rounded.split(sizes), strict=True):
            latent.copy_(new.view_as(latent) * tensor.step)
        return memory.file_bytes_with(memory.num_images, memory.code_bytes, budget_bytes)

    if takes(0.0) <= budget_bytes:
        return
    most = float(magnitudes.max()) + 1
    if (least := takes(most)) > budget_bytes:
        takes(0.0)
        raise BudgetError(
            f"the memory takes {least:,} bytes even with all its images alike, over its budget "
            f"of {budget_bytes:,}; give a larger budget, or a layout of fewer channels"
        )
    takes(smallest(0.0, most, lambda steps: takes(steps) <= budget_bytes, _NUM_HALVINGS))
