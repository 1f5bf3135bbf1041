"""Torch's convolution in the form that ConvNet's layers call, and memory by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmn_replay.objectives._convolution import (
    Direct,
    Memory,
    Scratch,
    Slabs,
    Winograd,
    channels_first,
)
from tests.support import draw


@pytest.mark.parametrize("dtype", [torch.double, torch.bfloat16])
def test_products_are_a_convolution_and_its_gradients(dtype: torch.dtype) -> None:
    x, other = draw(2, 5, 4, 3), draw(2, 5, 4, 3, seed=1)
    w, v = draw(6, 3, 3, 3, seed=2), draw(6, 3, 3, 3, seed=3)
    g, h = draw(2, 5, 4, 6, seed=4), draw(2, 5, 4, 6, seed=5)
    a, b = (channels_first(t).clone().requires_grad_() for t in (x, other))
    weight, second = w.clone().requires_grad_(), v.clone().requires_grad_()
    y = F.conv2d(a, weight, padding=1) + F.conv2d(b, second, padding=1)
    direct = Direct(dtype, Scratch(x))
    lifted = direct.lift(x, "x"), direct.lift(other, "other")
    kernels = direct.kernel(w), direct.kernel(v)
    tolerance = 1e-12 if dtype == torch.double else 0.03

    def check(ours: Tensor, theirs: Tensor) -> None:
        assert ours.dtype == torch.double and ours.shape == theirs.shape
        assert float((ours - theirs.detach()).norm()) <= tolerance * float(theirs.detach().norm())

    check(direct.forward(*zip(lifted, kernels, strict=True)), y.movedim(1, 3))
    gradients = direct.lift_gradient(g, "g"), direct.lift_gradient(h, "h")
    total = direct.zeros(w)
    for image, gradient in zip(lifted, gradients, strict=True):
        direct.add_product(total, image, gradient)
    to_weight, to_a = torch.autograd.grad(y, (weight, a), channels_first(g), retain_graph=True)
    (to_second,) = torch.autograd.grad(y, second, channels_first(h), retain_graph=True)
    check(direct.weight_gradient(total), to_weight + to_second)
    (to_b,) = torch.autograd.grad(y, b, channels_first(h))
    check(direct.backward(*zip(gradients, kernels, strict=True)), (to_a + to_b).movedim(1, 3))


def test_a_name_has_one_memory_for_each_dtype() -> None:
    scratch = Scratch(torch.empty(0))
    first = scratch("a", (2, 3)).fill_(1)
    assert first.dtype == torch.float32 and first.is_contiguous()
    others = scratch("b", (2, 3)).fill_(2), scratch("a", (2, 3), torch.float64).fill_(3)
    assert bool((first == 1).all()) and bool((others[0] == 2).all())
    again = scratch("a", (5,))
    assert again.data_ptr() == first.data_ptr()
    again.fill_(4)
    assert bool((first.flatten()[:5] == 4).all()) and bool((others[1] == 3).all())


def test_memory_grows_with_what_is_asked_for() -> None:
    scratch = Scratch(torch.empty(0), Slabs(1024))
    taken = [scratch(f"{i}", (70 + 100 * i,)).fill_(i) for i in range(6)]
    grown = scratch("0", (300,)).fill_(-1)
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(taken))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in [*taken, grown])
    assert scratch("0", (300,)).data_ptr() == grown.data_ptr()


def test_two_scratches_share_nothing() -> None:
    one = Scratch(torch.empty(0))("a", (4,)).fill_(1)
    Scratch(torch.empty(0))("a", (4,)).fill_(2)
    assert bool((one == 1).all())


def test_memory_is_used_again_once_no_tensor_uses_it() -> None:
    slabs = Slabs(1024)
    scratch = Scratch(torch.empty(0), slabs)
    tensor, part = scratch("a", (4,)).fill_(1), scratch("b", (4,))[1:].fill_(2)
    place = tensor.data_ptr()
    del scratch, tensor
    # A part of it is still in use.
    other = Scratch(torch.empty(0), slabs)("a", (4,)).fill_(3)
    assert other.data_ptr() != place and bool((part == 2).all())
    del part
    assert Scratch(torch.empty(0), slabs)("a", (4,)).data_ptr() == place
    assert bool((other == 3).all())


def test_memory_that_is_kept_is_bounded_and_can_be_released() -> None:
    slabs = Slabs(1024, max_spare=2)
    taken = [Scratch(torch.empty(0), slabs)("a", (n,)).fill_(n) for n in (1, 100, 500, 2, 3)]
    assert all(bool((tensor == len(tensor)).all()) for tensor in taken)
    assert slabs.num_spare == 0
    taken.clear()
    assert slabs.num_spare == 2
    slabs.release()
    assert slabs.num_spare == 0


def test_large_tensors_have_memory_of_their_own() -> None:
    scratch = Scratch(torch.empty(0))
    small, large = scratch("a", (5,)).fill_(1), scratch("b", (2**22 + 3,)).fill_(2)
    after = scratch("c", (5,)).fill_(3)
    assert large.data_ptr() % 64 == 0 and 0 < after.data_ptr() - small.data_ptr() < 1024
    assert bool((small == 1).all()) and bool((large == 2).all())


def test_memory_gives_nothing_twice() -> None:
    memory = Memory(torch.empty(0), Slabs(1024))
    taken = [memory("a", (2, 50)).fill_(i) for i in range(20)]
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(taken))
    assert memory("a", (3,), torch.bfloat16).dtype == torch.bfloat16


def test_other_devices_have_new_memory_each_time() -> None:
    scratch = Scratch(torch.empty(0, device="meta"))
    tensor = scratch("a", (2, 3), torch.bfloat16)
    assert tensor.device.type == "meta" and tensor.dtype == torch.bfloat16
    assert scratch("a", (2, 3), torch.bfloat16) is not tensor and not scratch._buffers
    assert Memory(torch.empty(0, device="meta"))("a", (2,)).device.type == "meta"


# Winograd.


def by_autograd(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, and the gradients to input and weight."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = F.conv2d(channels_first(x), w, padding=1).movedim(1, 3)
    to_x, to_w = torch.autograd.grad(y, (x, w), g)
    return y.detach(), to_x, to_w


def relative(ours: Tensor, exact: Tensor) -> float:
    assert ours.shape == exact.shape
    return float((ours.double() - exact).norm() / exact.norm())


@settings(max_examples=40, deadline=None)
@given(
    num_images=st.integers(1, 3),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
)
def test_float64_equals_torch(
    num_images: int, height: int, width: int, inputs: int, outputs: int
) -> None:
    x = draw(num_images, height, width, inputs)
    w = draw(outputs, inputs, 3, 3, seed=1)
    g = draw(num_images, height, width, outputs, seed=2)
    y, to_x, to_w = by_autograd(x, w, g)
    winograd = Winograd(Scratch(x))
    kernel, lifted = winograd.kernel(w), winograd.lift(x, "x")
    assert relative(winograd.forward((lifted, kernel)), y) < 1e-10
    gradient, total = winograd.lift_gradient(g, "g"), winograd.zeros(w)
    winograd.add_product(total, lifted, gradient)
    assert relative(winograd.weight_gradient(total), to_w) < 1e-10
    assert relative(winograd.backward((gradient, kernel)), to_x) < 1e-10


@pytest.mark.parametrize("side", [8, 7])
def test_sums_are_taken_before_transforms(side: int) -> None:
    pairs = [
        (
            draw(2, side, side, 3, seed=s),
            draw(4, 3, 3, 3, seed=s + 1),
            draw(2, side, side, 4, seed=s + 2),
        )
        for s in (0, 10)
    ]
    expected = [
        sum(parts[1:], parts[0]) for parts in zip(*(by_autograd(*p) for p in pairs), strict=True)
    ]
    winograd = Winograd(Scratch(pairs[0][0]))
    kernels = [winograd.kernel(w) for _, w, _ in pairs]
    inputs = [winograd.lift(x, f"x {i}") for i, (x, _, _) in enumerate(pairs)]
    gradients = [winograd.lift_gradient(g, f"g {i}") for i, (_, _, g) in enumerate(pairs)]
    total = winograd.zeros(pairs[0][1])
    for lifted, gradient in zip(inputs, gradients, strict=True):
        winograd.add_product(total, lifted, gradient)
    assert relative(winograd.forward(*zip(inputs, kernels, strict=True)), expected[0]) < 1e-10
    assert relative(winograd.backward(*zip(gradients, kernels, strict=True)), expected[1]) < 1e-10
    assert relative(winograd.weight_gradient(total), expected[2]) < 1e-10


def test_float32_rounds_a_little_more_than_direct_convolution() -> None:
    x, w, g = draw(4, 16, 16, 64).relu(), draw(64, 64, 3, 3, seed=1), draw(4, 16, 16, 64, seed=2)
    y, to_x, to_w = by_autograd(x, w, g)
    winograd = Winograd(Scratch(x.float()))
    kernel, lifted = winograd.kernel(w.float()), winograd.lift(x.float(), "x")
    output = winograd.forward((lifted, kernel))
    assert output.dtype == torch.float32
    assert 5e-7 < relative(output, y) < 9e-7
    gradient, total = winograd.lift_gradient(g.float(), "g"), winograd.zeros(w.float())
    winograd.add_product(total, lifted, gradient)
    assert relative(winograd.backward((gradient, kernel)), to_x) < 1.2e-6
    assert relative(winograd.weight_gradient(total), to_w) < 1.5e-6
