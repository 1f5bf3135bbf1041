"""The rivals, each against its paper's decoding written out, and its fit against numpy's."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hmn_replay.budget import Budget
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.memory import (
    HaBaLayout,
    HaBaMemory,
    IDCLayout,
    IDCMemory,
    LinBaLayout,
    LinBaMemory,
    PixelLayout,
    PixelMemory,
    loads,
)
from hmn_replay.memory.formats import clamp_inwards
from tests.support import PLAIN_FORMATS, rounded_by_hand, same_bits, trained, upsampled_by_hand

pytestmark = pytest.mark.usefixtures("untouched_random_state")
every_format = pytest.mark.parametrize("number_format", PLAIN_FORMATS)

CIFAR = (3, 32, 32)
_STEP = 0.5 / 127  # of pixels as int8: 255 steps of brightness


# Pixels, and several small images in each stored one (IDC).

every_layout = pytest.mark.parametrize(
    "layout",
    [
        PixelLayout((3, 8, 8), "float32"),
        PixelLayout((1, 9, 14), "float32"),
        IDCLayout((3, 8, 8), "float32", 2),
        IDCLayout((1, 9, 14), "float32", 2),
        IDCLayout((3, 10, 8), "float32", 3),
        IDCLayout((1, 16, 17), "float32", 8),
    ],
    ids=lambda layout: f"{layout.image_shape} {layout.factor}",
)


def pixels(layout: PixelLayout, classes: list[int], counts: Any) -> PixelMemory:
    """Return a memory of the kind that a layout is one of."""
    return (IDCMemory if isinstance(layout, IDCLayout) else PixelMemory)(layout, classes, counts)


def corner(layout: PixelLayout, index: int) -> tuple[int, int, int]:
    """Return the stored image that an image is a piece of, and the piece's upper left corner."""
    height, width = layout.image_shape[1] // layout.factor, layout.image_shape[2] // layout.factor
    row, column = divmod(index % layout.factor**2, layout.factor)
    return index // layout.factor**2, row * height, column * width


def pixels_by_hand(memory: PixelMemory, index: int) -> Tensor:
    layout = memory.layout
    stored, top, left = corner(layout, index)
    height, width = layout.image_shape[1] // layout.factor, layout.image_shape[2] // layout.factor
    piece = memory.images[stored, :, top : top + height, left : left + width]
    rounded = rounded_by_hand(piece, layout.number_format, scale=0.5 / 127)
    return upsampled_by_hand(rounded + 0.5, *layout.image_shape[1:]).clamp(0, 1)


def random_images(shape: tuple[int, int, int], count: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, *shape), generator=generator) / 255


@every_layout
@every_format
def test_images_are_pieces_upsampled(layout: PixelLayout, number_format: str) -> None:
    layout = dataclasses.replace(layout, number_format=number_format)
    memory = trained(pixels(layout, [7, -3], [layout.group_size, 2 * layout.group_size]))
    images, _ = memory.decode()
    expected = torch.stack([pixels_by_hand(memory, index) for index in range(len(images))])
    assert images.shape == expected.shape == (3 * layout.factor**2, *layout.image_shape)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-6)
    assert float((expected[0] - expected[-1]).abs().max()) > 0.1


def test_a_memory_costs_its_pixels() -> None:
    assert PixelMemory.num_floats_of(PixelLayout(CIFAR, "float32"), 10, 10) == 30_720
    assert IDCMemory.num_floats_of(IDCLayout(CIFAR, "float32"), 10, 40) == 30_720
    large = IDCLayout((3, 224, 224), "int8", 3)
    assert large.piece == (74, 74)
    assert large.group_size == 9
    assert IDCMemory.num_floats_of(large, 1, 9) == IDCMemory.group_bytes(large) == 3 * 222 * 222


def test_the_factor_is_the_papers() -> None:
    for side, factor in ((8, 2), (32, 2), (127, 2), (128, 3), (224, 3)):
        assert IDCMemory.choose_layout("1 MiB", (3, side, 224), 1).factor == factor


@pytest.mark.parametrize("factor", [0, 1, 9, -2])
def test_a_factor_out_of_range_is_refused(factor: int) -> None:
    with pytest.raises(ConfigError, match=f"pieces is 2 to 8, .* or more; got {factor} for images"):
        IDCLayout((3, 32, 32), "int8", factor)


def test_pieces_have_two_pixels_at_least() -> None:
    assert IDCLayout((3, 12, 8), "int8", 4).piece == (3, 2)
    with pytest.raises(ConfigError, match=r"pieces of 2 x 2 pixels or more; got 5 for .*3, 12, 8"):
        IDCLayout((3, 12, 8), "int8", 5)
    with pytest.raises(ConfigError, match=r"pieces is an integer; got 2\.0"):
        IDCLayout((3, 12, 8), "int8", 2.0)  # type: ignore[arg-type]


# fit


@every_layout
def test_fitted_images_are_real_ones_scaled_down(layout: PixelLayout) -> None:
    f = layout.factor
    memory = pixels(layout, [0, 1], [2 * f * f, f * f])
    real = random_images(layout.image_shape, 3 * f * f)
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
def test_fitted_raw_images_are_the_real_ones(number_format: str) -> None:
    memory = pixels(PixelLayout((3, 8, 8), number_format), [0], 300)
    real = random_images((3, 8, 8), 300)
    memory.fit(0, lambda positions: real[positions])
    memory.update_scales()
    atol = {"float32": 1e-7, "float16": 2**-12, "int8": _STEP / 2 + 1e-7}[number_format]
    torch.testing.assert_close(memory.decode()[0], real, rtol=0, atol=atol)


def test_fitting_leaves_the_images_before() -> None:
    memory = pixels(IDCLayout((3, 8, 8), "float32"), [0, 1], [8, 1200])
    before = memory.images.detach().clone()
    real = random_images((3, 8, 8), 1208)
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
def test_without_a_fit_images_are_noise(layout: PixelLayout) -> None:
    memory = pixels(layout, [0], 40 * layout.group_size)
    images = memory.images.detach()
    assert float(images.abs().max()) <= 0.5
    assert float(images.mean()) == pytest.approx(0, abs=0.03)
    assert float(images.std()) == pytest.approx(0.2, abs=0.02)


# Values and gradients.


@every_layout
def test_gradients_reach_the_pixels_behind_an_image_and_no_other(layout: PixelLayout) -> None:
    memory = pixels(layout, [0, 1], layout.group_size)
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
@pytest.mark.parametrize("layout", [PixelLayout, IDCLayout])
def test_black_and_white_pixels_learn_inwards_alone(
    number_format: str, layout: type[PixelLayout]
) -> None:
    memory = pixels(layout((1, 8, 8), number_format), [0], 8)
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
    y = clamp_inwards(x, 0, 1)
    assert y.tolist() == pytest.approx([0, 0, 0.3, 1, 1] * 2)
    torch.autograd.backward(y, torch.tensor([2.0] * 5 + [-2.0] * 5))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 2, 2, 2, -2, -2, -2, 0, 0]


def test_int8_has_255_steps_of_brightness() -> None:
    memory = pixels(PixelLayout((1, 16, 16), "int8"), [0], 1)
    with torch.no_grad():
        memory.images.copy_(torch.linspace(-0.5, 0.5, 256).view(1, 1, 16, 16))
    steps = memory.decode()[0].unique()
    assert len(steps) == 255
    torch.testing.assert_close(steps, torch.linspace(0, 1, 255))


# Bases and hallucinators (HaBa).

WEIGHTS = ("encoder_weight", "scaling", "shift", "decoder_weight")


def hallucinated_by_hand(memory: HaBaMemory, index: int) -> Tensor:
    layout = memory.layout
    group, j = divmod(index, layout.num_hallucinators)
    bias_format = "float32" if layout.number_format == "float32" else "float16"
    weight, scale, shift, last = (
        rounded_by_hand(memory.get_parameter(name)[j], layout.number_format) for name in WEIGHTS
    )
    bias = rounded_by_hand(memory.encoder_bias[j], bias_format)
    last_bias = rounded_by_hand(memory.decoder_bias[j], bias_format)
    x = rounded_by_hand(memory.bases[group], layout.number_format, scale=0.5 / 127)
    x = scale * F.conv2d(x[None], weight, bias) + shift
    # The kernel of a transposed convolution is that of a convolution, turned around.
    x = F.conv_transpose2d(x, last.flip(2, 3).transpose(0, 1), last_bias)
    return (x[0] + 0.5).clamp(0, 1)


@every_format
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 14)])
@pytest.mark.parametrize("count", [1, 4])
def test_images_are_bases_through_hallucinators(
    number_format: str, shape: tuple[int, int, int], count: int
) -> None:
    layout = HaBaLayout(shape, number_format, count)
    memory = trained(HaBaMemory(layout, [7, -3], [count, 2 * count]), std=0.1)
    images, _ = memory.decode()
    expected = torch.stack([hallucinated_by_hand(memory, index) for index in range(3 * count)])
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=3e-6)
    assert float((expected[0] - expected[-1]).abs().max()) > 0.1


def test_a_hallucinator_of_cifar_has_the_papers_5568_floats() -> None:
    layout = HaBaLayout((3, 32, 32), "float32")
    assert layout.num_hallucinators == 5
    assert HaBaMemory.num_floats_of(layout, 1, 0) == 5 * 5568
    assert HaBaMemory.num_floats_of(layout, 10, 50) == 5 * 5568 + 10 * 3072
    memory = HaBaMemory(layout, [0], 5)
    of_one = [p[0].numel() for name, p in memory.named_parameters() if name != "bases"]
    assert sum(of_one) == 5568


def test_there_are_as_many_hallucinators_as_leave_room_for_a_basis_a_class() -> None:
    counts = []
    for num_bytes in (120_000, 55_000, 50_000, 45_000, 40_000):
        layout = HaBaMemory.choose_layout(num_bytes, (3, 32, 32), 10)
        assert HaBaMemory.max_images(layout, num_bytes, 10) >= 10 * layout.num_hallucinators
        counts.append(layout.num_hallucinators)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 5
    assert counts[-1] == 1
    for num_bytes in (45_000, 50_000, 55_000):
        chosen = HaBaMemory.choose_layout(num_bytes, (3, 32, 32), 10).num_hallucinators
        if chosen < 5:
            with pytest.raises(BudgetError):
                HaBaMemory.max_images(HaBaLayout(CIFAR, "int8", chosen + 1), num_bytes, 10)


@pytest.mark.parametrize("count", [0, 65, -1])
def test_a_number_of_hallucinators_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"num_hallucinators is 1 to 64; got {count}"):
        HaBaLayout((3, 8, 8), "int8", count)


def test_hallucinators_begin_near_the_identity_and_apart() -> None:
    memory = HaBaMemory(HaBaLayout((3, 12, 12), "float32"), [0], 10)
    images = memory.decode()[0].view(2, 5, 3, 12, 12)
    bases = memory.bases.detach() + 0.5
    for j in range(5):
        correlation = torch.corrcoef(torch.stack([images[:, j].flatten(), bases.flatten()]))
        assert 0.5 < float(correlation[0, 1]) < 0.9999
    assert len(images[0].unique(dim=0)) == 5


def test_fitting_begins_with_a_real_image_for_each_basis() -> None:
    memory = HaBaMemory(HaBaLayout((3, 8, 8), "float32", 3), [0, 1], [6, 1200])
    before = memory.bases.detach().clone()
    real = torch.rand(1206, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert not memory.fit(6, lambda positions: real[positions])
    torch.testing.assert_close(memory.bases[2:].detach(), real[6::3] - 0.5)
    assert same_bits(memory.bases[:2].detach(), before[:2])


@every_format
def test_gradients_reach_what_an_image_is_made_of_and_no_other(
    number_format: str,
) -> None:
    memory = HaBaMemory(HaBaLayout((3, 8, 8), number_format, 3), [0, 1], 3)
    image = memory(torch.tensor([4]))  # basis 1 through hallucinator 1
    torch.autograd.backward(image, torch.rand(image.shape, generator=torch.Generator()))
    for name, parameter in memory.named_parameters():
        assert parameter.grad is not None
        assert float((parameter.grad[1] != 0).float().mean()) > 0.9, name
        others = parameter.grad.clone()
        others[1] = 0
        assert not others.any(), name


# A basis and coefficients (LinBa).


def combined_by_hand(memory: LinBaMemory, index: int) -> Tensor:
    layout = memory.layout
    values, ds = layout.number_format, layout.downsampling
    siblings = memory.class_index == memory.class_index[index]
    own = rounded_by_hand(memory.coefficients[siblings], values)
    place = int(siblings[:index].sum())
    basis = [rounded_by_hand(vector, values) for vector in memory.basis]
    total = sum((own[place, k] * basis[k] for k in range(layout.num_bases)), start=torch.zeros(()))
    _, height, width = layout.image_shape
    up = upsampled_by_hand(total, ds * total.shape[1], ds * total.shape[2])
    return (up[:, :height, :width] + 0.5).clamp(0, 1)


@every_format
@pytest.mark.parametrize(
    ("shape", "ds"), [((3, 8, 8), 2), ((1, 9, 14), 2), ((3, 10, 8), 1), ((1, 11, 8), 8)]
)
def test_images_are_combinations_upsampled(
    number_format: str, shape: tuple[int, int, int], ds: int
) -> None:
    memory = trained(LinBaMemory(LinBaLayout(shape, number_format, 4, ds), [7, -3], [2, 3]))
    images, _ = memory.decode()
    expected = torch.stack([combined_by_hand(memory, index) for index in range(5)])
    assert images.shape == expected.shape == (5, *shape)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=3e-6)
    assert float((expected[0] - expected[4]).abs().max()) > 0.1


def test_the_papers_budget_holds_115_images_a_class() -> None:
    num_floats = Budget.ipc(1, CIFAR, 10).num_floats
    layout = LinBaLayout(CIFAR, "float32")
    assert (layout.num_bases, layout.downsampling) == (16, 2)
    assert layout.basis_shape == (3, 16, 16)
    assert (
        LinBaMemory.num_floats_of(layout, 10, 10 * 115)
        <= num_floats
        < LinBaMemory.num_floats_of(layout, 10, 10 * 116)
    )


# choose


def test_the_papers_shape_is_chosen_at_the_papers_budget() -> None:
    assert LinBaMemory.choose_layout(Budget.ipc(1, CIFAR, 10), CIFAR, 10, "float32") == LinBaLayout(
        CIFAR, "float32", 16, 2
    )
    # The square root of four times the values.
    assert LinBaMemory.choose_layout(Budget.ipc(1, CIFAR, 10), CIFAR, 10, "int8").num_bases == 32
    assert LinBaMemory.choose_layout(Budget.ipc(4, CIFAR, 10), CIFAR, 10, "float32").num_bases == 32


def test_a_basis_is_no_larger_than_the_space_it_is_in() -> None:
    assert LinBaMemory.choose_layout("1 MiB", (1, 8, 8), 10).num_bases == 16
    assert LinBaMemory.choose_layout("10 GiB", CIFAR, 10).num_bases == 768
    assert LinBaMemory.choose_layout("900 GiB", (3, 224, 224), 10).num_bases == 1024


@pytest.mark.parametrize(
    ("num_classes", "num_bases"), [(1, 9), (200, 4), (500, 4), (600, 2), (900, 1), (1000, 1)]
)
def test_the_basis_is_halved_until_each_class_has_an_image(
    num_classes: int, num_bases: int
) -> None:
    layout = LinBaMemory.choose_layout("10 KiB", CIFAR, num_classes)
    assert layout.num_bases == num_bases
    assert LinBaMemory.max_images(layout, "10 KiB", num_classes) >= num_classes
    if num_bases < 9:
        with pytest.raises(BudgetError):
            LinBaMemory.max_images(
                LinBaLayout(CIFAR, "int8", 2 * num_bases + 1), "10 KiB", num_classes
            )


@pytest.mark.parametrize(
    ("num_bases", "downsampling", "message"),
    [
        (0, 2, "num_bases is 1 to 1024; got 0"),
        (1025, 2, "num_bases is 1 to 1024; got 1025"),
        (16, 0, "downsampling is 1 to 8; got 0"),
        (16, 9, "downsampling is 1 to 8; got 9"),
    ],
)
def test_fields_out_of_range_are_refused(num_bases: int, downsampling: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LinBaLayout(CIFAR, "int8", num_bases, downsampling)


# fit


def smooth_images(count: int, shape: tuple[int, int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, shape[0], 3, 3, generator=generator)
    return torch.nn.functional.interpolate(coarse, shape[1:], mode="bilinear")


def test_images_of_few_dimensions_are_fitted_exactly() -> None:
    memory = LinBaMemory(LinBaLayout((3, 8, 8), "float32", 6, 1), [0, 1], 20)
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(40, 5, generator=generator)
    real = ((weights / 5) @ torch.rand(5, 192, generator=generator)).view(40, 3, 8, 8)
    assert memory.fit(0, lambda positions: real[positions])
    torch.testing.assert_close(memory.decode()[0], real, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 14)])
def test_no_basis_of_that_size_comes_nearer(shape: tuple[int, int, int]) -> None:
    """The squared error is that of the singular values left out: Eckart and Young's theorem."""
    num_bases, ds = 4, 2
    memory = LinBaMemory(LinBaLayout(shape, "float32", num_bases, ds), [0], 50)
    real = smooth_images(50, shape)
    memory.fit(0, lambda positions: real[positions])
    _, height, width = memory.layout.basis_shape
    rows, columns = (
        np.minimum(np.arange(n * ds), s - 1) for n, s in ((height, shape[1]), (width, shape[2]))
    )
    wide = real.double().numpy()[:, :, rows][:, :, :, columns] - 0.5
    reduced = wide.reshape(50, shape[0], height, ds, width, ds).mean((3, 5)).reshape(50, -1)
    left_out = np.linalg.svd(reduced, compute_uv=False)[num_bases:]
    fitted = (memory.coefficients @ memory.basis.flatten(1)).detach().double().numpy()
    assert np.square(fitted - reduced).sum() == pytest.approx(np.square(left_out).sum(), rel=1e-4)
    assert np.square(left_out).sum() > 1e-3


def test_new_images_are_fitted_to_the_old_basis() -> None:
    memory = LinBaMemory(LinBaLayout((3, 8, 8), "float32", 4), [0, 1], [3, 600])
    before, basis = memory.coefficients.detach().clone(), memory.basis.detach().clone()
    real = smooth_images(603, (3, 8, 8))
    asked = []

    def wanted(positions: Tensor) -> Tensor:
        asked.extend(positions.tolist())
        return real[positions]

    assert memory.fit(3, wanted)
    assert asked == list(range(3, 603))
    assert same_bits(memory.basis.detach(), basis)
    assert same_bits(memory.coefficients[:3].detach(), before[:3])
    reduced = torch.nn.functional.avg_pool2d(real[3:] - 0.5, 2).flatten(1).double().numpy()
    solution, *_ = np.linalg.lstsq(basis.flatten(1).double().numpy().T, reduced.T, rcond=None)
    np.testing.assert_allclose(memory.coefficients[3:].detach().numpy(), solution.T, atol=1e-5)


@every_format
def test_images_are_fitted_to_the_basis_that_they_are_decoded_with(number_format: str) -> None:
    real = smooth_images(60, (3, 8, 8))
    memory = LinBaMemory(LinBaLayout((3, 8, 8), number_format, 4), [0], 20)
    memory.fit(0, lambda positions: real[positions])
    loaded = loads(memory.to_bytes())
    assert isinstance(loaded, LinBaMemory)
    for each in (memory, loaded):
        each.add_classes([1], [40])
        each.fit(20, lambda positions: real[positions])
        each.update_scales(1)
    assert loaded.to_bytes() == memory.to_bytes()


@every_format
def test_a_basis_with_more_vectors_than_images_goes_on_learning(
    number_format: str,
) -> None:
    memory = LinBaMemory(LinBaLayout((3, 8, 8), number_format, 12), [0], 3)
    real = smooth_images(3, (3, 8, 8))
    memory.fit(0, lambda positions: real[positions])
    memory.update_scales()
    images = memory(torch.arange(3))
    torch.testing.assert_close(images.detach(), real, rtol=0, atol=0.2)
    torch.autograd.backward(images, torch.rand(images.shape, generator=torch.Generator()))
    # Vectors of no use yet are not zero, so their coefficients find out what they are good for.
    assert bool((memory.basis.flatten(1).abs().amax(dim=1) > 0.1).all())
    assert memory.coefficients.grad is not None
    assert bool((memory.coefficients.grad != 0).all())


def test_a_fitted_basis_is_in_the_range_of_pixels() -> None:
    memory = LinBaMemory(LinBaLayout((3, 8, 8), "int8", 4), [0], 50)
    real = smooth_images(50, (3, 8, 8))
    memory.fit(0, lambda positions: real[positions])
    memory.update_scales()
    for vector, scale in zip(memory.basis.detach(), memory.get_buffer("basis_scale"), strict=True):
        assert float(vector.square().mean().sqrt()) == pytest.approx(0.3, rel=1e-3)
        assert float(vector.abs().max()) / float(scale) == pytest.approx(127, abs=1e-3)


# Scales, gradients, bounds.


@every_format
def test_gradients_reach_the_basis_and_the_coefficients_of_an_image(
    number_format: str,
) -> None:
    memory = LinBaMemory(LinBaLayout((3, 9, 14), number_format, 4), [0, 1], 2)
    image = memory(torch.tensor([2]))
    torch.autograd.backward(image, torch.rand(image.shape, generator=torch.Generator()))
    gradient = memory.coefficients.grad
    assert gradient is not None
    assert bool((gradient[2] != 0).all())
    assert not gradient[[0, 1, 3]].any()
    assert memory.basis.grad is not None
    assert float((memory.basis.grad != 0).float().mean()) > 0.9
