"""Pixels that are learned: raw images, and IDC's, which hold several small images each.

IDC (Kim et al. 2022, arXiv 2205.14959, Section 3.2, "multi-formation") cuts each stored image into
f x f pieces and upsamples every piece to a whole image. With f = 1 that is a raw image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hmn_replay.budget import Budget
from hmn_replay.container import Container, Stored, noise, zeros
from hmn_replay.container_layout import ContainerLayout, check_image_shape
from hmn_replay.errors import ConfigError
from hmn_replay.filesize import TensorSpec
from hmn_replay.formats import NumberFormat, check_number_format, round_to_format
from hmn_replay.options import convert_fields

__all__ = ["IDCLayout", "PixelContainer", "RawLayout"]

# Latent pixels are in [-0.5, 0.5], so that int8 has one step for every brightness of 8 bits.
_SCALE = 0.5 / 127
_FITTED_AT_ONCE = 256


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

    def __post_init__(self) -> None:
        check_image_shape(self.image_shape)
        convert_fields(self)
        check_number_format(self.number_format)

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
        layout.max_images(budget, num_classes)
        return layout

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

    def tensors(self, num_classes: int, num_images: int) -> dict[str, TensorSpec]:
        """Return the name, type and shape of every tensor in the file."""
        height, width = (side * self.factor for side in self.piece)
        shape = (num_images // self.group_size, self.image_shape[0], height, width)
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

    Where a side is no multiple of the factor, a stored image is smaller than a decoded one.

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
        layout.max_images(budget, num_classes)
        return layout

    def _words(self) -> tuple[str, ...]:
        return self.container, str(self.factor)

    @classmethod
    def _from_words(
        cls, image_shape: tuple[int, int, int], number_format: NumberFormat, words: Sequence[str]
    ) -> IDCLayout:
        _, factor = words
        return cls(image_shape, number_format, int(factor))


class PixelContainer(Container):
    """Learned pixels; arguments as for :class:`~hmn_replay.container.Container`.

    Images ``f^2 k`` to ``f^2 k + f^2 - 1`` are the pieces of stored image k, row by row.

    Attributes:
        images: float32 ``(N / f^2, C, f h, f w)``, brightness less 0.5, in [-0.5, 0.5].
    """

    group_rows = ("images",)
    private = ("images",)
    layout: RawLayout

    def _make_shared(self, generator: torch.Generator) -> None:
        height, width = (side * self.layout.factor for side in self.layout.piece)
        self.images = zeros(0, self.layout.image_shape[0], height, width)

    def _new_rows(
        self, generator: torch.Generator, counts: Sequence[int], owner: Tensor
    ) -> dict[str, Tensor]:
        shape = (sum(counts) // self.layout.group_size, *self.images.shape[1:])
        return {"images": noise(generator, 0.2, *shape).clamp(-0.5, 0.5)}

    def forward(self, indices: Tensor) -> Tensor:
        """Decode images, with gradients to their pixels; see :meth:`Container.forward`."""
        layout = self.layout
        stored = self.images[indices // layout.group_size]
        scale = stored.new_tensor(_SCALE)
        stored = round_to_format(stored, layout.number_format, scale) + 0.5
        if layout.factor == 1:
            return stored.clamp(0, 1)
        pieces = rearrange(
            stored, "b c (f h) (g w) -> b (f g) c h w", f=layout.factor, g=layout.factor
        )
        # Not an index with two tensors, whose second derivative is slow.
        which = (indices % layout.group_size).view(-1, 1, 1, 1, 1)
        chosen = pieces.take_along_dim(which, dim=1).squeeze(1)
        size = layout.image_shape[1:]
        return F.interpolate(chosen, size, mode="bilinear", align_corners=False).clamp(0, 1)

    @torch.no_grad()
    def fit(self, first_image: int, real_images: Callable[[Tensor], Tensor]) -> bool:
        """Take over real images, each scaled down to its piece: IDC's `mix` initialisation."""
        layout = self.layout
        height, width = layout.piece
        for positions in torch.arange(first_image, self.num_images).split(_FITTED_AT_ONCE):
            # A resize by whole pixels is a mean of them; others fall back to overlapping means.
            pieces = F.adaptive_avg_pool2d(real_images(positions), layout.piece) - 0.5
            for position, piece in zip(positions.tolist(), pieces, strict=True):
                group, which = divmod(position, layout.group_size)
                top, left = (which // layout.factor) * height, (which % layout.factor) * width
                self.images[group, :, top : top + height, left : left + width] = piece
        return True

    def stored(self) -> dict[str, list[Stored]]:
        """Return what the file's tensors hold, by name; see :meth:`Container.stored`."""
        scale = self.images.new_tensor(_SCALE)
        return {"images": [Stored(self.images, self.layout.number_format, scale)]}

    @torch.no_grad()
    def update_scales(self, first_class: int = 0) -> None:
        """Bring pixels back to their range, whence the next step's gradient can reach them."""
        self.images.clamp_(-0.5, 0.5)

    @torch.no_grad()
    def largest_sum(self) -> float:
        """Return the largest pixel."""
        return float(self.images.abs().max()) if len(self.images) else 0.0
