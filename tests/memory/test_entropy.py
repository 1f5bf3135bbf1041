"""Entropy coding: exact round trips, lengths as promised, and tables that no machine can change."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmn_replay.errors import MemoryFileError
from hmn_replay.memory import entropy
from hmn_replay.memory.entropy import MAX_INTEGER, NUM_LEVELS, best_levels, bits, decode, encode


def geometric(mean: float, *shape: int, seed: int = 0) -> Tensor:
    """Draw integers whose mean of |k| is about ``mean``."""
    generator = torch.Generator().manual_seed(seed)
    ratio = mean / (1 + math.sqrt(1 + mean * mean))
    uniform = torch.rand((2, *shape), generator=generator, dtype=torch.double)
    # The difference of two geometric variables is two-sided geometric.
    first, second = (uniform.log() / math.log(ratio)).floor().unbind()
    return (first - second).clamp(-MAX_INTEGER, MAX_INTEGER).to(torch.int8)


def mean_of(level: int) -> float:
    return float(2 ** (level / 4 - 6))


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.tuples(
            st.lists(st.integers(-127, 127), min_size=0, max_size=40),
            st.integers(0, NUM_LEVELS - 1),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_what_is_decoded_is_what_was_encoded(parts: list[tuple[list[int], int]]) -> None:
    given = [
        (torch.tensor(values, dtype=torch.int8), torch.tensor([level], dtype=torch.uint8))
        for values, level in parts
    ]
    data = encode(given)
    assert len(data) % 4 == 0
    decoded = decode(data, [(integers.shape, levels) for integers, levels in given])
    for (integers, _), back in zip(given, decoded, strict=True):
        assert back.dtype == torch.int8
        assert back.equal(integers)


def test_levels_broadcast_as_the_models_of_positions_do() -> None:
    generator = torch.Generator().manual_seed(1)
    integers = torch.randint(-9, 10, (5, 2, 3, 4), generator=generator).to(torch.int8)
    levels = torch.randint(NUM_LEVELS, (1, 2, 3, 4), generator=generator).to(torch.uint8)
    whole, flat = torch.tensor([[3, -3]], dtype=torch.int8), torch.tensor([[40]], dtype=torch.uint8)
    data = encode([(integers, levels), (whole, flat)])
    first, second = decode(data, [(integers.shape, levels), ((1, 2), flat)])
    assert first.equal(integers)
    assert second.equal(whole)


@pytest.mark.parametrize("mean", [0.05, 0.4, 1.0, 3.0, 12.0])
def test_a_code_is_as_long_as_its_bits_say_and_the_entropy_allows(mean: float) -> None:
    integers = geometric(mean, 20_000)
    levels = best_levels(integers.double().abs().mean().view(1))
    length = 8 * len(encode([(integers, levels)]))
    promised = float(bits(integers.double(), levels).sum())
    counts = (integers.long() + MAX_INTEGER).bincount().double()
    shares = counts[counts > 0] / counts.sum()
    entropy_bits = float(-(shares * shares.log2()).sum()) * len(integers)
    assert promised - 1 <= length <= promised * 1.001 + 64
    assert length <= 1.02 * entropy_bits + 64


@pytest.mark.parametrize("level", range(0, NUM_LEVELS, 3))
def test_bits_are_minus_the_logarithm_of_the_probability(level: int) -> None:
    mean = mean_of(level)
    ratio = mean / (1 + math.sqrt(1 + mean * mean))
    values = torch.arange(-5, 6, dtype=torch.double)
    expected = [-math.log2((1 - ratio) / (1 + ratio) * ratio ** abs(k)) for k in range(-5, 6)]
    found = bits(values, torch.tensor([level], dtype=torch.uint8))
    assert found.tolist() == pytest.approx(expected, rel=2e-3)
    # The mean of |k| under the model is what the level stands for.
    weights = 2 ** -bits(torch.arange(-4000, 4001).double(), torch.tensor([level]))
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    assert float((weights * torch.arange(-4000, 4001).abs()).sum()) == pytest.approx(mean, rel=0.01)


def test_bits_have_a_gradient_towards_zero() -> None:
    values = torch.tensor([-2.0, -0.3, 0.0, 0.3, 2.0], requires_grad=True)
    bits(values, torch.tensor([30], dtype=torch.uint8)).sum().backward()
    assert values.grad is not None
    assert values.grad.sign().tolist() == [-1, -1, 0, 1, 1]
    assert values.grad.abs().unique().numel() == 2


@given(mean=st.floats(0, 127))
def test_the_best_level_has_the_shortest_code_of_all(mean: float) -> None:
    best = best_levels(torch.tensor([mean]))
    # bits are linear in |k|: those of the mean are the mean of the bits.
    lengths = [
        float(bits(torch.tensor([mean], dtype=torch.double), torch.tensor([level])))
        for level in range(NUM_LEVELS)
    ]
    assert lengths[int(best)] == pytest.approx(min(lengths), abs=1e-6)


def test_levels_are_close_enough_that_none_between_would_save_a_hundredth() -> None:
    for mean in np.geomspace(2**-6, 100, 200):
        ratio = mean / (1 + math.sqrt(1 + mean * mean))
        ideal = math.log2((1 + ratio) / (1 - ratio)) - mean * math.log2(ratio)
        level = best_levels(torch.tensor([mean]))
        assert float(bits(torch.tensor([mean]).double(), level)) < 1.01 * ideal


def test_tables_are_those_of_exact_arithmetic() -> None:
    for level in range(NUM_LEVELS):
        ratio = Fraction(entropy._ratio(level), 2**16)
        assert 0 < ratio < 1
        mean = mean_of(level)
        assert float(ratio) == pytest.approx(mean / (1 + math.sqrt(1 + mean * mean)), abs=2**-16)
        counts = entropy._counts(level)
        assert len(counts) == 2 * MAX_INTEGER + 1
        assert sum(counts) == 2**24
        assert counts == counts[::-1]
        total = sum(ratio ** abs(k) for k in range(-MAX_INTEGER, MAX_INTEGER + 1))
        for k in (1, 2, 50, MAX_INTEGER):
            share = ratio**k / total
            assert counts[MAX_INTEGER + k] == 1 + math.floor(share * (2**24 - len(counts)))


def test_a_code_is_the_same_bytes_on_every_machine() -> None:
    """Files that were written elsewhere decode here: this code was written once, and kept."""
    integers = torch.tensor([0, 1, -1, 5, -127, 127, 0, 0, 2, -3], dtype=torch.int8)
    levels = torch.tensor([0, 10, 20, 30, 40, 50, 55, 54, 33, 35], dtype=torch.uint8)
    data = encode([(integers, levels)])
    assert data.hex() == KEPT
    (back,) = decode(bytes.fromhex(KEPT), [((10,), levels)])
    assert back.equal(integers)


KEPT = "2d1a2ef5a8c82e78"


def test_what_is_no_code_is_refused() -> None:
    levels = torch.tensor([20], dtype=torch.uint8)
    integers = geometric(0.5, 1000)
    data = encode([(integers, levels)])
    with pytest.raises(MemoryFileError, match="its code has 7 bytes, not a multiple of 4"):
        decode(data[:7], [((1000,), levels)])
    with pytest.raises(MemoryFileError, match="goes on behind its end"):
        decode(data, [((100,), levels)])


@given(data=st.binary(max_size=64))
def test_other_bytes_decode_to_something_or_are_refused(data: bytes) -> None:
    levels = torch.tensor([30], dtype=torch.uint8)
    try:
        (integers,) = decode(data, [((50,), levels)])
    except MemoryFileError:
        return
    assert integers.shape == (50,)
    assert int(integers.abs().max()) <= MAX_INTEGER


def test_an_integer_takes_no_less_than_a_zero() -> None:
    levels = torch.arange(NUM_LEVELS).to(torch.uint8)
    least = entropy.least_bits(levels)
    for k in range(4):
        assert bool((bits(torch.full((NUM_LEVELS,), float(k)).double(), levels) >= least).all())
    assert float(least[0]) > 0.02
