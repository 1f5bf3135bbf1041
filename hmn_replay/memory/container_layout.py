"""What the layouts of all containers share: the file that they describe, and what fits in it."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import ClassVar, TypeVar

from hmn_replay.budget import Budget, as_int
from hmn_replay.condensation.options import convert, convert_fields
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.memory.filesize import TensorSpec, file_size
from hmn_replay.memory.formats import PLAIN_FORMATS, NumberFormat, check_number_format, is_integer

__all__ = [
    "DIGEST_LENGTH",
    "FILE_VERSION",
    "MAX_CLASSES",
    "MAX_SIDE",
    "METADATA_KEY",
    "MIN_SIDE",
    "ContainerLayout",
    "check_image_shape",
    "check_num_classes",
    "first_that_fits",
]

FILE_VERSION = 1
DIGEST_LENGTH = 16
# One key alone: safetensors writes the keys of several in an order that changes from run to run.
METADATA_KEY = "hmn_replay"
MIN_SIDE, MAX_SIDE, MAX_CLASSES = 8, 224, 1000
_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "int8": "I8", "entropy": "U8"}

_Layout = TypeVar("_Layout", bound="ContainerLayout")


class ContainerLayout(abc.ABC):
    """Shapes of a container's tensors, whatever its number of classes and images.

    Subclasses are frozen dataclasses; beside these attributes they have their own fields.

    Attributes:
        container: The container's name, such as ``"hmn"``.
        learned: Names of the tensors in the file that hold learned values.
        per_image: The name of the one whose rows are the images, or groups of them.
        image_shape: ``(C, H, W)`` of a decoded image; C is 1 or 3, H and W are 8 to 224.
        number_formats: Those that a container of this kind can have.
        number_format: One of them.
    """

    container: ClassVar[str]
    learned: ClassVar[tuple[str, ...]]
    per_image: ClassVar[str]
    number_formats: ClassVar[tuple[NumberFormat, ...]] = PLAIN_FORMATS
    image_shape: tuple[int, int, int]
    number_format: NumberFormat

    def __post_init__(self) -> None:
        """Bring all fields to their types, and check those that every layout has."""
        check_image_shape(self.image_shape)
        convert_fields(self)
        if check_number_format(self.number_format) not in self.number_formats:
            raise ConfigError(
                f"the container {self.container!r} has one of the number formats "
                f"{', '.join(self.number_formats)}; got {self.number_format!r}"
            )

    @classmethod
    @abc.abstractmethod
    def choose(
        cls: type[_Layout],
        budget: Budget | int | str,
        image_shape: Sequence[int],
        num_classes: int,
        number_format: NumberFormat = "int8",
        real_images_per_class: int | None = None,
    ) -> _Layout:
        """Return the layout for a budget.

        Args:
            budget: Bytes of the file.
            image_shape: ``(C, H, W)``.
            num_classes: K, 1 to 1000: how many classes share the budget.
            number_format: How values are stored.
            real_images_per_class: How many real images of a class there are. The hierarchical
                memory gives room beyond so many to better images. None where that is not known.

        Raises:
            BudgetError: The budget does not hold an image of every class, whatever the layout; the
                message gives the smallest budget that does.
            ConfigError: A shape, a number of classes or a number format outside its range.
        """

    @abc.abstractmethod
    def tensors(self, num_classes: int, num_images: int) -> dict[str, TensorSpec]:
        """Return the name, type and shape of every tensor in the file.

        Where values are entropy-coded, ``"code"`` has the size that the layout plans for it.

        Args:
            num_classes: How many classes there are.
            num_images: How many images, a multiple of :attr:`group_size`.
        """

    @abc.abstractmethod
    def _words(self) -> tuple[str, ...]:
        """Return the fields that only this container has, as words of the file's metadata."""

    @classmethod
    @abc.abstractmethod
    def _from_words(
        cls: type[_Layout],
        image_shape: tuple[int, int, int],
        number_format: NumberFormat,
        words: Sequence[str],
    ) -> _Layout:
        """Return the layout that wrote these words; ValueError if none did."""

    @property
    def group_size(self) -> int:
        """How many images stand and fall together, since they share stored values."""
        return 1

    @property
    def is_coded(self) -> bool:
        """Whether values are entropy-coded."""
        return self.number_format == "entropy"

    @property
    def level_shapes(self) -> dict[str, list[tuple[int, ...]]]:
        """Shapes of the levels of each coded tensor's parts: one model an entry."""
        return {}

    def shapes(self, num_classes: int, num_images: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what is learned, by name."""
        specs = self.tensors(num_classes, num_images)
        return {name: specs[name].shape for name in self.learned}

    @property
    def values_dtype(self) -> str:
        """The safetensors data type of the learned values."""
        return _SAFETENSORS_DTYPES[self.number_format]

    @property
    def bias_format(self) -> NumberFormat:
        """Number format of the few biases: int8 would need as many scales as it has values."""
        return "float16" if is_integer(self.number_format) else self.number_format

    @property
    def bias_dtype(self) -> str:
        """The safetensors data type of the biases."""
        return _SAFETENSORS_DTYPES[self.bias_format]

    def metadata(self, budget_bytes: int | None, digest: str = "0" * DIGEST_LENGTH) -> str:
        """Return the text that the file carries about itself; :meth:`from_metadata` reads it.

        Words apart by spaces: file version, digest, budget, number format, image shape, and what
        the container has beside.
        """
        words = (
            str(FILE_VERSION),
            digest,
            "-" if budget_bytes is None else str(budget_bytes),
            self.number_format,
            ",".join(map(str, self.image_shape)),
            *self._words(),
        )
        return " ".join(words)

    @classmethod
    def from_metadata(cls: type[_Layout], text: str) -> tuple[_Layout, int | None, str]:
        """Return the layout, the budget in bytes and the digest that :meth:`metadata` wrote.

        Raises:
            ValueError: The text is not such a text, or names a layout that cannot be.
        """
        _, digest, budget, number_format, shape, *words = text.split(" ")
        if len(digest) != DIGEST_LENGTH:
            raise ValueError(f"a digest has {DIGEST_LENGTH} characters")
        channels, height, width = map(int, shape.split(","))
        image_shape = (channels, height, width)
        layout = cls._from_words(image_shape, check_number_format(number_format), words)
        budget_bytes = None if budget == "-" else Budget(int(budget)).num_bytes
        if layout.metadata(budget_bytes, digest) != text:
            raise ValueError("its numbers are written in another way than this package writes them")
        return layout, budget_bytes, digest

    def file_bytes(
        self,
        num_classes: int,
        num_images: int,
        budget_bytes: int | None,
        code_bytes: int | None = None,
    ) -> int:
        """Return the exact size of the memory file, header and all.

        Where values are entropy-coded, it is that of a code of ``code_bytes``: what the layout
        plans, where that is None.
        """
        specs = self.file_tensors(num_classes, num_images, code_bytes)
        return file_size(specs, {METADATA_KEY: self.metadata(budget_bytes)})

    def file_tensors(
        self, num_classes: int, num_images: int, code_bytes: int | None
    ) -> dict[str, TensorSpec]:
        """Return what :meth:`tensors` does, with a code of another size unless that is None."""
        specs = self.tensors(num_classes, num_images)
        if code_bytes is not None:
            specs["code"] = TensorSpec("U8", (code_bytes,))
        return specs

    @property
    def group_bytes(self) -> int:
        """Bytes that each further image takes, or each further group of them."""
        without, with_one = (
            sum(spec.num_bytes for spec in self.tensors(1, count * self.group_size).values())
            for count in (0, 1)
        )
        return with_one - without

    def max_images(self, budget: Budget | int | str, num_classes: int) -> int:
        """Return how many images fit: the largest number within the budget, in whole groups.

        Raises:
            BudgetError: Not even one group of images a class fits; the message gives the smallest
                budget that this layout can do with.
            ConfigError: ``num_classes`` is not 1 to 1000.
        """
        limit = Budget.parse(budget).num_bytes
        num_classes = check_num_classes(num_classes)
        size = self.group_size
        smallest = self.file_bytes(num_classes, size * num_classes, limit)
        if smallest > limit:
            # The budget itself stands in the header: one of more digits may take more bytes.
            while (needed := self.file_bytes(num_classes, size * num_classes, smallest)) > smallest:
                smallest = needed
            what = "one image" if size == 1 else f"{size} images, which come together,"
            raise BudgetError(
                f"a budget of {limit:,} bytes does not hold {what} of each of {num_classes} "
                f"classes; with this layout the smallest that does is {smallest:,} bytes"
            )
        # The header grows by a digit now and then, so the quotient is a start, not the answer.
        num_groups = num_classes + (limit - smallest) // self.group_bytes
        while self.file_bytes(num_classes, size * num_groups, limit) > limit:
            num_groups -= 1
        return size * num_groups

    def num_floats(self, num_classes: int, num_images: int) -> int:
        """Return the number of learned values: the paper's measure of storage."""
        return sum(map(math.prod, self.shapes(num_classes, num_images).values()))

    def _labels(self, num_classes: int) -> dict[str, TensorSpec]:
        """Return the tensors that every container's file begins with."""
        return {
            "labels": TensorSpec("I64", (num_classes,)),
            "counts": TensorSpec("I32", (num_classes,)),
        }


def first_that_fits(
    layouts: Iterable[_Layout], budget: Budget | int | str, num_classes: int
) -> _Layout:
    """Return the first layout with which a budget holds an image of every class.

    Raises:
        BudgetError: None does; the message is that of the last one.
        ConfigError: ``num_classes`` is not 1 to 1000.
    """
    *others, last = layouts
    for layout in others:
        with contextlib.suppress(BudgetError):
            layout.max_images(budget, num_classes)
            return layout
    last.max_images(budget, num_classes)
    return last


def check_num_classes(num_classes: int, name: str = "num_classes") -> int:
    """Return a number of classes that a container can have, or raise :class:`ConfigError`."""
    count = as_int(num_classes)
    if count is None or not 1 <= count <= MAX_CLASSES:
        raise ConfigError(f"{name} is 1 to {MAX_CLASSES}; got {num_classes!r}")
    return count


def check_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """Return an image shape that a container can have, or raise :class:`ConfigError`."""
    with contextlib.suppress(ConfigError):
        channels, *sides = convert("image_shape", image_shape, "tuple[int, ...]") or (0,)
        if (
            channels in (1, 3)
            and len(sides) == 2
            and MIN_SIDE <= min(sides) <= max(sides) <= MAX_SIDE
        ):
            return channels, sides[0], sides[1]
    raise ConfigError(
        f"image_shape is (C, H, W) with C 1 or 3 and H, W from {MIN_SIDE} to {MAX_SIDE}; "
        f"got {image_shape!r}"
    )
