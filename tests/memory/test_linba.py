"""LinBa's combinations, against sums written out, and its fit, against least squares by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hmn_replay.budget import Budget
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.memory.formats import PLAIN_FORMATS, NumberFormat
from hmn_replay.memory.linba import LinBa, LinBaLayout
from tests.support import rounded_by_hand, same_bits, trained, upsampled_by_hand

pytestmark = pytest.mark.usefixtures("untouched_random_state")
every_format = pytest.mark.parametrize("number_format", PLAIN_FORMATS)

CIFAR = (3, 32, 32)


def decoded_by_hand(memory: LinBa, index: int) -> Tensor:
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
    number_format: NumberFormat, shape: tuple[int, int, int], ds: int
) -> None:
    memory = trained(LinBa(LinBaLayout(shape, number_format, 4, ds), [7, -3], [2, 3]))
    images, _ = memory.decode()
    expected = torch.stack([decoded_by_hand(memory, index) for index in range(5)])
    assert images.shape == expected.shape == (5, *shape)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=3e-6)
    assert float((expected[0] - expected[4]).abs().max()) > 0.1


def test_the_papers_budget_holds_115_images_a_class() -> None:
    num_floats = Budget.ipc(1, CIFAR, 10).num_floats
    layout = LinBaLayout(CIFAR, "float32")
    assert (layout.num_bases, layout.downsampling) == (16, 2)
    assert layout.basis_shape == (3, 16, 16)
    assert layout.num_floats(10, 10 * 115) <= num_floats < layout.num_floats(10, 10 * 116)


# choose


def test_the_papers_shape_is_chosen_at_the_papers_budget() -> None:
    assert LinBaLayout.choose(Budget.ipc(1, CIFAR, 10), CIFAR, 10, "float32") == LinBaLayout(
        CIFAR, "float32", 16, 2
    )
    # The square root of four times the values.
    assert LinBaLayout.choose(Budget.ipc(1, CIFAR, 10), CIFAR, 10, "int8").num_bases == 32
    assert LinBaLayout.choose(Budget.ipc(4, CIFAR, 10), CIFAR, 10, "float32").num_bases == 32


def test_a_basis_is_no_larger_than_the_space_it_is_in() -> None:
    assert LinBaLayout.choose("1 MiB", (1, 8, 8), 10).num_bases == 16
    assert LinBaLayout.choose("10 GiB", CIFAR, 10).num_bases == 768
    assert LinBaLayout.choose("900 GiB", (3, 224, 224), 10).num_bases == 1024


@pytest.mark.parametrize(
    ("num_classes", "num_bases"), [(1, 13), (300, 13), (500, 6), (900, 3), (1000, 1)]
)
def test_the_basis_is_halved_until_each_class_has_an_image(
    num_classes: int, num_bases: int
) -> None:
    layout = LinBaLayout.choose("20 KiB", CIFAR, num_classes)
    assert layout.num_bases == num_bases
    assert layout.max_images("20 KiB", num_classes) >= num_classes
    if num_bases < 13:
        with pytest.raises(BudgetError):
            LinBaLayout(CIFAR, "int8", 2 * num_bases + 1).max_images("20 KiB", num_classes)


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
    memory = LinBa(LinBaLayout((3, 8, 8), "float32", 6, 1), [0, 1], 20)
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(40, 5, generator=generator)
    real = ((weights / 5) @ torch.rand(5, 192, generator=generator)).view(40, 3, 8, 8)
    assert memory.fit(0, lambda positions: real[positions])
    torch.testing.assert_close(memory.decode()[0], real, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 14)])
def test_no_basis_of_that_size_comes_nearer(shape: tuple[int, int, int]) -> None:
    """The squared error is that of the singular values left out: Eckart and Young's theorem."""
    num_bases, ds = 4, 2
    memory = LinBa(LinBaLayout(shape, "float32", num_bases, ds), [0], 50)
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
    memory = LinBa(LinBaLayout((3, 8, 8), "float32", 4), [0, 1], [3, 600])
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
def test_a_basis_with_more_vectors_than_images_goes_on_learning(
    number_format: NumberFormat,
) -> None:
    memory = LinBa(LinBaLayout((3, 8, 8), number_format, 12), [0], 3)
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
    memory = LinBa(LinBaLayout((3, 8, 8), "int8", 4), [0], 50)
    real = smooth_images(50, (3, 8, 8))
    memory.fit(0, lambda positions: real[positions])
    for vector, scale in zip(memory.basis.detach(), memory.basis_scale, strict=True):
        assert float(vector.square().mean().sqrt()) == pytest.approx(0.3, rel=1e-3)
        assert float(vector.abs().max()) / float(scale) == pytest.approx(127, abs=1e-3)


# Scales, gradients, bounds.


def test_int8_clips_no_value() -> None:
    memory = trained(LinBa(LinBaLayout((3, 8, 8), "int8", 4), [0, 1, 2], [3, 0, 2]))
    assert memory.coefficient_scale.shape == (3, 1)
    for k in (0, 2):
        own = memory.coefficients[memory.class_index == k].detach()
        assert float(own.abs().max() / memory.coefficient_scale[k]) == pytest.approx(127, abs=1e-3)
    steps = memory.basis.detach().abs() / memory.basis_scale
    torch.testing.assert_close(steps.amax((1, 2, 3)), torch.full((4,), 127.0))


@every_format
def test_gradients_reach_the_basis_and_the_coefficients_of_an_image(
    number_format: NumberFormat,
) -> None:
    memory = LinBa(LinBaLayout((3, 9, 14), number_format, 4), [0, 1], 2)
    image = memory(torch.tensor([2]))
    torch.autograd.backward(image, torch.rand(image.shape, generator=torch.Generator()))
    gradient = memory.coefficients.grad
    assert gradient is not None
    assert bool((gradient[2] != 0).all())
    assert not gradient[[0, 1, 3]].any()
    assert memory.basis.grad is not None
    assert float((memory.basis.grad != 0).float().mean()) > 0.9


def test_the_bound_of_sums_is_that_of_the_largest_combination() -> None:
    memory = LinBa(LinBaLayout((1, 8, 8), "float32", 2), [0], 2)
    with torch.no_grad():
        memory.basis[0], memory.basis[1] = -2.0, 5.0
        memory.coefficients.copy_(torch.tensor([[3.0, 1.0], [-1.0, 2.0]]))
    assert memory.largest_sum() == pytest.approx(1 * 2 + 2 * 5)
    memory.keep([])
    assert memory.largest_sum() == 5.0
    with torch.no_grad():
        memory.basis[1, 0, 0, 0] = float("nan")
    assert not memory.largest_sum() < float("inf")
