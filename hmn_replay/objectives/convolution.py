"""A 3 x 3 convolution of maps with its two derivatives, and the memory that they work in.

Maps are ``(n, h, w, C)``. A convolution and its derivatives are three products of two out of three:
a layer's input, its kernel, and the gradient to its output. What one of them needs done before it
is multiplied, here a cast, is done once and is called lifting. A fast convolution lifts to a space
of its own: :class:`hmn_replay.objectives.winograd.Winograd` has the same methods.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.grad import conv2d_weight

__all__ = [
    "Convolution",
    "Direct",
    "Kernel",
    "Lifted",
    "Memory",
    "Scratch",
    "channels_first",
    "release_memory",
]

_SLAB_BYTES = 2**24
_ALIGNMENT = 64
_MOST_SPARE = 16
_SPARE: list[np.ndarray[Any, Any]] = []


class Lifted(NamedTuple):
    """A map that a convolution can multiply, and the map's ``(n, h, w)``."""

    values: Tensor
    shape: tuple[int, int, int]


class Kernel(NamedTuple):
    """A weight that a convolution can multiply, forward and backward."""

    forward: Tensor
    backward: Tensor


class Scratch:
    """Memory by name: what it gives is valid until the same name is asked for again.

    Memory that is new to a process comes page by page, which takes longer than to fill it with a
    convolution's output. So what takes less is asked for in slabs of 16 MiB, and up to 16 that
    nobody uses any longer are kept for the next who asks, until :func:`release_memory`. From 4 MiB
    on, numpy has the system give huge pages, which torch does not, and they come four times as
    fast. On other devices than the CPU, all memory is torch's, which keeps it.

    Args:
        like: Of the device and of the dtype that is meant where none is given.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like.new_empty(0)
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}
        self._slab = torch.empty(0, dtype=torch.uint8)

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of any values; on a CPU it takes the place of the last of that name.

        Args:
            name: Tensors of two names, or of two dtypes, share nothing.
            shape: Of the tensor, which is contiguous.
            dtype: Of the tensor. Default: that of ``like``.
        """
        dtype = dtype or self.like.dtype
        if self.like.device.type != "cpu":
            return self._new(shape, dtype)
        key = name, dtype, tuple(shape)
        if key not in self._views:
            size = math.prod(shape)
            buffer = self._buffers.get((name, dtype))
            if buffer is None or len(buffer) < size:
                self._views = {k: v for k, v in self._views.items() if k[:2] != (name, dtype)}
                buffer = self._buffers[name, dtype] = self._new((size,), dtype)
            self._views[key] = buffer[:size].view(shape)
        return self._views[key]

    def _new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self.like.device.type != "cpu":
            return self.like.new_empty(shape, dtype=dtype)
        num_bytes = math.prod(shape) * dtype.itemsize
        return self._cut(num_bytes).view(dtype).view(tuple(shape))

    def _cut(self, num_bytes: int) -> Tensor:
        if num_bytes + _ALIGNMENT > _SLAB_BYTES:
            alone = torch.from_numpy(np.empty(num_bytes + _ALIGNMENT, np.uint8))
            return _aligned(alone)[:num_bytes]
        if num_bytes > len(_aligned(self._slab)):
            self._slab = _lend_slab()
        taken, self._slab = _aligned(self._slab).tensor_split([num_bytes])
        return taken


class Memory(Scratch):
    """Memory that is given once: it stays valid, whatever the name."""

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of any values that shares memory with no other."""
        return self._new(shape, dtype or self.like.dtype)


def release_memory() -> None:
    """Give back to the system the memory that is kept for the next who asks."""
    _SPARE.clear()


def _lend_slab() -> Tensor:
    try:
        slab = _SPARE.pop()
    except IndexError:
        slab = np.empty(_SLAB_BYTES, np.uint8)
    # The last tensor that uses it takes this view of it along.
    lent = slab.view()
    weakref.finalize(lent, _take_back, slab).atexit = False
    return torch.from_numpy(lent)


def _take_back(slab: np.ndarray[Any, Any]) -> None:
    if len(_SPARE) < _MOST_SPARE:
        _SPARE.append(slab)


def _aligned(slab: Tensor) -> Tensor:
    return slab[-slab.data_ptr() % _ALIGNMENT :]


class Convolution(Protocol):
    """A 3 x 3 convolution with padding 1, and its derivatives.

    Maps that it returns are in scratch memory: valid until it is called again. A ``name`` is of the
    memory that a lifted map may take; it may share the map's own instead.

    Attributes:
        dtype: In which maps can be kept without loss, where they are to be lifted.
    """

    dtype: torch.dtype

    def kernel(self, weight: Tensor) -> Kernel:
        """Return a weight ``(O, I, 3, 3)`` as the others read it."""
        ...

    def lift(self, x: Tensor, name: str) -> Lifted:
        """Return an input ``(n, h, w, I)`` as the others read it."""
        ...

    def lift_gradient(self, g: Tensor, name: str) -> Lifted:
        """Return a gradient to an output, ``(n, h, w, O)``, as the others read it."""
        ...

    def forward(self, *terms: tuple[Lifted, Kernel]) -> Tensor:
        """Return the sum of some inputs' convolutions, ``(n, h, w, O)``."""
        ...

    def backward(self, *terms: tuple[Lifted, Kernel]) -> Tensor:
        """Return the gradient to an input, ``(n, h, w, I)``: a sum over gradients to outputs."""
        ...

    def zeros(self, weight: Tensor) -> Tensor:
        """Return the total to which :meth:`add_product` adds."""
        ...

    def add_product(self, total: Tensor, x: Lifted, g: Lifted) -> None:
        """Add what an input and a gradient to its output give for the weight."""
        ...

    def weight_gradient(self, total: Tensor) -> Tensor:
        """Return a total as a gradient to the weight, ``(O, I, 3, 3)``."""
        ...


class Direct:
    """A convolution as torch computes it.

    Args:
        dtype: In which it multiplies.
        scratch: Where its results are; they have the dtype of its ``like``.
    """

    def __init__(self, dtype: torch.dtype, scratch: Scratch) -> None:
        self.dtype, self._scratch = dtype, scratch

    def kernel(self, weight: Tensor) -> Kernel:
        """See :class:`Convolution`."""
        # A convolution with the second is the transpose of that with the first.
        pair = weight, rearrange(weight.flip(2, 3), "o i h w -> i o h w")
        return Kernel(*(w.to(self.dtype, memory_format=torch.channels_last) for w in pair))

    def lift(self, x: Tensor, name: str) -> Lifted:
        """See :class:`Convolution`."""
        n, h, w, _ = x.shape
        if x.dtype != self.dtype:
            x = self._scratch(name, x.shape, self.dtype).copy_(x)
        return Lifted(channels_first(x), (n, h, w))

    def lift_gradient(self, g: Tensor, name: str) -> Lifted:
        """See :class:`Convolution`."""
        return self.lift(g, name)

    def forward(self, *terms: tuple[Lifted, Kernel]) -> Tensor:
        """See :class:`Convolution`."""
        return self._sum([(x.values, kernel.forward) for x, kernel in terms])

    def backward(self, *terms: tuple[Lifted, Kernel]) -> Tensor:
        """See :class:`Convolution`."""
        return self._sum([(g.values, kernel.backward) for g, kernel in terms])

    def zeros(self, weight: Tensor) -> Tensor:
        """See :class:`Convolution`."""
        return torch.zeros_like(weight)

    def add_product(self, total: Tensor, x: Lifted, g: Lifted) -> None:
        """See :class:`Convolution`."""
        total += conv2d_weight(x.values, total.shape, g.values, padding=1)

    def weight_gradient(self, total: Tensor) -> Tensor:
        """See :class:`Convolution`."""
        return total

    def _sum(self, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
        first, *others = (F.conv2d(x, weight, padding=1).movedim(1, 3) for x, weight in terms)
        total = self._widen(first, "sum")
        for other in others:
            total += self._widen(other, "summand")
        return total

    def _widen(self, x: Tensor, name: str) -> Tensor:
        # Sums of two dtypes would do the same, in memory that is new each time.
        scratch = self._scratch
        return x if x.dtype == scratch.like.dtype else scratch(name, x.shape).copy_(x)


def channels_first(x: Tensor) -> Tensor:
    """View ``(n, h, w, C)`` as ``(n, C, h, w)``."""
    return x.movedim(3, 1)
