"""Matching of mean features: of every block, or of the last one (DM)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from hmn_replay.errors import ConfigError
from hmn_replay.objectives._network import keeping_statistics, requires_grad, uncached_autocast

__all__ = ["BlockMeans", "block_means", "distribution_matching", "last_block_matching"]

BlockMeans: TypeAlias = Callable[[nn.Module, Tensor], list[Tensor]]


def block_means(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the batch means of all blocks' features, in float32 at least.

    Args:
        network: Has ``features(images)``, a list of tensors ``(N, ...)``, one a block, or a single
            tensor.
        images: float ``(N, C, H, W)``.
    """
    blocks = network.features(images)  # type: ignore[operator]
    blocks = [blocks] if isinstance(blocks, Tensor) else blocks
    return [
        block.mean(dim=0, dtype=torch.promote_types(block.dtype, torch.float32)) for block in blocks
    ]


def distribution_matching(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
    means: BlockMeans = block_means,
) -> Tensor:
    """Match the mean features of every block (Zhao and Bilen 2023, arXiv 2110.04181).

    The loss is the sum over blocks of the mean squared difference between the batch means of the
    features. DM matches the last block only; see :func:`last_block_matching`.

    Costs a forward pass on the real batch, and on the decoded one a training step without the
    gradients of the weights. Peak memory is that of a training step on the decoded batch.

    Args:
        network: Has ``features(images)``, a list of tensors ``(N, ...)``, one a block, or a single
            tensor. It is left as it was; see :func:`hmn_replay.gradient_matching`.
        real_images: float ``(R, C, H, W)`` of one class.
        real_labels: Not read.
        decoded_images: float ``(B, C, H, W)`` of the same class.
        decoded_labels: Not read.
        means: What takes the batch means of features, such as :func:`block_means` compiled.

    Returns:
        The loss, a scalar with a graph to ``decoded_images``.

    Raises:
        ConfigError: The network has no ``features``.
    """
    decoded, real = _mean_features(network, decoded_images, real_images, means)
    return torch.stack([(d - r).square().mean() for d, r in zip(decoded, real, strict=True)]).sum()


def last_block_matching(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
    means: BlockMeans = block_means,
) -> Tensor:
    """Match the mean features of the last block (DM; Zhao and Bilen 2023, arXiv 2110.04181, eq. 5).

    The loss is the squared Euclidean distance of the batch means of the last block's output,
    flattened: a sum over features, as in DM's code, where :func:`distribution_matching` takes a
    mean. DM draws a new network for every step, and trains none of them.

    Args:
        network: Has ``features(images)``, a list of tensors ``(N, ...)``, one a block, or a single
            tensor. It is left as it was; see :func:`hmn_replay.gradient_matching`.
        real_images: float ``(R, C, H, W)`` of one class.
        real_labels: Not read.
        decoded_images: float ``(B, C, H, W)`` of the same class.
        decoded_labels: Not read.
        means: What takes the batch means of features, such as :func:`block_means` compiled.

    Returns:
        The loss, a scalar with a graph to ``decoded_images``.

    Raises:
        ConfigError: The network has no ``features``.
    """
    decoded, real = _mean_features(network, decoded_images, real_images, means)
    return (decoded[-1] - real[-1]).square().sum()


def _mean_features(
    network: nn.Module, decoded_images: Tensor, real_images: Tensor, means: BlockMeans
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the batch means of all blocks' features for both batches."""
    if not callable(getattr(network, "features", None)):
        raise ConfigError(
            "distribution matching needs a network with features(images); "
            f"{type(network).__name__} has none"
        )
    # Frozen weights are left out of the graph, which backward() would go through to them.
    frozen = requires_grad(list(network.parameters()), False)
    with keeping_statistics(network), frozen, uncached_autocast(decoded_images.device.type):
        with torch.no_grad():
            real = means(network, real_images)
        return means(network, decoded_images), real
