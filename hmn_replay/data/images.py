"""Labelled images: what this package takes in, checked once and brought to one form."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any, Protocol, TypeAlias, TypeGuard, Union

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from hmn_replay.budget import as_int
from hmn_replay.data.lookup import Images, as_floats
from hmn_replay.errors import ConfigError, DataError, HMNReplayWarning
from hmn_replay.runtime import make_generator

__all__ = [
    "CHANNELS",
    "ImageSource",
    "LabelledImages",
    "MapStyleDataset",
    "as_labelled_images",
    "channel_stats",
    "check_same_keys",
    "check_same_names",
    "check_tensor",
    "joined_names",
    "mean_psnr",
    "show_label",
    "stack_images",
    "to_image",
    "to_label",
    "to_labels",
]

CHANNELS = (1, 3)
"""How many channels an image may have: grey, or red, green and blue."""

_STD_FLOOR = 1e-3
_MAX_SIDE = 8192
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Images converted at a time, so that no float copy of a whole data set is made.
_CHUNK = 128


class MapStyleDataset(Protocol):
    """A data set of known length whose items are ``(image, label)`` or ``(image, label, ...)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Array: TypeAlias = "Tensor | npt.NDArray[Any]"

ImageSource: TypeAlias = Union[
    "LabelledImages", "tuple[Array | Sequence[Any], Array | Sequence[int]]", MapStyleDataset
]
"""What :func:`as_labelled_images` takes."""


@dataclass(frozen=True, eq=False)
class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images and their labels, in memory; also a map-style torch data set.

    :class:`~hmn_replay.LabelledFeatures` has what a network makes of images in their place.

    Args:
        images: uint8 ``(N, C, H, W)`` on the CPU, with N at least 1 and C of 1 or 3.
        labels: int64 ``(N,)`` on the CPU. Any integers, in any order.
        class_names: Label to name; labels may be missing. Default: no names.

    Raises:
        DataError: A tensor is of another type, dtype, shape or device, the lengths differ, there
            is no image, or ``class_names`` maps no labels to names. :func:`as_labelled_images`
            takes more, and converts it.
    """

    images: Tensor
    labels: Tensor
    class_names: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the tensors."""
        self._check_images()
        check_tensor(self.labels, "labels", torch.int64, ("N",))
        if len(self.images) != len(self.labels):
            raise DataError(
                f"expected a label for every image, got {len(self.images)} images and "
                f"{len(self.labels)} labels"
            )
        if len(self.images) < 1:
            raise DataError("expected at least 1 image, got an empty data set")
        self._check_shape()
        _check_class_names(self.class_names)

    def _check_images(self) -> None:
        check_tensor(self.images, "images", torch.uint8, ("N", "C", "H", "W"))

    def _check_shape(self) -> None:
        if self.images.shape[1] not in CHANNELS or self.images.numel() == 0:
            raise DataError(
                "expected images (N, C, H, W) of at least 1 pixel, with 1 or 3 channels, got "
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
        return dataclasses.replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def split(self, fraction: float, seed: int = 0) -> tuple[LabelledImages, LabelledImages]:
        """Split every class at random, in the same proportion.

        Args:
            fraction: Share of each class that the second part holds, rounded to whole images, in
                (0, 1). A class of two images or more keeps at least one in each part; a class of
                one image goes to the first part.
            seed: Seed of the draw, which for one class does not depend on the others. Default:
                ``0``.

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
            The positions of the first and of the second part, int64, ascending.
        """
        if not 0 < fraction < 1:
            raise ConfigError(f"fraction must be in (0, 1), got {fraction}")
        in_second = torch.zeros(len(self), dtype=torch.bool)
        for label in self.classes.tolist():
            positions = self.of_class(label)
            num_second = min(max(round(fraction * len(positions)), 1), len(positions) - 1)
            order = torch.randperm(len(positions), generator=make_generator(seed, "split", label))
            in_second[positions[order[:num_second]]] = True
        if not in_second.any():
            raise DataError(
                f"{self} cannot be split: no class has 2 images; bring more images of each class"
            )
        return (~in_second).nonzero().flatten(), in_second.nonzero().flatten()

    def floats(self, indices: Tensor | None = None) -> Tensor:
        """Return images as float32 ``(N, C, H, W)`` in [0, 1], or features as they are.

        Args:
            indices: Positions, or a mask, of those wanted. Default: ``None``, all of them.
        """
        return as_floats(self.images if indices is None else self.images[indices])


def as_labelled_images(source: ImageSource, *, size: int | None = None) -> LabelledImages:
    """Bring any labelled images to one form.

    Args:
        source: One of

            * :class:`LabelledImages`, returned as it is;
            * a pair ``(images, labels)`` of tensors or numpy arrays. Images are uint8, or floats
              in [0, 1] (rounded to uint8), of shape ``(N, C, H, W)``, ``(N, H, W, C)`` or
              ``(N, H, W)``, with 1 or 3 channels. Where both orders fit, a tensor is read channels
              first and an array channels last. Labels are integers of shape ``(N,)`` or
              ``(N, 1)``. Images may also be a list or tuple of what a data set has;
            * a map-style data set of ``(image, label)`` or ``(image, label, ...)``, such as those
              of torchvision and Avalanche. An image is a PIL image of 8 bits per channel, or one
              of the above without ``N``; a label is one integer. Every item is fetched once, in
              order, through the data set's own transform: a random transform is drawn once. Items
              may be mappings with ``"image"`` and ``"label"``; of a data set of Hugging Face's
              ``datasets``, its only ``Image`` and its only ``ClassLabel`` column count, whatever
              their names.
        size: Side in pixels that every image is brought to: its shorter side is resized
            (bilinear, antialiased), then its centre is cropped to a square. Default: ``None``,
            leave the images as they are, which must then all be of one size.

    Returns:
        The images and labels, in the order of ``source``. A uint8 ``(N, C, H, W)`` tensor on the
        CPU is not copied, and ``LabelledFeatures`` are returned as they are. Grey images among
        coloured ones are repeated over the 3 channels. Class names are a data set's own
        ``class_to_idx``, ``classes`` or ``ClassLabel``, where it has them.

    Raises:
        DataError: The images or the labels are not as said above, or there are none.
        ConfigError: ``size`` is below 1.
    """
    check_size(size)
    if isinstance(source, LabelledImages):
        if size is None or source.image_shape[1:] == (size, size):
            return source
        if source.images.dtype != torch.uint8:
            raise DataError(f"features have no size in pixels, got size={size} for {source!r}")
        images = _to_pixels(source.images, "images", size)
        return LabelledImages(images, source.labels, source.class_names)
    if isinstance(source, (tuple, list)) and len(source) == 2 and _is_array(source[0]):
        return LabelledImages(_to_pixels(source[0], "images", size), to_labels(source[1], "labels"))
    if isinstance(source, (tuple, list)) and len(source) == 2 and _are_images(source[0]):
        return _stack_pair(source[0], to_labels(source[1], "labels"), size)
    return _from_dataset(source, size)


def joined_names(names: Mapping[int, str], more: Mapping[int, str]) -> dict[int, str]:
    """Return the names of both, of which neither contradicts the other.

    A name that stands for other labels in one than in the other is warned of: there will be two
    classes of that name.

    Args:
        names: Label to name, of a memory.
        more: The same of images that are added.

    Raises:
        DataError: A label has two names, as where the classes of two folders were numbered each by
            itself.
    """
    for label, name in more.items():
        if (known := names.get(label, name)) != name:
            raise DataError(
                f"label {label} is {known!r} in the memory and {name!r} in the images that are "
                "added: give a class the same label and name in both, or leave the names out, as "
                "LabelledImages(images, labels) does"
            )
    for name, label, added in _numbered_otherwise(names, more):
        if max(label, added) < 2**32:  # of tasks, each has its own
            warnings.warn(
                f"{name!r} is label {label} in the memory and {added} in the images that are "
                "added, which makes two classes of it: give it one label if it is one",
                HMNReplayWarning,
                stacklevel=3,
            )
    return {**names, **more}


def check_same_names(
    names: Mapping[int, str], others: Mapping[int, str], where: str, elsewhere: str
) -> None:
    """Refuse names that stand for other labels in one of two sets of images than in the other.

    A label whose name is spelled differently in the two is let pass, unless all are: these are
    other classes.

    Args:
        names: Label to name.
        others: The same of other images.
        where: What ``names`` belong to, for the message.
        elsewhere: What ``others`` belong to.

    Raises:
        DataError: A name has other labels in both, or two labels or more are named in both, each
            differently.
    """
    for name, label, other in _numbered_otherwise(names, others):
        raise DataError(
            f"{name!r} is label {label} in {where} and {other} in {elsewhere}: number the classes "
            "of both alike (those of a folder are numbered in the order of their names), or leave "
            "the names of one out, as LabelledImages(images, labels) does"
        )
    common = sorted(names.keys() & others.keys())
    if len(common) > 1 and all(names[label] != others[label] for label in common):
        first = common[0]
        raise DataError(
            f"label {show_label(first)} is {names[first]!r} in {where} and {others[first]!r} in "
            f"{elsewhere}, and no other has one name in both: these are other classes. If they are "
            "the same, leave the names of one out, as LabelledImages(images, labels) does"
        )


def _check_class_names(names: object) -> None:
    """Raise a DataError unless these are a label's name each."""
    if not isinstance(names, Mapping):
        raise DataError(
            "class_names maps labels to names, such as {0: 'cat', 1: 'dog'}; got "
            f"{names!r:.60}: dict(enumerate(names)) makes that of a list"
        )
    for label, name in names.items():
        if not isinstance(label, Integral) or not isinstance(name, str):
            raise DataError(
                "class_names maps labels, which are integers, to names, which are texts; got "
                f"{label!r}: {name!r:.60}"
            )


def _numbered_otherwise(
    names: Mapping[int, str], others: Mapping[int, str]
) -> Iterator[tuple[str, int, int]]:
    """Yield each name that has other labels in both, and the least of them in either."""
    own, other = (_labels_of_names(each) for each in (names, others))
    for name in sorted(own.keys() & other.keys()):
        if not own[name] & other[name]:
            yield name, min(own[name]), min(other[name])


def _labels_of_names(names: Mapping[int, str]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for label, name in names.items():
        found.setdefault(name, set()).add(label)
    return found


def stack_images(
    fetch: Callable[[int], tuple[object, object]],
    num_images: int,
    *,
    size: int | None = None,
    class_names: Mapping[int, str] | None = None,
    describe: Callable[[int], str] = "item {}".format,
    remedy: str = "as_labelled_images(data, size=64) brings them all to 64 x 64",
) -> LabelledImages:
    """Stack images fetched one by one, holding little more than the result in memory.

    Args:
        fetch: Returns the image and the label at a position, each as :func:`as_labelled_images`
            takes it from a map-style data set. Called once for each, in order.
        num_images: How many there are.
        size: As in :func:`as_labelled_images`.
        class_names: Label to name. Default: ``None``, no names.
        describe: Names the image at a position in an error message.
        remedy: What to do where sizes differ, for the message.

    Raises:
        DataError: An image or a label cannot be used, sizes differ, or ``num_images`` is 0.
    """
    images = torch.empty((0, 0, 0, 0), dtype=torch.uint8)
    labels = torch.empty(0, dtype=torch.int64)
    for position in range(num_images):
        image, label = fetch(position)
        name = describe(position)
        pixels, number = to_image(image, name, size), to_label(label, name)
        if position == 0:
            images, labels = _room_for(num_images, pixels.shape)
        labels[position] = number
        channels, height, width = pixels.shape
        if (height, width) != images.shape[2:]:
            raise DataError(
                f"{name} is {height} x {width} pixels (height x width) where the first image is "
                f"{images.shape[2]} x {images.shape[3]}: images of one size are expected; {remedy}"
            )
        if channels > images.shape[1]:
            images = images.repeat(1, channels, 1, 1)
        images[position] = pixels
    return LabelledImages(images, labels, dict(class_names or {}))


def _room_for(num_images: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return tensors for images and labels; DataError where memory does not hold them."""
    try:
        images = torch.empty((num_images, *shape), dtype=torch.uint8)
        return images, torch.empty(num_images, dtype=torch.int64)
    except (RuntimeError, MemoryError) as error:
        raise DataError(
            f"{num_images:,} images of {tuple(shape)} do not fit in memory: they take "
            f"{num_images * math.prod(shape):,} bytes; bring fewer, or smaller ones by size= "
            "(--size)"
        ) from error


def to_image(image: object, name: str, size: int | None = None) -> Tensor:
    """Bring one image to uint8 ``(C, H, W)``.

    Args:
        image: As in a map-style data set that :func:`as_labelled_images` takes. Of PIL images,
            grey modes give 1 channel, all others 3, without transparency.
        name: What the image is called in an error message.
        size: As in :func:`as_labelled_images`.

    Raises:
        DataError: It is something else.
    """
    from PIL.Image import Image

    if _is_array(image):
        return _to_pixels(image[None], name, size)[0]
    if not isinstance(image, Image):
        raise DataError(
            f"{name}: expected an image as a PIL image, a tensor or an array, got "
            f"{type(image).__name__}; give the data set a transform that makes one"
        )
    if image.mode.startswith(("I", "F", "LAB")):
        raise DataError(
            f"{name}: expected a grey or RGB picture of 8 bits per channel, got one of PIL's mode "
            f"{image.mode!r}; convert it first"
        )
    grey = image.mode in ("1", "L", "LA", "La")
    return _to_pixels(np.array(image.convert("L" if grey else "RGB"))[None], name, size)[0]


def to_label(label: object, name: str) -> int:
    """Bring one label to an int: an integer of any type, or a tensor or array that holds one.

    Raises:
        DataError: It is something else, or int64 does not hold it; ``name`` begins the message.
    """
    values = _as_array(label, name)
    if isinstance(values, np.ndarray) and values.dtype.kind in "OSU":
        raise DataError(
            f"{name}: expected an integer as its label, got {label!r:.60}; number the classes, "
            "whose names are LabelledImages' class_names"
        )
    return int(to_labels(values.reshape(1, -1), name))


def check_same_keys(labels: Tensor, classes: Tensor, what: str) -> None:
    """Raise a DataError where labels are plain, and those of a memory class keys with tasks.

    Args:
        labels: Those of images, int64.
        classes: Those of the memory, int64.
        what: What the images are, for the message.
    """
    keys = classes[classes >= 2**32]
    plain = labels[~torch.isin(labels, classes)]
    if bool(torch.isin(plain, keys & (2**32 - 1)).any()):
        raise DataError(
            f"the memory's labels are class keys of tasks, and those of {what} are not: give both "
            "the same, such as the labels that hmn_replay.split_class_keys(memory.labels) returns"
        )


def show_label(label: int) -> str:
    """Return a label as messages show it: ``"7"``, or ``"task 1: 7"``.

    The latter is ``2**32 + 7``: of the class keys of streams with task labels, 2**32 and above, the
    upper 32 bits are the task's label and the lower ones the class's.
    """
    task, own = divmod(label, 2**32)
    return f"task {task}: {own}" if task > 0 else str(label)


def mean_psnr(errors: Tensor) -> float:
    """Return the mean PSNR in dB of images by their mean squared errors; 100 for one of 1e-10."""
    return float(-10 * errors.clamp_min(1e-10).log10().mean())


def channel_stats(images: Images) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of each channel, as values in [0, 1].

    Args:
        images: ``(N, C, H, W)``, uint8, or floats in [0, 1]; on any device. Read in chunks: no
            float copy of all of them is made. A lookup of features has any floats.

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
            "expected images of shape (N, C, H, W), not empty, uint8 or floats in [0, 1], got "
            f"{_dtype_name(images)} {tuple(images.shape)}"
        )
    in_unit_range = isinstance(images, Tensor) or not images.holds_features
    totals, squares = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK].detach()
        if not is_bytes and in_unit_range:
            _check_unit_range(chunk, "images")
        values = chunk.cpu().double()
        totals += values.sum(dim=(0, 2, 3))
        squares += values.square().sum(dim=(0, 2, 3))
    count, top = images.shape.numel() // images.shape[1], 255 if is_bytes else 1
    mean = totals / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return (mean / top).float(), (std / top).clamp(min=_STD_FLOOR).float()


def check_size(size: int | None) -> None:
    """Raise a ConfigError unless ``size`` is None or the side of an image, 1 to 8192 pixels."""
    if size is not None and not 1 <= (as_int(size) or 0) <= _MAX_SIDE:
        raise ConfigError(f"size is the side of an image in pixels, 1 to {_MAX_SIDE}; got {size!r}")


def check_tensor(value: object, name: str, dtype: torch.dtype, axes: tuple[str, ...]) -> None:
    """Raise a DataError unless ``value`` is a tensor of these axes and dtype, on the CPU."""
    got = type(value).__name__
    if isinstance(value, Tensor):
        if value.dtype == dtype and value.ndim == len(axes) and value.device.type == "cpu":
            return
        got = f"{_dtype_name(value)} {tuple(value.shape)} on {value.device}"
    wanted = str(dtype).removeprefix("torch.")
    raise DataError(
        f"expected {name} as a tensor of {wanted} ({', '.join(axes)}) on the CPU, got {got}; "
        "as_labelled_images converts"
    )


def _are_images(values: object) -> TypeGuard[Sequence[object]]:
    """Return whether all of some values are images, where an item of a data set has a label."""
    from PIL.Image import Image

    # An array of one value may be a label.
    return isinstance(values, (tuple, list)) and all(
        isinstance(value, Image)
        or (_is_array(value) and value.ndim > 1 and math.prod(value.shape) > 1)
        for value in values
    )


def _stack_pair(images: Sequence[object], labels: Tensor, size: int | None) -> LabelledImages:
    if len(images) != len(labels):
        raise DataError(
            f"expected a label for every image, got {len(images)} images and {len(labels)} labels"
        )
    pairs = list(zip(images, labels, strict=True))
    return stack_images(pairs.__getitem__, len(pairs), size=size, describe="image {}".format)


def _from_dataset(source: Any, size: int | None) -> LabelledImages:
    if isinstance(source, (str, os.PathLike)):
        raise DataError(
            f"expected images, got the name {os.fspath(source)!r}: pass that of a data set to "
            "load_dataset, or that of a memory file to hmn_replay.load"
        )
    if isinstance(source, DataLoader):
        raise DataError(
            "expected images, got a DataLoader: pass its data set, loader.dataset, which is read "
            "item by item"
        )
    is_map_style = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if not is_map_style or isinstance(source, Mapping) or _is_array(source):
        raise DataError(
            "expected LabelledImages, a pair (images, labels) of tensors or arrays, or a map-style "
            f"data set of (image, label) with a length, got {type(source).__name__}"
        )

    columns = _columns_of(source)

    try:
        num_items = len(source)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"the length of the data set is no number of items ({error})") from error

    def fetch(position: int) -> tuple[object, object]:
        try:
            item = source[position]
        except (IndexError, KeyError) as error:
            raise DataError(
                f"item {position}: there is none, though the data set says that it has "
                f"{num_items:,} ({type(error).__name__}: {error})"
            ) from error
        if isinstance(item, (tuple, list)) and len(item) >= 2:
            return item[0], item[1]
        if isinstance(item, Mapping) and all(name in item for name in columns):
            return item[columns[0]], item[columns[1]]
        raise DataError(
            f"item {position}: expected (image, label), got {type(item).__name__}; map the data "
            f"set to such pairs, or to a mapping with the keys {columns[0]!r} and {columns[1]!r}"
        )

    return stack_images(fetch, num_items, size=size, class_names=_names_of(source))


def _columns_of(source: object) -> tuple[str, str]:
    """Return the names of image and label in items that are mappings.

    They are a Hugging Face data set's only ``Image`` and only ``ClassLabel`` column, where it has
    one of each, else ``"image"`` and ``"label"``.
    """
    features = getattr(source, "features", None)
    if not isinstance(features, Mapping):
        return "image", "label"
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    found = [
        [name for name, own in kinds.items() if own == kind] for kind in ("Image", "ClassLabel")
    ]
    image, label = (
        own[0] if len(own) == 1 else usual
        for own, usual in zip(found, ("image", "label"), strict=True)
    )
    return image, label


def _names_of(source: object) -> dict[int, str]:
    """Return the class names of a data set that names them as torchvision's or Hugging Face's."""
    features = getattr(source, "features", None)
    if isinstance(features, Mapping):
        names = getattr(features.get(_columns_of(source)[1]), "names", None)
        return dict(enumerate(names or []))
    if isinstance(source, Subset):
        return _names_of(source.dataset)
    if isinstance(source, ConcatDataset):
        with contextlib.suppress(DataError):
            return functools.reduce(joined_names, map(_names_of, source.datasets), {})
        return {}
    if isinstance(source, LabelledImages):
        return source.class_names
    if getattr(source, "target_transform", None) is not None:
        return {}
    indices, names = getattr(source, "class_to_idx", None), getattr(source, "classes", None)
    if isinstance(indices, Mapping):
        return {int(label): str(name) for name, label in indices.items()}
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        return dict(enumerate(names))
    return {}


def _to_pixels(images: Array, name: str, size: int | None) -> Tensor:
    """Bring a batch of images to uint8 ``(N, C, H, W)`` on the CPU, copied only where needed."""
    batch = _to_tensor(images, name)
    if batch.ndim and len(batch) == 0:
        raise DataError(f"{name}: expected at least 1 image, got an empty data set")
    shape = tuple(batch.shape[1:])
    first, last = (len(shape) == 3 and shape[axis] in CHANNELS for axis in (0, -1))
    if not (len(shape) == 2 or first or last) or 0 in shape:
        raise DataError(
            f"{name}: expected each image of shape (C, H, W), (H, W, C) or (H, W), with 1 or 3 "
            f"channels, got {shape}"
        )
    pixels = batch if batch.dtype == torch.uint8 else _floats_to_bytes(batch, name)
    if len(shape) == 2:
        pixels = pixels.unsqueeze(1)
    elif not first or (last and not isinstance(images, Tensor)):
        pixels = pixels.movedim(-1, 1)
    if size is None or tuple(pixels.shape[2:]) == (size, size):
        return pixels.contiguous()
    from torchvision.transforms.functional import center_crop, resize

    parts = pixels.split(_CHUNK)
    return torch.cat([center_crop(resize(part, size), size) for part in parts])


def _floats_to_bytes(batch: Tensor, name: str) -> Tensor:
    if not batch.is_floating_point():
        raise DataError(
            f"{name}: expected pixels as uint8, or as floats in [0, 1], got {_dtype_name(batch)}; "
            "convert integers in 0..255 to uint8"
        )
    pixels = torch.empty(batch.shape, dtype=torch.uint8)
    for start in range(0, len(batch), _CHUNK):
        values = batch[start : start + _CHUNK]
        _check_unit_range(values, name)
        pixels[start : start + _CHUNK] = values.float().mul(255).round_().clamp_(0, 255)
    return pixels


def to_labels(labels: object, name: str) -> Tensor:
    """Bring integers, ``(N,)`` or ``(N, 1)``, to int64 ``(N,)`` on the CPU."""
    targets = _to_tensor(_as_array(labels, name), name)
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim != 1:
        raise DataError(
            f"{name}: expected one integer for each image as label, got shape "
            f"{tuple(targets.shape)}; multi-label targets are not supported; for one-hot ones "
            "pass labels.argmax(1)"
        )
    # An empty list becomes an array of floats.
    if targets.numel() and (targets.is_floating_point() or targets.is_complex()):
        raise DataError(
            f"{name}: expected integers as labels, got {_dtype_name(targets)}; convert them to "
            "int64"
        )
    integers = targets.to(torch.int64)
    if targets.dtype == torch.uint64 and bool((integers < 0).any()):
        raise DataError(f"{name}: expected labels below 2**63, got larger ones")
    return integers.contiguous()


def _as_array(labels: object, name: str) -> Array:
    if _is_array(labels):
        return labels
    try:
        return np.asarray(labels)
    except ValueError as error:
        raise DataError(
            f"{name}: expected one integer for each image, got rows of different lengths; "
            "multi-label targets are not supported"
        ) from error


def _to_tensor(values: Array, name: str) -> Tensor:
    """Bring numbers to a tensor on the CPU that shares their memory where it can."""
    if isinstance(values, Tensor):
        is_plain = not values.is_nested and values.layout == torch.strided
        if not is_plain or values.is_quantized or values.is_meta:
            kind = "meta tensor" if values.is_meta else "sparse, nested or quantized tensor"
            raise DataError(f"{name}: expected a plain tensor with values, got a {kind}")
        if values.is_floating_point() and values.dtype not in _FLOATS:
            raise DataError(
                f"{name}: expected floats of 16, 32 or 64 bits, got {_dtype_name(values)}; convert "
                "them to float32"
            )
        return values.detach().cpu()
    # Torch reads neither foreign byte orders nor negative strides, and warns of read-only memory.
    native = values.dtype.newbyteorder("=")
    values = values.astype(native, order="C", copy=not values.flags.writeable)
    try:
        return torch.from_numpy(values)
    except TypeError as error:
        raise DataError(
            f"{name}: expected numbers, got an array of {values.dtype}; convert it first"
        ) from error


def _check_unit_range(values: Tensor, name: str) -> None:
    """Raise a DataError for NaN, infinity, and floats outside [0, 1] by more than rounding."""
    low, high = (float(bound) for bound in values.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DataError(f"{name}: expected finite floats in [0, 1], got NaN or infinity")
    if low < -1e-5 or high > 1 + 1e-5:
        in_bytes = low >= 0 and 2 < high <= 255
        raise DataError(
            f"{name}: expected floats in [0, 1], got [{low:.3g}, {high:.3g}]; "
            + ("divide by 255" if in_bytes else "undo your normalisation (values * std + mean)")
        )


def _is_array(value: object) -> TypeGuard[Array]:
    return isinstance(value, (Tensor, np.ndarray))


def _dtype_name(values: Images) -> str:
    return str(values.dtype).removeprefix("torch.")
