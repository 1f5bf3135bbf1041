"""How objectives pass batches through a network, and leave it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["keeping_statistics", "uncached_autocast", "with_gradients"]


@contextlib.contextmanager
def keeping_statistics(network: nn.Module) -> Iterator[None]:
    """Keep batch normalisation from updating its running statistics inside the block.

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


def uncached_autocast(device_type: str) -> torch.autocast:
    """Return the caller's autocast without its cache of cast weights.

    A weight that was cast under ``no_grad`` would stay without a graph in the cache.
    """
    return torch.autocast(
        device_type,
        torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )


def with_gradients(loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return the loss as a function of inputs, with gradients that are known already.

    Args:
        loss: A scalar without a graph.
        inputs: The tensors that the loss depends on.
        gradients: The loss's gradient with respect to each input, of its shape.

    Returns:
        The scalar; ``backward()`` hands the gradients over. It cannot be differentiated twice.
    """
    result: Tensor = _Known.apply(loss, *gradients, *inputs)
    return result


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[: len(tensors) // 2])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor, ...] = ctx.saved_tensors
        return None, *[None] * len(gradients), *(factor * gradient for gradient in gradients)
