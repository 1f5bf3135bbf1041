"""A block's four passes, against autograd through the block written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn_replay.objectives.convnet_layers import MapLayer, pool, rectify_, unpool
from hmn_replay.objectives.convolution import Convolution, Direct, Scratch, channels_first
from hmn_replay.objectives.winograd import Winograd
from tests.support import draw, make_norm


def block(x: Tensor, weight: Tensor, norm: nn.GroupNorm) -> Tensor:
    y = F.conv2d(channels_first(x), weight, padding=1).movedim(1, 3)
    y = y - y.mean(dim=(1, 2), keepdim=True)
    n = y / (y.square().mean(dim=(1, 2), keepdim=True) + norm.eps).sqrt()
    return F.avg_pool2d(channels_first((n * norm.weight + norm.bias).relu()), 2).movedim(1, 3)


def relative(ours: Tensor, exact: Tensor) -> float:
    assert ours.shape == exact.shape and float(exact.norm()) > 0
    return float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize("size", [(4, 4), (7, 6), (5, 9)])
@pytest.mark.parametrize("winograd", [False, True])
def test_passes_are_derivatives_of_the_block(size: tuple[int, int], winograd: bool) -> None:
    x, dx = draw(3, *size, 2), draw(3, *size, 2, seed=1)
    w, v = draw(4, 2, 3, 3, seed=2), draw(4, 2, 3, 3, seed=3)
    g, dg = (draw(3, size[0] // 2, size[1] // 2, 4, seed=s) for s in (4, 5))
    norm = make_norm(4)

    def gradients(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        output = block(x, w, norm)
        return (output, *torch.autograd.grad(output, (x, w), g, create_graph=True))

    wanted, along = torch.autograd.functional.jvp(gradients, (x, w, g), (dx, v, dg))
    scratch, memory = Scratch(x), Scratch(x)
    convolution: Convolution = Winograd(scratch) if winograd else Direct(x.dtype, scratch)
    layer = MapLayer("1", w, norm, convolution, scratch)
    state, output = layer.forward(x, memory)
    assert relative(output, wanted[0]) < 1e-10
    total = layer.zeros()
    assert relative(layer.backward(state, g, total, memory), wanted[1]) < 1e-10
    assert relative(layer.weight_gradient(total), wanted[2]) < 1e-10
    direction = layer.direction(v)
    assert relative(layer.forward_tangent(state, direction, dx), along[0]) < 1e-10
    assert relative(layer.backward_tangent(state, direction, dg), along[1]) < 1e-10


def test_backward_adds_to_the_total() -> None:
    x, w, g = draw(2, 4, 4, 2), draw(4, 2, 3, 3, seed=2), draw(2, 2, 2, 4, seed=4)
    scratch = Scratch(x)
    layer = MapLayer("1", w, make_norm(4), Direct(x.dtype, scratch), scratch)
    state, _ = layer.forward(x, scratch)
    once, twice = layer.zeros(), layer.zeros()
    for total in (once, twice, twice):
        layer.backward(state, g, total, scratch)
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize("size", [(4, 6), (5, 4), (4, 5), (3, 3)])
def test_unpool_is_the_gradient_of_pooling_and_relu(size: tuple[int, int]) -> None:
    x = draw(2, *size, 3).requires_grad_()
    expected = F.avg_pool2d(channels_first(x.relu()), 2).movedim(1, 3)
    rectified, scratch = x.detach().relu(), Scratch(x.detach())
    output = pool(rectified, scratch)
    torch.testing.assert_close(output, expected.detach())
    g = draw(*output.shape, seed=1)
    scratch("map", x.shape).fill_(7)
    (gradient,) = torch.autograd.grad(expected, x, g)
    torch.testing.assert_close(unpool(g, rectified, scratch), gradient)


def test_rectify_works_in_place() -> None:
    gradient = torch.tensor([1.0, -2.0, 3.0, 4.0])
    assert rectify_(gradient, torch.tensor([0.5, 2.0, 0.0, 0.0])) is gradient
    assert gradient.tolist() == [1, -2, 0, 0]
