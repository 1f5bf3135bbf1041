"""Matching objectives: pure functions of a network and two batches.

Each takes a network, a real batch and a decoded batch, and returns the loss and its gradient with
respect to the decoded batch. None of them knows what decoded the images: the caller sends the
gradient on to the memory with ``decoded.backward(gradient)``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hmn_replay.errors import ConfigError

__all__ = [
    "OBJECTIVES",
    "Objective",
    "ObjectiveName",
    "distribution_matching",
    "get_objective",
    "gradient_matching",
]

ObjectiveName = Literal["gradient", "distribution"]


class Objective(Protocol):
    """What every objective looks like; see :func:`gradient_matching` for the arguments."""

    def __call__(
        self,
        network: nn.Module,
        real_images: Tensor,
        real_labels: Tensor,
        decoded_images: Tensor,
        decoded_labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient with respect to ``decoded_images``."""
        ...


def gradient_matching(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Match the gradients of the convolution weights (Zheng et al. 2024, Section 3.1; IDC).

    The loss is the squared Euclidean distance, summed over the convolution weights W,

        sum_W || dL/dW (decoded) - dL/dW (real) ||^2,

    where L is the mean cross-entropy of a batch. Biases, norms and the head are left out, as IDC
    does (Kim et al. 2022, arXiv 2205.14959). Costs a training step on the real batch and about
    three on the decoded one.

    Args:
        network: Maps images to logits ``(N, K)``. Its parameters' ``.grad`` and ``requires_grad``
            and its mode are left as they are, and so are batch normalisation's statistics.
        real_images: float ``(R, C, H, W)``, augmented as the decoded ones are.
        real_labels: int64 ``(R,)``, class indices.
        decoded_images: float ``(B, C, H, W)``.
        decoded_labels: int64 ``(B,)``, class indices.

    Returns:
        The loss, a scalar without a graph, and its gradient, of ``decoded_images``' shape.

    Raises:
        ConfigError: The network has no convolution.
    """
    weights = _convolution_weights(network)
    decoded_images = decoded_images.detach().requires_grad_()
    with _keeping_statistics(network), _requiring_grad(weights), torch.enable_grad():
        real_loss = F.cross_entropy(network(real_images.detach()), real_labels)
        real_gradients = torch.autograd.grad(real_loss, weights)
        decoded_loss = F.cross_entropy(network(decoded_images), decoded_labels)
        decoded_gradients = torch.autograd.grad(decoded_loss, weights, create_graph=True)
        loss = torch.stack(
            [
                (decoded - real).square().sum()
                for decoded, real in zip(decoded_gradients, real_gradients, strict=True)
            ]
        ).sum()
        (gradient,) = torch.autograd.grad(loss, decoded_images)
    return loss.detach(), gradient


def distribution_matching(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Match the mean features of every block (Zhao and Bilen 2023, arXiv 2110.04181).

    The loss is the sum over blocks of the mean squared difference between the batch means of the
    features. First order only: about two training steps' worth of time, a third of
    :func:`gradient_matching`'s or less. DM matches the last block alone; with all of them, no block
    is left to chance.

    Args:
        network: Has ``features(images)``, a list of tensors ``(N, ...)``, as the networks of
            :mod:`hmn_replay.networks` have.
        real_images: As in :func:`gradient_matching`.
        real_labels: Not read: the batches hold one class each.
        decoded_images: As in :func:`gradient_matching`.
        decoded_labels: Not read.

    Returns:
        As :func:`gradient_matching`.

    Raises:
        ConfigError: The network has no ``features``.
    """
    features = getattr(network, "features", None)
    if not callable(features):
        raise ConfigError(
            f"distribution matching needs a network with features(images); "
            f"{type(network).__name__} has none"
        )
    decoded_images = decoded_images.detach().requires_grad_()
    with _keeping_statistics(network), torch.enable_grad():
        with torch.no_grad():
            real_means = [layer.mean(dim=0) for layer in features(real_images)]
        decoded_means = [layer.mean(dim=0) for layer in features(decoded_images)]
        loss = torch.stack(
            [
                (decoded - real).square().mean()
                for decoded, real in zip(decoded_means, real_means, strict=True)
            ]
        ).sum()
        (gradient,) = torch.autograd.grad(loss, decoded_images)
    return loss.detach(), gradient


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "gradient": gradient_matching,
    "distribution": distribution_matching,
}


def get_objective(name: str) -> Objective:
    """Return the objective of that name, or raise :class:`ConfigError` with the names there are."""
    for known in get_args(ObjectiveName):
        if name == known:
            return OBJECTIVES[known]
    raise ConfigError(f"objective is one of {', '.join(OBJECTIVES)}; got {name!r}")


def _convolution_weights(network: nn.Module) -> list[Tensor]:
    weights: list[Tensor] = [
        cast(nn.Parameter, module.weight)
        for module in network.modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    if not weights:
        raise ConfigError(
            f"gradient matching compares convolution weights; {type(network).__name__} has none"
        )
    return weights


@contextlib.contextmanager
def _requiring_grad(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let parameters require gradients inside the block, and restore their flags afterwards."""
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _keeping_statistics(network: nn.Module) -> Iterator[None]:
    """Let batch normalisation not record what it sees inside the block; what it gives is the same.

    In training mode it normalises by the batch, whether or not it tracks running statistics.
    """
    tracking = [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    ]
    try:
        for module in tracking:
            module.track_running_stats = False
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
