"""A ConvNet's blocks, each with its four passes: forward, backward, and the tangents of both.

A block is a convolution, a normalisation of each channel to n, a scale and shift, ReLU, and average
pooling by 2. Its passes come in this order, and each leaves in the block's state what later ones
read:

* ``forward``: the normalised output n, and the rate r, one over the deviation;
* ``backward``: the gradient h to the convolution's output, and from it that to the weight;
* ``forward_tangent``: D n, where D is the derivative along a direction of all weights;
* ``backward_tangent``: D h, and from it D of the gradient to the block's input.

With m the mean over an image's pixels, and g the gradient to ReLU's input, of scale s,

    h = s r (g - m(g) - n m(n g)),    D n = r (D y - m(D y) - n m(n D y)),

for the convolution's output y. By the product rule, with D r = -r^2 m(n D y), and with
m(g D n) s = r m(h D y), since the normalisation's Jacobian is symmetric,

    D h = s r (D g - m(D g) - n m(n D g)) - n r m(h D y) - D n s r m(n g) - h r m(n D y).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hmn_replay.objectives.convolution import Convolution, Kernel, Lifted, Scratch, channels_first

__all__ = ["MapLayer", "Maps", "pool", "rectify_", "unpool"]


@dataclass(eq=False)
class Maps:
    """State of a :class:`MapLayer`: maps ``(n, h, w, C)`` and statistics ``(n, 1, 1, C)``.

    Attributes:
        input: Of the convolution, in the convolution's dtype.
        lifted: The input as the convolution multiplies it, where ``rectified`` is.
        normalised: n.
        rate: r.
        rectified: ReLU's output, in scratch memory: until the layer sees other images.
        gradient: h, in the convolution's dtype.
        projection: m(n g).
        tangent: D n, where ``rectified`` is.
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
    """A block, by its maps.

    Args:
        name: Of its memory; no other layer's.
        weight: Of the convolution, ``(O, I, 3, 3)``.
        norm: With scale and shift.
        convolution: Which computes.
        scratch: What the layer works in. Maps that it returns are in scratch memory: valid until
            the next pass of any layer but the one that they are given to.
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
    """Take a gradient back through :func:`pool`, and through ReLU, whose output is given."""
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
    """Set a gradient to 0 where ReLU gave 0: in one pass, where a comparison takes two."""
    torch.ops.aten.threshold_backward.grad_input(gradient, rectified, 0, grad_input=gradient)
    return gradient


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=(1, 2), keepdim=True)
