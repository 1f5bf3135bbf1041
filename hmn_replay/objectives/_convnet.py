"""Derivatives of a ConvNet's loss, first and mixed second order, in closed form.

Matching needs the gradients g_W of a network's weights on two batches, and then the gradient to the
decoded images of these gradients' distance: sum_W <v_W, d g_W / dx>, where v is the derivative of
the distance by g. Autograd differentiates a recorded backward pass. For a ConvNet the result can be
written down. Let D be the derivative along v, as a change of the weights. Since

    sum_W <v_W, d g_W / dx> = d (D L) / dx = D (dL / dx),

it is the tangent of a forward and of a backward pass, and both reuse what the first passes have
computed: every layer's input, its normalised output, and the loss's gradient to its output. The
decoded batch takes seven convolution passes: three for the gradients of the weights, and two for
each of the tangents. :class:`MapLayer` has the formulas of a block, and :class:`PatchLayer` those
of the first one.

Maps are channels last, in reused memory, and in chunks of images whose largest map has 4 MiB.
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

from hmn_replay.objectives._convolution import (
    Convolution,
    Direct,
    Kernel,
    Lifted,
    Memory,
    Scratch,
    Winograd,
    channels_first,
)
from hmn_replay.training.networks import ConvBlock, Network, StagedNetwork

__all__ = ["ConvNet", "MapLayer", "PatchLayer", "Trace"]

# With fewer channels, Winograd's transforms take longer than they save.
_WINOGRAD_WIDTH = 64


@dataclass(frozen=True, eq=False)
class _Chunk:
    """States of some images: layers', last map ``(n, h, w, C)``, probabilities, logit gradients."""

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

    It reads the weights once: make another when they have changed. Where ``torch.autocast`` is
    enabled while it is made, convolutions compute in autocast's dtype, and the first layer has its
    maps in it; statistics, coefficients and all other maps have the network's. It reuses the memory
    that it works in, so that two threads need one each.

    Args:
        network: One that :meth:`is_convnet`.
        bytes_per_chunk: Bytes of the largest map of the images that are computed together, on a
            CPU.

    Attributes:
        weights: The weights of the convolutions, in order, then of the head.
        convolution: What computes all convolutions but the first.
    """

    def __init__(self, network: nn.Module, *, bytes_per_chunk: int = 2**22) -> None:
        assert isinstance(network, Network)
        self._bytes_per_chunk = bytes_per_chunk
        body = cast(StagedNetwork, network.body)
        self._mean, self._std = network.mean, network.std
        self._head = cast(nn.Linear, body.head.get_submodule("1"))
        self._scratch = Scratch(network.mean)
        blocks = [stage for stage in body.stages if isinstance(stage, ConvBlock)]
        convolutions = [block.convolution.weight.detach() for block in blocks]
        self.weights: list[Tensor] = [*convolutions, self._head.weight.detach()]
        self.convolution = self._choose_convolution()
        dtype = self.convolution.dtype
        self._first = PatchLayer(convolutions[0], blocks[0].norm, dtype, self._scratch)
        self._others = [
            MapLayer(str(i), convolutions[i], blocks[i].norm, self.convolution, self._scratch)
            for i in range(1, len(blocks))
        ]

    @staticmethod
    def is_convnet(network: nn.Module) -> bool:
        """Return whether a network is such a ConvNet, for which the formulas hold."""
        return (
            type(network) is Network
            and type(body := network.body) is StagedNetwork
            and all(type(stage) is ConvBlock for stage in body.stages)
            and [type(part) for part in body.head.children()] == [nn.Flatten, nn.Linear]
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
        """Return the gradient to the images of sum_W <v_W, g_W>, for constant v.

        Args:
            trace: The images' trace.
            directions: v for the first of :attr:`weights`: for all convolutions, and optionally for
                the head.

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

    def _choose_convolution(self) -> Convolution:
        own, device = self._mean.dtype, self._mean.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else own
        if dtype == own and device == "cpu" and len(self.weights[0]) >= _WINOGRAD_WIDTH:
            return Winograd(self._scratch)
        return Direct(dtype, self._scratch)

    def _chunk_size(self, images: Tensor) -> int:
        if images.device.type != "cpu":
            return len(images)
        values = len(self.weights[0]) * math.prod(images.shape[2:])
        return max(1, self._bytes_per_chunk // (values * self.convolution.dtype.itemsize))


def _flatten(last_map: Tensor) -> Tensor:
    return rearrange(last_map, "n h w c -> n (c h w)")


def _unflatten(features: Tensor, like: Tensor) -> Tensor:
    _, height, width, _ = like.shape
    return rearrange(features, "n (c h w) -> n h w c", h=height, w=width)


@dataclass(eq=False)
class Maps:
    """State of a :class:`MapLayer`: maps ``(n, h, w, C)`` and statistics ``(n, 1, 1, C)``.

    Attributes:
        input: The convolution's input, in the convolution's dtype.
        lifted: The input as the convolution multiplies it, in scratch memory like ``rectified``.
        normalised: n.
        rate: r.
        rectified: ReLU's output, in scratch memory: until the layer sees other images.
        gradient: h, in the convolution's dtype.
        projection: m(n g).
        tangent: D n, in scratch memory like ``rectified``.
        slope: m(n D y).
        correlation: m(h D y).
    """

    input: Tensor
    lifted: Lifted
    normalised: Tensor
    rate: Tensor
    rectified: Tensor = field(init=False)
    gradient: Tensor = field(init=False)
    projection: Tensor = field(init=False)
    tangent: Tensor = field(init=False)
    slope: Tensor = field(init=False)
    correlation: Tensor = field(init=False)


class MapLayer:
    """A block of ConvNet: convolution, normalisation, scale and shift, ReLU, average pooling by 2.

    It has four passes. They are called in this order, and each leaves in the block's state what
    later ones read:

    * ``forward``: the normalised output n, and the rate r, one over the deviation;
    * ``backward``: the gradient h to the convolution's output, and from it that to the weight;
    * ``forward_tangent``: D n, where D is the derivative along a direction of all weights;
    * ``backward_tangent``: D h, and from it D of the gradient to the block's input.

    With m the mean over an image's pixels, and g the gradient to ReLU's input, of scale s,

        h = s r (g - m(g) - n m(n g)),    D n = r (D y - m(D y) - n m(n D y)),

    for the convolution's output y. By the product rule, with D r = -r^2 m(n D y), and with
    m(g D n) s = r m(h D y), since the normalisation's Jacobian is symmetric,

        D h = s r (D g - m(D g) - n m(n D g)) - n r m(h D y) - D n s r m(n g) - h r m(n D y).

    Args:
        name: Name of its memory, which no other layer has.
        weight: Weight of the convolution, ``(O, I, 3, 3)``.
        norm: Normalisation, with scale and shift.
        convolution: Computes the products.
        scratch: Memory that the layer works in. Maps that it returns are in it: valid until the
            next pass of any layer but the one that they are given to.
    """

    def __init__(
        self,
        name: str,
        weight: Tensor,
        norm: nn.GroupNorm,
        convolution: Convolution,
        scratch: Scratch,
    ) -> None:
        self._name, self._weight, self._norm = name, weight, norm
        self._convolution, self._scratch = convolution, scratch
        self._kernel = convolution.kernel(weight)

    def direction(self, v: Tensor) -> Kernel:
        """Return a direction of the weight as the tangents' passes read it."""
        return self._convolution.kernel(v)

    def zeros(self) -> Tensor:
        """Return the total to which :meth:`backward` adds."""
        return self._convolution.zeros(self._weight)

    def weight_gradient(self, total: Tensor) -> Tensor:
        """Return a total as a gradient, of the weight's shape."""
        return self._convolution.weight_gradient(total)

    def forward(self, x: Tensor, memory: Scratch) -> tuple[Maps, Tensor]:
        """Return a state, whose maps are in ``memory``, and the block's output."""
        dtype = self._convolution.dtype
        x = memory(f"input {self._name}", x.shape, dtype).copy_(x)
        lifted = self._convolution.lift(x, f"lifted {self._name}")
        y = self._convolution.forward((lifted, self._kernel))
        n = torch.sub(y, _mean(y), out=memory(f"normalised {self._name}", y.shape))
        rate = (self._mean_of_product(n, n) + self._norm.eps).rsqrt()
        n *= rate
        state = Maps(x, lifted, n, rate)
        return state, pool(self._rectify(state), self._scratch)

    def backward(self, state: Maps, to_output: Tensor, total: Tensor, memory: Scratch) -> Tensor:
        """Return the gradient to the block's input, and add the weight's to a total."""
        n = state.normalised
        g = unpool(to_output, state.rectified, self._scratch)
        mean, state.projection = _mean(g), self._mean_of_product(g, n)
        g.sub_(mean).addcmul_(n, state.projection, value=-1).mul_(self._norm.weight * state.rate)
        dtype = self._convolution.dtype
        state.gradient = memory(f"gradient {self._name}", g.shape, dtype).copy_(g)
        lifted = self._convolution.lift_gradient(state.gradient, "gradient")
        self._convolution.add_product(total, state.lifted, lifted)
        return self._convolution.backward((lifted, self._kernel))

    def forward_tangent(self, state: Maps, direction: Kernel, x: Tensor) -> Tensor:
        """Return D of the block's output, for ``x`` the D of its input."""
        convolution, n = self._convolution, state.normalised
        y = convolution.forward(
            (convolution.lift(x, "tangent"), self._kernel),
            (convolution.lift(state.input, "input"), direction),
        )
        state.slope = self._mean_of_product(n, y)
        state.correlation = self._mean_of_product(self._gradient(state), y)
        y -= _mean(y)
        tangent = self._scratch(f"tangent {self._name}", y.shape)
        state.tangent = torch.addcmul(y, n, state.slope, value=-1, out=tangent).mul_(state.rate)
        flowing = torch.mul(tangent, self._norm.weight, out=self._scratch("product", n.shape))
        return pool(rectify_(flowing, self._rectify(state)), self._scratch)

    def backward_tangent(self, state: Maps, direction: Kernel, to_output: Tensor) -> Tensor:
        """Return D of the gradient to the block's input, from D of that to its output."""
        convolution, n, scale = self._convolution, state.normalised, self._norm.weight * state.rate
        g = unpool(to_output, state.rectified, self._scratch)
        mean, projection = _mean(g), self._mean_of_product(g, n)
        g.mul_(scale).sub_(scale * mean)
        g.addcmul_(n, scale * projection + state.rate * state.correlation, value=-1)
        g.addcmul_(state.tangent, scale * state.projection, value=-1)
        g.addcmul_(self._gradient(state), state.rate * state.slope, value=-1)
        return convolution.backward(
            (convolution.lift_gradient(g, "tangent"), self._kernel),
            (convolution.lift_gradient(state.gradient, "gradient"), direction),
        )

    def _rectify(self, state: Maps) -> Tensor:
        n, norm = state.normalised, self._norm
        out = self._scratch(f"rectified {self._name}", n.shape)
        state.rectified = torch.addcmul(norm.bias, n, norm.weight, out=out).relu_()
        return state.rectified

    def _gradient(self, state: Maps) -> Tensor:
        """Return h in the dtype of the other maps."""
        h = state.gradient
        if h.dtype == state.normalised.dtype:
            return h
        return self._scratch("wide gradient", h.shape).copy_(h)

    def _mean_of_product(self, a: Tensor, b: Tensor) -> Tensor:
        return _mean(torch.mul(a, b, out=self._scratch("product", a.shape)))


def pool(x: Tensor, scratch: Scratch) -> Tensor:
    """Average by 2, as ``F.avg_pool2d`` does, from and to ``(n, h, w, C)``."""
    n, h, w, c = x.shape
    out = scratch("pooled", (n, h // 2, w // 2, c), x.dtype)
    torch.ops.aten.avg_pool2d.out(channels_first(x), [2, 2], out=channels_first(out))
    return out


def unpool(to_output: Tensor, rectified: Tensor, scratch: Scratch) -> Tensor:
    """Return the gradient to ReLU's input from that to the output of :func:`pool` after it."""
    n, h, w, c = rectified.shape
    i, j = h // 2, w // 2
    out = scratch("map", rectified.shape, rectified.dtype)
    if h % 2 or w % 2:
        out.zero_()
    quarter = scratch("quarter", (n, i, j, c), rectified.dtype).copy_(to_output).mul_(0.25)
    windows, into = (
        x[:, : 2 * i, : 2 * j].unflatten(2, (j, 2)).unflatten(1, (i, 2)) for x in (rectified, out)
    )
    spread = quarter[:, :, None, :, None].expand_as(windows)
    torch.ops.aten.threshold_backward.grad_input(spread, windows, 0, grad_input=into)
    return out


def rectify_(gradient: Tensor, rectified: Tensor) -> Tensor:
    """Set a gradient to 0 where ReLU's output is 0, in one pass over memory, and return it."""
    torch.ops.aten.threshold_backward.grad_input(gradient, rectified, 0, grad_input=gradient)
    return gradient


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=(1, 2), keepdim=True)


@dataclass(eq=False)
class Patches:
    """State of a :class:`PatchLayer`: coefficients ``(n, P, K)`` of maps of ``h w`` pixels.

    Attributes:
        shape: ``(h, w)``.
        values: ``(n, P, h w)``: values of patches, relative to their means; the last is 1. They
            have the layer's dtype, as ``to_output`` has.
        gram: ``(n, P, P)``: means of products of values.
        rate: r, ``(n, 1, K)``.
        normalised: Coefficients of n.
        rectified: ReLU's output, in scratch memory: until the layer sees other images.
        to_output: The gradient to the block's output.
        removed: Coefficients of m(g) + n m(n g).
        moments: Means of values times h.
        projection: m(n g), ``(n, 1, K)``.
        tangent: Coefficients of D n.
        correlation: m(h D y), ``(n, 1, K)``.
    """

    shape: tuple[int, int]
    values: Tensor
    gram: Tensor
    rate: Tensor
    normalised: Tensor
    rectified: Tensor = field(init=False)
    to_output: Tensor = field(init=False)
    removed: Tensor = field(init=False)
    moments: Tensor = field(init=False)
    projection: Tensor = field(init=False)
    tangent: Tensor = field(init=False)
    correlation: Tensor = field(init=False)


class PatchLayer:
    """The first block, as :class:`MapLayer` but computed by coefficients.

    Where an input has few channels C, the convolution's many output maps are combinations of only
    the 9 C values of a patch. Take these relative to their means over the image, add the constant
    1, and call the P = 9 C + 1 maps V. Then all maps of the block that ReLU has not cut are V'a for
    coefficients a, a column of P for each channel: of n they are r w, and of D n

        t = r (v - r w m(n D y)),    m(n D y) = r w' K v,

    where w is the weight, v its direction, and K = V V' / (h w) the Gram matrix, by which the mean
    of two maps' product is a product of coefficients. Of a map g that ReLU has cut, means need its
    moments V g / (h w). So the passes write maps out only to rectify them.

    Args:
        weight: Weight of the convolution, ``(K, C, 3, 3)``.
        norm: Normalisation, with scale and shift.
        dtype: Dtype of maps, and of their products with patch values. Coefficients, and what is
            computed from them alone, have the dtype of the weight.
        scratch: Memory that the layer works in; see :class:`MapLayer`.
    """

    def __init__(
        self, weight: Tensor, norm: nn.GroupNorm, dtype: torch.dtype, scratch: Scratch
    ) -> None:
        self._dtype, self._shape, self._weight = dtype, weight.shape, self.direction(weight)
        self._norm, self._scratch = norm, scratch

    def direction(self, v: Tensor) -> Tensor:
        """Return a direction of the weight as the tangents' passes read it: as coefficients."""
        return F.pad(v.flatten(1).T, (0, 0, 0, 1))

    def zeros(self) -> Tensor:
        """Return the total to which :meth:`backward` adds."""
        return torch.zeros_like(self._weight)

    def weight_gradient(self, total: Tensor) -> Tensor:
        """Return a total as a gradient, of the weight's shape."""
        return total[:-1].T.reshape(self._shape)

    def forward(self, images: Tensor, memory: Scratch) -> tuple[Patches, Tensor]:
        """Return a state, whose maps are in ``memory``, and the block's output.

        Args:
            images: ``(n, C, h, w)``.
            memory: Memory of the state.
        """
        n, c, h, w = images.shape
        exact = self._scratch("patches", (n, 9 * c + 1, h * w))
        windows = F.pad(images, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
        patches, one = exact.tensor_split([9 * c], dim=1)
        patches.view(n, c, 3, 3, h, w).copy_(rearrange(windows, "n c h w i j -> n c i j h w"))
        patches -= patches.mean(dim=2, keepdim=True)
        one.fill_(1)
        gram = torch.bmm(exact, exact.mT) / (h * w)
        values = memory("rounded", exact.shape, self._dtype).copy_(exact)
        # Rounding may take a flat image's variance below 0.
        variance = (self._weight * (gram @ self._weight)).sum(dim=1, keepdim=True).relu_()
        rate = (variance + self._norm.eps).rsqrt()
        state = Patches((h, w), values, gram, rate, self._weight * rate)
        return state, pool(self._rectify(state), self._scratch)

    def backward(self, state: Patches, to_output: Tensor, total: Tensor, memory: Scratch) -> None:
        """Add the weight's gradient to a total."""
        state.to_output = memory("to output", to_output.shape, self._dtype).copy_(to_output)
        g = unpool(to_output, state.rectified, self._scratch)
        moments, state.removed, state.projection = self._project(state, g)
        state.moments = moments.sub_(state.gram @ state.removed).mul_(
            self._norm.weight * state.rate
        )
        total += state.moments.sum(dim=0) * state.values.shape[2]

    def forward_tangent(self, state: Patches, direction: Tensor) -> Tensor:
        """Return D of the block's output; the images' is 0."""
        n, v = state.normalised, direction
        slope = (n * (state.gram @ v)).sum(dim=1, keepdim=True)
        state.correlation = (v * state.moments).sum(dim=1, keepdim=True)
        state.tangent = state.rate * (v - n * slope)
        flowing = self._map(state, state.tangent * self._norm.weight, "map")
        return pool(rectify_(flowing, self._rectify(state)), self._scratch)

    def backward_tangent(self, state: Patches, to_output: Tensor) -> Tensor:
        """Return D of the gradient to the images, ``(n, C, h, w)``, in memory of its own."""
        own, scale = state.values[:, :-1], self._norm.weight
        scaled, scaled_tangent = scale * state.normalised, scale * state.tangent
        # The products of D h with the weight and of h with the direction. In the latter, D r
        # turns the direction into r D n; the rest of D h does not pass ReLU, and is a bilinear
        # form of the patch values.
        g = unpool(to_output, state.rectified, self._scratch)
        _, removed, _ = self._project(state, g)
        to_patches = self._scratch("to patches", own.shape, self._dtype)
        torch.bmm(self._cast(scaled), g.flatten(1, 2).mT, out=to_patches)
        g = unpool(state.to_output, state.rectified, self._scratch)
        to_patches.baddbmm_(self._cast(scaled_tangent), g.flatten(1, 2).mT)
        form = scaled @ removed.mT + scaled_tangent @ state.removed.mT
        form += (state.normalised * state.correlation) @ state.normalised.mT
        form += (scaled * state.projection) @ state.tangent.mT
        to_patches.baddbmm_(self._cast(form), state.values, alpha=-1)
        images: Tensor = F.fold(to_patches.to(form.dtype), state.shape, 3, padding=1)
        return images

    def _cast(self, coefficients: Tensor) -> Tensor:
        """Return all coefficients but the constant's, which no pixel has a part in."""
        return coefficients[:, :-1].to(self._dtype)

    def _map(self, state: Patches, coefficients: Tensor, name: str) -> Tensor:
        n, _, num_pixels = state.values.shape
        out = self._scratch(name, (n, num_pixels, coefficients.shape[2]), self._dtype)
        torch.bmm(state.values.mT, coefficients.to(self._dtype), out=out)
        return out.view(n, *state.shape, -1)

    def _rectify(self, state: Patches) -> Tensor:
        coefficients = state.normalised * self._norm.weight
        coefficients[:, -1] += self._norm.bias
        state.rectified = self._map(state, coefficients, "rectified").relu_()
        return state.rectified

    def _project(self, state: Patches, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the means of values times g; coefficients of m(g) + n m(n g); and m(n g)."""
        products = torch.bmm(state.values, g.flatten(1, 2))
        moments = products.to(state.rate.dtype) / state.values.shape[2]
        projection = (state.normalised * moments).sum(dim=1, keepdim=True)
        removed = state.normalised * projection
        removed[:, -1] += moments[:, -1]
        return moments, removed, projection
