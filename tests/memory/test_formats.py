"""Rounding to number formats, against scalar arithmetic written out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from hmn_replay.errors import ConfigError
from hmn_replay.memory.formats import (
    NUMBER_FORMATS,
    NumberFormat,
    check_number_format,
    dequantise,
    is_integer,
    max_abs_scale,
    quantise,
    round_to_format,
)

Arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=4),
    # torch runs with denormals as they are; Hypothesis checks that they are not flushed.
    elements=st.floats(-1e4, 1e4, width=32),
)


def one_scale(latent: Tensor) -> Tensor:
    return max_abs_scale(latent, torch.ones([1] * latent.ndim))


def same_bits(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.numpy().tobytes() == two.numpy().tobytes()


def int8_by_hand(value: float, scale: float) -> int:
    """Round half to even, as IEEE 754 and numpy do, and clip to the symmetric range."""
    quotient = float(np.float32(value) / np.float32(scale))
    return max(-127, min(127, round(quotient)))


def test_int8_rounds_half_to_even_and_clips_symmetrically() -> None:
    latent = torch.tensor([0.0, 0.4, 0.5, 0.6, 1.5, 2.5, -0.5, -1.5, 126.6, 127.4, 300.0, -300.0])
    stored = quantise(latent, "int8", torch.ones(1))
    assert stored.dtype == torch.int8
    assert stored.tolist() == [0, 0, 0, 1, 2, 2, 0, -2, 127, 127, 127, -127]


@given(Arrays, st.floats(2**-20, 2**10, width=32))
def test_int8_is_a_division_and_a_rounding(values: Any, scale: float) -> None:
    stored = quantise(torch.from_numpy(values), "int8", torch.full((1,), scale))
    expected = [int8_by_hand(value, scale) for value in values.flatten().tolist()]
    assert stored.flatten().tolist() == expected
    back = dequantise(stored, torch.full((1,), scale)).numpy()
    assert (back == stored.numpy().astype(np.float32) * np.float32(scale)).all()


@given(Arrays)
def test_float16_is_numpys(values: Any) -> None:
    stored = quantise(torch.from_numpy(values), "float16")
    assert stored.dtype == torch.float16
    assert stored.numpy().tobytes() == values.astype(np.float16).tobytes()


def test_float16_clips_instead_of_overflowing() -> None:
    latent = torch.tensor([1e6, -1e6, 65519.0, 65520.0])
    assert quantise(latent, "float16").tolist() == [65504, -65504, 65504, 65504]


def test_float32_is_a_copy() -> None:
    latent = torch.tensor([1e-42, 1.1, -0.0])
    stored = quantise(latent, "float32")
    assert same_bits(stored, latent)
    assert stored.data_ptr() != latent.data_ptr()


@given(Arrays, st.sampled_from(NUMBER_FORMATS))
def test_what_is_read_back_rounds_to_itself(values: Any, number_format: NumberFormat) -> None:
    latent = torch.from_numpy(values)
    scale = one_scale(latent) if is_integer(number_format) else None
    stored = quantise(latent, number_format, scale)
    back = dequantise(stored, scale)
    assert quantise(back, number_format, scale).equal(stored)
    assert round_to_format(latent, number_format, scale).equal(back)
    assert round_to_format(back, number_format, scale).equal(back)


@given(Arrays)
def test_the_scale_clips_nothing_and_wastes_nothing(values: Any) -> None:
    latent = torch.from_numpy(values)
    scale = one_scale(latent)
    rounded = round_to_format(latent, "int8", scale)
    assert float((rounded - latent).abs().max()) <= float(scale) * 0.501
    if float(latent.abs().max()) > 127e-8:
        assert int(quantise(latent, "int8", scale).abs().max()) == 127


@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 3), (1, 4))))
def test_there_is_a_scale_for_each_entry_of_the_scales(shape: tuple[int, int, int]) -> None:
    latent = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    scale = max_abs_scale(latent, torch.empty(shape))
    assert scale.shape == shape
    for place in itertools.product(*map(range, shape)):
        window = tuple(
            slice(None) if size == 1 else slice(at, at + 1)
            for at, size in zip(place, shape, strict=True)
        )
        assert float(scale[place]) == float(latent[window].abs().max() / 127)


def test_the_scale_of_zeros_is_positive() -> None:
    scale = one_scale(torch.zeros(3, 2))
    assert float(scale) == pytest.approx(1e-8)
    assert round_to_format(torch.zeros(3, 2), "int8", scale).equal(torch.zeros(3, 2))


def test_the_scale_has_no_graph() -> None:
    assert not one_scale(torch.ones(3, requires_grad=True)).requires_grad


@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
def test_gradients_pass_the_rounding_unchanged(number_format: NumberFormat) -> None:
    latent = torch.tensor([0.0, 0.31, -1.7, 0.499, 5.0], requires_grad=True)
    scale = torch.tensor([0.01])  # 5.0 is clipped: its gradient passes too
    rounded = round_to_format(latent, number_format, scale)
    weights = torch.tensor([1.0, -2.0, 3.0, 0.0, 0.5])
    torch.autograd.backward((rounded * weights).sum())
    assert latent.grad is not None
    assert latent.grad.equal(weights)


@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
def test_the_value_is_the_same_with_a_gradient_and_without(number_format: NumberFormat) -> None:
    latent = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    scale = one_scale(latent)
    without = round_to_format(latent, number_format, scale)
    with_gradient = round_to_format(latent.clone().requires_grad_(), number_format, scale)
    assert without.equal(with_gradient.detach())


@pytest.mark.parametrize("name", NUMBER_FORMATS)
def test_a_number_format_is_known_by_its_name(name: str) -> None:
    assert check_number_format(name) == name


@pytest.mark.parametrize("name", ["int4", "", "FLOAT32", "bfloat16"])
def test_another_name_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=f"float32, float16, int8, entropy; got '{name}'"):
        check_number_format(name)
