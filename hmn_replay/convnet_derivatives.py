"""Derivatives of a ConvNet's loss, first and mixed second order, in closed form.

Matching needs the gradients g_W of a network's weights on two batches, and then, for the distance
of these gradients, its gradient to the images: sum_W <v_W, d g_W / dx>, with v the derivative of
the distance by g. Autograd gets it by going back through a recorded backward pass. For a ConvNet it
can be written down. Let D be the derivative along v, as a change of the weights. Since

    sum_W <v_W, d g_W / dx> = d (D L) / dx = D (dL / dx),

it is the tangent of a forward and of a backward pass, and both reuse what the first passes have
computed: every layer's input, its normalised output n, and the loss's gradient to its output. The
decoded batch takes seven convolution passes: three for the gradients of the weights, and two for
each of the tangents. A normalisation of one channel a group has a symmetric Jacobian,

    J h = r (h - mean h - n mean(n h)),    r one over the deviation,

so one formula serves forward and backward.

For ConvNet-3 of width 128 and 64 real and 64 decoded images of 32 x 32 this takes a third of the
time of double backward in float32, and a fifth with bfloat16 convolutions, on two cores with
AVX-512 (``python experiments/benchmark.py matching``). Besides the formulas, that is due to

* chunks, whose largest map has 2**20 values: maps of a whole batch, 33 MB each, are fetched from
  the system page by page and given back at once, which takes longer than to fill them;
* channels last throughout, by which the first convolution takes an eighth of the time.

What did not pay: forward-mode differentiation under reverse mode, which takes the first passes once
more; ``torch.compile`` of the whole step, half the time of double backward after a minute of
compilation; all classes in one batch, for convolutions are at the processor's peak with 8 images
already; one convolution of twice the channels for the sum of two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from hmn_replay.networks import ConvBlock, Network

__all__ = ["ConvNet", "Trace"]

_VALUES_PER_CHUNK = 2**20


@dataclass(eq=False)
class _Block:
    """What the tangents of a block read: maps ``(n, H, W, C)`` and statistics ``(n, 1, 1, C)``.

    Attributes:
        input: Of the convolution.
        normalised: n, the convolution's output less its mean, over its deviation.
        rate: r, one over the deviation.
        rectified: ReLU's output; where it is 0, nothing flows back.
        gradient: Of the loss, to the convolution's output.
        projection: Mean of n times the gradient to ReLU's input.
        tangent: D n.
        slope: Mean of n times D of the convolution's output.
        correlation: Mean of ``gradient`` times D of the convolution's output.
    """

    input: Tensor
    normalised: Tensor
    rate: Tensor
    rectified: Tensor
    gradient: Tensor = field(init=False)
    projection: Tensor = field(init=False)
    tangent: Tensor = field(init=False)
    slope: Tensor = field(init=False)
    correlation: Tensor = field(init=False)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some images' blocks, last map ``(n, h, w, C)``, probabilities, and gradient to logits."""

    blocks: list[_Block]
    last_map: Tensor
    probabilities: Tensor
    to_logits: Tensor


@dataclass(frozen=True, eq=False)
class Trace:
    """What :meth:`ConvNet.image_gradient` reads of a batch's forward and backward pass."""

    chunks: list[_Chunk]
    num_images: int


class ConvNet:
    """A ConvNet of :func:`hmn_replay.networks.build_network`, as its derivatives read it.

    To be made anew when weights have changed. Where ``torch.autocast`` is enabled while it is made,
    convolutions compute in autocast's dtype, and all else in the network's.

    Args:
        network: One that :meth:`is_convnet`.

    Attributes:
        weights: Of the convolutions, in order, then of the head.
    """

    def __init__(self, network: nn.Module) -> None:
        assert isinstance(network, Network)
        self.mean, self.std = network.mean, network.std
        blocks = [stage for stage in network.stages if isinstance(stage, ConvBlock)]
        self.norms = [block.norm for block in blocks]
        self.head = cast(nn.Linear, network.head.get_submodule("1"))
        convolutions = [block.convolution.weight.detach() for block in blocks]
        self.weights: list[Tensor] = [*convolutions, self.head.weight.detach()]
        kind = self.mean.device.type
        is_autocast = torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if is_autocast else self.mean.dtype
        self.kernels = [self._kernel(weight) for weight in convolutions]
        self.transposed = [self._kernel(_transpose(weight)) for weight in convolutions]

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
            keep: Whether to keep what :meth:`image_gradient` reads: four maps of every layer, and a
                fifth that it adds.

        Returns:
            The gradients, in the order and of the shapes of :attr:`weights`; and the trace, which
            is empty unless ``keep``.
        """
        gradients = [torch.zeros_like(weight) for weight in self.weights]
        trace = Trace([], len(images))
        size = self._chunk_size(images)
        with torch.autocast(images.device.type, enabled=False):
            for own, own_labels in zip(images.split(size), labels.split(size), strict=True):
                blocks, last_map = self._forward(own)
                features = _flatten(last_map)
                logits = self.head(features)
                probabilities = logits.softmax(dim=1)
                to_logits = probabilities.clone()
                to_logits[torch.arange(len(own), device=own.device), own_labels] -= 1
                to_logits /= len(images)
                gradients[-1].addmm_(to_logits.T, features)
                to_map = _unflatten(to_logits @ self.head.weight, last_map)
                self._backward(blocks, to_map, gradients)
                if keep:
                    trace.chunks.append(_Chunk(blocks, last_map, probabilities, to_logits))
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
        num_blocks = len(self.kernels)
        kernels = [self._kernel(v) for v in directions[:num_blocks]]
        transposed = [self._kernel(_transpose(v)) for v in directions[:num_blocks]]
        (head,) = directions[num_blocks:] or (None,)
        gradients = []
        with torch.autocast(self.mean.device.type, enabled=False):
            for chunk in trace.chunks:
                logits = _flatten(self._forward_tangent(chunk.blocks, kernels)) @ self.head.weight.T
                if head is not None:
                    logits += _flatten(chunk.last_map) @ head.T
                # The tangent of softmax.
                p = chunk.probabilities
                to_logits = p * (logits - (p * logits).sum(dim=1, keepdim=True))
                to_features = (to_logits / trace.num_images) @ self.head.weight
                if head is not None:
                    to_features += chunk.to_logits @ head
                to_map = _unflatten(to_features, chunk.last_map)
                gradients.append(self._backward_tangent(chunk.blocks, to_map, transposed))
        return rearrange(torch.cat(gradients), "n h w c -> n c h w") / self.std

    def _forward(self, images: Tensor) -> tuple[list[_Block], Tensor]:
        """Return the blocks, with what the forward pass knows of them, and the last map."""
        x = rearrange((images - self.mean) / self.std, "n c h w -> n h w c").contiguous()
        blocks = []
        for kernel, norm in zip(self.kernels, self.norms, strict=True):
            x = x.to(self.dtype)
            n = self._convolve(x, kernel)
            n -= _mean(n)
            rate = (_mean(n * n) + norm.eps).rsqrt()
            n *= rate
            rectified = torch.addcmul(norm.bias, n, norm.weight).relu_()
            blocks.append(_Block(x, n, rate, rectified))
            x = _pool(rectified)
        return blocks, x

    def _backward(self, blocks: list[_Block], to_map: Tensor, gradients: list[Tensor]) -> None:
        """Add to the weights' gradients, and set what the backward pass knows of the blocks."""
        for i in reversed(range(len(blocks))):
            block, scale = blocks[i], self.norms[i].weight * blocks[i].rate
            g = _unpool(to_map, block.rectified)
            mean, block.projection = _mean(g), _mean(g * block.normalised)
            g *= scale
            g.addcmul_(block.normalised, scale * block.projection, value=-1).sub_(scale * mean)
            block.gradient = g.to(self.dtype)
            gradients[i] += conv2d_weight(
                _channels_first(block.input),
                gradients[i].shape,
                _channels_first(block.gradient),
                padding=1,
            )
            if i:
                to_map = self._convolve(block.gradient, self.transposed[i])

    def _forward_tangent(self, blocks: list[_Block], kernels: list[Tensor]) -> Tensor:
        """Return D of the last map, and set what the tangent knows of the blocks."""
        x: Tensor | None = None
        for block, norm, kernel, direction in zip(
            blocks, self.norms, self.kernels, kernels, strict=True
        ):
            y = self._convolve(block.input, direction)
            if x is not None:
                y += self._convolve(x.to(self.dtype), kernel)
            block.slope = _mean(y * block.normalised)
            block.correlation = _mean(y * block.gradient)
            y -= _mean(y)
            block.tangent = y.addcmul_(block.normalised, block.slope, value=-1).mul_(block.rate)
            x = _pool(_rectify(y * norm.weight, block.rectified))
        assert x is not None
        return x

    def _backward_tangent(
        self, blocks: list[_Block], to_map: Tensor, directions: list[Tensor]
    ) -> Tensor:
        """Return D of the gradient to the images, ``(n, H, W, C)``."""
        for i in reversed(range(len(blocks))):
            block, scale = blocks[i], self.norms[i].weight * blocks[i].rate
            g = _unpool(to_map, block.rectified)
            mean, projection = _mean(g), _mean(g * block.normalised)
            # The product rule on scale (g - mean g - n mean(n g)): D rate is -rate^2 slope, and
            # scale mean(g D n) is rate times the correlation, since J is symmetric.
            along_n = scale * projection + block.rate * block.correlation
            g *= scale
            g.addcmul_(block.normalised, along_n, value=-1).sub_(scale * mean)
            g.addcmul_(block.tangent, scale * block.projection, value=-1)
            g.addcmul_(block.gradient.to(g.dtype), block.rate * block.slope, value=-1)
            to_map = self._convolve(g.to(self.dtype), self.transposed[i])
            to_map += self._convolve(block.gradient, directions[i])
        return to_map

    def _kernel(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def _convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        y = F.conv2d(_channels_first(x), kernel, padding=1)
        return y.movedim(1, 3).to(self.mean.dtype)

    def _chunk_size(self, images: Tensor) -> int:
        if images.device.type != "cpu":
            return len(images)
        values = len(self.weights[0]) * math.prod(images.shape[2:])
        return max(1, _VALUES_PER_CHUNK // values)


def _transpose(weight: Tensor) -> Tensor:
    """Return the weight with which a convolution is the transpose of that with ``weight``."""
    return rearrange(weight.flip(2, 3), "o i h w -> i o h w")


def _channels_first(x: Tensor) -> Tensor:
    return x.movedim(3, 1)


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=(1, 2), keepdim=True)


def _pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(_channels_first(x), 2).movedim(1, 3)


def _rectify(gradient: Tensor, rectified: Tensor) -> Tensor:
    """Return ``gradient``, and 0 where ReLU gave 0: in one pass, where a comparison takes two."""
    flowing: Tensor = torch.ops.aten.threshold_backward(gradient, rectified, 0)
    return flowing


def _unpool(to_map: Tensor, rectified: Tensor) -> Tensor:
    """Take a gradient back through average pooling by 2, and through ReLU."""
    # As F.avg_pool2d calls it: kernel, stride, padding, ceil_mode, count_include_pad, divisor.
    spread = torch.ops.aten.avg_pool2d_backward(
        _channels_first(to_map), _channels_first(rectified), 2, 2, 0, False, True, None
    )
    return _rectify(spread.movedim(1, 3), rectified)


def _flatten(last_map: Tensor) -> Tensor:
    return rearrange(last_map, "n h w c -> n (c h w)")


def _unflatten(features: Tensor, like: Tensor) -> Tensor:
    _, height, width, _ = like.shape
    return rearrange(features, "n (c h w) -> n h w c", h=height, w=width)
