"""Number formats: how the values of a memory are rounded, so that training sees what is stored.

A tensor of a memory is kept while it is trained as float32 *latent* values. What is decoded, and
what is stored, is the latent value rounded to the number format; gradients pass the rounding
unchanged (the straight-through estimator of Bengio et al. 2013, arXiv 1308.3432).

At equal bytes int8 teaches most: a warm start of CIFAR-10 at 122,880 bytes, decoded, took a ConvNet
to 41.7 % with int8 (941 images), 38.9 % with float16 (539) and 37.2 % with float32 (391).

int8 needs scales. They are tensors of their own, fixed while images are decoded and counted in the
file, so that dropping one image cannot move another and a loaded memory rounds to the same values.

``entropy`` has integers too, of steps that never change, and codes them: values that are rare take
more bits, and training is told what each one takes (:mod:`hmn_replay.memory.entropy`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hmn_replay.errors import ConfigError
from hmn_replay.memory.entropy import bits

__all__ = [
    "NUMBER_FORMATS",
    "PLAIN_FORMATS",
    "NumberFormat",
    "Stored",
    "check_number_format",
    "dequantise",
    "is_integer",
    "max_abs_scale",
    "quantise",
    "round_to_format",
    "stored_bits",
]

NumberFormat = Literal["float32", "float16", "int8", "entropy"]
NUMBER_FORMATS: tuple[NumberFormat, ...] = get_args(NumberFormat)
PLAIN_FORMATS: tuple[NumberFormat, ...] = ("float32", "float16", "int8")
"""Those that take as many bytes for every value."""

_MAX_INT8 = 127
_MAX_FLOAT16 = 65504.0


class Stored(NamedTuple):
    """Latent values, and how the file has them.

    Attributes:
        latent: float32.
        number_format: What they are rounded to.
        scale: Of ``int8`` and ``entropy``: float32, of a shape that broadcasts to ``latent``'s.
        levels: Of ``entropy``: their models, uint8, of such a shape too.
    """

    latent: Tensor
    number_format: NumberFormat
    scale: Tensor | None = None
    levels: Tensor | None = None


def check_number_format(name: str) -> NumberFormat:
    """Return ``name`` if it is a number format, or raise :class:`ConfigError`."""
    if name not in NUMBER_FORMATS:
        raise ConfigError(f"number_format is one of {', '.join(NUMBER_FORMATS)}; got {name!r}")
    return name


def is_integer(number_format: NumberFormat) -> bool:
    """Tell whether a number format stores integers, which need scales."""
    return number_format in ("int8", "entropy")


def max_abs_scale(latent: Tensor, scale: Tensor) -> Tensor:
    """Return the int8 scales under which no value of ``latent`` is clipped.

    Args:
        latent: float32, any shape with at least one value.
        scale: float32; the same number of axes, each of size 1 or of ``latent``'s size. Only its
            shape is read: one scale for each of its entries.

    Returns:
        float32 of ``scale``'s shape: max |latent| / 127, at least 1e-8.
    """
    shared = [axis for axis, size in enumerate(scale.shape) if size == 1]
    largest = latent.detach().abs().amax(dim=shared, keepdim=True) if shared else latent.abs()
    return (largest / _MAX_INT8).clamp_min(1e-8)


def quantise(latent: Tensor, number_format: NumberFormat, scale: Tensor | None = None) -> Tensor:
    """Round ``latent`` to what is stored: a float32, float16 or int8 tensor of the same shape."""
    if is_integer(number_format):
        assert scale is not None
        return (latent / scale).round().clamp(-_MAX_INT8, _MAX_INT8).to(torch.int8)
    if number_format == "float16":
        return latent.clamp(-_MAX_FLOAT16, _MAX_FLOAT16).to(torch.float16)
    return latent.clone()


def dequantise(stored: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return the float32 values that ``stored`` stands for: the inverse of :func:`quantise`."""
    values = stored.to(torch.float32)
    return values if scale is None else values * scale


def stored_bits(part: Stored) -> float:
    """Return how many bits stored values take, code lengths if they are entropy-coded."""
    stored = quantise(*part[:3])
    if part.levels is None:
        return float(8 * stored.numel() * stored.element_size())
    return float(bits(stored.double(), part.levels).sum())


def round_to_format(
    latent: Tensor, number_format: NumberFormat, scale: Tensor | None = None
) -> Tensor:
    """Return the float32 values that the file will hold, with the gradient of ``latent`` itself.

    Args:
        latent: float32, any shape.
        number_format: The format to round to.
        scale: For int8 and entropy, as in :func:`max_abs_scale`; otherwise not used.
    """
    if number_format == "float32":
        return latent
    with torch.no_grad():
        rounded = dequantise(
            quantise(latent, number_format, scale), scale if is_integer(number_format) else None
        )
    # latent - latent.detach() is zero, so the value is `rounded` to the bit and the gradient is 1.
    return rounded + (latent - latent.detach()) if latent.requires_grad else rounded
