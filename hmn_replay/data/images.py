"""Labelled images: what this package takes in, checked once and brought to one form."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias, Union

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hmn_replay.data.convert import (
    CHANNELS,
    CHUNK,
    Array,
    check_size,
    check_tensor,
    check_unit_range,
    dtype_name,
    is_array,
    to_image,
    to_label,
    to_labels,
    to_pixels,
)
from hmn_replay.data.lookup import Images
from hmn_replay.errors import ConfigError, DataError
from hmn_replay.runtime import make_generator

__all__ = [
    "ImageSource",
    "LabelledImages",
    "MapStyleDataset",
    "as_labelled_images",
    "channel_stats",
    "stack_images",
]

STD_FLOOR = 1e-3


class MapStyleDataset(Protocol):
    """A data set of known length whose items are ``(image, label)`` or ``(image, label, ...)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


ImageSource: TypeAlias = Union[
    "LabelledImages", "tuple[Array, Array | Sequence[int]]", MapStyleDataset
]
"""What :func:`as_labelled_images` takes."""


def as_labelled_images(source: ImageSource, *, size: int | None = None) -> LabelledImages:
    """Bring any labelled images to one form.

    Args:
        source: One of

            * :class:`LabelledImages`, returned as it is;
            * a pair ``(images, labels)`` of tensors or numpy arrays. Images are uint8, or floats
              in [0, 1] (rounded to uint8), of shape ``(N, C, H, W)``, ``(N, H, W, C)`` or
              ``(N, H, W)``, with 1 or 3 channels. Where both orders fit, a tensor is read channels
              first and an array channels last. Labels are integers of shape ``(N,)`` or
              ``(N, 1)``;
            * a map-style data set of ``(image, label)`` or ``(image, label, ...)``, such as those
              of torchvision and Avalanche. An image is a PIL image of 8 bits a channel, or one of
              the above without ``N``; a label is one integer. Every item is fetched once, in
              order, through the data set's own transform: a random transform is drawn once.
        size: Side in pixels that every image is brought to: its shorter side is resized
            (bilinear, antialiased), then its centre is cropped to a square. Default: ``None``,
            leave the images as they are, which must then all be of one size.

    Returns:
        The images and labels, in the order of ``source``. A uint8 ``(N, C, H, W)`` tensor on the
        CPU is not copied. Grey images among coloured ones are repeated over the 3 channels. Class
        names are a data set's own ``class_to_idx`` or ``classes``, where it has them.

    Raises:
        DataError: The images or the labels are not as said above, or there are none.
        ConfigError: ``size`` is below 1.
    """
    check_size(size)
    if isinstance(source, LabelledImages):
        if size is None or source.image_shape[1:] == (size, size):
            return source
        images = to_pixels(source.images, "images", size)
        return LabelledImages(images, source.labels, source.class_names)
    if isinstance(source, (tuple, list)) and len(source) == 2 and is_array(source[0]):
        return LabelledImages(to_pixels(source[0], "images", size), to_labels(source[1]))
    return _from_dataset(source, size)


def stack_images(
    fetch: Callable[[int], tuple[object, object]],
    num_images: int,
    *,
    size: int | None = None,
    class_names: Mapping[int, str] | None = None,
    describe: Callable[[int], str] = "item {}".format,
) -> LabelledImages:
    """Stack images fetched one by one, holding little more than the result in memory.

    Args:
        fetch: Returns the image and the label at a position, each as :func:`as_labelled_images`
            takes it from a map-style data set. Called once for each, in order.
        num_images: How many there are.
        size: As in :func:`as_labelled_images`.
        class_names: Label to name. Default: ``None``, no names.
        describe: Names the image at a position in an error message.

    Raises:
        DataError: An image or a label cannot be used, sizes differ, or ``num_images`` is 0.
    """
    images = np.empty((num_images, 0, 0, 0), np.uint8)
    labels = np.empty(num_images, np.int64)
    for position in range(num_images):
        image, label = fetch(position)
        name = describe(position)
        pixels, labels[position] = to_image(image, name, size), to_label(label, name)
        if position == 0:
            images = np.empty((num_images, *pixels.shape), np.uint8)
        channels, height, width = pixels.shape
        if (height, width) != images.shape[2:]:
            raise DataError(
                f"{name} is {height} x {width} pixels (height x width) where the first image is "
                f"{images.shape[2]} x {images.shape[3]}: images of one size are expected; pass "
                "size= (--size) to resize and crop them all"
            )
        if channels > images.shape[1]:
            images = images.repeat(channels, axis=1)
        images[position] = pixels
    names = dict(class_names or {})
    return LabelledImages(torch.from_numpy(images), torch.from_numpy(labels), names)


def channel_stats(images: Images) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of each channel, as values in [0, 1].

    Args:
        images: ``(N, C, H, W)``, uint8, or floats in [0, 1]; on any device. Read in chunks: no
            float copy of all of them is made.

    Returns:
        Mean and population standard deviation, each float32 ``(C,)`` on the CPU. The deviation is
        at least 0.001, so that dividing by it is safe for a constant channel.

    Raises:
        DataError: The shape or the dtype is another, or a value is not in [0, 1].
    """
    is_bytes = images.dtype == torch.uint8
    is_number = is_bytes or images.dtype.is_floating_point
    if len(images.shape) != 4 or 0 in images.shape or not is_number:
        raise DataError(
            "expected images of shape (N, C, H, W), not empty, uint8 or floats in [0, 1], came "
            f"{dtype_name(images.dtype)} {tuple(images.shape)}"
        )
    totals, squares = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK].detach()
        if not is_bytes:
            check_unit_range(chunk, "images")
        values = chunk.cpu().double()
        totals += values.sum(dim=(0, 2, 3))
        squares += values.square().sum(dim=(0, 2, 3))
    count, top = images.shape.numel() // images.shape[1], 255 if is_bytes else 1
    mean = totals / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return (mean / top).float(), (std / top).clamp(min=STD_FLOOR).float()


@dataclass(frozen=True, eq=False)
class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images and their labels, in memory; also a map-style torch data set.

    Args:
        images: uint8 ``(N, C, H, W)`` on the CPU, with N at least 1 and C of 1 or 3.
        labels: int64 ``(N,)`` on the CPU. Any integers, in any order.
        class_names: Label to name; labels may be missing. Default: no names.

    Raises:
        DataError: A tensor is of another type, dtype, shape or device, the lengths differ, or
            there is no image. :func:`as_labelled_images` takes more, and converts it.
    """

    images: Tensor
    labels: Tensor
    class_names: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the tensors."""
        check_tensor(self.images, "images", torch.uint8, ("N", "C", "H", "W"))
        check_tensor(self.labels, "labels", torch.int64, ("N",))
        if len(self.images) != len(self.labels):
            raise DataError(
                f"expected a label for every image, came {len(self.images)} images and "
                f"{len(self.labels)} labels"
            )
        if len(self.images) < 1:
            raise DataError("expected at least 1 image, came an empty data set")
        if self.images.shape[1] not in CHANNELS or self.images.numel() == 0:
            raise DataError(
                "expected images (N, C, H, W) of at least 1 pixel, with 1 or 3 channels, came "
                f"{tuple(self.images.shape)}"
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image, float32 ``(C, H, W)`` in [0, 1], and its label."""
        return self.images[index].float().div_(255), int(self.labels[index])

    def __repr__(self) -> str:
        """Describe the data in a line, without its pixels."""
        shape = "x".join(map(str, self.image_shape))
        return f"LabelledImages({len(self)} images of {shape}, {self.num_classes} classes)"

    @property
    def targets(self) -> Tensor:
        """The labels, int64 ``(N,)``, by the name that torchvision and Avalanche look for."""
        return self.labels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @cached_property
    def classes(self) -> Tensor:
        """The labels that occur, sorted: int64 ``(K,)``."""
        classes: Tensor = torch.unique(self.labels)
        return classes

    @property
    def num_classes(self) -> int:
        """How many labels occur: K."""
        return len(self.classes)

    @cached_property
    def class_indices(self) -> Tensor:
        """The position of each image's label in :attr:`classes`: int64 ``(N,)`` in [0, K)."""
        return torch.searchsorted(self.classes, self.labels)

    def of_class(self, label: int) -> Tensor:
        """Return the positions of the images of one class: int64, ascending, maybe none."""
        return (self.labels == label).nonzero().flatten()

    def take(self, indices: Tensor | npt.NDArray[Any] | Sequence[int]) -> LabelledImages:
        """Return some of the images, copied.

        Args:
            indices: Positions, in the order wanted (repeats are kept), or a mask ``(N,)`` of bools.

        Raises:
            DataError: No image is left.
            IndexError: A position is outside [-N, N), or a mask is not of length N.
        """
        chosen = torch.as_tensor(indices)
        if chosen.numel() == 0:
            chosen = chosen.long()
        return LabelledImages(self.images[chosen], self.labels[chosen], self.class_names)

    def split(self, fraction: float, seed: int = 0) -> tuple[LabelledImages, LabelledImages]:
        """Split every class at random, in the same proportion.

        Args:
            fraction: Share of each class that the second part holds, rounded to whole images, in
                (0, 1). A class of two images or more keeps at least one in each part; a class of
                one image goes to the first part.
            seed: Of the draw, which for one class does not depend on the others. Default: ``0``.

        Returns:
            The two parts, each in the order of this data set.

        Raises:
            ConfigError: ``fraction`` is not in (0, 1).
            DataError: No class has two images.
        """
        first, second = self.split_positions(fraction, seed)
        return self.take(first), self.take(second)

    def split_positions(self, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return the positions of the images of both parts of :meth:`split`, without a copy.

        Args:
            fraction: As in :meth:`split`.
            seed: As in :meth:`split`.

        Returns:
            The positions, int64, ascending.
        """
        if not 0 < fraction < 1:
            raise ConfigError(f"fraction is expected to be in (0, 1), came {fraction}")
        in_second = torch.zeros(len(self), dtype=torch.bool)
        for label in self.classes.tolist():
            positions = self.of_class(label)
            num_second = min(max(round(fraction * len(positions)), 1), len(positions) - 1)
            order = torch.randperm(len(positions), generator=make_generator(seed, "split", label))
            in_second[positions[order[:num_second]]] = True
        if not in_second.any():
            raise DataError(
                f"{self} cannot be split: no class has 2 images; bring more images a class"
            )
        return (~in_second).nonzero().flatten(), in_second.nonzero().flatten()

    def floats(self, indices: Tensor | None = None) -> Tensor:
        """Return images as float32 ``(N, C, H, W)`` in [0, 1].

        Args:
            indices: Positions, or a mask, of those wanted. Default: ``None``, all of them.
        """
        chosen = self.images if indices is None else self.images[indices]
        return chosen.float().div_(255)


def _from_dataset(source: Any, size: int | None) -> LabelledImages:
    if isinstance(source, (str, os.PathLike)):
        raise DataError(
            f"expected images, came the name {os.fspath(source)!r}: pass it to load_dataset"
        )
    is_map_style = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if not is_map_style or isinstance(source, Mapping) or is_array(source):
        raise DataError(
            "expected LabelledImages, a pair (images, labels) of tensors or arrays, or a map-style "
            f"data set of (image, label) with a length, came {type(source).__name__}"
        )

    def fetch(position: int) -> tuple[object, object]:
        item = source[position]
        if isinstance(item, (tuple, list)) and len(item) >= 2:
            return item[0], item[1]
        raise DataError(
            f"item {position}: expected (image, label), came {type(item).__name__}; map the data "
            "set to such pairs"
        )

    return stack_images(fetch, len(source), size=size, class_names=_names_of(source))


def _names_of(source: object) -> dict[int, str]:
    """Read the class names off a data set that keeps torchvision's habits."""
    if getattr(source, "target_transform", None) is not None:
        return {}
    indices, names = getattr(source, "class_to_idx", None), getattr(source, "classes", None)
    if isinstance(indices, Mapping):
        return {int(label): str(name) for name, label in indices.items()}
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        return dict(enumerate(names))
    return {}
