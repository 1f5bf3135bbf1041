"""Number formats: how the values of a memory are rounded, so that training sees what is stored.

A tensor of a memory is kept while it is trained as float32 *latent* values. What is decoded, and
what is stored, is the latent value rounded to the number format; gradients pass the rounding
unchanged (the straight-through estimator of Bengio et al. 2013, arXiv 1308.3432).

Integers need a scale, the width of a step. The scales of ``int8`` follow from the values, are fixed
while images are decoded, and are stored, so that dropping one image cannot move another and a
loaded memory rounds to the same values. The steps of ``entropy`` never change, and its integers are
entropy-coded: rare values take more bits, and training knows how many
(:mod:`hmn_replay.memory.entropy`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hmn_replay.errors import ConfigError
from hmn_replay.registry import Registry

__all__ = [
    "NUMBER_FORMATS",
    "NumberFormat",
    "clamp_inwards",
    "max_abs_scale",
    "round_to_format",
]

_MAX_INTEGER = 127
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class NumberFormat:
    """How values are rounded and stored.

    Args:
        dtype: What is stored: ``torch.float32``, ``float16`` or ``bfloat16``, or ``torch.int8`` for
            integers -127 to 127.
        is_coded: Whether the integers are entropy-coded, with steps that never change. Otherwise
            integers have scales that follow from the values, and are stored beside them.

    Raises:
        ConfigError: Another type, or floats that are to be coded.
    """

    dtype: torch.dtype
    is_coded: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            names = ", ".join(map(str, _DTYPES))
            raise ConfigError(f"a number format stores one of {names}; got {self.dtype}")
        if self.is_coded and not self.is_integer:
            raise ConfigError("only integers can be entropy-coded")

    @property
    def is_integer(self) -> bool:
        """Whether integers are stored, which need a scale."""
        return not self.dtype.is_floating_point

    @property
    def of_biases(self) -> NumberFormat:
        """The format of the few biases: int8 would need as many scales as it has values."""
        return NumberFormat(torch.float16) if self.is_integer else self

    def quantise(self, latent: Tensor, scale: Tensor | float | None = None) -> Tensor:
        """Round latent values to what is stored.

        Args:
            latent: float32, any shape.
            scale: Width of a step, broadcasting to ``latent``; for integers only.

        Returns:
            A tensor of :attr:`dtype` and of ``latent``'s shape.
        """
        if not self.is_integer:
            return _to_float(latent, self.dtype)
        assert scale is not None, "integers have a scale"
        return (latent / scale).round().clamp(-_MAX_INTEGER, _MAX_INTEGER).to(self.dtype)

    def dequantise(self, stored: Tensor, scale: Tensor | float | None = None) -> Tensor:
        """Return the float32 values that ``stored`` stands for: the inverse of :meth:`quantise`."""
        values = stored.to(torch.float32)
        return values if not self.is_integer or scale is None else values.mul_(scale)


NUMBER_FORMATS: Registry[NumberFormat] = Registry("number format")
"""The number formats by name; ``NUMBER_FORMATS.add(name, NumberFormat(dtype))`` adds one."""

NUMBER_FORMATS.add("float32", NumberFormat(torch.float32))
NUMBER_FORMATS.add("float16", NumberFormat(torch.float16))
NUMBER_FORMATS.add("int8", NumberFormat(torch.int8))
NUMBER_FORMATS.add("entropy", NumberFormat(torch.int8, is_coded=True))


def round_to_format(
    latent: Tensor, number_format: NumberFormat, scale: Tensor | float | None = None
) -> Tensor:
    """Return the float32 values that will be stored, with the gradient of ``latent`` itself.

    Args:
        latent: float32, any shape.
        number_format: The format to round to.
        scale: As in :meth:`NumberFormat.quantise`.
    """
    if number_format.dtype == torch.float32:
        return latent
    with torch.no_grad():
        rounded = number_format.dequantise(number_format.quantise(latent, scale), scale)
    return _straight_through(rounded, latent)


def _straight_through(rounded: Tensor, latent: Tensor) -> Tensor:
    """Return ``rounded``, to the bit, with the gradient of ``latent``."""
    # latent - latent.detach() is zero, so the value is `rounded` to the bit and the gradient is 1.
    return rounded + (latent - latent.detach()) if latent.requires_grad else rounded


def clamp_inwards(values: Tensor, low: Tensor | float, high: float | None = None) -> Tensor:
    """Clamp values, with gradients that lead what is at an end or beyond it back inside.

    A plain clamp has no gradient there (in some versions of torch, at the ends themselves neither),
    so that the black ground of a digit could never learn. Only what leads further out is cut.

    Args:
        values: float, any shape.
        low: The least that they may be, broadcasting to ``values``.
        high: The most. Default: None, no bound.
    """
    clamped: Tensor = _ClampInwards.apply(values, low, high)
    return clamped


class _ClampInwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, low: Any, high: float | None) -> Tensor:
        ctx.save_for_backward(values <= low, None if high is None else values >= high)
        return values.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        is_low, is_high = ctx.saved_tensors
        outwards = is_low & (gradient > 0)
        if is_high is not None:
            outwards |= is_high & (gradient < 0)
        return gradient.masked_fill(outwards, 0), None, None


def max_abs_scale(largest: Tensor) -> Tensor:
    """Return the int8 scales under which no value is clipped.

    Args:
        largest: float32, the largest absolute values.

    Returns:
        float32 of the same shape: ``largest / 127``, at least 1e-8.
    """
    # By a tensor: a GPU divides by a number by multiplying with its rounded inverse.
    return (largest / torch.full_like(largest, _MAX_INTEGER)).clamp_min(1e-8)


def _to_float(latent: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return latent.clamp(-limit, limit).to(dtype)
