"""Rounding to number formats, against scalar arithmetic written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from hmn_replay.errors import ConfigError
from hmn_replay.memory import NUMBER_FORMATS, NumberFormat
from hmn_replay.memory.formats import max_abs_scale, round_to_format
from tests.support import same_bits

Arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=4),
    # torch runs with denormals as they are; Hypothesis checks that they are not flushed.
    elements=st.floats(-1e4, 1e4, width=32),
)


INT8 = NUMBER_FORMATS["int8"]


def one_scale(latent: Tensor) -> Tensor:
    return max_abs_scale(latent.abs().amax())


def int8_by_hand(value: float, scale: float) -> int:
    """Round half to even, as IEEE 754 and numpy do, and clip to the symmetric range."""
    quotient = float(np.float32(value) / np.float32(scale))
    return max(-127, min(127, round(quotient)))


def test_int8_rounds_half_to_even_and_clips_symmetrically() -> None:
    latent = torch.tensor([0.0, 0.4, 0.5, 0.6, 1.5, 2.5, -0.5, -1.5, 126.6, 127.4, 300.0, -300.0])
    stored = INT8.quantise(latent, torch.ones(1))
    assert stored.dtype == torch.int8
    assert stored.tolist() == [0, 0, 0, 1, 2, 2, 0, -2, 127, 127, 127, -127]


@given(Arrays, st.floats(2**-20, 2**10, width=32))
def test_int8_is_a_division_and_a_rounding(values: Any, scale: float) -> None:
    stored = INT8.quantise(torch.from_numpy(values), torch.full((1,), scale))
    expected = [int8_by_hand(value, scale) for value in values.flatten().tolist()]
    assert stored.flatten().tolist() == expected
    back = INT8.dequantise(stored, torch.full((1,), scale)).numpy()
    assert (back == stored.numpy().astype(np.float32) * np.float32(scale)).all()


@given(Arrays)
def test_float16_is_numpys(values: Any) -> None:
    stored = NUMBER_FORMATS["float16"].quantise(torch.from_numpy(values))
    assert stored.dtype == torch.float16
    assert stored.numpy().tobytes() == values.astype(np.float16).tobytes()


def test_float16_clips_instead_of_overflowing() -> None:
    latent = torch.tensor([1e6, -1e6, 65519.0, 65520.0])
    assert NUMBER_FORMATS["float16"].quantise(latent).tolist() == [65504, -65504, 65504, 65504]


def test_float32_is_a_copy() -> None:
    latent = torch.tensor([1e-42, 1.1, -0.0])
    stored = NUMBER_FORMATS["float32"].quantise(latent)
    assert same_bits(stored, latent)
    assert stored.data_ptr() != latent.data_ptr()


@given(Arrays, st.sampled_from(list(NUMBER_FORMATS)))
def test_what_is_read_back_rounds_to_itself(values: Any, name: str) -> None:
    latent, own = torch.from_numpy(values), NUMBER_FORMATS[name]
    scale = one_scale(latent) if own.is_integer else None
    stored = own.quantise(latent, scale)
    back = own.dequantise(stored, scale)
    assert (stored.dtype, back.dtype) == (own.dtype, torch.float32)
    assert own.quantise(back, scale).equal(stored)
    assert round_to_format(latent, own, scale).equal(back)
    assert round_to_format(back, own, scale).equal(back)


@given(Arrays)
def test_the_scale_clips_nothing_and_wastes_nothing(values: Any) -> None:
    latent = torch.from_numpy(values)
    scale = one_scale(latent)
    rounded = round_to_format(latent, INT8, scale)
    assert float((rounded - latent).abs().max()) <= float(scale) * 0.501
    if float(latent.abs().max()) > 127e-8:
        assert int(INT8.quantise(latent, scale).abs().max()) == 127


def test_a_scale_is_a_part_of_each_largest_value() -> None:
    largest = torch.tensor([[0.0, 1e-12], [127.0, 5.08]])
    torch.testing.assert_close(max_abs_scale(largest), torch.tensor([[1e-8, 1e-8], [1.0, 0.04]]))


def test_the_scale_of_zeros_is_positive() -> None:
    scale = one_scale(torch.zeros(3, 2))
    assert float(scale) == pytest.approx(1e-8)
    assert round_to_format(torch.zeros(3, 2), INT8, scale).equal(torch.zeros(3, 2))


@pytest.mark.parametrize("name", NUMBER_FORMATS)
def test_gradients_pass_the_rounding_unchanged(name: str) -> None:
    latent = torch.tensor([0.0, 0.31, -1.7, 0.499, 5.0], requires_grad=True)
    scale = torch.tensor([0.01])  # 5.0 is clipped: its gradient passes too
    rounded = round_to_format(latent, NUMBER_FORMATS[name], scale)
    weights = torch.tensor([1.0, -2.0, 3.0, 0.0, 0.5])
    torch.autograd.backward((rounded * weights).sum())
    assert latent.grad is not None
    assert latent.grad.equal(weights)


@pytest.mark.parametrize("name", NUMBER_FORMATS)
def test_the_value_is_the_same_with_a_gradient_and_without(name: str) -> None:
    latent = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    scale = one_scale(latent)
    without = round_to_format(latent, NUMBER_FORMATS[name], scale)
    with_gradient = round_to_format(latent.clone().requires_grad_(), NUMBER_FORMATS[name], scale)
    assert without.equal(with_gradient.detach())


@pytest.mark.parametrize("name", NUMBER_FORMATS)
def test_biases_are_floats_that_integers_would_be_too_coarse_for(name: str) -> None:
    own = NUMBER_FORMATS[name].of_biases
    assert own.dtype == (torch.float32 if name == "float32" else torch.float16)
    latent = torch.tensor([0.1, -3.3, 1e6, 0.0], requires_grad=True)
    rounded = round_to_format(latent, own)
    assert rounded.tolist() == latent.clamp(-65504, 65504).to(own.dtype).tolist() or (
        name == "float32" and rounded is latent
    )
    torch.autograd.backward(rounded.sum())
    assert latent.grad is not None
    assert latent.grad.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["int4", "", "FLOAT32", "bfloat16"])
def test_another_name_is_refused_with_those_that_there_are(name: str) -> None:
    message = f"number format must be one of {', '.join(NUMBER_FORMATS)}; got '{name}'"
    with pytest.raises(ConfigError, match=message):
        NUMBER_FORMATS[name]


def test_floats_are_not_coded() -> None:
    with pytest.raises(ConfigError, match="only integers can be entropy-coded"):
        NumberFormat(torch.float16, is_coded=True)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float8_e4m3fn, torch.uint8, torch.int16, torch.int64, torch.bool]
)
def test_formats_store_what_files_can_hold(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"one of torch\.float32, .*, torch\.int8; got torch\."):
        NumberFormat(dtype)
    assert NumberFormat(torch.bfloat16).dtype == torch.bfloat16
