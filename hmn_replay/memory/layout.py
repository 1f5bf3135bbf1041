"""The declaration of a learned memory: the tensors that it stores, and its frozen shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hmn_replay.budget import as_int
from hmn_replay.errors import ConfigError
from hmn_replay.memory.checks import check_image_shape
from hmn_replay.memory.formats import NUMBER_FORMATS, NumberFormat

__all__ = ["PRIVATE_RATE", "MemoryLayout", "StoredTensor"]

PRIVATE_RATE = 10.0
"""How many times faster class and instance memories learn, which few images share. Entropy-coded
tensors multiply it by their step, so that an update is the same fraction of a step."""

Init = Callable[[torch.Generator, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class StoredTensor:
    """One row of the table of what a memory stores.

    Args:
        name: The parameter's name, a Python identifier.
        rows: ``"shared"``, one for all images; ``"class"``, a row a class; or ``"image"``, a row an
            image (or ``layout.group_size`` images that share it).
        shape: Of a row, or of all of it where it is shared.
        init: Standard deviation of the normal values that it begins with; or a function from a
            generator and a shape to them, float32.
        is_bias: Whether it is one of the few values that integers would be too coarse for: stored
            in float16 where the number format has integers, without scales.
        scale_axes: Axes of ``shape`` along which int8 scales differ. Rows of classes have scales of
            their own, and so have, class by class, rows of images.
        scale: The int8 scale, where it does not follow from the values. Default: None, it does.
        step: Width of a step between integers where they are entropy-coded.
        model_axes: Axes of ``shape`` along which models of the entropy coder differ.
        rate: How many times faster than others it learns.
    """

    name: str
    rows: Literal["shared", "class", "image"]
    shape: tuple[int, ...]
    init: float | Init = 0.0
    is_bias: bool = False
    scale_axes: tuple[int, ...] = ()
    scale: float | None = None
    step: float = 0.0625
    model_axes: tuple[int, ...] = ()
    rate: float = 1.0

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ConfigError(f"the name of a stored tensor is an identifier; got {self.name!r}")
        if self.rows not in ("shared", "class", "image"):
            raise ConfigError(f"rows are 'shared', 'class' or 'image'; got {self.rows!r}")

    def full_shape(self, num_classes: int, num_rows: int) -> tuple[int, ...]:
        """Return the shape of all of it, for so many classes and rows of images."""
        leading = {"shared": (), "class": (num_classes,), "image": (num_rows,)}
        return (*leading[self.rows], *self.shape)

    def scale_shape(self, num_classes: int) -> tuple[int, ...]:
        """Return the shape of its int8 scales, for so many classes."""
        leading = () if self.rows == "shared" else (num_classes,)
        return (*leading, *_masked(self.shape, self.scale_axes))

    @property
    def model_shape(self) -> tuple[int, ...]:
        """The shape of its entropy models, which broadcasts to all of it."""
        leading = () if self.rows == "shared" else (1,)
        return (*leading, *_masked(self.shape, self.model_axes))

    def draw(self, generator: torch.Generator, num_rows: int | None = None) -> Tensor:
        """Return values to begin with, float32: ``num_rows`` rows, or all of it where shared."""
        shape = self.shape if num_rows is None else (num_rows, *self.shape)
        if callable(self.init):
            return self.init(generator, shape)
        if self.init == 0:
            return torch.zeros(shape, dtype=torch.float32)
        return torch.randn(shape, generator=generator, dtype=torch.float32) * self.init


@dataclass(frozen=True)
class MemoryLayout:
    """The frozen shape of a memory, whatever its number of classes and images.

    Subclasses are frozen dataclasses with fields of their own, integers or tuples of integers.

    Args:
        image_shape: ``(C, H, W)`` of a decoded image; C is 1 or 3, H and W are 8 to 224.
        number_format: A name among :data:`~hmn_replay.memory.formats.NUMBER_FORMATS`.

    Raises:
        ConfigError: A value outside these ranges.
        DataError: A height or width outside them.
    """

    image_shape: tuple[int, int, int]
    number_format: str

    def __post_init__(self) -> None:
        NUMBER_FORMATS[self.number_format]
        object.__setattr__(self, "image_shape", self.check_shape(self.image_shape))
        for field in self._own_fields():
            value = getattr(self, field.name)
            is_tuple = str(field.type).startswith("tuple")
            numbers = list(value) if is_tuple and isinstance(value, Sequence) else [value]
            whole = [number for number in map(as_int, numbers) if number is not None]
            if len(whole) < len(numbers) or is_tuple != isinstance(value, Sequence):
                what = "a sequence of integers" if is_tuple else "an integer"
                raise ConfigError(f"{field.name} is {what}; got {value!r}")
            object.__setattr__(self, field.name, tuple(whole) if is_tuple else whole[0])

    @staticmethod
    def check_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return a shape that decoded images can have, or raise an error that says which."""
        return check_image_shape(image_shape)

    @classmethod
    def _own_fields(cls) -> list[dataclasses.Field[Any]]:
        return [
            f for f in dataclasses.fields(cls) if f.name not in ("image_shape", "number_format")
        ]

    def _check_image_bytes(self, image_bytes: int) -> None:
        """Raise a ConfigError unless the bytes planned for an image go with the number format."""
        if (image_bytes > 0) != self.is_coded or image_bytes < 0:
            raise ConfigError(
                f"image_bytes is 1 or more where values are entropy-coded, and 0 otherwise; got "
                f"{image_bytes!r} with {self.number_format!r}"
            )

    @property
    def format(self) -> NumberFormat:
        """The number format."""
        return NUMBER_FORMATS[self.number_format]

    @property
    def is_coded(self) -> bool:
        """Whether values are entropy-coded."""
        return self.format.is_coded

    @property
    def image_field(self) -> str | None:
        """The name of the field that says how large images are; None where they have one size."""
        return "image_bytes" if self.is_coded else None

    def with_images_of(self, size: int) -> Any:
        """Return the same layout with images of another size; see :attr:`image_field`."""
        assert self.image_field is not None, "images have one size"
        changed: dict[str, Any] = {self.image_field: size}
        return dataclasses.replace(self, **changed)

    @property
    def group_size(self) -> int:
        """How many images share stored values, and so are kept or dropped together."""
        return 1

    def words(self) -> tuple[str, ...]:
        """Return the layout as words without spaces; :meth:`from_words` reads them."""
        own = (getattr(self, field.name) for field in self._own_fields())
        return (self.number_format, _join(self.image_shape), *map(_join, own))

    @classmethod
    def from_words(cls, words: Sequence[str]) -> Any:
        """Return the layout that wrote these words.

        Raises:
            ValueError: None did.
        """
        number_format, shape, *own = words
        fields = cls._own_fields()
        if len(own) != len(fields):
            raise ValueError(f"a layout of {2 + len(fields)} words, got {len(words)}")
        values = [
            tuple(map(int, word.split(","))) if str(field.type).startswith("tuple") else int(word)
            for field, word in zip(fields, own, strict=True)
        ]
        channels, height, width = map(int, shape.split(","))
        layout = cls((channels, height, width), number_format, *values)
        if layout.words() != tuple(words):
            raise ValueError("its numbers are written in another way than this package writes them")
        return layout


def _masked(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(size if axis in axes else 1 for axis, size in enumerate(shape))


def _join(value: int | tuple[int, ...]) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
