"""Checks of labels, positions and counts that users give to a container."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hmn_replay.budget import as_int
from hmn_replay.errors import ConfigError
from hmn_replay.memory.container_layout import MAX_CLASSES

__all__ = ["check_classes", "check_counts", "check_indices"]


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
        raise ConfigError(f"a memory holds 1 to {MAX_CLASSES} classes; got {len(values)}")
    if len(set(values)) != len(values):
        raise ConfigError("classes come once each; some come twice or more")
    return values


def check_indices(indices: Tensor | Sequence[int], num_images: int) -> Tensor:
    """Return positions of images as int64 ``(B,)`` on the CPU, or raise :class:`ConfigError`."""
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
    return checked.long()


def check_groups(indices: Tensor, group_size: int) -> Tensor:
    """Return the groups that ascending positions name, int64, or raise :class:`ConfigError`.

    Args:
        indices: int64 ``(B,)``, ascending, no two alike.
        group_size: How many images share stored values: positions ``k * group_size`` and on.
    """
    groups = indices[::group_size] // group_size
    whole = groups.view(-1, 1) * group_size + torch.arange(group_size)
    if not whole.flatten().equal(indices):
        raise ConfigError(
            f"images come in groups of {group_size} that share stored values, and stay or go "
            "together; some of these are apart from their group"
        )
    return groups


def check_counts(
    images_per_class: int | Sequence[int], num_classes: int, group_size: int
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
            f"images come in groups of {group_size} that share stored values; images_per_class "
            f"is a multiple of that; got {images_per_class!r}"
        )
    return counts
