"""Weights of a network that are noted, compared, and put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hmn_replay.files import digest_tensors

__all__ = [
    "digest_of",
    "digests_like",
    "is_same_network",
    "on_cpu",
    "take_weights",
    "weight_digests",
    "weights_of",
]


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU, without a graph."""
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


@torch.no_grad()
def take_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a network those of some weights whose names and shapes it has."""
    for name, parameter in model.named_parameters():
        if name in weights and weights[name].shape == parameter.shape:
            parameter.copy_(weights[name])


def digests_like(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Return a digest of each of a network's weights whose name and shape are given."""
    return {
        name: _digest(name, each)
        for name, each in model.named_parameters()
        if name in weights and weights[name].shape == each.shape
    }


def weight_digests(model: nn.Module) -> dict[tuple[str, tuple[int, ...]], str]:
    """Return a digest of each of a network's weights, by its name and shape."""
    return {
        (name, tuple(each.shape)): _digest(name, each) for name, each in model.named_parameters()
    }


def _digest(name: str, weight: Tensor) -> str:
    return digest_tensors("", {name: weight.detach()})


def digest_of(model: nn.Module) -> str:
    """Return a digest of a network's state: that of copies with the same weights is the same."""
    state = getattr(model, "_orig_mod", model).state_dict()  # compiled or not
    return digest_tensors("", {k: v for k, v in state.items() if isinstance(v, Tensor)})


def is_same_network(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules are one, or copies with the same weights."""
    one, other = (getattr(each, "_orig_mod", each) for each in (one, other))  # compiled or not
    if one is other:
        return True
    own, others = one.state_dict(), other.state_dict()
    return own.keys() == others.keys() and all(
        isinstance(value, Tensor) and value.cpu().equal(others[name].cpu())
        for name, value in own.items()
    )


@contextlib.contextmanager
def weights_of(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a network some weights inside the block, by their names, and its own after it."""
    own = on_cpu({name: each for name, each in model.named_parameters() if name in weights})
    take_weights(model, weights)
    try:
        yield
    finally:
        take_weights(model, own)
