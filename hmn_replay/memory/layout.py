"""Layouts: the tensor shapes of the three tiers, and how many images a budget holds.

The paper names no shapes. :meth:`Layout.choose` takes these:

* a grid of 4 to 7 cells along the smaller side;
* instance memories of one value for every 32 values of an image (96 for CIFAR);
* one 1 x 1 extractor, two class channels and four dataset channels: small, for they are paid for
  once a class;
* a decoder whose convolutions have 64, 32 and 16 channels from coarse to fine (64 above): the
  coarse ones hold most of the parameters and cost little time;
* all but the instance memories shrunk until they take 30 % of the budget at most and ten images a
  class fit, and then the instance memories too;
* up to four times larger instance memories where more images would fit than there are real ones.

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

With ``"entropy"`` values that are 0 cost little, so that there may be many: the grid is finer and
has more channels (6 x 8 x 8 for CIFAR: 0.6 dB above 16 x 4 x 4 at equal bytes), the decoder is a
little smaller (48 and 24 channels; 32 and 16, or 64 and 32, gave the same), and an image is planned
1.73 bytes for the root of its number of values: 96 for CIFAR, 14 for digits of 8 x 8 pixels, whose
pixels repeat each other less. As above, but with 600 steps, and a ConvNet-3 of width 32 after
20,000 passes (three trainings each, with a deviation of 0.6 to 1):

=============  =======  =======  ==========
bytes planned  images   PSNR dB  accuracy %
=============  =======  =======  ==========
60             1,871    22.9     42.2
96             1,169    25.3     43.6
140            802      26.9     43.5
=============  =======  =======  ==========

Real images as JPEG taught 43.2 % with quality 10 (1,629 images), 43.7 with 20 (1,046) and 43.5 with
30 (817). Digits at 2,048 bytes: 65 % with 4 bytes planned, 74 with 8, 76 with 14 and 72 with 22.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hmn_replay.budget import Budget
from hmn_replay.condensation.options import convert
from hmn_replay.errors import ConfigError
from hmn_replay.memory.container_layout import ContainerLayout, check_image_shape, check_num_classes
from hmn_replay.memory.filesize import TensorSpec
from hmn_replay.memory.formats import NUMBER_FORMATS, NumberFormat, check_number_format

__all__ = ["Layout"]

_MAX_CHANNELS = 512
_SHARED_SHARE = 0.3
_MIN_IMAGES_PER_CLASS = 10
# Below that, better images teach less than more of them: less than planned is then spent on each.
_MIN_CODED_IMAGES_PER_CLASS = 5
_LARGEST_INSTANCE = 4
# Planned for a value that all images share, or those of a class, where values are entropy-coded.
_SHARED_BITS = 4
_SHRINKS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625)


class _Rule(NamedTuple):
    """What :meth:`Layout.choose` begins with.

    Attributes:
        cells_below: The grid has fewer cells than that along the smaller side.
        pixels_per_value: Values of an image for one of its instance memory.
        widest: Most channels in the decoder.
        narrowest: Those of its finest convolution but the last.
        image_bytes: Bytes planned for an image, if entropy-coded, over the root of its number of
            values.
    """

    cells_below: int
    pixels_per_value: int
    widest: int
    narrowest: int
    image_bytes: float = 0.0


_RULE = _Rule(8, 32, widest=64, narrowest=16)
_CODED_RULE = _Rule(12, 8, widest=48, narrowest=24, image_bytes=1.73)


@dataclass(frozen=True)
class Layout(ContainerLayout):
    """Shapes of a hierarchical memory's tensors, whatever its number of classes and images.

    The tiers are grids of ``ceil(H / stride) x ceil(W / stride)``; the decoder doubles the grid
    ``log2(stride)`` times, and what stands over the image's right and lower border is cut off.

    Args:
        image_shape: ``(C, H, W)`` of a decoded image; C is 1 or 3, H and W are 8 to 224.
        number_format: ``"float32"``, ``"float16"``, ``"int8"`` or ``"entropy"``.
        stride: Image pixels a grid cell, along each side: 2, 4, 8, 16 or 32.
        dataset_channels: Channels of the dataset memory m_D.
        feature_channels: Channels that a class's extractor f_c makes of m_D.
        class_channels: Channels of a class memory m_C.
        instance_channels: Channels of an instance memory m_I.
        decoder_channels: Output channels of each of the decoder's convolutions but the last,
            coarsest first: log2(stride) of them.
        image_bytes: Bytes planned for the code of an instance memory, with ``"entropy"``: 1 or
            more. They decide how many images a budget is filled with. 0 with other formats.

    Raises:
        ConfigError: A value outside these ranges.
    """

    container = "hmn"
    learned = ("dataset", "classes", "instances", "extractors", "decoder", "biases")
    per_image = "instances"
    number_formats = NUMBER_FORMATS

    image_shape: tuple[int, int, int]
    number_format: NumberFormat
    stride: int
    dataset_channels: int
    feature_channels: int
    class_channels: int
    instance_channels: int
    decoder_channels: tuple[int, ...]
    image_bytes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if (self.image_bytes > 0) != self.is_coded or self.image_bytes < 0:
            raise ConfigError(
                f"image_bytes is 1 or more with number_format 'entropy', and 0 with others; got "
                f"{self.image_bytes!r} with {self.number_format!r}"
            )

    @classmethod
    def choose(
        cls,
        budget: Budget | int | str,
        image_shape: Sequence[int],
        num_classes: int,
        number_format: NumberFormat = "int8",
        real_images_per_class: int | None = None,
    ) -> Layout:
        """Return the layout for a budget, by the rules at the top of this module.

        Args:
            budget: Bytes of the file.
            image_shape: ``(C, H, W)``.
            num_classes: K, 1 to 1000: how many classes share the budget.
            number_format: How values are stored.
            real_images_per_class: How many real images of a class there are: more room than for
                so many goes to better images. None where that is not known.

        Raises:
            BudgetError: One image a class does not fit even with the smallest tiers; the message
                gives the smallest budget that does.
            ConfigError: A shape, a number of classes or a number format outside its range.
        """
        channels, height, width = check_image_shape(image_shape)
        num_classes = check_num_classes(num_classes)
        check_number_format(number_format)
        limit = Budget.parse(budget).num_bytes
        rule = _CODED_RULE if number_format == "entropy" else _RULE
        stride = next((s for s in (2, 4, 8, 16) if min(height, width) / s < rule.cells_below), 32)
        num_doublings = stride.bit_length() - 1
        cells = math.ceil(height / stride) * math.ceil(width / stride)
        num_values = channels * height * width
        instance_channels = max(1, round(num_values / rule.pixels_per_value / cells))
        image_bytes = math.ceil(math.sqrt(num_values) * rule.image_bytes)
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
                    max(4, round(min(rule.widest, rule.narrowest * 2**level) * shrink))
                    for level in reversed(range(num_doublings))
                ),
                image_bytes=image_bytes,
            )
            shared_bytes = layout.file_bytes(num_classes, 0, limit)
            instances_bytes = _MIN_IMAGES_PER_CLASS * num_classes * layout.group_bytes
            if shared_bytes <= min(_SHARED_SHARE * limit, limit - instances_bytes):
                break
        if layout.is_coded:
            room = max(1, (limit - shared_bytes) // (_MIN_CODED_IMAGES_PER_CLASS * num_classes))
            layout = dataclasses.replace(layout, image_bytes=min(image_bytes, room))
        num_real = math.inf
        if real_images_per_class is not None:
            num_real = real_images_per_class * num_classes
        smallest = layout
        while layout.max_images(limit, num_classes) > num_real:
            if layout.group_bytes >= _LARGEST_INSTANCE * smallest.group_bytes:
                break
            layout = layout._with_larger_instances()
        return layout

    def _with_larger_instances(self) -> Layout:
        if self.is_coded:
            return dataclasses.replace(self, image_bytes=self.image_bytes + 1)
        return dataclasses.replace(self, instance_channels=self.instance_channels + 1)

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

    @property
    def level_shapes(self) -> dict[str, list[tuple[int, ...]]]:
        """Shapes of the levels of each coded tensor's parts: one model an entry."""
        return {
            "dataset": [(1, 1, 1)],
            "classes": [(1, self.class_channels, 1, 1)],
            "instances": [(1, *self.instance_shape)],
            "extractors": [(1, 1, 1)],
            "decoder": [(1, 1, 1, 1) for _ in self.convolutions],
        }

    def shapes(self, num_classes: int, num_images: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what is learned, by name."""
        num_biases = num_classes * self.feature_channels + sum(o for _, o in self.convolutions)
        return {
            "dataset": (self.dataset_channels, *self.grid),
            "classes": (num_classes, self.class_channels, *self.grid),
            "instances": (num_images, *self.instance_shape),
            "extractors": (num_classes, self.feature_channels, self.dataset_channels),
            "decoder": (sum(9 * i * o for i, o in self.convolutions),),
            "biases": (num_biases,),
        }

    def tensors(self, num_classes: int, num_images: int) -> dict[str, TensorSpec]:
        """Return the name, type and shape of every tensor in the file."""
        num_classes = convert("num_classes", num_classes, "int")
        num_images = convert("num_images", num_images, "int")
        shapes = self.shapes(num_classes, num_images)
        specs = self._labels(num_classes)
        specs["biases"] = TensorSpec(self.bias_dtype, shapes.pop("biases"))
        if self.is_coded:
            levels = itertools.chain.from_iterable(self.level_shapes.values())
            shared = sum(math.prod(shapes[name]) for name in shapes if name != "instances")
            planned = (shared * _SHARED_BITS + 7) // 8 + num_images * self.image_bytes
            specs["levels"] = TensorSpec("U8", (sum(map(math.prod, levels)),))
            specs["code"] = TensorSpec("U8", (planned,))
            return specs
        specs |= {name: TensorSpec(self.values_dtype, shape) for name, shape in shapes.items()}
        if self.number_format == "int8":
            num_scales = 1 + num_classes * (2 + self.instance_channels) + len(self.convolutions)
            specs["scales"] = TensorSpec("F32", (num_scales,))
        return specs

    def _words(self) -> tuple[str, ...]:
        tiers = (
            self.dataset_channels,
            self.feature_channels,
            self.class_channels,
            self.instance_channels,
        )
        words = str(self.stride), _join(tiers), _join(self.decoder_channels)
        return (*words, str(self.image_bytes)) if self.is_coded else words

    @classmethod
    def _from_words(
        cls,
        image_shape: tuple[int, int, int],
        number_format: NumberFormat,
        words: Sequence[str],
    ) -> Layout:
        stride, channels, decoder, *planned = words
        (image_bytes,) = planned or ("0",)
        dataset_channels, feature_channels, class_channels, instance_channels = _split(channels)
        return cls(
            image_shape=image_shape,
            number_format=number_format,
            stride=int(stride),
            dataset_channels=dataset_channels,
            feature_channels=feature_channels,
            class_channels=class_channels,
            instance_channels=instance_channels,
            decoder_channels=_split(decoder),
            image_bytes=int(image_bytes),
        )


def _join(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _split(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
