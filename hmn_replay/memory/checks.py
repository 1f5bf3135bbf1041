"""What a memory can have: image shapes, classes, numbers of images, and positions of these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hmn_replay.budget import as_int
from hmn_replay.errors import ConfigError, DataError

__all__ = [
    "MAX_CLASSES",
    "MAX_SIDE",
    "MIN_SIDE",
    "check_classes",
    "check_counts",
    "check_image_shape",
    "check_indices",
    "check_num_classes",
]

MIN_SIDE, MAX_SIDE, MAX_CLASSES = 8, 224, 1000


def check_num_classes(num_classes: int, name: str = "num_classes") -> int:
    """Return a number of classes that a memory can have, or raise :class:`ConfigError`."""
    count = as_int(num_classes)
    if count is None or not 1 <= count <= MAX_CLASSES:
        raise ConfigError(f"{name} is 1 to {MAX_CLASSES}; got {num_classes!r}")
    return count


def check_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """Return an image shape that a memory can have.

    Raises:
        ConfigError: It is no ``(C, H, W)``, or C is neither 1 nor 3.
        DataError: H or W is not in 8 to 224.
    """
    sides = [as_int(side) for side in image_shape] if isinstance(image_shape, Sequence) else []
    whole = [side for side in sides if side is not None]
    if not (len(whole) == len(sides) == 3 and whole[0] in (1, 3) and min(whole) > 0):
        raise ConfigError(
            f"image_shape is (C, H, W) with C 1 or 3 and H, W from {MIN_SIDE} to {MAX_SIDE}; "
            f"got {image_shape!r}"
        )
    channels, height, width = whole
    if not MIN_SIDE <= min(height, width) <= max(height, width) <= MAX_SIDE:
        size = MIN_SIDE if min(height, width) < MIN_SIDE else MAX_SIDE
        raise DataError(
            f"expected images with sides of {MIN_SIDE} to {MAX_SIDE} pixels; got {height} x "
            f"{width} (height x width): resize and crop them all, as by as_labelled_images(data, "
            f"size={size}) (--size)"
        )
    return channels, height, width


def check_classes(classes: Sequence[int] | Tensor) -> list[int]:
    """Return labels as a list, or raise :class:`ConfigError`."""
    given = classes.tolist() if isinstance(classes, Tensor) else classes
    if not isinstance(given, Iterable):
        raise ConfigError(f"classes are a sequence of integers; got {classes!r}")
    given = list(given)
    values = [v for v in map(as_int, given) if v is not None and -(2**63) <= v < 2**63]
    if len(values) < len(given):
        raise ConfigError(f"classes are integers of 64 bits; got {given[:5]}")
    if not 1 <= len(values) <= MAX_CLASSES:
        raise ConfigError(f"a memory has 1 to {MAX_CLASSES} classes; got {len(values)}")
    if len(set(values)) != len(values):
        raise ConfigError("each class may occur once; some occur twice or more")
    return values


def check_indices(
    indices: Tensor | Sequence[int], num_images: int, *, once: bool = False
) -> Tensor:
    """Return positions of images as int64 ``(B,)`` on the CPU, or raise :class:`ConfigError`.

    Args:
        indices: The positions.
        num_images: How many images there are.
        once: Whether each may occur once alone.
    """
    try:
        checked = torch.as_tensor(indices).flatten().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"indices are integers; got {indices!r}") from error
    if not len(checked):
        return checked.long()
    if checked.is_floating_point() or checked.dtype == torch.bool:
        raise ConfigError(f"indices are integers; got {checked.dtype}: pass mask.nonzero()")
    first, last = int(checked.min()), int(checked.max())
    if first < 0 or last >= num_images:
        raise ConfigError(
            f"indices are positions from 0 to {num_images - 1}; got {first} to {last}"
        )
    if once and len(checked.unique()) != len(checked):
        raise ConfigError("each index may occur once; some occur twice or more")
    return checked.long()


def check_counts(
    images_per_class: int | Sequence[int], num_classes: int, group_size: int = 1
) -> list[int]:
    """Return the number of images of each class, or raise :class:`ConfigError`."""
    given: list[object]
    try:
        given = list(images_per_class)  # type: ignore[arg-type]
    except TypeError:  # a number, be it a tensor without axes
        given = [images_per_class] * num_classes
    counts = [count for count in map(as_int, given) if count is not None and count >= 0]
    if not len(counts) == len(given) == num_classes:
        raise ConfigError(
            f"images_per_class is an integer of 0 or more, or {num_classes} of them; "
            f"got {images_per_class!r}"
        )
    if any(count % group_size for count in counts):
        raise ConfigError(
            f"{group_size} images share stored values, so images_per_class is a multiple of "
            f"{group_size}; got {images_per_class!r}"
        )
    return counts
