"""Arrays, tensors and pictures to uint8 pixels, and labels to int64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hmn_replay.data.convert import check_size, to_image, to_label, to_labels, to_pixels
from hmn_replay.errors import ConfigError, DataError


def some_pixels(*shape: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("make", [torch.from_numpy, np.asarray], ids=["tensor", "array"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_layout_gives_channels_first(make: Any, channels: int) -> None:
    pixels = some_pixels(4, channels, 8, 6)
    want = torch.from_numpy(pixels)
    assert to_pixels(make(pixels), "images").equal(want)
    last = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    assert to_pixels(make(last), "images").equal(want)
    assert to_pixels(make(last), "images").is_contiguous()


def test_grey_images_may_leave_out_the_channel() -> None:
    pixels = some_pixels(4, 8, 6)
    assert to_pixels(pixels, "images").equal(torch.from_numpy(pixels)[:, None])


def test_where_both_layouts_fit_a_tensor_is_channels_first_and_an_array_channels_last() -> None:
    pixels = some_pixels(2, 3, 8, 3)
    assert to_pixels(torch.from_numpy(pixels), "images").shape == (2, 3, 8, 3)
    assert to_pixels(pixels, "images").shape == (2, 3, 3, 8)


def test_bytes_share_memory() -> None:
    images = torch.from_numpy(some_pixels(2, 3, 4, 4))
    assert to_pixels(images, "images").data_ptr() == images.data_ptr()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_are_rounded_to_bytes(dtype: Any) -> None:
    pixels = some_pixels(300, 1, 4, 4)
    assert to_pixels((pixels / 255).astype(dtype), "images").equal(torch.from_numpy(pixels))


def test_bfloat16_with_gradient_is_read() -> None:
    images = torch.tensor([0.0, 0.5, 1.0]).bfloat16().reshape(3, 1, 1, 1).requires_grad_()
    assert to_pixels(images, "images").flatten().tolist() == [0, 128, 255]


def test_read_only_and_reversed_arrays_are_read() -> None:
    pixels = some_pixels(3, 4, 4)
    pixels.flags.writeable = False
    assert to_pixels(pixels, "images").equal(torch.from_numpy(pixels.copy())[:, None])
    assert to_pixels(pixels[::-1], "images").equal(torch.from_numpy(pixels[::-1].copy())[:, None])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((0, 3, 8, 8), np.uint8), "at least 1 image, came an empty data set"),
        (np.zeros((5, 784), np.uint8), r"expected each image of shape .*, came \(784,\)"),
        (np.zeros((5, 8, 8, 4), np.uint8), r"1 or 3 channels, came \(8, 8, 4\)"),
        (np.zeros((5, 1, 3, 8, 8), np.uint8), r"came \(1, 3, 8, 8\)"),
        (np.zeros((5, 3, 0, 8), np.uint8), r"came \(3, 0, 8\)"),
        (np.uint8(3), r"came \(\)"),
        (np.zeros((5, 8, 8), np.int64), "uint8, or as floats .* came int64; convert integers"),
        (torch.zeros(5, 8, 8, dtype=torch.bool), "came bool"),
        (np.full((5, 8, 8), np.nan), "finite floats in .* came NaN or infinity"),
        (np.full((5, 8, 8), -np.inf), "came NaN or infinity"),
        (np.linspace(-2.1, 2.6, 64).reshape(1, 8, 8), "undo your normalisation"),
        (np.linspace(0, 255, 64).reshape(1, 8, 8), r"came \[0, 255\]; divide by 255"),
        (np.full((5, 8, 8), None), "an array of numbers, came one of object"),
        (np.full((5, 8, 8), "cat"), "came one of <U3"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_pixels(np.asarray(images) if np.isscalar(images) else images, "images")


def test_nan_is_found_in_the_last_chunk() -> None:
    images = torch.zeros(1000, 1, 2, 2)
    images[-1, 0, 1, 1] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        to_pixels(images, "images")


@settings(max_examples=50, deadline=None)
@given(
    height=st.integers(1, 20), width=st.integers(1, 20), channels=st.sampled_from([1, 3]),
    size=st.integers(1, 16),
)  # fmt: skip
def test_resizing_gives_squares_for_any_shape(
    height: int, width: int, channels: int, size: int
) -> None:
    batch = torch.from_numpy(some_pixels(2, channels, height, width))
    resized = to_pixels(batch, "images", size)
    assert resized.shape == (2, channels, size, size)
    constant = to_pixels(torch.full_like(batch, 77), "images", size)
    assert constant.unique().tolist() == [77]


def test_resizing_keeps_the_centre_and_matches_the_picture() -> None:
    pixels = some_pixels(6, 10, 3)
    cropped = to_pixels(pixels[None], "images", 6)[0]
    assert cropped.equal(torch.from_numpy(pixels[:, 2:8].transpose(2, 0, 1).copy()))
    halved = to_image(Image.fromarray(pixels), "item 0", 3)
    np.testing.assert_array_equal(to_pixels(pixels[None], "images", 3)[0], halved)


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3), ("CMYK", 3), ("YCbCr", 3)],
)
def test_pictures_of_8_bits_become_grey_or_colour(mode: str, channels: int) -> None:
    picture = Image.fromarray(some_pixels(5, 7, 3)).convert(mode)
    assert to_image(picture, "item 0").shape == (channels, 5, 7)


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "LAB"])
def test_pictures_of_other_modes_are_refused(mode: str) -> None:
    with pytest.raises(DataError, match=f"item 7: .* 8 bits a channel, came .*{mode}"):
        to_image(Image.new(mode, (4, 4)), "item 7")


def test_an_image_of_another_type_is_refused() -> None:
    with pytest.raises(DataError, match=r"item 7: .* came dict; give the data set a transform"):
        to_image({"pixels": 1}, "item 7")
    with pytest.raises(DataError, match=r"item 7: expected each image .* came \(2, 4, 4\)"):
        to_image(torch.zeros(2, 4, 4), "item 7")


@pytest.mark.parametrize(
    "labels",
    [
        [-3, 7, 1000],
        (np.int8(-3), 7, np.uint16(1000)),
        np.array([[-3], [7], [1000]], np.int16),
        np.array([-3, 7, 1000], ">i4"),
        torch.tensor([-3, 7, 1000], dtype=torch.int32),
    ],
)
def test_integers_of_any_kind_are_labels(labels: Any) -> None:
    converted = to_labels(labels)
    assert converted.dtype == torch.int64
    assert converted.tolist() == [-3, 7, 1000]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.eye(4), r"shape \(N,\), came \(4, 4\); multi-label .* labels.argmax\(1\)"),
        ([[0, 1], [1, 0]], "multi-label"),
        ([[0], [1, 2]], "rows of different lengths; multi-label"),
        (3, r"came \(\)"),
        ([0.5, 1.0], "expected integers, came float64"),
        (torch.zeros(3), "expected integers, came float32"),
        (np.array([1j]), "expected integers, came complex128"),
        (["cat", "dog"], "an array of numbers, came one of <U3"),
        ([None, 3], "came one of object"),
        (np.array([2**63], np.uint64), r"below 2\*\*63"),
    ],
)
def test_what_is_not_one_integer_an_image_is_refused(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_labels(labels)


@pytest.mark.parametrize(
    "label", [5, np.int64(5), np.array(5), np.array([5]), torch.tensor(5), torch.tensor([[5]])]
)
def test_one_integer_of_any_kind_is_a_label(label: Any) -> None:
    assert to_label(label, "item 0") == 5
    assert type(to_label(label, "item 0")) is int


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (torch.tensor([0, 1, 1]), "item 2: expected one integer as label, came 3 values"),
        ([0, 1], "came 2 values; multi-label"),
        (np.array([]), "came 0 values"),
        (2.0, "item 2: expected an integer as label, came float 2.0"),
        (torch.tensor(0.5), "came float 0.5"),
        ("cat", "came str 'cat'"),
        (None, "came NoneType None"),
        ({"boxes": []}, "came dict"),
        (2**63, "a label that int64 holds, came 9223372036854775808"),
    ],
)
def test_what_is_not_one_integer_is_refused(label: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_label(label, "item 2")


def test_a_size_below_one_is_refused() -> None:
    check_size(None)
    check_size(1)
    with pytest.raises(ConfigError, match="1 or more; came 0"):
        check_size(0)
