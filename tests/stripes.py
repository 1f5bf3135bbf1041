"""A set of stripes that a small network learns in a moment, and how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hmn_replay.training.train import TrainingConfig

TINY = TrainingConfig(width=8, num_passes=1_600, batch_size=16)
PLAIN = TrainingConfig(
    width=8, num_passes=640, batch_size=16, cutmix_probability=0.0, augmentations=()
)


def stripes(num_images: int, labels: tuple[int, ...] = (-3, 7, 1000), seed: int = 0) -> Any:
    """Horizontal, vertical and checked stripes under noise, as a pair of tensors."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.arange(num_images) % 3
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    patterns = torch.stack((rows // 2 % 2, columns // 2 % 2, (rows // 2 + columns // 2) % 2))
    noise = torch.rand((num_images, 3, 8, 8), generator=generator)
    images = 0.6 * patterns[kinds].unsqueeze(1) + 0.4 * noise
    return (images * 255).round().to(torch.uint8), torch.tensor(labels)[kinds]


def weights(network: nn.Module) -> Tensor:
    """Return all parameters in a row."""
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
