"""Layouts: the tensor shapes of the three tiers, and how many images a budget holds.

The paper names no shapes. :meth:`Layout.choose` takes these:

* a grid of 4 to 7 cells along the smaller side;
* instance memories of one value for every 32 values of an image (96 for CIFAR);
* one 1 x 1 extractor, two class channels and four dataset channels: small, for they are paid for
  once a class;
* a decoder whose convolutions have 64, 32 and 16 channels from coarse to fine (64 above): the
  coarse ones hold most of the parameters and cost little time;
* all but the instance memories shrunk until they take 30 % of the budget at most and ten images a
  class fit, and then the instance memories too.

They were chosen on CIFAR-10 (1,000 training images a class) at 122,880 bytes in int8, by the
accuracy of a ConvNet-3 of width 64 after 40,000 image passes on what a warm start of 1,500 steps
decodes to (one training each; two trainings of one memory differ by about 0.7 points):

==============  ===============  =======  =======  ==========
instance        decoder          images   PSNR dB  accuracy %
==============  ===============  =======  =======  ==========
3 x 4 x 4       64, 32, 16       1,860    22.2     49.3
6 x 4 x 4       64, 32, 16       956      24.7     49.7
6 x 4 x 4       48, 24, 12       1,054    23.9     49.1
6 x 4 x 4       96, 48, 16       604      26.2     48.1
1 x 8 x 8       48, 24           1,584    22.0     49.5
2 x 8 x 8       48, 24           788      24.9     49.2
==============  ===============  =======  =======  ==========

The optimum is flat: half as many images of twice the quality teach as much. Beyond about 130
bytes an image, decoder and all, images are too few.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from hmn_replay.budget import Budget, as_int
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.filesize import TensorSpec, file_size
from hmn_replay.formats import NumberFormat, check_number_format
from hmn_replay.options import convert, convert_fields

__all__ = [
    "DIGEST_LENGTH",
    "FILE_VERSION",
    "MAX_CLASSES",
    "MAX_SIDE",
    "METADATA_KEY",
    "MIN_SIDE",
    "Layout",
]

FILE_VERSION = 1
DIGEST_LENGTH = 16
# One key alone: safetensors writes the keys of several in an order that changes from run to run.
METADATA_KEY = "hmn_replay"
MIN_SIDE, MAX_SIDE, MAX_CLASSES = 8, 224, 1000
_MAX_CHANNELS = 512
_PIXELS_PER_VALUE = 32
_SHARED_SHARE = 0.3
_MIN_IMAGES_PER_CLASS = 10
_SHRINKS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625)
_VALUE_BYTES = {"float32": 4, "float16": 2, "int8": 1}
_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "int8": "I8"}


@dataclass(frozen=True)
class Layout:
    """Shapes of a hierarchical memory's tensors, whatever its number of classes and images.

    The tiers are grids of ``ceil(H / stride) x ceil(W / stride)``; the decoder doubles the grid
    ``log2(stride)`` times, and what stands over the image's right and lower border is cut off.

    Args:
        image_shape: ``(C, H, W)`` of a decoded image; C is 1 or 3, H and W are 8 to 224.
        number_format: ``"float32"``, ``"float16"`` or ``"int8"``.
        stride: Image pixels a grid cell, along each side: 2, 4, 8, 16 or 32.
        dataset_channels: Channels of the dataset memory m_D.
        feature_channels: Channels that a class's extractor f_c makes of m_D.
        class_channels: Channels of a class memory m_C.
        instance_channels: Channels of an instance memory m_I.
        decoder_channels: Output channels of each of the decoder's convolutions but the last,
            coarsest first: log2(stride) of them.

    Raises:
        ConfigError: A value outside these ranges.
    """

    image_shape: tuple[int, int, int]
    number_format: NumberFormat
    stride: int
    dataset_channels: int
    feature_channels: int
    class_channels: int
    instance_channels: int
    decoder_channels: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_image_shape(self.image_shape)
        convert_fields(self)
        check_number_format(self.number_format)
        if self.stride not in (2, 4, 8, 16, 32):
            raise ConfigError(f"stride is 2, 4, 8, 16 or 32; got {self.stride!r}")
        counts = {
            "dataset_channels": self.dataset_channels,
            "feature_channels": self.feature_channels,
            "class_channels": self.class_channels,
            "instance_channels": self.instance_channels,
            **{f"decoder_channels[{i}]": c for i, c in enumerate(self.decoder_channels)},
        }
        for name, count in counts.items():
            if not 1 <= count <= _MAX_CHANNELS:
                raise ConfigError(f"{name} is 1 to {_MAX_CHANNELS}; got {count!r}")
        if len(self.decoder_channels) != self.num_doublings:
            raise ConfigError(
                f"decoder_channels has one entry a doubling, {self.num_doublings} for stride "
                f"{self.stride}; got {self.decoder_channels!r}"
            )

    @classmethod
    def choose(
        cls,
        budget: Budget | int | str,
        image_shape: Sequence[int],
        num_classes: int,
        number_format: NumberFormat = "int8",
    ) -> Layout:
        """Return the layout for a budget, by the rules at the top of this module.

        Args:
            budget: Bytes of the file.
            image_shape: ``(C, H, W)``.
            num_classes: K, 1 to 1000: how many classes share the budget.
            number_format: How values are stored.

        Raises:
            BudgetError: One image a class does not fit even with the smallest tiers; the message
                gives the smallest budget that does.
            ConfigError: A shape, a number of classes or a number format outside its range.
        """
        channels, height, width = _check_image_shape(image_shape)
        count = as_int(num_classes)
        if count is None or not 1 <= count <= MAX_CLASSES:
            raise ConfigError(f"num_classes is 1 to {MAX_CLASSES}; got {num_classes!r}")
        num_classes = count
        check_number_format(number_format)
        limit = Budget.parse(budget).num_bytes
        side = min(height, width)
        stride = next((s for s in (2, 4, 8, 16) if side / s < 8), 32)
        num_doublings = stride.bit_length() - 1
        cells = math.ceil(height / stride) * math.ceil(width / stride)
        instance_channels = max(1, round(channels * height * width / _PIXELS_PER_VALUE / cells))
        for shrink in _SHRINKS:
            layout = cls(
                (channels, height, width),
                number_format,
                stride,
                dataset_channels=max(1, round(4 * shrink)),
                feature_channels=max(1, round(2 * shrink)),
                class_channels=max(1, round(2 * shrink)),
                instance_channels=max(1, round(instance_channels * min(1, 2 * shrink))),
                decoder_channels=tuple(
                    max(4, round(min(64, 16 * 2**level) * shrink))
                    for level in reversed(range(num_doublings))
                ),
            )
            shared_bytes = layout.file_bytes(num_classes, 0, limit)
            instances_bytes = _MIN_IMAGES_PER_CLASS * num_classes * layout.instance_bytes
            if shared_bytes <= min(_SHARED_SHARE * limit, limit - instances_bytes):
                break
        layout.max_images(limit, num_classes)
        return layout

    @property
    def bias_format(self) -> NumberFormat:
        """Number format of the few biases: int8 would need as many scales as it has values."""
        return "float16" if self.number_format == "int8" else self.number_format

    @property
    def num_doublings(self) -> int:
        """How many times the decoder doubles the grid: log2(stride)."""
        return self.stride.bit_length() - 1

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of every tier's grid."""
        _, height, width = self.image_shape
        return math.ceil(height / self.stride), math.ceil(width / self.stride)

    @property
    def instance_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of one instance memory."""
        return (self.instance_channels, *self.grid)

    @property
    def instance_bytes(self) -> int:
        """Bytes of one instance memory."""
        return math.prod(self.instance_shape) * _VALUE_BYTES[self.number_format]

    @property
    def convolutions(self) -> list[tuple[int, int]]:
        """``(input, output)`` channels of the decoder's 3 x 3 convolutions, in order.

        The last one makes four values for each colour of a 2 x 2 block of pixels.
        """
        widths = [
            self.feature_channels + self.class_channels + self.instance_channels,
            *self.decoder_channels,
            4 * self.image_shape[0],
        ]
        return list(itertools.pairwise(widths))

    def tensors(self, num_classes: int, num_images: int) -> dict[str, TensorSpec]:
        """Return the name, type and shape of every tensor in the file."""
        num_classes = convert("num_classes", num_classes, "int")
        num_images = convert("num_images", num_images, "int")
        values = _SAFETENSORS_DTYPES[self.number_format]
        num_biases = num_classes * self.feature_channels + sum(o for _, o in self.convolutions)
        specs = {
            "labels": TensorSpec("I64", (num_classes,)),
            "counts": TensorSpec("I32", (num_classes,)),
            "dataset": TensorSpec(values, (self.dataset_channels, *self.grid)),
            "classes": TensorSpec(values, (num_classes, self.class_channels, *self.grid)),
            "instances": TensorSpec(values, (num_images, *self.instance_shape)),
            "extractors": TensorSpec(
                values, (num_classes, self.feature_channels, self.dataset_channels)
            ),
            "decoder": TensorSpec(values, (sum(9 * i * o for i, o in self.convolutions),)),
            "biases": TensorSpec(_SAFETENSORS_DTYPES[self.bias_format], (num_biases,)),
        }
        if self.number_format == "int8":
            num_scales = 1 + num_classes * (2 + self.instance_channels) + len(self.convolutions)
            specs["scales"] = TensorSpec("F32", (num_scales,))
        return specs

    def metadata(self, budget_bytes: int | None, digest: str = "0" * DIGEST_LENGTH) -> str:
        """Return the text that the file carries about itself; :meth:`from_metadata` reads it.

        Words apart by spaces: file version, digest, budget, number format, image shape, stride,
        channels of f_c(m_D)'s input and output, m_C and m_I, decoder channels.
        """
        words = (
            str(FILE_VERSION),
            digest,
            "-" if budget_bytes is None else str(budget_bytes),
            self.number_format,
            _join(self.image_shape),
            str(self.stride),
            _join(
                (
                    self.dataset_channels,
                    self.feature_channels,
                    self.class_channels,
                    self.instance_channels,
                )
            ),
            _join(self.decoder_channels),
        )
        return " ".join(words)

    @classmethod
    def from_metadata(cls, text: str) -> tuple[Layout, int | None, str]:
        """Return the layout, the budget in bytes and the digest that :meth:`metadata` wrote.

        Raises:
            ValueError: The text is not such a text, or names a layout that cannot be.
        """
        _, digest, budget, number_format, shape, stride, channels, decoder = text.split(" ")
        if len(digest) != DIGEST_LENGTH:
            raise ValueError(f"a digest has {DIGEST_LENGTH} characters")
        channel, height, width = _split(shape)
        dataset_channels, feature_channels, class_channels, instance_channels = _split(channels)
        layout = cls(
            image_shape=(channel, height, width),
            number_format=check_number_format(number_format),
            stride=int(stride),
            dataset_channels=dataset_channels,
            feature_channels=feature_channels,
            class_channels=class_channels,
            instance_channels=instance_channels,
            decoder_channels=_split(decoder),
        )
        budget_bytes = None if budget == "-" else Budget(int(budget)).num_bytes
        if layout.metadata(budget_bytes, digest) != text:
            raise ValueError("its numbers are written in another way than this package writes them")
        return layout, budget_bytes, digest

    def file_bytes(self, num_classes: int, num_images: int, budget_bytes: int | None) -> int:
        """Return the exact size of the memory file, header and all."""
        metadata = {METADATA_KEY: self.metadata(budget_bytes)}
        return file_size(self.tensors(num_classes, num_images), metadata)

    def max_images(self, budget: Budget | int | str, num_classes: int) -> int:
        """Return how many instance memories fit: the largest number within the budget.

        Raises:
            BudgetError: Not even one image a class fits; the message gives the smallest budget
                that this layout can do with.
        """
        limit = Budget.parse(budget).num_bytes
        num_classes = convert("num_classes", num_classes, "int")
        smallest = self.file_bytes(num_classes, num_classes, limit)
        if smallest > limit:
            # The budget itself stands in the header: one of more digits may take more bytes.
            while (needed := self.file_bytes(num_classes, num_classes, smallest)) > smallest:
                smallest = needed
            raise BudgetError(
                f"a budget of {limit:,} bytes does not hold one image of each of {num_classes} "
                f"classes; with this layout the smallest that does is {smallest:,} bytes"
            )
        # The header grows by a digit now and then, so the quotient is a start, not the answer.
        num_images = num_classes + (limit - smallest) // self.instance_bytes
        while self.file_bytes(num_classes, num_images, limit) > limit:
            num_images -= 1
        return num_images

    def num_floats(self, num_classes: int, num_images: int) -> int:
        """Return the number of learned values: the paper's measure of storage."""
        learned = ("dataset", "classes", "instances", "extractors", "decoder", "biases")
        specs = self.tensors(num_classes, num_images)
        return sum(math.prod(specs[name].shape) for name in learned)


def _check_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
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


def _join(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _split(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
