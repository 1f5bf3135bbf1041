"""Budgets: how many bytes a memory file may take, header and all."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import SupportsFloat, SupportsIndex

import numpy as np

from hmn_replay.errors import BudgetError

__all__ = ["Budget", "as_int", "as_number", "largest", "smallest"]

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Budget:
    """A number of bytes that a file may take at most.

    Args:
        num_bytes: The bytes, 1 or more.

    Raises:
        BudgetError: ``num_bytes`` is not a positive integer.
    """

    num_bytes: int

    def __post_init__(self) -> None:
        num_bytes = as_int(self.num_bytes)
        if num_bytes is None:
            raise BudgetError(f"a budget is a whole number of bytes, got {self.num_bytes!r}")
        if num_bytes < 1:
            raise BudgetError(f"a budget is 1 byte or more, got {num_bytes}")
        object.__setattr__(self, "num_bytes", num_bytes)

    @property
    def num_floats(self) -> int:
        """How many float32 numbers the bytes hold: the paper counts storage in these."""
        return self.num_bytes // 4

    @classmethod
    def parse(cls, value: Budget | int | str) -> Budget:
        """Read a budget from what a person would write.

        Args:
            value: A budget, a number of bytes, or a text such as ``"120 KiB"``, ``"122880"`` or
                ``"1.5MB"``. Units are B, kB, MB, GB (powers of 1000) and KiB, MiB, GiB (powers of
                1024), in upper or lower case. A fraction of a byte is dropped.

        Raises:
            BudgetError: The text is not a size, or the size is below one byte.

        Example:
            >>> Budget.parse("120 KiB").num_bytes
            122880
        """
        if isinstance(value, Budget):
            return value
        if not isinstance(value, str):
            return cls(value)
        match = _SIZE.fullmatch(value)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise BudgetError(
                f"cannot read {value!r} as a budget: write a number and a unit (B, kB, MB, GB, "
                "KiB, MiB or GiB), such as '120 KiB'"
            )
        return cls(int(Fraction(match[1]) * unit))

    @classmethod
    def ipc(cls, images_per_class: int, image_shape: Sequence[int], num_classes: int) -> Budget:
        """Return the paper's budget, as bytes of float32.

        The paper allows ``IPC x classes x C x H x W`` floats (Zheng et al. 2024, Section 4.1);
        a float is stored in 4 bytes.

        Args:
            images_per_class: IPC, 1 or more.
            image_shape: ``(C, H, W)``.
            num_classes: How many classes the memory holds.

        Example:
            >>> Budget.ipc(1, (3, 32, 32), 10).num_bytes
            122880
        """
        num_images = _positive("images_per_class", images_per_class)
        num_images *= _positive("num_classes", num_classes)
        return cls(4 * num_images * _num_values(image_shape))

    @classmethod
    def raw_images(cls, num_images: int, image_shape: Sequence[int]) -> Budget:
        """Return the bytes of ``num_images`` uint8 images of shape ``(C, H, W)``.

        This is what replay papers mean by "a memory of 500 images".

        Example:
            >>> Budget.raw_images(500, (3, 32, 32)).num_bytes
            1536000
        """
        return cls(_positive("num_images", num_images) * _num_values(image_shape))

    def __str__(self) -> str:
        return f"{self.num_bytes:,} bytes"


def largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number from ``low`` to ``high`` that fits, found by bisection.

    Args:
        low: Returned without a question where no larger one fits.
        high: The largest that is asked for.
        fits: Whether a number fits; what is larger than one that does not, does not either.
    """
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def smallest(low: float, high: float, fits: Callable[[float], bool], num_halvings: int) -> float:
    """Return about the smallest number from ``low`` to ``high`` that fits, found by bisection.

    Args:
        low: A number that does not fit.
        high: One that does; returned where no smaller one is found.
        fits: Whether a number fits; what is larger than one that does, does as well.
        num_halvings: How often the range between the two is halved.
    """
    for _ in range(num_halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def as_int(value: object) -> int | None:
    """Return an integer of any library (Python, numpy, torch) as an ``int``.

    None for everything else, ``True`` and ``3.0`` among it.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:  # arrays and tensors have an index only as long as they hold one integer
        return None


def as_number(value: object) -> float | None:
    """Return a finite number of any library (Python, numpy, torch) as a ``float``.

    None for everything else, ``True`` and ``"3"`` among it.
    """
    if isinstance(value, str | bool | np.bool_) or not isinstance(value, SupportsFloat):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):  # arrays and tensors are numbers while they hold one
        return None
    return number if math.isfinite(number) else None


def _num_values(image_shape: Sequence[int]) -> int:
    try:
        sides = [as_int(side) for side in image_shape]
    except TypeError:
        sides = []
    positive = [side for side in sides if side is not None and side > 0]
    if len(sides) != 3 or len(positive) != 3:
        raise BudgetError(
            f"an image shape is (C, H, W), three positive integers, got {image_shape!r}"
        )
    return math.prod(positive)


def _positive(name: str, value: int) -> int:
    count = as_int(value)
    if count is None or count < 1:
        raise BudgetError(f"{name} is a whole number of 1 or more, got {value!r}")
    return count
