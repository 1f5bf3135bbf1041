"""Derivatives of a ConvNet's loss, first and mixed second order, in closed form.

Matching needs the gradients g_W of a network's weights on two batches, and then, for the distance
of these gradients, its gradient to the images: sum_W <v_W, d g_W / dx>, with v the derivative of
the distance by g. Autograd gets it by going back through a recorded backward pass. For a ConvNet it
can be written down. Let D be the derivative along v, as a change of the weights. Since

    sum_W <v_W, d g_W / dx> = d (D L) / dx = D (dL / dx),

it is the tangent of a forward and of a backward pass, and both reuse what the first passes have
computed: every layer's input, its normalised output, and the loss's gradient to its output. The
decoded batch takes seven convolution passes: three for the gradients of the weights, and two for
each of the tangents. The formulas of a block are in :mod:`hmn_replay.objectives.convnet_layers`, those of the
first, which has its own, in :mod:`hmn_replay.objectives.convnet_first_layer`.

For ConvNet-3 of width 128 and 64 real and 64 decoded images of 32 x 32 this takes less than a third
of the time of double backward in float32, and less than a quarter with bfloat16 convolutions, on
two cores with AVX-512 (``python experiments/benchmark.py matching``). Besides the formulas, what
makes the difference on a CPU is

* Winograd's convolution, of a quarter of the multiplications, in float32 and float64. In bfloat16,
  which rounds too coarsely for it, convolutions are torch's;
* the first layer by coefficients;
* memory that is asked for once (:class:`hmn_replay.objectives.convolution.Scratch`), channels last, in chunks
  whose largest map has 4 MiB. In bfloat16, half of it takes a tenth more time, for the number of
  calls; in float32, twice as much gains nothing.

What did not pay: forward-mode differentiation under reverse mode, which takes the first passes once
more; ``torch.compile`` of the whole step, half the time of double backward after a minute of
compilation; all classes in one batch; one convolution of twice the channels for the sum of two;
Winograd's F(2 x 2, 3 x 3) with products in bfloat16, which by its count of transforms saves nothing
over direct convolution; F(4 x 4, 3 x 3) in bfloat16, which has 1.6 times the error and, with its
transforms in float32, takes as long; chunks in threads of their own in place of threads within each
operation; maps other than the first layer's in bfloat16, for most of torch's operations on elements
take two or three times as long there as in float32. Not tried: real gradients taken once for
several steps of the memory, between which the network learns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from hmn_replay.objectives.convnet_first_layer import Patches, PatchLayer
from hmn_replay.objectives.convnet_layers import MapLayer, Maps
from hmn_replay.objectives.convolution import Convolution, Direct, Memory, Scratch
from hmn_replay.objectives.winograd import Winograd
from hmn_replay.training.networks import ConvBlock, Network

__all__ = ["ConvNet", "Trace"]

_BYTES_PER_CHUNK = 2**22
# With fewer channels, Winograd's transforms take longer than they save.
_WINOGRAD_WIDTH = 64


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some images' states, last map ``(n, h, w, C)``, probabilities, and gradient to logits."""

    patches: Patches
    maps: list[Maps]
    last_map: Tensor
    probabilities: Tensor
    to_logits: Tensor


@dataclass(frozen=True, eq=False)
class Trace:
    """What :meth:`ConvNet.image_gradient` reads of a batch's forward and backward pass."""

    chunks: list[_Chunk]
    num_images: int


class ConvNet:
    """A ConvNet of :func:`hmn_replay.training.networks.build_network`, as its derivatives read it.

    To be made anew when weights have changed. Where ``torch.autocast`` is enabled while it is made,
    convolutions compute in autocast's dtype, and the first layer has its maps in it; statistics,
    coefficients and all other maps have the network's. It keeps
    the memory that it works in: not for two threads at once.

    Args:
        network: One that :meth:`is_convnet`.

    Attributes:
        weights: Of the convolutions, in order, then of the head.
    """

    def __init__(self, network: nn.Module) -> None:
        assert isinstance(network, Network)
        self._mean, self._std = network.mean, network.std
        self._head = cast(nn.Linear, network.head.get_submodule("1"))
        self._scratch = Scratch(network.mean)
        blocks = [stage for stage in network.stages if isinstance(stage, ConvBlock)]
        convolutions = [block.convolution.weight.detach() for block in blocks]
        self.weights: list[Tensor] = [*convolutions, self._head.weight.detach()]
        convolution = self._convolution()
        self._dtype = convolution.dtype
        self._first = PatchLayer(convolutions[0], blocks[0].norm, convolution.dtype, self._scratch)
        self._others = [
            MapLayer(str(i), convolutions[i], blocks[i].norm, convolution, self._scratch)
            for i in range(1, len(blocks))
        ]

    @staticmethod
    def is_convnet(network: nn.Module) -> bool:
        """Tell whether a network is such a ConvNet, for which the formulas hold."""
        return (
            type(network) is Network
            and all(type(stage) is ConvBlock for stage in network.stages)
            and [type(part) for part in network.head.children()] == [nn.Flatten, nn.Linear]
        )

    @torch.no_grad()
    def weight_gradients(
        self, images: Tensor, labels: Tensor, *, keep: bool = False
    ) -> tuple[list[Tensor], Trace]:
        """Return the gradients of the mean cross-entropy to the weights.

        Args:
            images: ``(N, C, H, W)``, N 1 or more, of the network's dtype, float32 or float64.
            labels: int64 ``(N,)``, class indices.
            keep: Whether to keep what :meth:`image_gradient` reads: of the first layer patches and
                the gradient to its output, of every other three maps, and the last layer's output.

        Returns:
            The gradients, in the order and of the shapes of :attr:`weights`; and the trace, which
            is empty unless ``keep``.
        """
        first, others = self._first, self._others
        to_first, to_others = first.zeros(), [layer.zeros() for layer in others]
        to_head = torch.zeros_like(self._head.weight)
        trace = Trace([], len(images))
        memory = Memory(self._mean) if keep else self._scratch
        size = self._chunk_size(images)
        with torch.autocast(images.device.type, enabled=False):
            for own, own_labels in zip(images.split(size), labels.split(size), strict=True):
                patches, x = first.forward((own - self._mean) / self._std, memory)
                maps = []
                for layer in others:
                    state, x = layer.forward(x, memory)
                    maps.append(state)
                last_map = memory("last map", x.shape).copy_(x)
                features = _flatten(last_map)
                probabilities = self._head(features).softmax(dim=1)
                to_logits = probabilities.clone()
                to_logits[torch.arange(len(own), device=own.device), own_labels] -= 1
                to_logits /= len(images)
                to_head.addmm_(to_logits.T, features)
                to_map = _unflatten(to_logits @ self._head.weight, last_map)
                for i in reversed(range(len(others))):
                    to_map = others[i].backward(maps[i], to_map, to_others[i], memory)
                first.backward(patches, to_map, to_first, memory)
                if keep:
                    trace.chunks.append(_Chunk(patches, maps, last_map, probabilities, to_logits))
            gradients = [
                first.weight_gradient(to_first),
                *(layer.weight_gradient(t) for layer, t in zip(others, to_others, strict=True)),
                to_head,
            ]
        return gradients, trace

    @torch.no_grad()
    def image_gradient(self, trace: Trace, directions: Sequence[Tensor]) -> Tensor:
        """Return the gradient to the images of sum_W <v_W, g_W>, with v held still.

        Args:
            trace: Of the images.
            directions: v, for the first of :attr:`weights`: for all convolutions, and maybe for the
                head.

        Returns:
            ``(N, C, H, W)``, of the network's dtype.
        """
        first, others = self._first, self._others
        along_first = first.direction(directions[0])
        along = [layer.direction(v) for layer, v in zip(others, directions[1:], strict=False)]
        (head,) = directions[1 + len(others) :] or (None,)
        gradients = []
        with torch.autocast(self._mean.device.type, enabled=False):
            for chunk in trace.chunks:
                x = first.forward_tangent(chunk.patches, along_first)
                for layer, state, v in zip(others, chunk.maps, along, strict=True):
                    x = layer.forward_tangent(state, v, x)
                logits = _flatten(x) @ self._head.weight.T
                if head is not None:
                    logits += _flatten(chunk.last_map) @ head.T
                # The tangent of softmax.
                p = chunk.probabilities
                to_logits = p * (logits - (p * logits).sum(dim=1, keepdim=True))
                to_features = (to_logits / trace.num_images) @ self._head.weight
                if head is not None:
                    to_features += chunk.to_logits @ head
                to_map = _unflatten(to_features, chunk.last_map)
                for i in reversed(range(len(others))):
                    to_map = others[i].backward_tangent(chunk.maps[i], along[i], to_map)
                gradients.append(first.backward_tangent(chunk.patches, to_map))
        return torch.cat(gradients) / self._std

    def _convolution(self) -> Convolution:
        """Return what computes all convolutions but the first."""
        own, device = self._mean.dtype, self._mean.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else own
        if dtype == own and device == "cpu" and len(self.weights[0]) >= _WINOGRAD_WIDTH:
            return Winograd(self._scratch)
        return Direct(dtype, self._scratch)

    def _chunk_size(self, images: Tensor) -> int:
        if images.device.type != "cpu":
            return len(images)
        values = len(self.weights[0]) * math.prod(images.shape[2:])
        return max(1, _BYTES_PER_CHUNK // (values * self._dtype.itemsize))


def _flatten(last_map: Tensor) -> Tensor:
    return rearrange(last_map, "n h w c -> n (c h w)")


def _unflatten(features: Tensor, like: Tensor) -> Tensor:
    _, height, width, _ = like.shape
    return rearrange(features, "n (c h w) -> n h w c", h=height, w=width)
