"""How near the images of a container are to others, in dB; decoded in parts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hmn_replay.data.lookup import Images, images_at_once
from hmn_replay.memory.learned import LearnedMemory

__all__ = ["drift_psnr", "mean_psnr", "reconstruction_psnr"]


def reconstruction_psnr(
    memory: LearnedMemory, positions: Tensor, wanted_images: Callable[[Tensor], Tensor]
) -> float:
    """Return the mean over images of their peak signal-to-noise ratio (PSNR) to wanted ones.

    Args:
        memory: What decodes them.
        positions: int64 ``(N,)``, which images, N 1 or more.
        wanted_images: From positions to images, float32 ``(B, C, H, W)`` in [0, 1] on the CPU.

    Returns:
        dB; 100 for an image that is as wanted to that many.
    """
    # Not a list of the parts' errors: each, kept where large tensors come and go, would keep the
    # hole before it from being used again, and the process would grow by a tensor each time.
    errors = torch.empty(len(positions), dtype=torch.float32)
    parts = images_at_once(memory.image_shape)
    for own, part in zip(errors.split(parts), positions.split(parts), strict=True):
        own[:] = (memory.decode(part)[0].cpu() - wanted_images(part)).square().mean(dim=(1, 2, 3))
    return mean_psnr(errors)


def mean_psnr(errors: Tensor) -> float:
    """Return the mean PSNR in dB of images by their mean squared errors; 100 for one of 1e-10."""
    return float(-10 * errors.clamp_min(1e-10).log10().mean())


def drift_psnr(memory: LearnedMemory, before: Images) -> float | None:
    """Return the PSNR of the first images, at 8 bits, to what they were.

    Args:
        memory: What decodes them now.
        before: uint8 ``(N, C, H, W)`` on the CPU, what its first N images were, N 0 or more.

    Returns:
        dB, of the mean squared error of all pixels; None if no bit changed.
    """
    error = 0
    for part in torch.arange(len(before)).split(images_at_once(memory.image_shape)):
        now = memory.decode(part, dtype=torch.uint8)[0].cpu()
        error += int((now.int() - before[part].int()).square().sum())
    return -10 * math.log10(error / before.shape.numel() / 255**2) if error else None
