"""Images fetched on demand, so that no copy of all of them is held."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from hmn_replay.errors import DataError

__all__ = [
    "ImageLookup",
    "Images",
    "LabelledView",
    "as_floats",
    "check_labelled",
    "first_in_turn",
    "held_on",
    "images_at_once",
    "join_images",
    "rank_in_class",
    "take_images",
    "without_repeats",
]

# 512 images of 32 x 32, 10 of 224 x 224.
_PIXELS_AT_ONCE = 2**19
_IMAGES_AT_ONCE = 512
# Bytes of images that a GPU holds at most: 1.4 million images of 32 x 32, as uint8.
_MOST_BYTES_HELD = 2**32


class ImageLookup:
    """A tensor of images ``(N, C, H, W)`` whose rows are computed when they are indexed.

    It has the tensor's shape, dtype and length, and its indexing by positions, a mask or a slice.

    Args:
        fetch: Function from positions, int64 ``(B,)`` on the CPU, to images ``(B, C, H, W)``.
        shape: ``(N, C, H, W)``.
        dtype: The dtype of the images.
        holds_features: Whether they are a network's features, floats of any size, and no pixels.
    """

    def __init__(
        self,
        fetch: Callable[[Tensor], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        holds_features: bool = False,
    ) -> None:
        self.holds_features = holds_features
        self._fetch = fetch
        self._positions = torch.arange(shape[0])
        self._image_shape = tuple(shape[1:])
        self.dtype = dtype

    @property
    def shape(self) -> torch.Size:
        """``(N, C, H, W)``."""
        return torch.Size((len(self), *self._image_shape))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._positions)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Return some images as a tensor ``(B, C, H, W)``."""
        if isinstance(index, Tensor):
            index = index.cpu()
        return self._fetch(self._positions[index])

    def take(self, positions: Tensor) -> ImageLookup:
        """Return a lookup of some positions, int64 ``(B,)``, repeats kept; nothing is fetched."""
        taken = self._like(self._fetch)
        taken._positions = self._positions[positions.cpu()]
        return taken

    def without_repeats(self, positions: Tensor) -> Tensor:
        """Return those of some positions, int64 ``(B,)``, at which an image stands first."""
        ascending, order = self._positions[positions].sort(stable=True)
        is_first = torch.ones_like(ascending, dtype=torch.bool)
        is_first[1:] = ascending[1:] != ascending[:-1]
        return positions[order[is_first].sort().values]

    def to(self, device: torch.device) -> ImageLookup:
        """Return a lookup of the same images that fetches them to a device."""
        # Towards a GPU nothing waits: what was fetched is pageable memory that nobody else has.
        is_ahead = device.type == "cuda"
        return self._like(lambda positions: self[positions].to(device, non_blocking=is_ahead))

    def _like(self, fetch: Callable[[Tensor], Tensor]) -> ImageLookup:
        return ImageLookup(fetch, self.shape, self.dtype, holds_features=self.holds_features)


Images: TypeAlias = "Tensor | ImageLookup"
"""Images ``(N, C, H, W)``, indexed by positions or slices."""


def held_on(images: Images, device: torch.device) -> Images:
    """Return images where a device can look at them: a GPU holds them all, where they are few."""
    if device.type == "cuda" and not (isinstance(images, Tensor) and images.is_cuda):
        num_bytes = math.prod(images.shape) * images.dtype.itemsize
        free_bytes, _ = torch.cuda.mem_get_info(device)
        if num_bytes <= min(_MOST_BYTES_HELD, free_bytes // 2):
            images = images[:]
        elif isinstance(images, Tensor):
            images = join_images([images])
    return images.to(device)


@dataclass(frozen=True, eq=False)
class LabelledView:
    """Labelled images that are fetched on demand: what ``LabelledImages`` is for tensors.

    Attributes:
        images: uint8 ``(N, C, H, W)``, or features, float32.
        labels: int64 ``(N,)``.
    """

    images: ImageLookup
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def floats(self, indices: Tensor) -> Tensor:
        """Return images as float32 ``(B, C, H, W)`` in [0, 1], or features as they are."""
        return as_floats(self.images[indices])


def take_images(images: Images, positions: Tensor) -> Images:
    """Return the images at some positions: a copy of a tensor, or another lookup."""
    return images[positions] if isinstance(images, Tensor) else images.take(positions)


def without_repeats(images: Images, positions: Tensor) -> Tensor:
    """Return those of some positions at which an image stands first; a tensor has no repeats."""
    return positions if isinstance(images, Tensor) else images.without_repeats(positions)


def join_images(parts: Sequence[Images]) -> ImageLookup:
    """Concatenate uint8 images, or float features, of one image shape, without a copy."""
    parts = [part for part in parts if len(part)]
    starts = torch.tensor([0, *map(len, parts)]).cumsum(0)

    def fetch(positions: Tensor) -> Tensor:
        if len(parts) == 1:
            return parts[0][positions]
        images = parts[0][:0].new_empty((len(positions), *parts[0].shape[1:]))
        for part, start in zip(parts, starts.tolist(), strict=False):
            own = (positions >= start) & (positions < start + len(part))
            if own.any():
                images[own] = part[positions[own] - start].to(images.device)
        return images

    shape, dtype = (int(starts[-1]), *parts[0].shape[1:]), parts[0].dtype
    return ImageLookup(fetch, shape, dtype, holds_features=dtype.is_floating_point)


def images_at_once(image_shape: Sequence[int]) -> int:
    """Return how many images ``(C, H, W)`` go through a network at once: 512 of 32 x 32 at most."""
    return max(1, min(_IMAGES_AT_ONCE, _PIXELS_AT_ONCE // num_pixels(image_shape)))


def num_pixels(image_shape: Sequence[int]) -> int:
    """Return how many pixels an image ``(C, H, W)`` has, and of features what they count as."""
    channels, height, width = image_shape
    return max(1, channels // 3) * height * width


def as_floats(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1], and floats as float32."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def rank_in_class(labels: Tensor) -> Tensor:
    """Return the place of each image among those of its class, int64 ``(N,)``: 0, 1, ..."""
    order = labels.argsort(stable=True)
    _, counts = labels[order].unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    places = torch.arange(len(labels), device=labels.device) - starts
    return torch.empty_like(places).scatter_(0, order, places)


def first_in_turn(labels: Tensor, priorities: Tensor) -> Tensor:
    """Order images so that the classes take turns, each with its lowest priority first.

    In a turn they stand by priority, and where that is the same by class.
    """
    order = labels.argsort(stable=True)
    order = order[priorities[order].argsort(stable=True)]
    return order[rank_in_class(labels[order]).argsort(stable=True)]


def check_labelled(images: Images, class_indices: Tensor) -> None:
    """Raise a DataError unless these are images, float or uint8, and a class index of each."""
    is_number = images.dtype.is_floating_point or images.dtype == torch.uint8
    if len(images.shape) != 4 or not is_number:
        raise DataError(
            f"expected uint8 or float images (N, C, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    if not len(images):
        raise DataError("expected one image or more, got none")
    if class_indices.dtype != torch.int64 or class_indices.shape != images.shape[:1]:
        raise DataError(
            f"expected int64 class indices of shape ({len(images)},), got "
            f"{class_indices.dtype} {tuple(class_indices.shape)}"
        )


def are_probabilities(rows: Tensor) -> bool:
    """Return whether each row is finite, 0 or more, and not 0 throughout."""
    are_good = rows.isfinite() & (rows >= 0)
    return bool(are_good.all()) and bool((rows > 0).any(dim=1).all())
