"""Winograd's convolution, against torch's and its gradients by autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmn_replay.objectives.convolution import Scratch, channels_first
from hmn_replay.objectives.winograd import Winograd
from tests.support import draw


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


def test_float32_rounds_as_the_module_tells() -> None:
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
