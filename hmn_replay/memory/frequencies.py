"""A memory of frequencies: the discrete cosine transform in place of a learned decoder.

FreD (Shin et al. 2023, arXiv 2311.08819, "Frequency Domain-based Dataset Distillation") learns the
coefficients of those frequencies in which images vary most, and nothing else: nothing is shared by
images, so nothing has to be fitted to real ones before they can be encoded, nothing has to stay as
the first classes left it, and all of a budget is for images. Here

* images are cut into blocks of up to 32 x 32 pixels, and a block's three colours are turned into
  brightness and two differences of colours;
* which frequencies are stored is the same for all data, and takes no bytes: those at which natural
  images vary most, by a rule, where the paper selects them by their variance in the data;
* coefficients are entropy-coded by default, eight neighbours in that order under one model. The
  paper stores floats.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hmn_replay.budget import smallest
from hmn_replay.errors import ConfigError
from hmn_replay.memory.base import Codec, register_memory
from hmn_replay.memory.entropy import MAX_INTEGER
from hmn_replay.memory.formats import NUMBER_FORMATS, clamp_inwards
from hmn_replay.memory.layout import PRIVATE_RATE, MemoryLayout, StoredTensor
from hmn_replay.memory.learned import LearnedMemory
from hmn_replay.runtime import without_autocast

__all__ = ["FrequencyLayout", "FrequencyMemory"]

_LARGEST_BLOCK, _GROUP = 32, 8
# Brightness, and what natural images vary by next: red against blue, both against green; and at how
# many times the frequency brightness varies as little as each does.
_COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (0.5, -1.0, 0.5))
_COLOUR_FACTORS = (1.0, 2.6, 4.0)
# As in the hierarchical memory: bytes planned for an image over the root of its number of values.
_IMAGE_BYTES = 1.73
# Where values are not entropy-coded, one of so many is stored; else so many for each byte.
_VALUES_PER_STORED, _FREQUENCIES_PER_BYTE = 16, 11
# By how much of a step coefficients are brought nearer to zero before they are rounded: what is
# smaller takes fewer bits.
_LEAST_SHIFT, _MOST_SHIFT, _NUM_HALVINGS = 1 / 6, 8.0, 20
# Of the logarithm of the step.
_LOG_STEPS = -8.0, 4.0
# Of coefficients beside the lowest ones: by how much those of later images may be larger.
_MARGIN = 1.25


@dataclass(frozen=True)
class FrequencyLayout(MemoryLayout):
    """How many frequencies of a block are stored, and how finely.

    Args:
        image_shape: ``(C, H, W)`` of a decoded image; C is 1 or 3, H and W are 8 to 224.
        number_format: A name among :data:`~hmn_replay.memory.formats.NUMBER_FORMATS`.
        num_frequencies: F, how many coefficients of a block of ``h x w`` pixels are stored, of all
            its colours together: a multiple of 8, and at most ``C h w``.
        image_bytes: Bytes planned for the code of an image where values are entropy-coded, 1 or
            more: they decide how many images a budget is filled with. 0 with other formats.

    Raises:
        ConfigError: A value outside these ranges.
    """

    num_frequencies: int
    image_bytes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.image_shape[0] * math.prod(self.block)
        if not _GROUP <= self.num_frequencies <= most or self.num_frequencies % _GROUP:
            raise ConfigError(
                f"num_frequencies is a multiple of {_GROUP}, up to {most} for images of "
                f"{self.image_shape}; got {self.num_frequencies!r}"
            )
        self._check_image_bytes(self.image_bytes)

    @classmethod
    def of_images(
        cls, image_shape: tuple[int, int, int], number_format: str, image_bytes: int = 0
    ) -> FrequencyLayout:
        """Return a layout: the more bytes an entropy-coded image has, the more frequencies."""
        least = cls(image_shape, number_format, _GROUP, image_bytes)
        num_values, num_blocks = math.prod(least.image_shape), math.prod(least.blocks)
        wanted = num_values / _VALUES_PER_STORED
        if least.is_coded:
            wanted = _FREQUENCIES_PER_BYTE * image_bytes
        most = least.image_shape[0] * math.prod(least.block) // _GROUP
        groups = max(1, min(most, round(wanted / num_blocks / _GROUP)))
        return dataclasses.replace(least, num_frequencies=_GROUP * groups)

    def with_images_of(self, size: int) -> FrequencyLayout:
        """Return the layout of images of other bytes; see :attr:`image_field`."""
        return self.of_images(self.image_shape, self.number_format, size)

    @property
    def lowest_units(self) -> int:
        """How many steps a unit of a block's eight lowest frequencies has: 1, 2 or 4.

        They are the largest, and entropy-coded integers are 127 at most: where a block has twice
        or four times the usual bytes, and so a smaller step, twice or four times as many.
        """
        values = self.image_shape[0] * math.prod(self.block)
        usual = _IMAGE_BYTES * math.sqrt(values) * math.prod(self.blocks)
        octaves = round(math.log2(max(1, self.image_bytes) / usual))
        return (1, 2, 4)[max(0, min(2, octaves))]

    @property
    def blocks(self) -> tuple[int, int]:
        """How many blocks an image has, down and across."""
        _, height, width = self.image_shape
        return math.ceil(height / _LARGEST_BLOCK), math.ceil(width / _LARGEST_BLOCK)

    @property
    def block(self) -> tuple[int, int]:
        """Height and width of a block in pixels, 32 at most.

        What extends beyond the image's right and lower border is cut off.
        """
        (_, height, width), (down, across) = self.image_shape, self.blocks
        return math.ceil(height / down), math.ceil(width / across)


@register_memory("fred")
class FrequencyMemory(LearnedMemory):
    """Coefficients of cosine transforms; arguments as for :class:`LearnedMemory`.

    Shin et al. 2023, arXiv 2311.08819, entropy-coded by default.

    Attributes:
        coefficients: float32 ``(N, B, F / 8, 8)`` for B blocks and F frequencies, the lowest first,
            of brightness less 0.5, in units of a step, or of several for the first eight; see
            :attr:`FrequencyLayout.lowest_units`. The transform is orthonormal.
        log_step: The logarithm of the step, float32 ``(1,)``; 0 where they are not entropy-coded.
    """

    Layout = FrequencyLayout
    has_codec = True
    default_number_format = "entropy"
    codes_entropy = True
    layout: FrequencyLayout
    coefficients: Tensor
    log_step: Tensor

    @classmethod
    def table(cls, layout: FrequencyLayout) -> tuple[StoredTensor, ...]:
        """Return what is stored: the coefficients and their step."""
        shape = (math.prod(layout.blocks), layout.num_frequencies // _GROUP, _GROUP)
        return (
            StoredTensor(
                "coefficients",
                "image",
                shape,
                init=0.1,
                scale_axes=(1,),
                step=1.0,
                model_axes=(1,),
                rate=PRIVATE_RATE,
            ),
            StoredTensor("log_step", "shared", (1,), is_bias=True),
        )

    @classmethod
    def layouts(
        cls, budget_bytes: int, image_shape: tuple[int, int, int], number_format: str
    ) -> Iterable[FrequencyLayout]:
        """Return the only layout there is; see :meth:`LearnedMemory.layouts`."""
        image_bytes = 0
        if NUMBER_FORMATS[number_format].is_coded:
            image_bytes = math.ceil(_IMAGE_BYTES * math.sqrt(math.prod(image_shape)))
        return [cls.Layout.of_images(image_shape, number_format, image_bytes)]

    @classmethod
    def image_work(cls, layout: FrequencyLayout) -> int:
        """Return how many multiplications decode an image: those of its blocks' transforms."""
        channels, (height, width) = layout.image_shape[0], layout.block
        each = channels * height * width * (height + width + channels)
        return math.prod(layout.blocks) * each

    def forward(self, indices: Tensor) -> Tensor:
        """Decode images, with gradients to their coefficients; see :meth:`LearnedMemory.forward`.

        In float32, whatever the precision of a surrounding ``torch.autocast``.
        """
        with without_autocast(self.classes.device):
            return self._images(indices, _product)

    def _decode_chunk(self, indices: Tensor) -> Tensor:
        return self._images(indices, _sum_in_order)

    @property
    def _units(self) -> Tensor:
        """What a coefficient of 1 stands for, ``(F / 8, 1)``, or one number for all."""
        step = self.value("log_step").clamp(*_LOG_STEPS).exp()
        if self.layout.lowest_units == 1:
            return step
        units = torch.ones_like(step).repeat(self.layout.num_frequencies // _GROUP, 1)
        units[0] = self.layout.lowest_units
        return step * units

    def _images(self, indices: Tensor, product: _Product) -> Tensor:
        """Return images, float32 ``(n, C, H, W)``, by a way to combine values along an axis."""
        (channels, height, width), (down, across) = self.layout.image_shape, self.layout.blocks
        coefficients = self.value("coefficients", indices) * self._units
        size = self.layout.block
        _, places = _frequencies(channels, size, self.layout.num_frequencies, coefficients.device)
        # What is not stored is the zero at the end.
        x = F.pad(coefficients.flatten(2), (0, 1))[..., places].unflatten(2, (channels, *size))
        matrices = _transforms(channels, size, x.device, x.dtype)
        for dim, matrix in zip((2, 3, 4), matrices, strict=True):
            x = product(x, matrix, dim)
        x = rearrange(x, "n (a b) c h w -> n c (a h) (b w)", a=down, b=across)
        return clamp_inwards(x[..., :height, :width] + 0.5, 0, 1)

    def _analysed(self, images: Tensor) -> Tensor:
        """Return the coefficients of images, float32 ``(n, B, F / 8, 8)``, in units of 1."""
        (channels, height, width), (down, across) = self.layout.image_shape, self.layout.blocks
        size = self.layout.block
        beyond = (0, across * size[1] - width, 0, down * size[0] - height)
        x = F.pad(images - 0.5, beyond, mode="replicate")
        x = rearrange(x, "n c (a h) (b w) -> n (a b) c h w", a=down, b=across)
        matrices = _transforms(channels, size, x.device, x.dtype)
        for dim, matrix in zip((2, 3, 4), matrices, strict=True):
            x = _product(x, matrix.T, dim)
        stored, _ = _frequencies(channels, size, self.layout.num_frequencies, x.device)
        found: Tensor = x.flatten(2)[..., stored].unflatten(2, (-1, _GROUP))
        return found

    @torch.no_grad()
    def fit(self, first_image: int, real_images: Callable[[Tensor], Tensor]) -> bool:
        """Take the coefficients of real images.

        Entropy-coded ones take as many bytes as are planned: by their step, which is found here,
        or, where older images have it already (``first_image`` above 0), by how much nearer to zero
        they are brought before they are rounded.
        """
        device = self.coefficients.device
        positions = torch.arange(first_image, self.num_images)
        parts = (real_images(chunk).to(device) for chunk in positions.split(self.chunk_size))
        exact = torch.cat([self.coefficients[:0], *map(self._analysed, parts)])
        if not self.layout.is_coded or not len(exact):
            self.coefficients[first_image:] = exact
            return True
        positions = positions.to(device)

        def fits(shift: float) -> bool:
            self.coefficients[first_image:] = self._in_steps(exact, shift)
            return float(self.rate(positions)[0]) <= 8 * self.layout.image_bytes

        def fits_with(log_step: float) -> bool:
            self.log_step.fill_(log_step)
            return fits(_LEAST_SHIFT)

        if first_image == 0:
            least = self._least_log_step(exact)
            fits_with(smallest(least, _LOG_STEPS[1], fits_with, _NUM_HALVINGS))
        elif not fits(_LEAST_SHIFT):
            fits(smallest(_LEAST_SHIFT, _MOST_SHIFT, fits, _NUM_HALVINGS))
        return True

    def _least_log_step(self, exact: Tensor) -> float:
        """Return the logarithm of a step that coefficients have no more than 127 of."""
        values = self.layout.image_shape[0] * math.prod(self.layout.block)
        lowest = math.sqrt(values) / 2 / self.layout.lowest_units  # of white or black images
        others = _MARGIN * float(exact[:, :, 1:].abs().amax()) if exact.shape[2] > 1 else 0.0
        return math.log(max(lowest, others) / MAX_INTEGER)

    @torch.no_grad()
    def set_images(self, indices: Tensor, real_images: Callable[[Tensor], Tensor]) -> bool:
        """Set coefficients to those of real images."""
        for chunk in indices.split(self.chunk_size):
            found = self._analysed(real_images(chunk).to(self.coefficients.device))
            self.coefficients[chunk.to(found.device)] = self._in_steps(found)
        return True

    @torch.no_grad()
    def _codec(self) -> Codec:
        device, size = self.coefficients.device, self.chunk_size
        shown = type(self)(self.layout, [0], 0).to(device)
        shown.log_step.copy_(self.log_step)

        @torch.no_grad()
        def recode(images: Tensor) -> Tensor:
            recoded = torch.empty_like(images)
            for own, some in zip(recoded.split(size), images.split(size), strict=True):
                found = shown._analysed(some.to(device).float() / 255)
                shown._replace("coefficients", shown._in_steps(found))
                shown.class_index = torch.zeros(len(some), dtype=torch.int64, device=device)
                shown.update_scales()
                own[:] = shown(torch.arange(len(some), device=device)).mul(255).round()
            return recoded

        return recode

    def _in_steps(self, coefficients: Tensor, shift: float = _LEAST_SHIFT) -> Tensor:
        """Return coefficients in units of a step; if coded, nearer to zero by a part of one."""
        steps = coefficients / self._units
        return F.softshrink(steps, shift) if self.layout.is_coded else steps


_Product = Callable[[Tensor, Tensor, int], Tensor]


def _product(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """Return ``x``, whose values along an axis became combinations of them: ``matrix[k]`` of each.

    Args:
        x: float, any shape.
        matrix: float ``(K, M)``.
        dim: The axis of ``x`` of size K, which becomes one of size M.
    """
    return torch.movedim(torch.movedim(x, dim, -1) @ matrix, -1, dim)


def _sum_in_order(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """Return :func:`_product`, to bits that do not depend on the place of a row.

    In a product of matrices the order of a sum, and so its last bit, does.
    """
    shape = (-1, *[1] * (x.ndim - 1 - dim))
    rows = zip(x.split(1, dim), matrix, strict=True)
    total: Tensor = sum(own * row.view(shape) for own, row in rows)
    return total


# What is made inside torch.inference_mode() could not be differentiated by later.
@functools.lru_cache
@torch.inference_mode(False)
def _transforms(
    channels: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what colours, rows and columns of coefficients are turned into pixels by.

    They are kept, so that a device does not wait for them in each step.

    Returns:
        Three orthonormal matrices, ``(C, C)``, ``(h, h)`` and ``(w, w)``: for each
        coefficient the colours, or the cosine, that it stands for.
    """
    colours = F.normalize(torch.tensor(_COLOURS, dtype=torch.float64), dim=1)
    colours = colours if channels == 3 else torch.ones((1, 1), dtype=torch.float64)
    rows, columns = map(_cosines, size)
    return colours.to(device, dtype), rows.to(device, dtype), columns.to(device, dtype)


def _cosines(size: int) -> Tensor:
    """Return the orthonormal discrete cosine transform (type II): float64, a row a frequency."""
    steps = torch.arange(size, dtype=torch.float64)
    cosines = (math.pi / size * steps[:, None] * (steps + 0.5)).cos()
    return F.normalize(cosines, dim=1)


@functools.lru_cache
@torch.inference_mode(False)
def _frequencies(
    channels: int, size: tuple[int, int], count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return which coefficients of a block are stored.

    Args:
        channels: C.
        size: Height and width of a block.
        count: F.
        device: Where the result is to be.

    Returns:
        int64 ``(F,)``, the positions of those that are stored among all of a block, ``(C, h, w)``
        in one row; and int64 ``(C h w,)``, the place of each among those that are stored, F of one
        that is not.
    """
    height, width = size
    distances = {
        (c, u, v): factor * (0.5 + _LARGEST_BLOCK * math.sqrt((u / height) ** 2 + (v / width) ** 2))
        for c, factor in enumerate(_COLOUR_FACTORS[:channels])
        for u in range(height)
        for v in range(width)
    }
    order = sorted(distances, key=distances.__getitem__)[:count]
    stored = torch.tensor([(c * height + u) * width + v for c, u, v in order])
    places = torch.full((channels * height * width,), count)
    places[stored] = torch.arange(count)
    return stored.to(device), places.to(device)
