"""Convolution by Winograd's minimal filtering, F(4 x 4, 3 x 3), with shared transforms.

After Lavin and Gray 2016 (arXiv:1509.09308). Let d be a window of 6 x 6 of the input, f the weight,
y the tile of 4 x 4 of the output, and C (x) C the Kronecker product by which C is applied to both
axes of a flattened tile. Then

    y = A' [(B d) * (G f)],    A, G, B each of the form C (x) C,

where * is a product by elements, which sums over input channels: 36 matrix products, one for each
position, in place of 144 for 4 x 4 pixels and 9 taps. For the points p, A and G are Vandermonde
matrices of 4 and 3 columns, with a row (0, ..., 0, 1) for the point at infinity, and B is the
inverse transpose of that of 6 columns.

The derivatives are the adjoints of the same maps: for the gradient g to y,

    to d: B' [(A g) * (G f)],    to f: G' [(B d) * (A g)],

so an input and a gradient are transformed once, for all that they are multiplied with, and the
weight's gradient is added up over batches before it is transformed.

In float32 the transforms round more coarsely than direct convolution: 7e-7 of the result in place
of 1.5e-7, with the points 0, 5/8, -5/8, 3/2, -3/2. With 0, 1, -1, 2, -2, whose matrices are of
integers, it is 1.5e-6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmn_replay.objectives.convolution import Kernel, Lifted, Scratch

__all__ = ["Winograd"]

_POINTS = (0.0, 0.625, -0.625, 1.5, -1.5)


class Winograd:
    """A :class:`hmn_replay.objectives.convolution.Convolution` of a quarter of the multiplications.

    It pays from about 64 channels on, where products outweigh transforms. Sizes that are no
    multiple of 4 are filled up with zeros.

    Args:
        scratch: Where it works, and where its results are, in the dtype of its ``like``: float32 or
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
        """See :class:`~hmn_replay.objectives.convolution.Convolution`."""
        o, i = weight.shape[:2]
        lifted = (self._g @ weight.permute(2, 3, 1, 0).reshape(9, i * o)).view(36, i, o)
        return Kernel(lifted, lifted.mT)

    def lift(self, x: Tensor, name: str) -> Lifted:
        """See :class:`~hmn_replay.objectives.convolution.Convolution`."""
        n, h, w, c = x.shape
        i, j = _num_tiles(h, w)
        padded = self._padded("input", x.shape, (n, 4 * i + 2, 4 * j + 2, c))
        padded[:, 1 : h + 1, 1 : w + 1] = x
        windows = self._scratch("tiles", (n, i, j, 6, 6, c))
        windows.copy_(padded.unfold(1, 6, 4).unfold(2, 6, 4).movedim(3, 5))
        return Lifted(self._transform(self._b, windows, name), (n, h, w))

    def lift_gradient(self, g: Tensor, name: str) -> Lifted:
        """See :class:`~hmn_replay.objectives.convolution.Convolution`."""
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
        """See :class:`~hmn_replay.objectives.convolution.Convolution`."""
        n, h, w = terms[0][0].shape
        i, j = _num_tiles(h, w)
        products = self._sum([(x.values, kernel.forward) for x, kernel in terms])
        tiles = self._transform(self._a.T, products.transpose(0, 1), "tiles").transpose(0, 1)
        output = self._scratch("output", (n, i, 4, j, 4, tiles.shape[2]))
        output.copy_(tiles.view(n, i, j, 4, 4, -1).transpose(2, 3))
        return output.view(n, 4 * i, 4 * j, -1)[:, :h, :w]

    def backward(self, *terms: tuple[Lifted, Kernel]) -> Tensor:
        """See :class:`~hmn_replay.objectives.convolution.Convolution`."""
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
        """See :class:`~hmn_replay.objectives.convolution.Convolution`."""
        o, i = weight.shape[:2]
        return weight.new_zeros(36, i, o)

    def add_product(self, total: Tensor, x: Lifted, g: Lifted) -> None:
        """See :class:`~hmn_replay.objectives.convolution.Convolution`."""
        total.baddbmm_(x.values.mT, g.values)

    def weight_gradient(self, total: Tensor) -> Tensor:
        """See :class:`~hmn_replay.objectives.convolution.Convolution`."""
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
