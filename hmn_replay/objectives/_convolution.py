"""A 3 x 3 convolution of maps with its two derivatives, and the memory that they work in.

Maps are ``(n, h, w, C)``. A convolution and its derivatives are three products, each of two out
of three tensors: a layer's input, its kernel, and the gradient to its output. What a tensor needs
before it is multiplied is done once, and is called lifting: a cast in :class:`Direct`, a transform
in :class:`Winograd`.
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
    "Slabs",
    "Winograd",
    "channels_first",
    "release_memory",
]

_ALIGNMENT = 64


class Lifted(NamedTuple):
    """A map that a convolution can multiply, and the map's ``(n, h, w)``."""

    values: Tensor
    shape: tuple[int, int, int]


class Kernel(NamedTuple):
    """A weight that a convolution can multiply, forward and backward."""

    forward: Tensor
    backward: Tensor


class Slabs:
    """Slabs of memory, some of which are kept for reuse when no tensor shares their memory.

    The first use of new memory, page by page, takes longer than to fill it with a convolution's
    output. From 4 MiB on, numpy asks the system for huge pages, which are faster; torch does not.

    Args:
        num_bytes: Bytes of a slab.
        max_spare: Slabs that are kept at most.
    """

    def __init__(self, num_bytes: int = 2**24, max_spare: int = 16) -> None:
        self.num_bytes, self._max_spare = num_bytes, max_spare
        self._spare: list[np.ndarray[Any, Any]] = []

    @property
    def num_spare(self) -> int:
        """How many slabs are kept for reuse."""
        return len(self._spare)

    def lend(self) -> Tensor:
        """Return a slab, uint8. It is taken back when no tensor shares its memory."""
        try:
            slab = self._spare.pop()
        except IndexError:
            slab = np.empty(self.num_bytes, np.uint8)
        # The last tensor that uses it takes this view of it along.
        lent = slab.view()
        weakref.finalize(lent, self._take_back, slab).atexit = False
        return torch.from_numpy(lent)

    def release(self) -> None:
        """Return the memory that is kept for reuse to the system."""
        self._spare.clear()

    def _take_back(self, slab: np.ndarray[Any, Any]) -> None:
        if len(self._spare) < self._max_spare:
            self._spare.append(slab)


_SHARED = Slabs()


def release_memory() -> None:
    """Return the memory that is kept for the next call of an objective to the system."""
    _SHARED.release()


class Scratch:
    """Memory by name: what it returns is valid until the same name is asked for again.

    On a CPU, tensors are cut from :class:`Slabs`, or have memory of their own where they are larger
    than one. On other devices, all memory is torch's, which keeps it for reuse itself.

    Args:
        like: A tensor of the device, and of the dtype of tensors for which none is given.
        slabs: Where memory comes from. Default: those of the whole process.
    """

    def __init__(self, like: Tensor, slabs: Slabs = _SHARED) -> None:
        self.like, self._slabs = like.new_empty(0), slabs
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}
        self._slab = torch.empty(0, dtype=torch.uint8)

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of any values; on a CPU it takes the place of the last of that name.

        Args:
            name: Tensors of two names, or of two dtypes, share nothing.
            shape: Shape of the tensor, which is contiguous.
            dtype: Dtype of the tensor. Default: that of ``like``.
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
        if num_bytes + _ALIGNMENT > self._slabs.num_bytes:
            alone = torch.from_numpy(np.empty(num_bytes + _ALIGNMENT, np.uint8))
            return _aligned(alone)[:num_bytes]
        if num_bytes > len(_aligned(self._slab)):
            self._slab = self._slabs.lend()
        taken, self._slab = _aligned(self._slab).tensor_split([num_bytes])
        return taken


class Memory(Scratch):
    """Memory that is never reused: tensors stay valid, whatever their name."""

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of any values that shares memory with no other."""
        return self._new(shape, dtype or self.like.dtype)


def _aligned(slab: Tensor) -> Tensor:
    return slab[-slab.data_ptr() % _ALIGNMENT :]


class Convolution(Protocol):
    """A 3 x 3 convolution with padding 1, and its derivatives.

    The maps that it returns are in scratch memory: valid until it is called again. A ``name`` is
    that of the scratch memory of a lifted map, which may share the map's own memory instead.

    Attributes:
        dtype: The dtype that maps are multiplied in: they can be kept in it without further loss.
    """

    dtype: torch.dtype

    def kernel(self, weight: Tensor) -> Kernel:
        """Return a weight ``(O, I, 3, 3)`` as the others read it."""

    def lift(self, x: Tensor, name: str) -> Lifted:
        """Return an input ``(n, h, w, I)`` as the others read it."""

    def lift_gradient(self, g: Tensor, name: str) -> Lifted:
        """Return a gradient to an output, ``(n, h, w, O)``, as the others read it."""

    def forward(self, *terms: tuple[Lifted, Kernel]) -> Tensor:
        """Return the sum of some inputs' convolutions, ``(n, h, w, O)``."""

    def backward(self, *terms: tuple[Lifted, Kernel]) -> Tensor:
        """Return the gradient to an input, ``(n, h, w, I)``: a sum over gradients to outputs."""

    def zeros(self, weight: Tensor) -> Tensor:
        """Return the total to which :meth:`add_product` adds."""

    def add_product(self, total: Tensor, x: Lifted, g: Lifted) -> None:
        """Add what an input and a gradient to its output give for the weight."""

    def weight_gradient(self, total: Tensor) -> Tensor:
        """Return a total as a gradient to the weight, ``(O, I, 3, 3)``."""


class Direct:
    """A convolution as torch computes it.

    Args:
        dtype: Dtype of its products.
        scratch: Memory of its results, which have the dtype of its ``like``.
    """

    def __init__(self, dtype: torch.dtype, scratch: Scratch) -> None:
        self.dtype, self._scratch = dtype, scratch

    def kernel(self, weight: Tensor) -> Kernel:
        # A convolution with the second is the transpose of that with the first.
        pair = weight, rearrange(weight.flip(2, 3), "o i h w -> i o h w")
        return Kernel(*(w.to(self.dtype, memory_format=torch.channels_last) for w in pair))

    def lift(self, x: Tensor, name: str) -> Lifted:
        n, h, w, _ = x.shape
        if x.dtype != self.dtype:
            x = self._scratch(name, x.shape, self.dtype).copy_(x)
        return Lifted(channels_first(x), (n, h, w))

    def lift_gradient(self, g: Tensor, name: str) -> Lifted:
        return self.lift(g, name)

    def forward(self, *terms: tuple[Lifted, Kernel]) -> Tensor:
        return self._sum([(x.values, kernel.forward) for x, kernel in terms])

    def backward(self, *terms: tuple[Lifted, Kernel]) -> Tensor:
        return self._sum([(g.values, kernel.backward) for g, kernel in terms])

    def zeros(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight)

    def add_product(self, total: Tensor, x: Lifted, g: Lifted) -> None:
        total += conv2d_weight(x.values, total.shape, g.values, padding=1)

    def weight_gradient(self, total: Tensor) -> Tensor:
        return total

    def _sum(self, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
        first, *others = (F.conv2d(x, weight, padding=1).movedim(1, 3) for x, weight in terms)
        total = self._widen(first, "sum")
        for other in others:
            total += self._widen(other, "summand")
        return total

    def _widen(self, x: Tensor, name: str) -> Tensor:
        # A sum of two dtypes would do the same, in new memory each time.
        scratch = self._scratch
        return x if x.dtype == scratch.like.dtype else scratch(name, x.shape).copy_(x)


def channels_first(x: Tensor) -> Tensor:
    """View ``(n, h, w, C)`` as ``(n, C, h, w)``."""
    return x.movedim(3, 1)


_POINTS = (0.0, 0.625, -0.625, 1.5, -1.5)


class Winograd:
    """A convolution by Winograd's minimal filtering, F(4 x 4, 3 x 3), with shared transforms.

    After Lavin and Gray 2016 (arXiv:1509.09308): a quarter of the multiplications. Let d be a
    window of 6 x 6 of the input, f the weight, y the tile of 4 x 4 of the output, and C (x) C the
    Kronecker product by which C is applied to both axes of a flattened tile. Then

        y = A' [(B d) * (G f)],    A, G, B each of the form C (x) C,

    where * is a product by elements, which sums over input channels: 36 matrix products, one for
    each position, in place of 144 for 4 x 4 pixels and 9 taps. For the points p, A and G are
    Vandermonde matrices of 4 and 3 columns, with a row (0, ..., 0, 1) for the point at infinity,
    and B is the inverse transpose of that of 6 columns.

    The derivatives are the adjoints of the same maps: for the gradient g to y,

        to d: B' [(A g) * (G f)],    to f: G' [(B d) * (A g)],

    so an input and a gradient are transformed once, for all that they are multiplied with, and the
    weight's gradient is added up over batches before it is transformed.

    The points 0, 5/8, -5/8, 3/2, -3/2 round less than 0, 1, -1, 2, -2, whose matrices are of
    integers; both round more than direct convolution.

    It pays from about 64 channels on, where products outweigh transforms. Sizes that are no
    multiple of 4 are padded with zeros.

    Args:
        scratch: Memory of its work and of its results, in the dtype of its ``like``: float32 or
            float64.
    """

    def __init__(self, scratch: Scratch) -> None:
        self.dtype, self._scratch = scratch.like.dtype, scratch
        self._zeros: dict[tuple[str, torch.Size], Tensor] = {}
        b = torch.linalg.inv(_vandermonde(6)).T
        self._a, self._g, self._b = (
            torch.kron(c, c).to(scratch.like) for c in (_vandermonde(4), _vandermonde(3), b)
        )

    def kernel(self, weight: Tensor) -> Kernel:
        o, i = weight.shape[:2]
        lifted = (self._g @ weight.permute(2, 3, 1, 0).reshape(9, i * o)).view(36, i, o)
        return Kernel(lifted, lifted.mT)

    def lift(self, x: Tensor, name: str) -> Lifted:
        n, h, w, c = x.shape
        i, j = _num_tiles(h, w)
        padded = self._padded("input", x.shape, (n, 4 * i + 2, 4 * j + 2, c))
        padded[:, 1 : h + 1, 1 : w + 1] = x
        windows = self._scratch("tiles", (n, i, j, 6, 6, c))
        windows.copy_(padded.unfold(1, 6, 4).unfold(2, 6, 4).movedim(3, 5))
        return Lifted(self._transform(self._b, windows, name), (n, h, w))

    def lift_gradient(self, g: Tensor, name: str) -> Lifted:
        n, h, w, c = g.shape
        i, j = _num_tiles(h, w)
        if h % 4 or w % 4:
            padded = self._padded("gradient", g.shape, (n, 4 * i, 4 * j, c))
            padded[:, :h, :w] = g
            g = padded
        tiles = self._scratch("tiles", (n, i, j, 4, 4, c))
        tiles.copy_(g.view(n, i, 4, j, 4, c).transpose(2, 3))
        return Lifted(self._transform(self._a, tiles, name), (n, h, w))

    def forward(self, *terms: tuple[Lifted, Kernel]) -> Tensor:
        n, h, w = terms[0][0].shape
        i, j = _num_tiles(h, w)
        products = self._sum([(x.values, kernel.forward) for x, kernel in terms])
        tiles = self._transform(self._a.T, products.transpose(0, 1), "tiles").transpose(0, 1)
        output = self._scratch("output", (n, i, 4, j, 4, tiles.shape[2]))
        output.copy_(tiles.view(n, i, j, 4, 4, -1).transpose(2, 3))
        return output.view(n, 4 * i, 4 * j, -1)[:, :h, :w]

    def backward(self, *terms: tuple[Lifted, Kernel]) -> Tensor:
        n, h, w = terms[0][0].shape
        i, j = _num_tiles(h, w)
        products = self._sum([(g.values, kernel.backward) for g, kernel in terms])
        tiles = self._transform(self._b.T, products.transpose(0, 1), "tiles").transpose(0, 1)
        tiles = tiles.view(n, i, j, 6, 6, -1).transpose(2, 3)
        # Windows overlap by two pixels: their last two lie in the next tile, the last of which has
        # no others.
        output = self._scratch("output", (n, i + 1, 4, j + 1, 4, tiles.shape[5]))
        output[:, :i, :, :j] = tiles[:, :, :4, :, :4]
        output[:, i, :2] = 0
        output[:, :i, :, j, :2] = 0
        output[:, 1:, :2, :j] += tiles[:, :, 4:, :, :4]
        output[:, :i, :, 1:, :2] += tiles[:, :, :4, :, 4:]
        output[:, 1:, :2, 1:, :2] += tiles[:, :, 4:, :, 4:]
        return output.view(n, 4 * i + 4, 4 * j + 4, -1)[:, 1 : h + 1, 1 : w + 1]

    def zeros(self, weight: Tensor) -> Tensor:
        o, i = weight.shape[:2]
        return weight.new_zeros(36, i, o)

    def add_product(self, total: Tensor, x: Lifted, g: Lifted) -> None:
        total.baddbmm_(x.values.mT, g.values)

    def weight_gradient(self, total: Tensor) -> Tensor:
        _, i, o = total.shape
        gradient = (self._g.T @ total.flatten(1)).view(3, 3, i, o)
        return gradient.permute(3, 2, 0, 1).contiguous()

    def _padded(self, kind: str, shape: torch.Size, padded_shape: tuple[int, ...]) -> Tensor:
        """Return zeros, but where a map of that kind and shape was written to before."""
        key = kind, shape
        if key not in self._zeros:
            self._zeros[key] = self._scratch.like.new_zeros(padded_shape)
        return self._zeros[key]

    def _transform(self, matrix: Tensor, tiles: Tensor, name: str) -> Tensor:
        """Apply a matrix to tiles ``(..., P, c)``, and return them position first."""
        rows, columns = matrix.shape
        tiles = tiles.reshape(-1, columns, tiles.shape[-1])
        out = self._scratch(name, (len(tiles), rows, tiles.shape[2]))
        torch.bmm(matrix.expand(len(tiles), rows, columns), tiles, out=out)
        return out.transpose(0, 1)

    def _sum(self, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
        (first, kernel), *others = terms
        products = self._scratch("products", (36, first.shape[1], kernel.shape[2]))
        torch.bmm(first, kernel, out=products)
        for tiles, kernel in others:
            products.baddbmm_(tiles, kernel)
        return products


def _num_tiles(height: int, width: int) -> tuple[int, int]:
    return -(-height // 4), -(-width // 4)


def _vandermonde(num_columns: int) -> Tensor:
    rows = [[point**power for power in range(num_columns)] for point in _POINTS]
    return torch.tensor([*rows, [0.0] * (num_columns - 1) + [1.0]], dtype=torch.float64)
