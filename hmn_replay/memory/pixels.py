"""Pixels that are learned: raw images, and IDC's, which hold several small images each.

IDC (Kim et al. 2022, arXiv 2205.14959, Section 3.2, "multi-formation") cuts each stored image into
f x f pieces and upsamples every piece to a whole image. With f = 1 that is a raw image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hmn_replay.budget import Budget
from hmn_replay.errors import ConfigError
from hmn_replay.memory.base import Container, noise, ones, zeros
from hmn_replay.memory.container_layout import ContainerLayout, check_image_shape, first_that_fits
from hmn_replay.memory.filesize import TensorSpec
from hmn_replay.memory.formats import NumberFormat, Stored, check_number_format, round_to_format

__all__ = ["PIXEL_SCALE", "IDCLayout", "PixelContainer", "RawLayout", "to_unit_interval"]

PIXEL_SCALE = 0.5 / 127
"""The int8 scale of latent pixels in [-0.5, 0.5]: 255 steps of brightness, the ends among them."""


@dataclass(frozen=True)
class RawLayout(ContainerLayout):
    """One stored image for each decoded one, and nothing else.

    Args:
        image_shape: ``(C, H, W)``; C is 1 or 3, H and W are 8 to 224.
        number_format: ``"float32"``, ``"float16"`` or ``"int8"``.

    Raises:
        ConfigError: A value outside these ranges.
    """

    container = "raw"
    learned = ("images",)
    per_image = "images"

    image_shape: tuple[int, int, int]
    number_format: NumberFormat

    @classmethod
    def choose(
        cls,
        budget: Budget | int | str,
        image_shape: Sequence[int],
        num_classes: int,
        number_format: NumberFormat = "int8",
        real_images_per_class: int | None = None,
    ) -> RawLayout:
        """Return the layout; see :meth:`ContainerLayout.choose`."""
        layout = cls(check_image_shape(image_shape), check_number_format(number_format))
        return first_that_fits([layout], budget, num_classes)

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

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width of a stored image."""
        height, width = self.piece
        return height * self.factor, width * self.factor

    def tensors(self, num_classes: int, num_images: int) -> dict[str, TensorSpec]:
        """Return the name, type and shape of every tensor in the file."""
        shape = (num_images // self.group_size, self.image_shape[0], *self.stored_size)
        return {**self._labels(num_classes), "images": TensorSpec(self.values_dtype, shape)}

    def _words(self) -> tuple[str, ...]:
        return (self.container,)

    @classmethod
    def _from_words(
        cls, image_shape: tuple[int, int, int], number_format: NumberFormat, words: Sequence[str]
    ) -> RawLayout:
        (_,) = words
        return cls(image_shape, number_format)


@dataclass(frozen=True)
class IDCLayout(RawLayout):
    """Stored images of ``factor x factor`` pieces, each decoded to an image of its own.

    Where a side is no multiple of the factor, a stored image is a little smaller than a decoded
    one; the paper's code pads it instead.

    Args:
        image_shape: As in :class:`RawLayout`.
        number_format: As in :class:`RawLayout`.
        factor: f, 2 to 8, and pieces of 2 x 2 pixels or more.

    Raises:
        ConfigError: A value outside these ranges.
    """

    container = "idc"

    factor: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.factor <= 8 or min(self.piece) < 2:
            raise ConfigError(
                f"factor is 2 to 8, with pieces of 2 x 2 pixels or more; got {self.factor!r} for "
                f"images of {self.image_shape}"
            )

    @classmethod
    def choose(
        cls,
        budget: Budget | int | str,
        image_shape: Sequence[int],
        num_classes: int,
        number_format: NumberFormat = "int8",
        real_images_per_class: int | None = None,
    ) -> IDCLayout:
        """Return the layout with the paper's factor: 2, or 3 from sides of 128 pixels on."""
        shape = check_image_shape(image_shape)
        factor = 3 if min(shape[1:]) >= 128 else 2
        layout = cls(shape, check_number_format(number_format), factor)
        return first_that_fits([layout], budget, num_classes)

    def _words(self) -> tuple[str, ...]:
        return self.container, str(self.factor)

    @classmethod
    def _from_words(
        cls, image_shape: tuple[int, int, int], number_format: NumberFormat, words: Sequence[str]
    ) -> IDCLayout:
        _, factor = words
        return cls(image_shape, number_format, int(factor))


class PixelContainer(Container):
    """Learned pixels; arguments as for :class:`~hmn_replay.memory.base.Container`.

    Images ``f^2 k`` to ``f^2 k + f^2 - 1`` are the pieces of stored image k, row by row.

    Attributes:
        images: float32 ``(N / f^2, C, f h, f w)``, brightness less 0.5, in [-0.5, 0.5].
    """

    group_rows = ("images",)
    private = ("images",)
    layout: RawLayout
    pixel_scale: Tensor

    def _make_shared(self, generator: torch.Generator) -> None:
        height, width = self.layout.stored_size
        self.images = zeros(0, self.layout.image_shape[0], height, width)
        self.register_buffer("pixel_scale", PIXEL_SCALE * ones(), persistent=False)

    def _new_rows(
        self, generator: torch.Generator, counts: Sequence[int], owner: Tensor
    ) -> dict[str, Tensor]:
        shape = (sum(counts) // self.layout.group_size, *self.images.shape[1:])
        return {"images": noise(generator, 0.2, *shape).clamp(-0.5, 0.5)}

    def forward(self, indices: Tensor) -> Tensor:
        """Decode images, with gradients to their pixels; see :meth:`Container.forward`."""
        layout, f = self.layout, self.layout.factor
        pieces = rearrange(self.images, "n c (f h) (g w) -> n f g c h w", f=f, g=f)
        chosen = pieces[indices // f**2, indices // f % f, indices % f]
        images = round_to_format(chosen, layout.number_format, self.pixel_scale) + 0.5
        if f > 1:
            size = layout.image_shape[1:]
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return to_unit_interval(images)

    @torch.no_grad()
    def fit(self, first_image: int, real_images: Callable[[Tensor], Tensor]) -> bool:
        """Take over real images, each scaled down to its piece: IDC's `mix` initialisation.

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

    def stored(self) -> dict[str, list[Stored]]:
        """Return what the file's tensors hold, by name; see :meth:`Container.stored`."""
        return {"images": [Stored(self.images, self.layout.number_format, self.pixel_scale)]}

    @torch.no_grad()
    def update_scales(self, first_class: int = 0) -> None:
        """Bring pixels back to their range, whence the next step's gradient can reach them."""
        self.images.clamp_(-0.5, 0.5)

    @torch.no_grad()
    def largest_sum(self) -> float:
        """Return the largest pixel."""
        return float(self.images.abs().max()) if len(self.images) else 0.0


def to_unit_interval(images: Tensor) -> Tensor:
    """Clamp brightness to [0, 1], with gradients that lead black and white pixels back inside.

    A plain clamp has no gradient there (in some versions of torch, at 0 and 1 themselves neither),
    so that the black ground of a digit could never learn. Only what leads further out is cut.

    Args:
        images: float, any shape.
    """
    clamped: Tensor = _UnitInterval.apply(images)
    return clamped


class _UnitInterval(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        outwards = ((x <= 0) & (gradient > 0)) | ((x >= 1) & (gradient < 0))
        return gradient.masked_fill(outwards, 0)
