"""Trajectory matching: a student's training on decoded images, compared with an expert's.

A pure function, like those of :mod:`hmn_replay.objectives.matching`, but of a stretch of training in place of
one gradient. Where its experts come from is in :mod:`hmn_replay.objectives.experts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hmn_replay.errors import ConfigError

__all__ = ["trajectory_matching"]


@torch.enable_grad()
def trajectory_matching(
    network: nn.Module,
    start: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    decoded_images: Tensor,
    decoded_labels: Tensor,
    batches: Sequence[Tensor],
    learning_rate: Tensor | float,
    augmentations: Sequence[Callable[[Tensor], Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Match where a student gets to with where an expert got to (MTT; Cazenavette et al. 2022).

    From an expert's parameters theta, a student takes N steps of plain SGD on decoded images,

        theta_(t+1) = theta_t - rate * grad L(theta_t, batch t),    theta_0 = theta,

    L the mean cross-entropy. The loss is its squared distance to the expert's parameters some
    epochs later, theta*, by what the expert itself has moved (arXiv 2203.11932, equation 2):

        || theta_N - theta* ||^2 / || theta - theta* ||^2.

    The gradient is exact: it goes through all of the steps. Yet no more than one of their graphs is
    kept: on the way back, each step is taken again from the parameters that it began with, and
    turns d loss / d theta_(t+1) into d loss / d theta_t by a product with its Hessian.

    Costs about 12 convolution passes over each batch, 3 on the way there and 9 on the way back,
    where 9 would do with all graphs kept. Peak memory is N + 1 copies of the parameters, and the
    second-order graph of one batch, which is twice the graph of a training step; it does not grow
    with the number of decoded images. What that comes to is in :mod:`hmn_replay.objectives.matching`.

    Args:
        network: Maps images to logits ``(N, K)``. Its architecture and mode count, its values do
            not. It is left as it is, and so are batch normalisation's statistics.
        start: The expert's parameters that the student begins with, by the names and on the device
            of the network's.
        target: The expert's parameters later, by the same names.
        decoded_images: float ``(B, C, H, W)``.
        decoded_labels: int64 ``(B,)``, class indices.
        batches: For each step of the student, the positions of its images, int64.
        learning_rate: The student's: a number, or a scalar on the network's device.
        augmentations: For each step, a differentiable function of its batch, which gives the same
            whenever it is called. Default: none.

    Returns:
        The loss, a scalar without a graph; its gradient with respect to the decoded images, 0 for
        those that no batch has; and with respect to the learning rate, a scalar. Of an expert that
        has not moved there is nothing to learn: a student that has not moved either is at 0.

    Raises:
        ConfigError: Parameters have other names or shapes than the network's, or there is not an
            augmentation for each batch.
    """
    names = list(dict(network.named_parameters()))
    path = [_values(network, start, "start")]
    wanted = _values(network, target, "target")
    augments = [_unchanged] * len(batches) if augmentations is None else list(augmentations)
    if len(augments) != len(batches):
        raise ConfigError(
            f"{len(batches)} batches need as many augmentations, or none; got {len(augments)}"
        )
    images = decoded_images.detach()
    rate = learning_rate.detach() if isinstance(learning_rate, Tensor) else learning_rate
    # Where batch normalisation writes statistics that nothing reads.
    buffers = {name: value.clone() for name, value in network.named_buffers()}

    def gradients_at(
        step: int, parameters: Sequence[Tensor], batch: Tensor, *, create_graph: bool
    ) -> tuple[Tensor, ...]:
        values = {**buffers, **dict(zip(names, parameters, strict=True))}
        logits = functional_call(network, values, (augments[step](batch),))
        loss = F.cross_entropy(logits, decoded_labels[batches[step]])
        return torch.autograd.grad(
            loss, parameters, create_graph=create_graph, materialize_grads=True
        )

    def step_back(step: int, values: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        """Return the step's gradient times a vector, and how that changes with what it is of."""
        parameters, batch = _leaves(values), images[batches[step]].requires_grad_()
        gradients = gradients_at(step, parameters, batch, create_graph=True)
        along = torch.stack([(g * v).sum() for g, v in zip(gradients, vector, strict=True)]).sum()
        changes = torch.autograd.grad(along, [batch, *parameters], materialize_grads=True)
        return [along.detach(), *changes]

    for step, indices in enumerate(batches):
        found = gradients_at(step, _leaves(path[-1]), images[indices], create_graph=False)
        path.append([p - rate * g for p, g in zip(path[-1], found, strict=True)])

    # An expert that stands still would divide by zero.
    moved = _squared_distance(path[0], wanted).clamp_min(torch.finfo(wanted[0].dtype).tiny)
    loss = _squared_distance(path[-1], wanted) / moved
    backward = [2 * (p - w) / moved for p, w in zip(path.pop(), wanted, strict=True)]
    image_gradient, rate_gradient = torch.zeros_like(images), torch.zeros_like(loss)
    for step, indices in reversed(list(enumerate(batches))):
        along, of_batch, *of_parameters = step_back(step, path.pop(), backward)
        backward = [b - rate * c for b, c in zip(backward, of_parameters, strict=True)]
        image_gradient.index_add_(0, indices, -rate * of_batch)
        rate_gradient -= along
    return loss, image_gradient, rate_gradient


def _values(network: nn.Module, given: Mapping[str, Tensor], which: str) -> list[Tensor]:
    """Return parameters in the network's order, or raise :class:`ConfigError`."""
    expected = {name: tuple(value.shape) for name, value in network.named_parameters()}
    came = {name: tuple(value.shape) for name, value in given.items()}
    if came != expected:
        differing = sorted({*came.items()} ^ {*expected.items()})
        raise ConfigError(
            f"{which} must hold the parameters of {type(network).__name__}, by name; "
            f"{differing[0][0]!r} is absent there, or here, or of another shape"
        )
    return [given[name].detach() for name in expected]


def _squared_distance(one: Sequence[Tensor], two: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a - b).square().sum() for a, b in zip(one, two, strict=True)]).sum()


def _leaves(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.detach().requires_grad_() for value in values]


def _unchanged(images: Tensor) -> Tensor:
    return images
