"""Tuning of a network on class-balanced mini-batches (as in EEIL, Castro et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hmn_replay.training.train import cosine_lr

__all__ = ["by_class", "draw_balanced", "tune_network"]


def tune_network(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    rate: float,
) -> None:
    """Take steps of SGD with momentum 0.9; gradients and modes are as before in the end.

    The network is in training mode meanwhile, but for batch normalisation, whose running
    statistics stay as they are.

    Args:
        model: The network.
        parameters: Those of its parameters that learn.
        loss: The loss of a step, by the step's number.
        steps: How many steps.
        rate: Learning rate at first; it falls to 0 along half a cosine.
    """
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    kept = [each.grad for each in parameters]
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in model.modules():
        module.training = module.training and not isinstance(module, _BatchNorm)
    try:
        with torch.enable_grad():
            for step in range(steps):
                gradients = torch.autograd.grad(loss(step), parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.param_groups[0]["lr"] = cosine_lr(step, steps, rate)
                optimizer.step()
    finally:
        for parameter, before in zip(parameters, kept, strict=True):
            parameter.grad = before
        for module, mode in modes.items():
            module.training = mode


def by_class(labels: Tensor) -> list[Tensor]:
    """Return the positions of each class's images, int64 ``(n,)`` on the CPU."""
    labels = labels.cpu()
    return [(labels == label).nonzero().flatten() for label in labels.unique().tolist()]


def draw_balanced(by_class: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Draw positions of images, of each class as many or one more, in random order: ``(n,)``."""
    order = torch.randperm(len(by_class), generator=generator).repeat(count // len(by_class) + 1)
    drawn = torch.rand(count, generator=generator)
    chosen = [
        by_class[index][int(share * len(by_class[index]))]
        for index, share in zip(order[:count].tolist(), drawn.tolist(), strict=True)
    ]
    return torch.stack(chosen)
