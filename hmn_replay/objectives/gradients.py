"""Matching of gradients: by squared distance (IDC and HMN), or by direction (DC and DSA)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn_replay.errors import ConfigError
from hmn_replay.objectives._network import keeping_statistics, uncached_autocast, with_gradients
from hmn_replay.training.networks import requires_grad
from hmn_replay.training.train import CompiledFunction, mixes_images

__all__ = [
    "CompiledMatch",
    "Match",
    "cosine_matching",
    "double_backward",
    "gradient_matching",
]

# DC's code adds it to the product of two norms.
_COSINE_FLOOR = 1e-6
# The label of images that pad a batch.
_IGNORED = -1

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Float images ``(N, C, H, W)``, and their labels, int64 ``(N,)``."""

Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From a weight's gradients on the decoded and on the real batch to a scalar."""

Match: TypeAlias = Callable[
    [nn.Module, tuple[str, ...], Distance, Batch, Batch], tuple[Tensor, Tensor | None]
]
"""From a network, the names of its weights that are compared, their distance, the real and the
decoded batch to the summed distance and its gradient to the decoded images, or None where these
require none; both without a graph."""


def double_backward(
    network: nn.Module,
    names: tuple[str, ...],
    distance: Distance,
    real: Batch,
    decoded: Batch,
) -> tuple[Tensor, Tensor | None]:
    """Match gradients by a backward pass through a backward pass; a :data:`Match`.

    The decoded batch takes about nine convolution passes, the real one a training step.
    """
    wants_gradient = decoded[0].requires_grad
    weights = [network.get_parameter(name) for name in names]

    def gradients(images: Tensor, labels: Tensor, create_graph: bool) -> tuple[Tensor, ...]:
        with uncached_autocast(images.device.type):
            loss = F.cross_entropy(network(images), labels)
        # A weight without a part in the logits has a gradient of 0.
        return torch.autograd.grad(loss, weights, create_graph=create_graph, materialize_grads=True)

    with keeping_statistics(network), requires_grad(weights, True), torch.enable_grad():
        wanted = gradients(*real, create_graph=False)
        found = gradients(*decoded, create_graph=wants_gradient)
        loss = torch.stack(list(map(distance, found, wanted))).sum()
        gradient = torch.autograd.grad(loss, decoded[0])[0] if wants_gradient else None
    return loss.detach(), gradient


class CompiledMatch:
    """What :func:`double_backward` does, compiled; a :data:`Match` for one run.

    Both backward passes are traced into one graph, in which what they have in common is computed
    once. Networks of one architecture share it. Where an image's logits depend on the batch's
    others, by batch normalisation, nothing is compiled.

    Args:
        backend: What torch.compile compiles with.
    """

    def __init__(self, backend: str | Callable[..., object] = "inductor") -> None:
        self._gradients = CompiledFunction(_weight_gradients, backend=backend)
        self._matched = CompiledFunction(_matched, image_dims=None, backend=backend)
        self._num_rows = 0

    def __call__(
        self,
        network: nn.Module,
        names: tuple[str, ...],
        distance: Distance,
        real: Batch,
        decoded: Batch,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss and the gradient; those of :func:`double_backward` but for rounding."""
        if not decoded[0].requires_grad or mixes_images(network):
            return double_backward(network, names, distance, real, decoded)
        images, labels = decoded[0].detach(), decoded[1]
        # Torch's second derivative of a group norm is for one number of images: fewer are padded.
        self._num_rows = max(self._num_rows, len(images))
        num_missing = self._num_rows - len(images)
        padding = images[:1].expand(num_missing, *images.shape[1:])
        with uncached_autocast(images.device.type), torch.no_grad():
            wanted = self._gradients(network, *real, names)
            loss, gradient = self._matched(
                network,
                torch.cat([images, padding]),
                F.pad(labels, (0, num_missing), value=_IGNORED),
                names,
                distance,
                *wanted,
            )
        return loss, gradient[: len(images)]


def _weight_gradients(
    network: nn.Module, images: Tensor, labels: Tensor, names: tuple[str, ...]
) -> tuple[Tensor, ...]:
    """Return the gradients of the mean cross-entropy to the weights of some names."""
    weights, others = _parameters_of(network, names)

    def loss_of(weights: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(network, {**others, **weights}, (images,))
        return F.cross_entropy(logits, labels, ignore_index=_IGNORED)

    gradients = torch.func.grad(loss_of)(weights)
    return tuple(gradients[name] for name in names)


def _matched(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    names: tuple[str, ...],
    distance: Distance,
    *wanted: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the distance from the wanted gradients, and its gradient to the images."""

    def distance_of(images: Tensor) -> Tensor:
        found = _weight_gradients(network, images, labels, names)
        return torch.stack(list(map(distance, found, wanted))).sum()

    gradient, loss = torch.func.grad_and_value(distance_of)(images)
    return loss, gradient


def _parameters_of(
    network: nn.Module, names: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of some names, and the network's other parameters, without graphs."""
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    return {name: parameters.pop(name) for name in names}, parameters


def gradient_matching(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
    match: Match = double_backward,
) -> Tensor:
    """Match the gradients of the convolution weights (Zheng et al. 2024, Section 3.1; IDC).

    The loss is the squared Euclidean distance, summed over the convolution weights W,

        sum_W || dL/dW (decoded) - dL/dW (real) ||^2,

    where L is the mean cross-entropy of a batch. Biases, norms and the head are left out, as IDC
    does (Kim et al. 2022, arXiv 2205.14959).

    The gradient to the decoded images is computed with the loss, where they require one, and
    ``backward()`` hands it over: network weights get no gradient, and the loss cannot be
    differentiated twice. The decoded batch costs about three training steps, the real one a single
    step. Peak memory is about twice a training step's, for the second-order graph.

    Under ``torch.autocast`` the network computes in its dtype; distances stay in the network's.

    Args:
        network: Maps images to logits ``(N, K)``. It is left as it was: its parameters' ``.grad``
            and ``requires_grad``, its mode, and the running statistics of batch normalisation. No
            other thread may use it during the call.
        real_images: float ``(R, C, H, W)``, augmented as the decoded ones are.
        real_labels: int64 ``(R,)``, class indices.
        decoded_images: float ``(B, C, H, W)``.
        decoded_labels: int64 ``(B,)``, class indices.
        match: How the loss and its gradient are computed: a :class:`CompiledMatch` is several times
            faster, after a minute or so of compiling.

    Returns:
        The loss, a scalar with a graph to ``decoded_images``.

    Raises:
        ConfigError: The network has no convolution.
    """
    # What has the weight's shape: the weight itself, or what a parametrization makes it of.
    names = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        for name, value in module.named_parameters()
        if value.shape == module.weight.shape
    ]
    if not names:
        raise ConfigError(
            f"gradient matching compares convolution weights; {type(network).__name__} has none"
        )
    real, decoded = (real_images, real_labels), (decoded_images, decoded_labels)
    return _loss(network, names, _squared_distance, real, decoded, match)


def cosine_matching(
    network: nn.Module,
    real_images: Tensor,
    real_labels: Tensor,
    decoded_images: Tensor,
    decoded_labels: Tensor,
    match: Match = double_backward,
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
        match: How the loss and its gradient are computed: a :class:`CompiledMatch` is several times
            faster, after a minute or so of compiling.

    Returns:
        The loss, a scalar with a graph to ``decoded_images``.

    Raises:
        ConfigError: The network has no parameter of two axes or more.
    """
    names = [name for name, value in network.named_parameters() if value.ndim >= 2]
    if not names:
        raise ConfigError(
            "cosine matching compares the weights of convolutions and linear layers; "
            f"{type(network).__name__} has none"
        )
    real, decoded = (real_images, real_labels), (decoded_images, decoded_labels)
    return _loss(network, names, _cosine_distance, real, decoded, match)


def _loss(
    network: nn.Module,
    names: Sequence[str],
    distance: Distance,
    real: Batch,
    decoded: Batch,
    match: Match,
) -> Tensor:
    """Return the summed distance of the weights' gradients, with a graph to the decoded images."""
    images, labels = decoded
    wants_gradient = images.requires_grad and torch.is_grad_enabled()
    leaf = images.detach().requires_grad_(wants_gradient)
    loss, gradient = match(
        network, tuple(names), distance, (real[0].detach(), real[1]), (leaf, labels)
    )
    return loss if gradient is None else with_gradients(loss, [images], [gradient])


def _squared_distance(decoded: Tensor, real: Tensor) -> Tensor:
    return (decoded - real).square().sum()


def _cosine_distance(decoded: Tensor, real: Tensor) -> Tensor:
    decoded, real = decoded.flatten(1), real.flatten(1)
    norms = decoded.norm(dim=1) * real.norm(dim=1)
    return torch.sum(1 - (decoded * real).sum(dim=1) / (norms + _COSINE_FLOOR))
