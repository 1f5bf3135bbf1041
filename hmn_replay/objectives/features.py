"""Matching of each class's mean features: of every block, or of the last one (DM)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from hmn_replay.errors import ConfigError, DataError
from hmn_replay.objectives._network import keeping_statistics, uncached_autocast
from hmn_replay.training.networks import requires_grad

__all__ = ["BlockMeans", "block_means", "distribution_matching", "last_block_matching"]

BlockMeans: TypeAlias = Callable[[nn.Module, Tensor, Tensor], list[Tensor]]


def block_means(network: nn.Module, images: Tensor, weights: Tensor) -> list[Tensor]:
    """Return weighted means of all blocks' features, in float32 at least: ``(K, F)`` a block.

    Args:
        network: Has ``features(images)``, a list of tensors ``(N, ...)``, one a block, or a single
            tensor.
        images: float ``(N, C, H, W)``.
        weights: float64 ``(K, N)``: for each mean, the images' weights.
    """
    blocks = network.features(images)  # type: ignore[operator]
    blocks = [blocks] if isinstance(blocks, Tensor) else blocks
    with torch.autocast(images.device.type, enabled=False):
        blocks = [
            block.flatten(1).to(torch.promote_types(block.dtype, torch.float32)) for block in blocks
        ]
        return [weights.to(block.dtype) @ block for block in blocks]


def distribution_matching(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
    means: BlockMeans = block_means,
) -> Tensor:
    """Match the mean features of every block (Zhao and Bilen 2023, arXiv 2110.04181).

    The loss is the sum over classes and blocks of the mean squared difference between the means of
    the class's features. DM matches the last block only; see :func:`last_block_matching`.

    Costs a forward pass on the real batch, and on the decoded one a training step without the
    gradients of the weights. Peak memory is that of a training step on the decoded batch.

    Args:
        network: Has ``features(images)``, a list of tensors ``(N, ...)``, one a block, or a single
            tensor. It is left as it was; see :func:`hmn_replay.gradient_matching`.
        real_images: float ``(R, C, H, W)``.
        real_labels: int64 ``(R,)``; on the CPU they are counted without waiting for a GPU.
        decoded_images: float ``(B, C, H, W)`` of the same classes.
        decoded_labels: int64 ``(B,)``, likewise.
        means: What takes weighted means of features, such as :func:`block_means` compiled.

    Returns:
        The loss, a scalar with a graph to ``decoded_images``.

    Raises:
        ConfigError: The network has no ``features``.
        DataError: The decoded images are of other classes than the real ones.
    """
    differences = _differences(
        network, real_images, real_labels, decoded_images, decoded_labels, means
    )
    return torch.stack([block.square().mean(dim=1).sum() for block in differences]).sum()


def last_block_matching(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
    means: BlockMeans = block_means,
) -> Tensor:
    """Match the mean features of the last block (DM; Zhao and Bilen 2023, arXiv 2110.04181, eq. 5).

    The loss is the sum over classes of the squared Euclidean distance of the means of the last
    block's output, flattened: a sum over features, as in DM's code, where
    :func:`distribution_matching` takes a mean. DM draws a new network for every step, and trains
    none of them.

    Args:
        network: Has ``features(images)``, a list of tensors ``(N, ...)``, one a block, or a single
            tensor. It is left as it was; see :func:`hmn_replay.gradient_matching`.
        real_images: float ``(R, C, H, W)``.
        real_labels: int64 ``(R,)``; on the CPU they are counted without waiting for a GPU.
        decoded_images: float ``(B, C, H, W)`` of the same classes.
        decoded_labels: int64 ``(B,)``, likewise.
        means: What takes weighted means of features, such as :func:`block_means` compiled.

    Returns:
        The loss, a scalar with a graph to ``decoded_images``.

    Raises:
        ConfigError: The network has no ``features``.
        DataError: The decoded images are of other classes than the real ones.
    """
    differences = _differences(
        network, real_images, real_labels, decoded_images, decoded_labels, means
    )
    return differences[-1].square().sum()


def _differences(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
    means: BlockMeans,
) -> list[Tensor]:
    """Return how the classes' mean features differ, ``(K, F)`` a block."""
    if not callable(getattr(network, "features", None)):
        raise ConfigError(
            "distribution matching needs a network with features(images); "
            f"{type(network).__name__} has none"
        )
    classes, own = real_labels.unique(), decoded_labels.unique()
    if not classes.equal(own):
        raise DataError(
            f"expected decoded images of the classes of the real ones, {classes.tolist()}, got "
            f"{own.tolist()}"
        )
    device = decoded_images.device
    of_real, of_decoded = (
        _weights_of(labels, classes).to(device, non_blocking=True)
        for labels in (real_labels, decoded_labels)
    )
    # Frozen weights are left out of the graph, which backward() would go through to them.
    frozen = requires_grad(list(network.parameters()), False)
    with keeping_statistics(network), frozen, uncached_autocast(device.type):
        with torch.no_grad():
            real = means(network, real_images, of_real)
        decoded = means(network, decoded_images, of_decoded)
    return [d - r for d, r in zip(decoded, real, strict=True)]


def _weights_of(labels: Tensor, classes: Tensor) -> Tensor:
    """Return what means of each class weigh images by: float64 ``(K, N)``, rows that sum to one."""
    is_member = (classes[:, None] == labels).double()
    return is_member / is_member.sum(dim=1, keepdim=True)
