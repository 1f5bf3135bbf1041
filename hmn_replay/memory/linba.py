"""LinBa: images as linear combinations of a few shared basis images.

Deng and Russakovsky 2022, arXiv 2206.02916 ("Remember the Past"): images = A @ B, upsampled. The
coefficients A are an image's own; the basis B is shared by all images of all classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hmn_replay.budget import Budget
from hmn_replay.errors import ConfigError
from hmn_replay.memory.base import Container, noise, ones, zeros
from hmn_replay.memory.container_layout import ContainerLayout, check_image_shape, first_that_fits
from hmn_replay.memory.filesize import TensorSpec
from hmn_replay.memory.formats import (
    NumberFormat,
    Stored,
    check_number_format,
    max_abs_scale,
    round_to_format,
)
from hmn_replay.memory.pixels import to_unit_interval

__all__ = ["LinBa", "LinBaLayout"]

_MAX_BASES = 1024
# The basis is computed from about so many images, 64 for each of the paper's 16 vectors.
_FITTED_FROM = 1024
_BASIS_STD = 0.3


@dataclass(frozen=True)
class LinBaLayout(ContainerLayout):
    """A shared basis at a lower resolution, and coefficients for each image.

    Args:
        image_shape: ``(C, H, W)``; C is 1 or 3, H and W are 8 to 224.
        number_format: ``"float32"``, ``"float16"`` or ``"int8"``.
        num_bases: K, 1 to 1024.
        downsampling: ds, 1 to 8: pixels of an image for one of the basis, along each side.

    Raises:
        ConfigError: A value outside these ranges.
    """

    container = "linba"
    learned = ("coefficients", "basis")
    per_image = "coefficients"

    image_shape: tuple[int, int, int]
    number_format: NumberFormat
    num_bases: int = 16
    downsampling: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("num_bases", _MAX_BASES), ("downsampling", 8)):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} is 1 to {most}; got {getattr(self, name)!r}")

    @classmethod
    def choose(
        cls,
        budget: Budget | int | str,
        image_shape: Sequence[int],
        num_classes: int,
        number_format: NumberFormat = "int8",
        real_images_per_class: int | None = None,
    ) -> LinBaLayout:
        """Return the layout with the paper's shape: K = 16 at 1 IPC of CIFAR-10's floats, ds = 2.

        K grows as the square root of the number of values, so that basis and coefficients both do,
        but not beyond the values of a basis image; where one image a class does not fit, it is
        halved.
        """
        paper = cls(check_image_shape(image_shape), check_number_format(number_format))
        num_values = Budget.parse(budget).num_bytes / TensorSpec(paper.values_dtype, ()).num_bytes
        num_images = num_values / math.prod(paper.image_shape)
        wanted = round(paper.num_bases * math.sqrt(num_images / 10))
        num_bases = max(1, min(wanted, math.prod(paper.basis_shape), _MAX_BASES))
        halvings = (num_bases >> i for i in range(num_bases.bit_length()))
        layouts = (dataclasses.replace(paper, num_bases=count) for count in halvings)
        return first_that_fits(layouts, budget, num_classes)

    @property
    def basis_shape(self) -> tuple[int, int, int]:
        """``(C, h, w)`` of a basis image."""
        channels, height, width = self.image_shape
        ds = self.downsampling
        return channels, math.ceil(height / ds), math.ceil(width / ds)

    def tensors(self, num_classes: int, num_images: int) -> dict[str, TensorSpec]:
        """Return the name, type and shape of every tensor in the file."""
        values, count = self.values_dtype, self.num_bases
        specs = {
            **self._labels(num_classes),
            "coefficients": TensorSpec(values, (num_images, count)),
            "basis": TensorSpec(values, (count, *self.basis_shape)),
        }
        if self.number_format == "int8":
            specs["scales"] = TensorSpec("F32", (num_classes + count,))
        return specs

    def _words(self) -> tuple[str, ...]:
        return self.container, f"{self.num_bases},{self.downsampling}"

    @classmethod
    def _from_words(
        cls, image_shape: tuple[int, int, int], number_format: NumberFormat, words: Sequence[str]
    ) -> LinBaLayout:
        _, numbers = words
        num_bases, downsampling = map(int, numbers.split(","))
        return cls(image_shape, number_format, num_bases, downsampling)


class LinBa(Container):
    """Coefficients and a basis; arguments as for :class:`~hmn_replay.memory.base.Container`.

    Attributes:
        coefficients: A, float32 ``(N, K)``.
        basis: B, float32 ``(K, C, h, w)``; combinations stand for brightness less 0.5.
        coefficient_scale: float32 ``(num_classes, 1)``.
        basis_scale: float32 ``(K, 1, 1, 1)``.
    """

    class_rows = ("coefficient_scale",)
    group_rows = ("coefficients",)
    private = ("coefficients",)
    layout: LinBaLayout
    coefficient_scale: Tensor
    basis_scale: Tensor

    def _make_shared(self, generator: torch.Generator) -> None:
        layout = self.layout
        self.basis = noise(generator, _BASIS_STD, layout.num_bases, *layout.basis_shape)
        self.coefficients = zeros(0, layout.num_bases)
        self.register_buffer("coefficient_scale", ones(0, 1))
        self.register_buffer("basis_scale", ones(layout.num_bases, 1, 1, 1))

    def _new_rows(
        self, generator: torch.Generator, counts: Sequence[int], owner: Tensor
    ) -> dict[str, Tensor]:
        num_bases = self.layout.num_bases
        coefficients = noise(generator, num_bases**-0.5, sum(counts), num_bases)
        return {
            "coefficients": coefficients,
            "coefficient_scale": _class_scales(coefficients, owner, len(counts)),
        }

    def forward(self, indices: Tensor) -> Tensor:
        """Decode images, with gradients to A and B; see :meth:`Container.forward`."""
        coefficients, basis = self._rounded(indices)
        return self._upsample((coefficients @ basis.flatten(1)).view(-1, *basis.shape[1:]))

    def _decode_chunk(self, indices: Tensor) -> Tensor:
        # In a product of matrices the order of a sum, and so its last bit, depends on the place.
        coefficients, basis = self._rounded(indices)
        x = basis.new_zeros(len(indices), *basis.shape[1:])
        for own, image in zip(coefficients.T, basis, strict=True):
            x += own.view(-1, 1, 1, 1) * image
        return self._upsample(x)

    def _rounded(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        values, scale = self.layout.number_format, self.coefficient_scale[self.class_index[indices]]
        coefficients = round_to_format(self.coefficients[indices], values, scale)
        return coefficients, round_to_format(self.basis, values, self.basis_scale)

    def _upsample(self, x: Tensor) -> Tensor:
        _, height, width = self.layout.image_shape
        if self.layout.downsampling > 1:
            factor = float(self.layout.downsampling)
            x = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
        return to_unit_interval(x[..., :height, :width] + 0.5)

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
            self.basis_scale = max_abs_scale(self.basis, self.basis_scale)
        basis = self.basis.flatten(1).cpu().double()
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

    def stored(self) -> dict[str, list[Stored]]:
        """Return what the file's tensors hold, by name; see :meth:`Container.stored`."""
        values = self.layout.number_format
        scale = self.coefficient_scale[self.class_index]
        return {
            "coefficients": [Stored(self.coefficients, values, scale)],
            "basis": [Stored(self.basis, values, self.basis_scale)],
        }

    def scales(self) -> list[Tensor]:
        """Return the int8 scales that the file has, in order."""
        return [self.coefficient_scale, self.basis_scale]

    @torch.no_grad()
    def update_scales(self, first_class: int = 0) -> None:
        """Set the int8 scales so that no latent value is clipped; see :class:`Container`."""
        if self.layout.number_format != "int8":
            return
        if not first_class:
            self.basis_scale = max_abs_scale(self.basis, self.basis_scale)
        new = _class_scales(self.coefficients, self.class_index, self.num_classes)
        kept = self.coefficient_scale[:first_class]
        self.coefficient_scale = torch.cat([kept, new[first_class:]])

    @torch.no_grad()
    def largest_sum(self) -> float:
        """Return what no sum of the combination can exceed, by the triangle inequality."""
        if not len(self.coefficients):
            return float(self.basis.abs().max())
        basis = self.basis.double().abs().flatten(1).amax(dim=1)
        return float((self.coefficients.double().abs() @ basis).max())


def _class_scales(coefficients: Tensor, owner: Tensor, num_classes: int) -> Tensor:
    largest = coefficients.detach().abs().amax(dim=1)
    by_class = largest.new_zeros(num_classes).scatter_reduce_(0, owner, largest, "amax")
    return max_abs_scale(by_class.view(-1, 1), ones(num_classes, 1))
