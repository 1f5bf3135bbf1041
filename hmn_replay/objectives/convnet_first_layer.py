"""A ConvNet's first block: :class:`hmn_replay.objectives.convnet_layers.MapLayer`, by coefficients.

Where an input has few channels C, the convolution's output has many, but not many that differ: each
is a combination of the 9 C values of a patch. Take these relative to their means over the image,
add the constant 1, and call the P = 9 C + 1 maps V. Then all maps of the block, but those that ReLU
has cut, are V'a for coefficients a, a column of P for each channel: of n they are r w, and of D n

    t = r (v - r w m(n D y)),    m(n D y) = r w' K v,

where w is the weight, v its direction, and K = V V' / (h w) the Gram matrix, by which the mean of
two maps' product is a product of coefficients. Of a map g that ReLU has cut, means need its moments
V g / (h w). So the passes write maps out to rectify them, and for nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hmn_replay.objectives.convnet_layers import pool, rectify_, unpool
from hmn_replay.objectives.convolution import Scratch

__all__ = ["PatchLayer", "Patches"]


@dataclass(eq=False)
class Patches:
    """State of a :class:`PatchLayer`: coefficients ``(n, P, K)`` of maps of ``h w`` pixels.

    Attributes:
        shape: ``(h, w)``.
        values: ``(n, P, h w)``: of patches, relative to their means; the last is 1. In the layer's
            dtype, and so is ``to_output``.
        gram: ``(n, P, P)``: means of products of values.
        rate: r, ``(n, 1, K)``.
        normalised: Of n.
        rectified: As in :class:`hmn_replay.objectives.convnet_layers.Maps`.
        to_output: The gradient to the block's output.
        removed: Of m(g) + n m(n g).
        moments: Means of values times h.
        projection: m(n g), ``(n, 1, K)``.
        tangent: Of D n.
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
    """A first block, by coefficients.

    Args:
        weight: Of the convolution, ``(K, C, 3, 3)``.
        norm: With scale and shift.
        dtype: Of maps, and of their products with patch values. Coefficients, and what is computed
            from them alone, have the dtype of the weight.
        scratch: As in :class:`hmn_replay.objectives.convnet_layers.MapLayer`.
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
            memory: For the state.
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
        # What D h gives by the weight, and h by the direction. The latter loses to D r what makes
        # it r D n; the rest of D h, which has no ReLU in it, is a form of the patch values.
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
