"""Matching of gradients: by squared distance (IDC and HMN), or by direction (DC and DSA)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn_replay.errors import ConfigError
from hmn_replay.objectives._convnet import ConvNet
from hmn_replay.objectives._network import (
    keeping_statistics,
    requires_grad,
    uncached_autocast,
    with_gradients,
)

__all__ = ["cosine_matching", "gradient_matching"]

# DC's code adds it to the product of two norms.
_COSINE_FLOOR = 1e-6


def gradient_matching(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
) -> Tensor:
    """Match the gradients of the convolution weights (Zheng et al. 2024, Section 3.1; IDC).

    The loss is the squared Euclidean distance, summed over the convolution weights W,

        sum_W || dL/dW (decoded) - dL/dW (real) ||^2,

    where L is the mean cross-entropy of a batch. Biases, norms and the head are left out, as IDC
    does (Kim et al. 2022, arXiv 2205.14959).

    The gradient to the decoded images is computed with the loss, where they require one, and
    ``backward()`` hands it over: network weights get no gradient, and the loss cannot be
    differentiated twice. For this package's ConvNet it is computed in closed form, with 7
    convolution passes over the decoded batch; for other networks by double backward, with about 9.
    The real batch costs a training step. Peak memory is less than a training step's for a ConvNet,
    and about twice that for other networks, whose second-order graph it holds.

    Under ``torch.autocast`` the network computes in its dtype; distances stay in the network's.

    Args:
        network: Maps images to logits ``(N, K)``. It is left as it was: its parameters' ``.grad``
            and ``requires_grad``, its mode, and the running statistics of batch normalisation. No
            other thread may use it during the call.
        real_images: float ``(R, C, H, W)``, augmented as the decoded ones are.
        real_labels: int64 ``(R,)``, class indices.
        decoded_images: float ``(B, C, H, W)``.
        decoded_labels: int64 ``(B,)``, class indices.

    Returns:
        The loss, a scalar with a graph to ``decoded_images``.

    Raises:
        ConfigError: The network has no convolution.
    """
    weights: list[Tensor] = [
        cast(nn.Parameter, module.weight)
        for module in network.modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    if not weights:
        raise ConfigError(
            f"gradient matching compares convolution weights; {type(network).__name__} has none"
        )
    real, decoded = (real_images, real_labels), (decoded_images, decoded_labels)
    return _match(network, weights, _squared_distance, real, decoded)


def cosine_matching(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
) -> Tensor:
    """Match the directions of the gradients of the weights, filter by filter (DC and DSA).

    The loss is the distance of Zhao et al. 2021 (arXiv 2006.05929, equation 6 and appendix), summed
    over the weights W of convolutions and linear layers, including the head, and their output
    filters,

        sum_W sum_o 1 - <d_o, r_o> / (|d_o| |r_o| + 1e-6),

    where d_o and r_o are row o of dL/dW on the decoded and on the real batch, as a matrix of output
    filters by all other axes. L is the mean cross-entropy of a batch. Biases and norms, all
    parameters of a single axis, are left out. The 1e-6 is that of DC's code: filters without a
    gradient are at distance 1, and small gradients, as a network has late in its training, count
    for less.

    DSA (Zhao and Bilen 2021, arXiv 2102.08259) has the same distance, between batches that the
    caller has augmented alike. Cost, peak memory, precision and the graph of the loss are those of
    :func:`gradient_matching`.

    Args:
        network: Maps images to logits ``(N, K)``. It is left as :func:`gradient_matching` leaves
            it.
        real_images: float ``(R, C, H, W)``, augmented as the decoded ones are.
        real_labels: int64 ``(R,)``, class indices.
        decoded_images: float ``(B, C, H, W)``.
        decoded_labels: int64 ``(B,)``, class indices.

    Returns:
        The loss, a scalar with a graph to ``decoded_images``.

    Raises:
        ConfigError: The network has no parameter of two axes or more.
    """
    weights: list[Tensor] = [p for p in network.parameters() if p.ndim >= 2]
    if not weights:
        raise ConfigError(
            "cosine matching compares the weights of convolutions and linear layers; "
            f"{type(network).__name__} has none"
        )
    real, decoded = (real_images, real_labels), (decoded_images, decoded_labels)
    return _match(network, weights, _cosine_distance, real, decoded)


_Batch = tuple[Tensor, Tensor]
_Distance = Callable[[Tensor, Tensor], Tensor]


def _match(
    network: nn.Module,
    weights: Sequence[Tensor],
    distance: _Distance,
    real: _Batch,
    decoded: _Batch,
) -> Tensor:
    """Return the summed distance of the weights' gradients, with a graph to the decoded images."""
    images, labels = decoded
    wants_gradient = images.requires_grad and torch.is_grad_enabled()
    values, real = images.detach(), (real[0].detach(), real[1])
    match = _in_closed_form if ConvNet.is_convnet(network) else _by_double_backward
    loss, gradient = match(network, weights, distance, real, (values, labels), wants_gradient)
    return loss if gradient is None else with_gradients(loss, [images], [gradient])


def _in_closed_form(
    network: nn.Module,
    weights: Sequence[Tensor],
    distance: _Distance,
    real: _Batch,
    decoded: _Batch,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    convnet = ConvNet(network)
    real_gradients, _ = convnet.weight_gradients(*real)
    decoded_gradients, trace = convnet.weight_gradients(*decoded, keep=wants_gradient)
    matched = [gradient.requires_grad_() for gradient in decoded_gradients[: len(weights)]]
    with torch.enable_grad():
        loss = torch.stack(list(map(distance, matched, real_gradients))).sum()
    if not wants_gradient:
        return loss.detach(), None
    return loss.detach(), convnet.image_gradient(trace, torch.autograd.grad(loss, matched))


def _by_double_backward(
    network: nn.Module,
    weights: Sequence[Tensor],
    distance: _Distance,
    real: _Batch,
    decoded: _Batch,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    images = decoded[0].requires_grad_(wants_gradient)

    def gradients(images: Tensor, labels: Tensor, create_graph: bool) -> tuple[Tensor, ...]:
        with uncached_autocast(images.device.type):
            loss = F.cross_entropy(network(images), labels)
        # A weight without a part in the logits has a gradient of 0.
        return torch.autograd.grad(loss, weights, create_graph=create_graph, materialize_grads=True)

    with keeping_statistics(network), requires_grad(weights, True), torch.enable_grad():
        real_gradients = gradients(*real, create_graph=False)
        decoded_gradients = gradients(images, decoded[1], create_graph=wants_gradient)
        loss = torch.stack(list(map(distance, decoded_gradients, real_gradients))).sum()
        gradient = torch.autograd.grad(loss, images)[0] if wants_gradient else None
    return loss.detach(), gradient


def _squared_distance(decoded: Tensor, real: Tensor) -> Tensor:
    return (decoded - real).square().sum()


def _cosine_distance(decoded: Tensor, real: Tensor) -> Tensor:
    decoded, real = decoded.flatten(1), real.flatten(1)
    norms = decoded.norm(dim=1) * real.norm(dim=1)
    return torch.sum(1 - (decoded * real).sum(dim=1) / (norms + _COSINE_FLOOR))
