"""Matching objectives: pure functions of a network and two batches.

Each takes a network, a real batch and a decoded batch, and returns the loss and its gradient with
respect to the decoded batch. None of them knows what decoded the images: the caller sends the
gradient on to the memory with ``decoded.backward(gradient)``. What else a caller does for each of
them is in :data:`OBJECTIVES`. Trajectory matching, which compares whole trainings, is in
:mod:`hmn_replay.objectives.trajectories`.

What a call costs in float32, of 64 real and 64 decoded images of 32 x 32 and a ConvNet-3 of width
128, on one core, the other busy (``python experiments/benchmark.py objectives --threads 1``),
beside a training step on the decoded images alone:

===========================  ===============  ===========
objective                    forward passes   peak memory
                             of 64 images
===========================  ===============  ===========
(training step)                          2.9       211 MB
`gradient`                               5.1       122 MB
`dc`, `dsa`                              5.1       119 MB
`distribution`                           3.5       207 MB
`dm`                                     3.5       210 MB
`mtt`, each of 10 steps                 15.8       447 MB
===========================  ===============  ===========

All but `mtt` are called once for each class of a step. With one step of the student `mtt` takes
397 MB, and with 30 of them 555 MB; no real images.
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
from hmn_replay.objectives.convnet_derivatives import ConvNet

__all__ = [
    "OBJECTIVES",
    "Objective",
    "ObjectiveName",
    "Recipe",
    "cosine_matching",
    "distribution_matching",
    "get_recipe",
    "gradient_matching",
    "keeping_statistics",
    "last_block_matching",
]

ObjectiveName = Literal["gradient", "dc", "dsa", "distribution", "dm", "mtt"]

# DC's code adds it to the product of two norms.
_COSINE_FLOOR = 1e-6


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
    does (Kim et al. 2022, arXiv 2205.14959).

    Costs a training step on the real batch, and on the decoded one 7 convolution passes for a
    ConvNet, about 9 for other networks. Peak memory is a ConvNet's three maps of every layer but
    the first on the decoded batch, less than a training step's; other networks' second-order graph
    is twice a training step's. It grows with the decoded batch, and for other networks with the
    larger of the two.

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
    return _match_gradients(
        network,
        _convolution_weights(network),
        lambda decoded, real: (decoded - real).square().sum(),
        (real_images, real_labels),
        (decoded_images, decoded_labels),
    )


def cosine_matching(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Match the directions of the gradients of the weights, filter by filter (DC and DSA).

    The loss is the distance of Zhao et al. 2021 (arXiv 2006.05929, equation 6 and appendix), summed
    over the weights W of convolutions and linear layers, the head's too, and their output filters,

        sum_W sum_o 1 - <d_o, r_o> / (|d_o| |r_o| + 1e-6),

    where d_o and r_o are row o of dL/dW on the decoded and on the real batch, as a matrix of output
    filters by all the rest. L is the mean cross-entropy of a batch. Biases and norms are left out:
    all parameters of one axis are. The 1e-6 is that of DC's code: filters without a gradient are at
    distance 1, and those with little of it, as a network has late in its training, count for less.

    DSA (Zhao and Bilen 2021, arXiv 2102.08259) has the same distance, between batches that the
    caller has augmented alike. Costs and peak memory are those of :func:`gradient_matching`.

    Args:
        network: As in :func:`gradient_matching`.
        real_images: As in :func:`gradient_matching`.
        real_labels: As in :func:`gradient_matching`.
        decoded_images: As in :func:`gradient_matching`.
        decoded_labels: As in :func:`gradient_matching`.

    Returns:
        As :func:`gradient_matching`.

    Raises:
        ConfigError: The network has no parameter of two axes or more.
    """
    weights: list[Tensor] = [p for p in network.parameters() if p.ndim >= 2]
    if not weights:
        raise ConfigError(
            "cosine matching compares the weights of convolutions and linear layers; "
            f"{type(network).__name__} has none"
        )
    return _match_gradients(
        network,
        weights,
        _cosine_distance,
        (real_images, real_labels),
        (decoded_images, decoded_labels),
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
    features. DM matches the last block alone; with all of them, no block is left to chance.

    First order only. Costs a forward pass on the real batch and a training step on the decoded one,
    less the gradients of the weights; peak memory is that of a training step on the decoded batch.

    Args:
        network: Has ``features(images)``, a list of tensors ``(N, ...)``, as the networks of
            :mod:`hmn_replay.training.networks` have.
        real_images: As in :func:`gradient_matching`.
        real_labels: Not read: the batches hold one class each.
        decoded_images: As in :func:`gradient_matching`.
        decoded_labels: Not read.

    Returns:
        As :func:`gradient_matching`.

    Raises:
        ConfigError: The network has no ``features``.
    """
    return _match_means(
        network,
        real_images,
        decoded_images,
        lambda decoded, real: torch.stack(
            [(d - r).square().mean() for d, r in zip(decoded, real, strict=True)]
        ).sum(),
    )


def last_block_matching(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Match the mean features of the last block (DM; Zhao and Bilen 2023, arXiv 2110.04181, eq. 5).

    The loss is the squared Euclidean distance of the batch means of the last block's output,
    flattened: summed over features, as in DM's code, where :func:`distribution_matching` takes the
    mean. The network is drawn afresh for every step, and never trained. Costs and peak memory are
    those of :func:`distribution_matching`.

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
    return _match_means(
        network,
        real_images,
        decoded_images,
        lambda decoded, real: (decoded[-1] - real[-1]).square().sum(),
    )


@dataclass(frozen=True)
class Recipe:
    """An objective, and what a loop does around it.

    Attributes:
        function: The objective; None where whole trainings are compared in place of two batches, by
            :func:`hmn_replay.objectives.trajectories.trajectory_matching`.
        augments: Whether real and decoded images are augmented, both by the same draw.
        learns_from: What the network learns from after each step: the real images, the decoded
            ones, or nothing. A network that learns nothing is drawn afresh for every step.
    """

    function: Objective | None
    augments: bool = True
    learns_from: Literal["real", "decoded", "nothing"] = "real"


OBJECTIVES: dict[ObjectiveName, Recipe] = {
    "gradient": Recipe(gradient_matching),
    "dc": Recipe(cosine_matching, augments=False, learns_from="decoded"),
    "dsa": Recipe(cosine_matching, learns_from="decoded"),
    "distribution": Recipe(distribution_matching),
    "dm": Recipe(last_block_matching, learns_from="nothing"),
    "mtt": Recipe(None, learns_from="nothing"),
}
"""The objectives by name: of IDC (`gradient`), DC, DSA, DM over all blocks, DM itself, and MTT."""


def get_recipe(name: str) -> Recipe:
    """Return the recipe of that name, or raise :class:`ConfigError` with the names there are."""
    for known in get_args(ObjectiveName):
        if name == known:
            return OBJECTIVES[known]
    raise ConfigError(f"objective is one of {', '.join(OBJECTIVES)}; got {name!r}")


@contextlib.contextmanager
def keeping_statistics(network: nn.Module) -> Iterator[None]:
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


def _match_gradients(
    network: nn.Module,
    weights: Sequence[Tensor],
    distance: Callable[[Tensor, Tensor], Tensor],
    real: tuple[Tensor, Tensor],
    decoded: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the distance of the weights' gradients, summed, and its gradient to the images."""
    if ConvNet.is_convnet(network):
        return _match_in_closed_form(ConvNet(network), len(weights), distance, real, decoded)
    images, labels = decoded[0].detach().requires_grad_(), decoded[1]
    with keeping_statistics(network), _requiring_grad(weights), torch.enable_grad():
        real_loss = F.cross_entropy(network(real[0].detach()), real[1])
        real_gradients = torch.autograd.grad(real_loss, weights)
        decoded_loss = F.cross_entropy(network(images), labels)
        decoded_gradients = torch.autograd.grad(decoded_loss, weights, create_graph=True)
        loss = torch.stack(list(map(distance, decoded_gradients, real_gradients))).sum()
        (gradient,) = torch.autograd.grad(loss, images)
    return loss.detach(), gradient


def _match_in_closed_form(
    convnet: ConvNet,
    num_weights: int,
    distance: Callable[[Tensor, Tensor], Tensor],
    real: tuple[Tensor, Tensor],
    decoded: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    real_gradients, _ = convnet.weight_gradients(*real)
    decoded_gradients, trace = convnet.weight_gradients(*decoded, keep=True)
    matched = [gradient.requires_grad_() for gradient in decoded_gradients[:num_weights]]
    with torch.enable_grad():
        loss = torch.stack(list(map(distance, matched, real_gradients))).sum()
    return loss.detach(), convnet.image_gradient(trace, torch.autograd.grad(loss, matched))


def _match_means(
    network: nn.Module,
    real_images: Tensor,
    decoded_images: Tensor,
    distance: Callable[[list[Tensor], list[Tensor]], Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the distance of the mean features of all blocks, and its gradient to the images."""
    features = getattr(network, "features", None)
    if not callable(features):
        raise ConfigError(
            f"distribution matching needs a network with features(images); "
            f"{type(network).__name__} has none"
        )
    images = decoded_images.detach().requires_grad_()
    with keeping_statistics(network), torch.enable_grad():
        with torch.no_grad():
            real_means = [layer.mean(dim=0) for layer in features(real_images)]
        decoded_means = [layer.mean(dim=0) for layer in features(images)]
        loss = distance(decoded_means, real_means)
        (gradient,) = torch.autograd.grad(loss, images)
    return loss.detach(), gradient


def _cosine_distance(decoded: Tensor, real: Tensor) -> Tensor:
    decoded, real = decoded.flatten(1), real.flatten(1)
    norms = decoded.norm(dim=1) * real.norm(dim=1)
    return torch.sum(1 - (decoded * real).sum(dim=1) / (norms + _COSINE_FLOOR))


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
