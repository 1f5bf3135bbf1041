"""Raw images and IDC's pieces, against pieces that are cut out and upsampled one by one."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from hmn_replay.errors import ConfigError
from hmn_replay.memory.formats import PLAIN_FORMATS, NumberFormat
from hmn_replay.memory.pixels import (
    PIXEL_SCALE,
    IDCLayout,
    PixelContainer,
    RawLayout,
    to_unit_interval,
)
from tests.support import rounded_by_hand, same_bits, trained, upsampled_by_hand

pytestmark = pytest.mark.usefixtures("untouched_random_state")
every_format = pytest.mark.parametrize("number_format", PLAIN_FORMATS)
every_layout = pytest.mark.parametrize(
    "layout",
    [
        RawLayout((3, 8, 8), "float32"),
        RawLayout((1, 9, 14), "float32"),
        IDCLayout((3, 8, 8), "float32", 2),
        IDCLayout((1, 9, 14), "float32", 2),
        IDCLayout((3, 10, 8), "float32", 3),
        IDCLayout((1, 16, 17), "float32", 8),
    ],
    ids=lambda layout: f"{layout.image_shape} {layout.factor}",
)


def corner(layout: RawLayout, index: int) -> tuple[int, int, int]:
    """Return the stored image that an image is a piece of, and the piece's upper left corner."""
    height, width = layout.image_shape[1] // layout.factor, layout.image_shape[2] // layout.factor
    row, column = divmod(index % layout.factor**2, layout.factor)
    return index // layout.factor**2, row * height, column * width


def decoded_by_hand(memory: PixelContainer, index: int) -> Tensor:
    layout = memory.layout
    stored, top, left = corner(layout, index)
    height, width = layout.image_shape[1] // layout.factor, layout.image_shape[2] // layout.factor
    piece = memory.images[stored, :, top : top + height, left : left + width]
    rounded = rounded_by_hand(piece, layout.number_format, scale=0.5 / 127)
    return upsampled_by_hand(rounded + 0.5, *layout.image_shape[1:]).clamp(0, 1)


def real_images(shape: tuple[int, int, int], count: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, *shape), generator=generator) / 255


@every_layout
@every_format
def test_images_are_pieces_upsampled(layout: RawLayout, number_format: NumberFormat) -> None:
    layout = dataclasses.replace(layout, number_format=number_format)
    memory = trained(PixelContainer(layout, [7, -3], [layout.group_size, 2 * layout.group_size]))
    images, _ = memory.decode()
    expected = torch.stack([decoded_by_hand(memory, index) for index in range(len(images))])
    assert images.shape == expected.shape == (3 * layout.factor**2, *layout.image_shape)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-6)
    assert float((expected[0] - expected[-1]).abs().max()) > 0.1


def test_a_memory_costs_its_pixels() -> None:
    cifar = (3, 32, 32)
    assert RawLayout(cifar, "float32").num_floats(10, 10) == 30_720
    assert IDCLayout(cifar, "float32").num_floats(10, 40) == 30_720
    large = IDCLayout((3, 224, 224), "int8", 3)
    assert large.piece == (74, 74)
    assert large.group_size == 9
    assert large.num_floats(1, 9) == large.group_bytes == 3 * 222 * 222


def test_the_factor_is_the_papers() -> None:
    for side, factor in ((8, 2), (32, 2), (127, 2), (128, 3), (224, 3)):
        assert IDCLayout.choose("1 MiB", (3, side, 224), 1).factor == factor


@pytest.mark.parametrize("factor", [0, 1, 9, -2])
def test_a_factor_out_of_range_is_refused(factor: int) -> None:
    with pytest.raises(ConfigError, match=f"factor is 2 to 8, .* or more; got {factor} for images"):
        IDCLayout((3, 32, 32), "int8", factor)


def test_pieces_have_two_pixels_at_least() -> None:
    assert IDCLayout((3, 12, 8), "int8", 4).piece == (3, 2)
    with pytest.raises(ConfigError, match=r"pieces of 2 x 2 pixels or more; got 5 for .*3, 12, 8"):
        IDCLayout((3, 12, 8), "int8", 5)
    with pytest.raises(ConfigError, match=r"factor must be int, got 2\.0"):
        IDCLayout((3, 12, 8), "int8", 2.0)  # type: ignore[arg-type]


# fit


@every_layout
def test_fitted_images_are_real_ones_scaled_down(layout: RawLayout) -> None:
    f = layout.factor
    memory = PixelContainer(layout, [0, 1], [2 * f * f, f * f])
    real = real_images(layout.image_shape, 3 * f * f)
    assert memory.fit(0, lambda positions: real[positions])
    height, width = layout.image_shape[1] // f, layout.image_shape[2] // f
    for index in range(3 * f * f):
        stored, top, left = corner(layout, index)
        small = torch.nn.functional.adaptive_avg_pool2d(real[index], (height, width))
        if layout.image_shape[1] % f == layout.image_shape[2] % f == 0:  # a mean of f x f pixels
            by_hand = real[index].unflatten(2, (width, f)).unflatten(1, (height, f)).mean((2, 4))
            torch.testing.assert_close(small, by_hand)
        own = memory.images[stored, :, top : top + height, left : left + width].detach()
        torch.testing.assert_close(own, small - 0.5)


@every_format
def test_fitted_raw_images_are_the_real_ones(number_format: NumberFormat) -> None:
    memory = PixelContainer(RawLayout((3, 8, 8), number_format), [0], 300)
    real = real_images((3, 8, 8), 300)
    memory.fit(0, lambda positions: real[positions])
    memory.update_scales()
    atol = {"float32": 1e-7, "float16": 2**-12, "int8": PIXEL_SCALE / 2 + 1e-7}[number_format]
    torch.testing.assert_close(memory.decode()[0], real, rtol=0, atol=atol)


def test_fitting_leaves_the_images_before() -> None:
    memory = PixelContainer(IDCLayout((3, 8, 8), "float32"), [0, 1], [8, 1200])
    before = memory.images.detach().clone()
    real = real_images((3, 8, 8), 1208)
    asked = []

    def wanted(positions: Tensor) -> Tensor:
        asked.append(positions)
        return real[positions]

    memory.fit(8, wanted)
    assert torch.cat(asked).tolist() == list(range(8, 1208))
    assert max(map(len, asked)) <= 256
    assert same_bits(memory.images[:2].detach(), before[:2])
    assert not (memory.images[2:] == before[2:]).flatten(1).all(dim=1).any()


@every_layout
def test_without_a_fit_images_are_noise(layout: RawLayout) -> None:
    memory = PixelContainer(layout, [0], 40 * layout.group_size)
    images = memory.images.detach()
    assert float(images.abs().max()) <= 0.5
    assert float(images.mean()) == pytest.approx(0, abs=0.03)
    assert float(images.std()) == pytest.approx(0.2, abs=0.02)


# Values and gradients.


@every_layout
def test_gradients_reach_the_pixels_behind_an_image_and_no_other(layout: RawLayout) -> None:
    memory = PixelContainer(layout, [0, 1], layout.group_size)
    index = layout.group_size + layout.group_size // 2
    torch.autograd.backward(memory(torch.tensor([index])).sum())
    gradient = memory.images.grad
    assert gradient is not None
    stored, top, left = corner(layout, index)
    height, width = layout.piece
    expected = torch.zeros_like(gradient, dtype=torch.bool)
    expected[stored, :, top : top + height, left : left + width] = True
    assert (gradient != 0).equal(expected)
    # Bilinear weights of an output pixel add up to 1.
    assert float(gradient.sum()) == pytest.approx(math.prod(layout.image_shape))


@every_format
@pytest.mark.parametrize("layout", [RawLayout, IDCLayout])
def test_black_and_white_pixels_learn_inwards_alone(
    number_format: NumberFormat, layout: type[RawLayout]
) -> None:
    memory = PixelContainer(layout((1, 8, 8), number_format), [0], 8)
    with torch.no_grad():
        memory.images[::2], memory.images[1::2] = -3.0, 3.0
    memory.update_scales()
    black_or_white = memory.images.detach().clone()
    assert black_or_white.unique().tolist() == [-0.5, 0.5]
    assert memory.decode()[0].unique().tolist() == [0.0, 1.0]
    for slope in (-1, 1):
        memory.images.grad = None
        torch.autograd.backward(slope * memory(torch.arange(8)).sum())
        assert memory.images.grad is not None
        # A descent makes pixels brighter where the slope is below 0.
        expected = black_or_white < 0 if slope < 0 else black_or_white > 0
        assert (memory.images.grad * slope > 0).equal(expected)


def test_what_leads_out_of_the_unit_interval_is_cut() -> None:
    x = torch.tensor([-1.0, 0.0, 0.3, 1.0, 2.0]).repeat(2).requires_grad_()
    y = to_unit_interval(x)
    assert y.tolist() == pytest.approx([0, 0, 0.3, 1, 1] * 2)
    torch.autograd.backward(y, torch.tensor([2.0] * 5 + [-2.0] * 5))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 2, 2, 2, -2, -2, -2, 0, 0]


def test_int8_has_255_steps_of_brightness() -> None:
    memory = PixelContainer(RawLayout((1, 16, 16), "int8"), [0], 1)
    with torch.no_grad():
        memory.images.copy_(torch.linspace(-0.5, 0.5, 256).view(1, 1, 16, 16))
    steps = memory.decode()[0].unique()
    assert len(steps) == 255
    torch.testing.assert_close(steps, torch.linspace(0, 1, 255))
