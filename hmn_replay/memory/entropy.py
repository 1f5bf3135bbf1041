"""Entropy coding of small integers: two-sided geometric models in fixed point, and a range coder.

A model says that the integer k has the probability p(k) = (1 - q) / (1 + q) q^|k|, the distribution
of largest entropy for a given mean of |k|, and close to what quantised latents have. Its one
parameter is stored as a *level*, a number from 0 to 55 in steps of a quarter of an octave of that
mean. A code length is thus linear in |k|,

    -log2 p(k) = log2((1 + q) / (1 - q)) + |k| log2(1 / q),

so that the rate of a memory is a weighted L1 norm: exact where values are integers, with a gradient
where they are not.

There is a model for each channel and position of an instance memory, and one for each of the other
tensors' parts. Latents of CIFAR-10 after a warm start would take 1 % less under the best model of
any form for each channel and position, and half a percent less with models for each class as well:
a class's memory tells next to nothing of how large its images' latents are, so that models are not
predicted from it.

The probabilities that the coder works with come from integer arithmetic, from square roots and
quotients that IEEE 754 rounds in one way only, and are multiples of 2**-24: a file decodes to the
same integers on every machine. The coder is constriction's range coder (Bamler 2022,
arXiv 2201.01741).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hmn_replay.errors import MemoryFileError

__all__ = [
    "DENSE_LEVEL",
    "MAX_INTEGER",
    "NUM_LEVELS",
    "PROBABILITY_BITS",
    "Reader",
    "Writer",
    "best_levels",
    "bits",
    "categorical",
    "decode",
    "encode",
    "least_bits",
    "total_bits",
]

MAX_INTEGER = 127
"""Integers are -127 to 127."""

NUM_LEVELS = 56
"""Levels are 0 to 55, of means of |k| from 2**-6 to 2**7.75.

Below the lowest, a zero would take next to nothing.
"""

DENSE_LEVEL = 10
"""The lowest level of a zero that takes an eighth of a bit or more: 64 of them fill a byte."""

_STEPS_PER_OCTAVE, _LOWEST_OCTAVE = 4, -6
PROBABILITY_BITS = 24
"""Probabilities are multiples of 2**-24."""

_RATIO_BITS = 16
_WORD_BYTES = 4
_DECODED_AT_ONCE = 2**16


def bits(values: Tensor, levels: Tensor) -> Tensor:
    """Return the code length of values in bits, with its gradient to them.

    Args:
        values: float, any shape; integers for exact lengths.
        levels: uint8, of a shape that broadcasts to ``values``'.

    Returns:
        float, of ``values``' shape.
    """
    constants, slopes = _code_lengths(values.device, values.dtype)
    levels = levels.long()
    return constants[levels] + values.abs() * slopes[levels]


def total_bits(integers: Tensor, levels: Tensor) -> float:
    """Return the sum of :func:`bits` over integers, with no float for each of them.

    Args:
        integers: int8, any shape.
        levels: uint8, as many axes, each of ``integers``' size or 1.
    """
    constants, slopes = _code_lengths(levels.device, torch.float64)
    own, sizes = levels.long(), integers.abs().sum_to_size(levels.shape)
    each = integers.numel() / levels.numel()
    return float((constants[own] * each + slopes[own] * sizes).sum())


def best_levels(means: Tensor) -> Tensor:
    """Return the levels with the shortest codes for integers of given means of |k|.

    Args:
        means: float, any shape, 0 or more.

    Returns:
        uint8, of the same shape.
    """
    constants, slopes = _code_lengths(means.device, torch.float64)
    lengths = constants + means.detach().double().unsqueeze(-1) * slopes
    return lengths.argmin(dim=-1).to(torch.uint8)


def least_bits(levels: Tensor) -> Tensor:
    """Return the bits that an integer takes at least, float64 of ``levels``' shape: those of 0."""
    constants, _ = _code_lengths(levels.device, torch.float64)
    return constants[levels.long()]


def encode(parts: Sequence[tuple[Tensor, Tensor]]) -> bytes:
    """Encode integers.

    Args:
        parts: Pairs of integers, int8 in -127 .. 127 of any shape, and their levels, uint8 of a
            shape that broadcasts to it.

    Returns:
        A multiple of 4 bytes: the code lengths' sum, and 8 bytes at most.
    """
    writer = Writer()
    values = np.concatenate([integers.cpu().flatten().numpy() for integers, _ in parts])
    levels = _spread([(integers.shape, own) for integers, own in parts])
    for level in np.unique(levels).tolist():
        writer.code(values[levels == level].astype(np.int32) + MAX_INTEGER, _model(level))
    return writer.data


def decode(data: bytes, parts: Sequence[tuple[Sequence[int], Tensor]]) -> list[Tensor]:
    """Decode integers: the inverse of :func:`encode`.

    Args:
        data: What :func:`encode` returned.
        parts: For each pair that was encoded the shape of its integers, and their levels.

    Returns:
        The integers, int8 of those shapes.

    Raises:
        MemoryFileError: No integers of these shapes have such a code.
    """
    reader = Reader(data, "code")
    levels = _spread(parts)
    values = np.empty(len(levels), np.int8)
    for level in np.unique(levels).tolist():
        own = levels == level
        found = np.empty(np.count_nonzero(own), np.int8)
        # The decoder gives four bytes for each of one: not for all of them at once.
        for start in range(0, len(found), _DECODED_AT_ONCE):
            part = found[start : start + _DECODED_AT_ONCE]
            part[:] = reader.code(part, _model(level)) - MAX_INTEGER
        values[own] = found
    reader.finish()
    flat = torch.from_numpy(values).split([math.prod(shape) for shape, _ in parts])
    return [own.view(*shape) for own, (shape, _) in zip(flat, parts, strict=True)]


class Writer:
    """A range coder's message while it is written."""

    def __init__(self) -> None:
        from constriction import stream

        self._encoder = stream.queue.RangeEncoder()

    def code(self, symbols: npt.NDArray[Any], model: Any) -> npt.NDArray[Any]:
        """Write symbols, integers from 0 on, under a model, and return them."""
        self._encoder.encode(symbols.astype(np.int32, copy=False), model)
        return symbols

    @property
    def data(self) -> bytes:
        """What was written: a multiple of 4 bytes."""
        words: npt.NDArray[np.uint32] = self._encoder.get_compressed()
        return words.astype("<u4").tobytes()


class Reader:
    """A range coder's message while it is read, as a :class:`Writer` has written it.

    Args:
        data: The message.
        what: What it is, for error messages.

    Raises:
        MemoryFileError: It does not consist of words of 4 bytes.
    """

    def __init__(self, data: bytes, what: str) -> None:
        from constriction import stream

        if len(data) % _WORD_BYTES:
            raise MemoryFileError(f"its {what} has {len(data)} bytes, not a multiple of 4")
        self._decoder = stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
        self._what = what

    def code(self, symbols: npt.NDArray[Any], model: Any) -> npt.NDArray[np.int32]:
        """Read as many symbols as are given under a model.

        Raises:
            MemoryFileError: No symbols have such a message.
        """
        try:
            found: npt.NDArray[np.int32] = self._decoder.decode(model, len(symbols))
        except (AssertionError, ValueError) as error:
            raise MemoryFileError(f"its {self._what} cannot be decoded: {error}") from error
        return found

    def finish(self) -> None:
        """Raise a MemoryFileError where more was written than has been read."""
        if not self._decoder.maybe_exhausted():
            raise MemoryFileError(f"its {self._what} goes on behind its end")


def categorical(counts: Sequence[int] | npt.NDArray[np.int64]) -> Any:
    """Return the model of symbols with these probabilities, in units of 2**-24."""
    from constriction import stream

    probabilities = np.array(counts, np.float64) / 2**PROBABILITY_BITS
    return stream.model.Categorical(probabilities, perfect=False)


def _spread(parts: Sequence[tuple[Sequence[int], Tensor]]) -> npt.NDArray[np.uint8]:
    """Return the level of every integer, in order."""
    return np.concatenate([own.cpu().expand(*shape).flatten().numpy() for shape, own in parts])


@functools.lru_cache
def _ratio(level: int) -> int:
    """Return a level's q in units of 2**-16."""
    octaves, quarters = divmod(level, _STEPS_PER_OCTAVE)
    # A power of a quarter, by square roots: they are rounded alike everywhere, powers are not.
    mean = math.ldexp(math.sqrt(math.sqrt(float(2**quarters))), octaves + _LOWEST_OCTAVE)
    return round(mean / (1 + math.sqrt(1 + mean * mean)) * (1 << _RATIO_BITS))


@functools.lru_cache
def _counts(level: int) -> list[int]:
    """Return the probabilities of -127 .. 127 at a level in units of 2**-24; none is 0."""
    ratio, one = _ratio(level), 1 << _RATIO_BITS
    sizes = [abs(k) for k in range(-MAX_INTEGER, MAX_INTEGER + 1)]
    weights = [ratio**size * one ** (MAX_INTEGER - size) for size in sizes]
    total, free = sum(weights), (1 << PROBABILITY_BITS) - len(weights)
    counts = [1 + weight * free // total for weight in weights]
    counts[MAX_INTEGER] += (1 << PROBABILITY_BITS) - sum(counts)
    return counts


@functools.lru_cache
def _model(level: int) -> Any:
    return categorical(_counts(level))


@functools.lru_cache
def _code_lengths(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return, for each level, the bits of 0 and those of each further step away from 0."""
    ratios = [_ratio(level) / 2**_RATIO_BITS for level in range(NUM_LEVELS)]
    constants = [math.log2((1 + q) / (1 - q)) for q in ratios]
    slopes = [-math.log2(q) for q in ratios]
    return torch.tensor(constants, device=device, dtype=dtype), torch.tensor(
        slopes, device=device, dtype=dtype
    )
