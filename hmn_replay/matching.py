"""Matching objectives: pure functions of a network and two batches.

Each takes a network, a real batch and a decoded batch, and returns the loss and its gradient with
respect to the decoded batch. None of them knows what decoded the images: the caller sends the
gradient on to the memory with ``decoded.backward(gradient)``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    "Recipe",
    "distribution_matching",
    "embedding_matching",
    "get_recipe",
    "gradient_matching",
    "layerwise_cosine_matching",
]

ObjectiveName = Literal["gradient", "distribution", "dc", "dsa", "dm"]

# As in DC's published code.
_EPSILON = 1e-6


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
    return _match_gradients(
        _squared_distance,
        weights,
        network,
        real_images,
        real_labels,
        decoded_images,
        decoded_labels,
    )


def layerwise_cosine_matching(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Match the directions of gradients, one for each output filter: the distance of DC and DSA.

    Zhao et al. 2021, arXiv 2006.05929, Eq. 9: the sum over layers and their output filters o,

        sum_W sum_o 1 - <g_o, r_o> / (|g_o| |r_o|),

    where g_o and r_o are all of the decoded and the real gradient that belong to o. As in DC's
    published code, W are the weights of convolutions and linear layers, not biases and norms. DSA
    (Zhao and Bilen 2021, arXiv 2102.08259) has the same distance after one augmentation of both
    batches. Costs what :func:`gradient_matching` costs, and the head's gradient.

    Args:
        network: As in :func:`gradient_matching`.
        real_images: As in :func:`gradient_matching`.
        real_labels: As in :func:`gradient_matching`.
        decoded_images: As in :func:`gradient_matching`.
        decoded_labels: As in :func:`gradient_matching`.

    Returns:
        As :func:`gradient_matching`.

    Raises:
        ConfigError: The network has no convolution and no linear layer.
    """
    weights = _weights(network, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear), "weights of layers")
    return _match_gradients(
        _cosine_distance,
        weights,
        network,
        real_images,
        real_labels,
        decoded_images,
        decoded_labels,
    )


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
    return _match_means(network, real_images, decoded_images, _every_block)


def embedding_matching(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Match the mean embedding, the last block's output: DM as published (arXiv 2110.04181, Eq. 5).

    The loss is the squared Euclidean distance of the batch means. First order only, as
    :func:`distribution_matching`.

    Args:
        network: As in :func:`distribution_matching`.
        real_images: As in :func:`gradient_matching`.
        real_labels: Not read: the batches hold one class each.
        decoded_images: As in :func:`gradient_matching`.
        decoded_labels: Not read.

    Returns:
        As :func:`gradient_matching`.

    Raises:
        ConfigError: The network has no ``features``.
    """
    return _match_means(network, real_images, decoded_images, _last_block)


@dataclass(frozen=True)
class Recipe:
    """An objective, and what the loop does around it as its paper does.

    Attributes:
        function: The objective.
        augments: Whether one augmentation is drawn for real and decoded images.
        learns_from: What the network learns from between steps: real images (IDC), the decoded
            ones (DC, DSA), or nothing (DM).
    """

    function: Objective
    augments: bool = True
    learns_from: Literal["real", "decoded", "nothing"] = "real"


OBJECTIVES: dict[ObjectiveName, Recipe] = {
    "gradient": Recipe(gradient_matching),
    "distribution": Recipe(distribution_matching),
    "dc": Recipe(layerwise_cosine_matching, augments=False, learns_from="decoded"),
    "dsa": Recipe(layerwise_cosine_matching, learns_from="decoded"),
    "dm": Recipe(embedding_matching, learns_from="nothing"),
}
"""``"gradient"`` is IDC's and the paper's; ``"distribution"`` is ours, with every block."""


def get_recipe(name: str) -> Recipe:
    """Return the objective of that name, or raise :class:`ConfigError` with the names there are."""
    for known in get_args(ObjectiveName):
        if name == known:
            return OBJECTIVES[known]
    raise ConfigError(f"objective is one of {', '.join(OBJECTIVES)}; got {name!r}")


def _match_gradients(
    distance: Callable[[Tensor, Tensor], Tensor],
    weights: list[Tensor],
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
) -> tuple[Tensor, Tensor]:
    decoded_images = decoded_images.detach().requires_grad_()
    with _keeping_statistics(network), _requiring_grad(weights), torch.enable_grad():
        real_loss = F.cross_entropy(network(real_images.detach()), real_labels)
        real_gradients = torch.autograd.grad(real_loss, weights)
        decoded_loss = F.cross_entropy(network(decoded_images), decoded_labels)
        decoded_gradients = torch.autograd.grad(decoded_loss, weights, create_graph=True)
        pairs = zip(decoded_gradients, real_gradients, strict=True)
        loss = torch.stack([distance(decoded, real) for decoded, real in pairs]).sum()
        (gradient,) = torch.autograd.grad(loss, decoded_images)
    return loss.detach(), gradient


def _squared_distance(decoded: Tensor, real: Tensor) -> Tensor:
    return (decoded - real).square().sum()


def _cosine_distance(decoded: Tensor, real: Tensor) -> Tensor:
    decoded, real = decoded.flatten(1), real.flatten(1)
    norms = decoded.norm(dim=1) * real.norm(dim=1)
    cosines = (decoded * real).sum(dim=1) / (norms + _EPSILON)
    return cosines.sub(1).neg().sum()


def _match_means(
    network: nn.Module,
    real_images: Tensor,
    decoded_images: Tensor,
    distance: Callable[[list[Tensor], list[Tensor]], Tensor],
) -> tuple[Tensor, Tensor]:
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
        loss = distance(decoded_means, real_means)
        (gradient,) = torch.autograd.grad(loss, decoded_images)
    return loss.detach(), gradient


def _every_block(decoded: list[Tensor], real: list[Tensor]) -> Tensor:
    pairs = zip(decoded, real, strict=True)
    distances = torch.stack([(own - other).square().mean() for own, other in pairs])
    return distances.sum()


def _last_block(decoded: list[Tensor], real: list[Tensor]) -> Tensor:
    return _squared_distance(decoded[-1], real[-1])


def _convolution_weights(network: nn.Module) -> list[Tensor]:
    return _weights(network, (nn.Conv1d, nn.Conv2d, nn.Conv3d), "convolution weights")


def _weights(network: nn.Module, kinds: tuple[type[nn.Module], ...], what: str) -> list[Tensor]:
    weights: list[Tensor] = [
        cast(nn.Parameter, module.weight)
        for module in network.modules()
        if isinstance(module, kinds)
    ]
    if not weights:
        raise ConfigError(f"gradient matching compares {what}; {type(network).__name__} has none")
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
