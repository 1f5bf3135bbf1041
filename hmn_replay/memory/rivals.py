"""The learned memories that the hierarchical memory is compared with, each in its paper's form.

* :class:`PixelMemory`: the pixels themselves.
* :class:`IDCMemory`: several small images in each stored one (IDC, Kim et al. 2022).
* :class:`HaBaMemory`: pairs of a basis image and a small network (HaBa, Liu et al. 2022).
* :class:`LinBaMemory`: combinations of basis images (LinBa, Deng and Russakovsky 2022).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hmn_replay.errors import ConfigError
from hmn_replay.memory.base import register_memory
from hmn_replay.memory.formats import clamp_inwards
from hmn_replay.memory.layout import MemoryLayout, StoredTensor
from hmn_replay.memory.learned import LearnedMemory

__all__ = [
    "HaBaLayout",
    "HaBaMemory",
    "IDCLayout",
    "IDCMemory",
    "LinBaLayout",
    "LinBaMemory",
    "PixelLayout",
    "PixelMemory",
]

# The int8 scale of latent pixels in [-0.5, 0.5]: 255 steps of brightness, both ends among them.
_PIXEL_SCALE = 0.5 / 127
_MAX_HALLUCINATORS, _MAX_BASES, _MAX_DOWNSAMPLING = 64, 1024, 8
# LinBa's basis is computed from about so many images, 64 for each of the paper's 16 vectors.
_FITTED_FROM = 1024
_BASIS_STD = 0.3


@dataclass(frozen=True)
class PixelLayout(MemoryLayout):
    """One stored image for each decoded one, and nothing else; see :class:`MemoryLayout`."""

    @property
    def factor(self) -> int:
        """Along each side, how many pieces a stored image is cut into."""
        return 1

    @property
    def group_size(self) -> int:
        """How many images a stored one is decoded to."""
        return self.factor**2

    @property
    def piece(self) -> tuple[int, int]:
        """Height and width of a piece, in stored pixels."""
        _, height, width = self.image_shape
        return height // self.factor, width // self.factor


@register_memory("pixels")
class PixelMemory(LearnedMemory):
    """Learned pixels; arguments as for :class:`LearnedMemory`.

    Images ``f^2 k`` to ``f^2 k + f^2 - 1`` are the pieces of stored image k, row by row; f is 1, or
    the factor of :class:`IDCMemory`.

    Attributes:
        images: float32 ``(N / f^2, C, f h, f w)``, brightness less 0.5, in [-0.5, 0.5].
    """

    Layout = PixelLayout
    layout: PixelLayout
    images: Tensor

    @classmethod
    def table(cls, layout: PixelLayout) -> tuple[StoredTensor, ...]:
        """Return what is stored: the pixels."""
        height, width = (layout.factor * side for side in layout.piece)
        shape = (layout.image_shape[0], height, width)
        return (_pixels("images", shape),)

    @classmethod
    def layouts(
        cls, budget_bytes: int, image_shape: tuple[int, int, int], number_format: str
    ) -> Iterable[MemoryLayout]:
        """Return the only layout there is; see :meth:`LearnedMemory.layouts`."""
        return [cls.Layout(image_shape, number_format)]

    def forward(self, indices: Tensor) -> Tensor:
        """Decode images, with gradients to their pixels; see :meth:`LearnedMemory.forward`."""
        f, stored = self.layout.factor, self.value("images", indices)
        pieces = rearrange(stored, "n c (f h) (g w) -> n f g c h w", f=f, g=f)
        own = torch.arange(len(indices), device=indices.device)
        images = pieces[own, indices // f % f, indices % f] + 0.5
        if f > 1:
            size = self.layout.image_shape[1:]
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return clamp_inwards(images, 0, 1)

    @torch.no_grad()
    def fit(self, first_image: int, real_images: Callable[[Tensor], Tensor]) -> bool:
        """Take over real images, each scaled down to its piece: IDC's ``mix`` initialisation.

        A pixel is the mean of those that it stands for; IDC's code takes one of them.
        """
        f, size = self.layout.factor, self.layout.group_size
        groups = torch.arange(first_image, self.num_images).view(-1, size)
        for chunk in groups.split(max(1, self.chunk_size // size)):
            pieces = F.adaptive_avg_pool2d(real_images(chunk.flatten()) - 0.5, self.layout.piece)
            stored = rearrange(pieces, "(n f g) c h w -> n c (f h) (g w)", f=f, g=f)
            device = self.images.device
            self.images[(chunk[:, 0] // size).to(device)] = stored.to(device)
        return True

    @torch.no_grad()
    def update_scales(self, first_class: int = 0) -> None:
        """Bring pixels back to their range, from where the next step's gradient can move them."""
        self.images.clamp_(-0.5, 0.5)
        super().update_scales(first_class)


@dataclass(frozen=True)
class IDCLayout(PixelLayout):
    """Stored images of ``f x f`` pieces, each decoded to an image of its own.

    Where a side is no multiple of the factor, a stored image is a little smaller than a decoded
    one; the paper's code pads it instead.

    Args:
        image_shape: As in :class:`MemoryLayout`.
        number_format: As in :class:`MemoryLayout`.
        pieces: f, 2 to 8, with pieces of 2 x 2 pixels or more. Default: 2.

    Raises:
        ConfigError: A value outside these ranges.
    """

    pieces: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.pieces <= 8 or min(self.piece) < 2:
            raise ConfigError(
                f"pieces is 2 to 8, with pieces of 2 x 2 pixels or more; got {self.pieces!r} for "
                f"images of {self.image_shape}"
            )

    @property
    def factor(self) -> int:
        """Along each side, how many pieces a stored image is cut into."""
        return self.pieces


@register_memory("idc")
class IDCMemory(PixelMemory):
    """Several small images in each stored one, each upsampled to a whole image.

    Kim et al. 2022, arXiv 2205.14959, Section 3.2, "multi-formation". Arguments and attributes as
    for :class:`PixelMemory`.
    """

    Layout = IDCLayout
    layout: IDCLayout

    @classmethod
    def layouts(
        cls, budget_bytes: int, image_shape: tuple[int, int, int], number_format: str
    ) -> Iterable[MemoryLayout]:
        """Return the layout with the paper's factor: 2, or 3 from sides of 128 pixels on."""
        pieces = 3 if min(image_shape[1:]) >= 128 else 2
        return [cls.Layout(image_shape, number_format, pieces)]


@dataclass(frozen=True)
class HaBaLayout(MemoryLayout):
    """Bases and hallucinators; every basis goes through every hallucinator.

    Args:
        image_shape: As in :class:`MemoryLayout`.
        number_format: As in :class:`MemoryLayout`.
        num_hallucinators: 1 to 64. Default: the paper's 5.

    Raises:
        ConfigError: A value outside these ranges.
    """

    num_hallucinators: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_hallucinators <= _MAX_HALLUCINATORS:
            raise ConfigError(
                f"num_hallucinators is 1 to {_MAX_HALLUCINATORS}; got {self.num_hallucinators!r}"
            )

    @property
    def group_size(self) -> int:
        """How many images a basis is decoded to."""
        return self.num_hallucinators


@register_memory("haba")
class HaBaMemory(LearnedMemory):
    """Bases and hallucinators; arguments as for :class:`LearnedMemory`.

    Liu et al. 2022, arXiv 2210.16774 ("Dataset Distillation via Factorization"). A hallucinator is
    a 3 x 3 convolution without padding, an element-wise scale and shift, and a transposed 3 x 3
    convolution back to the image's size: 5,568 floats for CIFAR. With h hallucinators, image
    ``h k + j`` is basis k through hallucinator j.

    Attributes:
        bases: float32 ``(N / h, C, H, W)``, brightness less 0.5, in [-0.5, 0.5].
        encoder_weight: float32 ``(h, C, C, 3, 3)``, convolutions without padding.
        encoder_bias: float32 ``(h, C)``.
        scaling: float32 ``(h, C, H - 2, W - 2)``.
        shift: float32 ``(h, C, H - 2, W - 2)``.
        decoder_weight: float32 ``(h, C, C, 3, 3)``: output, input; as convolutions with padding 2.
        decoder_bias: float32 ``(h, C)``.
    """

    Layout = HaBaLayout
    layout: HaBaLayout
    bases: Tensor
    encoder_weight: Tensor
    encoder_bias: Tensor
    scaling: Tensor
    shift: Tensor
    decoder_weight: Tensor
    decoder_bias: Tensor

    @classmethod
    def table(cls, layout: HaBaLayout) -> tuple[StoredTensor, ...]:
        """Return what is stored: the bases, and the hallucinators' weights."""
        count, (channels, height, width) = layout.num_hallucinators, layout.image_shape
        inner, kernel = (count, channels, height - 2, width - 2), (count, channels, channels, 3, 3)

        def weight(name: str, shape: tuple[int, ...], init: Any) -> StoredTensor:
            return StoredTensor(name, "shared", shape, init=init, scale_axes=(0,))

        return (
            _pixels("bases", layout.image_shape),
            weight("encoder_weight", kernel, _near_identity),
            StoredTensor("encoder_bias", "shared", (count, channels), is_bias=True),
            weight("scaling", inner, _ones),
            weight("shift", inner, 0.0),
            weight("decoder_weight", kernel, _near_identity),
            StoredTensor("decoder_bias", "shared", (count, channels), is_bias=True),
        )

    @classmethod
    def layouts(
        cls, budget_bytes: int, image_shape: tuple[int, int, int], number_format: str
    ) -> Iterable[MemoryLayout]:
        """Return the layouts of 5 hallucinators and fewer, which leave more room for bases."""
        return [cls.Layout(image_shape, number_format, count) for count in (5, 4, 3, 2, 1)]

    def forward(self, indices: Tensor) -> Tensor:
        """Decode images, with gradients to all of it; see :meth:`LearnedMemory.forward`."""
        which = indices % self.layout.num_hallucinators
        own = {name: self.value(name)[which] for name in self.tensors if name != "bases"}
        x = _convolve(self.value("bases", indices), own["encoder_weight"], own["encoder_bias"])
        x = x * own["scaling"] + own["shift"]
        x = _convolve(F.pad(x, (2, 2, 2, 2)), own["decoder_weight"], own["decoder_bias"])
        return clamp_inwards(x + 0.5, 0, 1)

    @torch.no_grad()
    def fit(self, first_image: int, real_images: Callable[[Tensor], Tensor]) -> bool:
        """Begin with the first real image of each group as its basis, as the paper does.

        The steps of the warm start do the rest: hallucinators learn to pick each image of a group
        out of the basis.
        """
        size, device = self.layout.group_size, self.bases.device
        for positions in torch.arange(first_image, self.num_images, size).split(self.chunk_size):
            self.bases[(positions // size).to(device)] = real_images(positions).to(device) - 0.5
        return False

    @torch.no_grad()
    def update_scales(self, first_class: int = 0) -> None:
        """Bring bases back to their range, and set the hallucinators' int8 scales."""
        self.bases.clamp_(-0.5, 0.5)
        super().update_scales(first_class)


@dataclass(frozen=True)
class LinBaLayout(MemoryLayout):
    """A shared basis at a lower resolution, and coefficients for each image.

    Args:
        image_shape: As in :class:`MemoryLayout`.
        number_format: As in :class:`MemoryLayout`.
        num_bases: K, 1 to 1024. Default: 16.
        downsampling: ds, 1 to 8: pixels of an image for one of the basis, along each side.
            Default: 2.

    Raises:
        ConfigError: A value outside these ranges.
    """

    num_bases: int = 16
    downsampling: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("num_bases", _MAX_BASES), ("downsampling", _MAX_DOWNSAMPLING)):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} is 1 to {most}; got {getattr(self, name)!r}")

    @property
    def basis_shape(self) -> tuple[int, int, int]:
        """``(C, h, w)`` of a basis image."""
        channels, height, width = self.image_shape
        ds = self.downsampling
        return channels, math.ceil(height / ds), math.ceil(width / ds)


@register_memory("linba")
class LinBaMemory(LearnedMemory):
    """A basis and coefficients; arguments as for :class:`LearnedMemory`.

    Deng and Russakovsky 2022, arXiv 2206.02916 ("Remember the Past"): images = A @ B, upsampled.
    The coefficients A are an image's own; the basis B is shared by all images of all classes.

    Attributes:
        coefficients: A, float32 ``(N, K)``.
        basis: B, float32 ``(K, C, h, w)``, brightness less 0.5.
    """

    Layout = LinBaLayout
    layout: LinBaLayout
    coefficients: Tensor
    basis: Tensor

    @classmethod
    def table(cls, layout: LinBaLayout) -> tuple[StoredTensor, ...]:
        """Return what is stored: coefficients and basis."""
        count = layout.num_bases
        shape = (count, *layout.basis_shape)
        return (
            StoredTensor("coefficients", "image", (count,), init=count**-0.5, rate=10.0),
            StoredTensor("basis", "shared", shape, init=_BASIS_STD, scale_axes=(0,)),
        )

    @classmethod
    def layouts(
        cls, budget_bytes: int, image_shape: tuple[int, int, int], number_format: str
    ) -> Iterable[MemoryLayout]:
        """Return layouts of the paper's shape: K = 16 at 1 IPC of CIFAR-10's floats, ds = 2.

        K grows as the square root of the number of values, so that basis and coefficients both do,
        but not beyond the values of a basis image; each further layout halves it.
        """
        paper = cls.Layout(image_shape, number_format)
        num_values = budget_bytes / paper.format.dtype.itemsize
        num_images = num_values / math.prod(paper.image_shape)
        wanted = round(paper.num_bases * math.sqrt(num_images / 10))
        num_bases = max(1, min(wanted, math.prod(paper.basis_shape), _MAX_BASES))
        halvings = (num_bases >> i for i in range(num_bases.bit_length()))
        return [dataclasses.replace(paper, num_bases=count) for count in halvings]

    def forward(self, indices: Tensor) -> Tensor:
        """Decode images, with gradients to A and B; see :meth:`LearnedMemory.forward`."""
        coefficients, basis = self.value("coefficients", indices), self.value("basis")
        return self._upsample((coefficients @ basis.flatten(1)).view(-1, *basis.shape[1:]))

    def _decode_chunk(self, indices: Tensor) -> Tensor:
        # In a product of matrices the order of a sum, and so its last bit, depends on the place.
        coefficients, basis = self.value("coefficients", indices), self.value("basis")
        x = basis.new_zeros(len(indices), *basis.shape[1:])
        for own, image in zip(coefficients.T, basis, strict=True):
            x += own.view(-1, 1, 1, 1) * image
        return self._upsample(x)

    def _upsample(self, x: Tensor) -> Tensor:
        _, height, width = self.layout.image_shape
        if self.layout.downsampling > 1:
            factor = float(self.layout.downsampling)
            x = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
        return clamp_inwards(x[..., :height, :width] + 0.5, 0, 1)

    @torch.no_grad()
    def fit(self, first_image: int, real_images: Callable[[Tensor], Tensor]) -> bool:
        """Take the principal components of real images, and each image's coordinates on them.

        A basis that older images are decoded with (``first_image`` above 0) stays.
        """
        positions = torch.arange(first_image, self.num_images)
        device = self.basis.device
        if not first_image:
            some = positions[:: max(1, len(positions) // _FITTED_FROM)]
            reduced = [self._reduced(real_images(part)) for part in some.split(self.chunk_size)]
            # Not centred: the first component stands for the mean.
            *_, components = torch.linalg.svd(torch.cat(reduced), full_matrices=False)
            # Every basis image in the range of pixels; the size of its part is in A.
            components *= _BASIS_STD * math.sqrt(components.shape[1])
            found = components[: self.layout.num_bases].view(-1, *self.layout.basis_shape)
            self.basis[: len(found)] = found.to(device)
            self.update_scales()  # images are decoded with what it is rounded to
        basis = self.value("basis").flatten(1).cpu().double()
        inverse = basis.T @ torch.linalg.pinv(basis @ basis.T, hermitian=True)
        for chunk in positions.split(self.chunk_size):
            coordinates = self._reduced(real_images(chunk)).double() @ inverse
            self.coefficients[chunk.to(device)] = coordinates.float().to(device)
        return True

    def _reduced(self, images: Tensor) -> Tensor:
        """Return images at the basis's resolution, float32 ``(B, C h w)``, less 0.5."""
        ds, (_, height, width) = self.layout.downsampling, self.layout.basis_shape
        beyond = (0, width * ds - images.shape[3], 0, height * ds - images.shape[2])
        return F.avg_pool2d(F.pad(images - 0.5, beyond, mode="replicate"), ds).flatten(1)


def _pixels(name: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name, "image", shape, init=_noise, scale=_PIXEL_SCALE, rate=10.0)


def _noise(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    return noise.mul_(0.2).clamp_(-0.5, 0.5)


def _ones(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    del generator
    return torch.ones(shape, dtype=torch.float32)


def _near_identity(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Return 3 x 3 convolutions that take the middle of each channel, and a little noise."""
    weight = torch.randn(shape, generator=generator, dtype=torch.float32) * 0.05
    channels = range(shape[1])
    weight[:, channels, channels, 1, 1] += 1
    return weight


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve each image with 3 x 3 weights of its own, without padding.

    Tap by tap: the order of a sum, and so its last bit, is the same wherever the image stands.

    Args:
        x: float ``(B, I, H, W)``.
        weight: float ``(B, O, I, 3, 3)``.
        bias: float ``(B, O)``.

    Returns:
        float ``(B, O, H - 2, W - 2)``.
    """
    height, width = x.shape[2] - 2, x.shape[3] - 2
    y = bias[:, :, None, None]
    for i, top, left in itertools.product(range(x.shape[1]), range(3), range(3)):
        window = x[:, i, None, top : top + height, left : left + width]
        y = y + weight[:, :, i, top, left, None, None] * window
    return y
