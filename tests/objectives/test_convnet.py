"""The closed form, against double backward through the same network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hmn_replay.objectives import ObjectiveFunction, cosine_matching, gradient_matching
from hmn_replay.objectives._convnet import ConvNet, MapLayer, PatchLayer, pool, rectify_, unpool
from hmn_replay.objectives._convolution import (
    Convolution,
    Direct,
    Scratch,
    Winograd,
    channels_first,
)
from hmn_replay.training.networks import Network, StagedNetwork, build_network
from tests.support import draw, make_norm

Batch = tuple[Tensor, Tensor]


def make_network(
    image_shape: tuple[int, int, int] = (3, 8, 8),
    num_classes: int = 3,
    width: int = 4,
    depth: int = 2,
    seed: int = 0,
) -> Network:
    channels = image_shape[0]
    network = build_network(
        "convnet",
        image_shape,
        num_classes,
        width=width,
        depth=depth,
        mean=torch.linspace(0.4, 0.6, channels),
        std=torch.linspace(0.2, 0.3, channels),
    ).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # biases and norms begin at 0 and 1, which would hide mistakes
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.double)
            parameter.add_(noise, alpha=0.2)
    return network


def make_batch(
    num_images: int, image_shape: tuple[int, int, int] = (3, 8, 8), num_classes: int = 3
) -> Batch:
    generator = torch.Generator().manual_seed(num_images)
    images = torch.rand(num_images, *image_shape, generator=generator, dtype=torch.double)
    return images, torch.randint(num_classes, (num_images,), generator=generator)


def make_directions(network: Network, *, with_head: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    weights = ConvNet(network).weights
    return [
        torch.randn(weight.shape, generator=generator, dtype=torch.double)
        for weight in (weights if with_head else weights[:-1])
    ]


def by_autograd(
    network: Network, batch: Batch, directions: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of all weights, and that of their product with some directions."""
    images, labels = batch[0].clone().requires_grad_(), batch[1]
    weights = [p for p in network.parameters() if p.ndim > 1]
    gradients = torch.autograd.grad(
        F.cross_entropy(network(images), labels), weights, create_graph=True
    )
    products = [(v * g).sum() for v, g in zip(directions, gradients, strict=False)]
    (to_images,) = torch.autograd.grad(torch.stack(products).sum(), images)
    return [gradient.detach() for gradient in gradients], to_images


def differentiate(
    objective: ObjectiveFunction, network: nn.Module, real: Batch, decoded: Batch
) -> tuple[Tensor, Tensor]:
    images = decoded[0].clone().requires_grad_()
    loss = objective(network, *real, images, decoded[1])
    return loss.detach(), torch.autograd.grad(loss, images)[0]


def check(network: Network, batch: Batch, *, with_head: bool, bytes_per_chunk: int = 2**22) -> None:
    directions = make_directions(network, with_head=with_head)
    expected, expected_to_images = by_autograd(network, batch, directions)
    convnet = ConvNet(network, bytes_per_chunk=bytes_per_chunk)
    gradients, trace = convnet.weight_gradients(*batch, keep=True)
    to_images = convnet.image_gradient(trace, directions)
    assert len(gradients) == len(expected) == len(convnet.weights)
    pairs = [*zip(gradients, expected, strict=True), (to_images, expected_to_images)]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert float((ours - theirs).norm()) <= 1e-9 * float(theirs.norm())
    assert float(expected_to_images.norm()) > 0


@settings(max_examples=40, deadline=None)
@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(4, 11),
    width=st.integers(4, 11),
    depth=st.integers(1, 2),
    num_images=st.integers(1, 5),
    num_classes=st.integers(2, 4),
    with_head=st.booleans(),
)
def test_both_orders_equal_double_backward(
    channels: int,
    height: int,
    width: int,
    depth: int,
    num_images: int,
    num_classes: int,
    with_head: bool,
) -> None:
    shape = (channels, height, width)
    network = make_network(shape, num_classes, depth=depth)
    check(network, make_batch(num_images, shape, num_classes), with_head=with_head)


@settings(max_examples=8, deadline=None)
@given(height=st.integers(4, 13), width=st.integers(4, 13), with_head=st.booleans())
def test_a_wide_network_takes_winograds_way(height: int, width: int, with_head: bool) -> None:
    shape = (3, height, width)
    network = make_network(shape, width=64)
    assert isinstance(ConvNet(network).convolution, Winograd)
    assert isinstance(ConvNet(make_network(shape, width=4)).convolution, Direct)
    check(network, make_batch(3, shape), with_head=with_head)


@pytest.mark.parametrize("num_bytes", [1, 8 * 4 * 64, 3 * 8 * 4 * 64, 2**22])
def test_chunks_do_not_change_what_comes_out(num_bytes: int) -> None:
    check(make_network(), make_batch(7), with_head=True, bytes_per_chunk=num_bytes)


def test_chunks_are_as_large_as_a_map_allows() -> None:
    convnet = ConvNet(make_network(), bytes_per_chunk=3 * 8 * 4 * 8 * 8)
    images, labels = make_batch(7)
    _, trace = convnet.weight_gradients(images, labels, keep=True)
    assert [len(chunk.last_map) for chunk in trace.chunks] == [3, 3, 1]
    _, trace = convnet.weight_gradients(images, labels)
    assert trace.chunks == []


def test_a_channel_that_is_switched_off_stops_what_flows_through_it() -> None:
    network = make_network()
    with torch.no_grad():
        network.get_parameter("body.stages.0.1.weight")[1] = 0
        network.get_parameter("body.stages.1.1.weight")[2] = 0
    check(network, make_batch(4), with_head=True)


def test_a_flat_image_has_a_gradient_too() -> None:
    """Its maps have no deviation but at their border, and eps is what the rate is of."""
    images, labels = make_batch(2)
    check(make_network(), (torch.full_like(images, 0.5), labels), with_head=True)


@pytest.mark.parametrize("objective", [gradient_matching, cosine_matching])
def test_objectives_take_the_closed_form_of_a_convnet_alone(objective: ObjectiveFunction) -> None:
    network, real, decoded = make_network(), make_batch(5), make_batch(4)
    num_calls = 0

    def count(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1

    # The closed form computes from the weights, and calls no module but the head.
    network.register_forward_hook(count)
    ours = differentiate(objective, network, real, decoded)
    assert num_calls == 0
    theirs = differentiate(objective, nn.Sequential(network), real, decoded)
    assert num_calls == 2
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_other_networks_are_no_convnets() -> None:
    class Own(Network):
        """May do anything in forward."""

    convnet = make_network()
    assert ConvNet.is_convnet(convnet)
    assert not ConvNet.is_convnet(build_network("resnet18", (3, 8, 8), 3))
    assert not ConvNet.is_convnet(nn.Sequential(convnet))
    mean, std = torch.zeros(3), torch.ones(3)
    body = convnet.body
    assert isinstance(body, StagedNetwork)
    assert not ConvNet.is_convnet(Own(body, 3, mean, std))
    other = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    other_head = StagedNetwork([*body.stages], other)
    assert not ConvNet.is_convnet(Network(other_head, 3, mean, std))
    assert ConvNet.is_convnet(Network(body, 3, mean, std))


def test_float32_is_within_the_rounding_of_double_backward() -> None:
    network, real, decoded = make_network(width=32), make_batch(16), make_batch(12)
    _, exact = differentiate(gradient_matching, network, real, decoded)
    network.float()
    batches = (real[0].float(), real[1]), (decoded[0].float(), decoded[1])
    _, ours = differentiate(gradient_matching, network, *batches)
    _, theirs = differentiate(gradient_matching, nn.Sequential(network), *batches)
    assert ours.dtype == torch.float32
    error, rounding = (float((g - exact).norm() / exact.norm()) for g in (ours, theirs))
    assert error < max(2 * rounding, 1e-5)


def test_autocast_decides_how_convolutions_compute_and_nothing_else() -> None:
    network, (images, labels) = make_network(width=16).float(), make_batch(6)
    directions = [v.float() for v in make_directions(network, with_head=False)]
    exact, _ = ConvNet(network).weight_gradients(images.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        convnet = ConvNet(network)
    gradients, trace = convnet.weight_gradients(images.float(), labels, keep=True)
    patches, maps = trace.chunks[0].patches, trace.chunks[0].maps[0]
    assert patches.values.dtype == maps.input.dtype == maps.gradient.dtype == torch.bfloat16
    assert patches.gram.dtype == maps.normalised.dtype == maps.rate.dtype == torch.float32
    assert convnet.image_gradient(trace, directions).dtype == torch.float32
    for rough, gradient in zip(gradients, exact, strict=True):
        assert rough.dtype == torch.float32
        assert 0 < float((rough - gradient).norm()) < 0.15 * float(gradient.norm())


def test_float32_at_full_width_is_close_to_float64() -> None:
    """ReLUs whose input rounds to the other side of 0 are what the images' gradient differs by."""
    shape = (3, 32, 32)
    network = make_network(shape, 10, width=128, depth=3)
    images, labels = make_batch(8, shape, 10)
    directions = make_directions(network, with_head=True)
    gradients, trace = ConvNet(network).weight_gradients(images, labels, keep=True)
    to_images = ConvNet(network).image_gradient(trace, directions)
    convnet = ConvNet(network.float())
    rounded, trace = convnet.weight_gradients(images.float(), labels, keep=True)
    rounded_to_images = convnet.image_gradient(trace, [v.float() for v in directions])
    for ours, exact in zip(rounded, gradients, strict=True):
        assert float((ours - exact).norm()) < 2e-4 * float(exact.norm())
    assert float((rounded_to_images - to_images).norm()) < 2e-3 * float(to_images.norm())


@pytest.mark.parametrize("width", [4, 64])
@pytest.mark.parametrize("keep", [False, True])
def test_a_trace_outlives_what_comes_between(width: int, keep: bool) -> None:
    convnet = ConvNet(make_network(width=width))
    directions = [torch.ones_like(weight) for weight in convnet.weights]
    _, trace = convnet.weight_gradients(*make_batch(5), keep=True)
    expected = convnet.image_gradient(trace, directions)
    _, trace = convnet.weight_gradients(*make_batch(5), keep=True)
    _, other = convnet.weight_gradients(*make_batch(6), keep=keep)
    if keep:
        convnet.image_gradient(other, directions)
    assert torch.equal(convnet.image_gradient(trace, directions), expected)
    assert torch.equal(convnet.image_gradient(trace, directions), expected)


@pytest.mark.parametrize("width", [4, 64])
def test_what_is_returned_is_the_callers(width: int) -> None:
    convnet, images = ConvNet(make_network(width=width)), make_batch(5)[0]
    labels = torch.zeros(5, dtype=torch.int64)
    weights = [weight.clone() for weight in convnet.weights]
    gradients, trace = convnet.weight_gradients(images, labels, keep=True)
    to_images = convnet.image_gradient(trace, gradients)
    results = [*gradients, to_images]
    copies = [result.clone() for result in results]
    _, other = convnet.weight_gradients(images + 1, labels + 1, keep=True)
    convnet.image_gradient(other, gradients)
    for result, copy in zip(results, copies, strict=True):
        assert torch.equal(result, copy)
        result.zero_()
    again, trace = convnet.weight_gradients(images, labels, keep=True)
    for gradient, copy in zip(again, copies[:-1], strict=True):
        assert torch.equal(gradient, copy)
    assert torch.equal(convnet.image_gradient(trace, again), copies[-1])
    for weight, before in zip(convnet.weights, weights, strict=True):
        assert torch.equal(weight, before)


def test_two_convnets_of_a_network_share_no_memory() -> None:
    network = make_network(width=64)
    one, other = ConvNet(network), ConvNet(network)
    directions = [torch.ones_like(weight) for weight in one.weights]
    _, trace = one.weight_gradients(*make_batch(5), keep=True)
    expected = one.image_gradient(trace, directions)
    _, trace = one.weight_gradients(*make_batch(5), keep=True)
    pointers = {buffer.untyped_storage().data_ptr() for buffer in one._scratch._buffers.values()}
    other.weight_gradients(*make_batch(6))
    for buffer in other._scratch._buffers.values():
        assert buffer.untyped_storage().data_ptr() not in pointers
    assert torch.equal(one.image_gradient(trace, directions), expected)


# A block.


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


# The first block.


def by_maps(
    images: Tensor, w: Tensor, v: Tensor, g: Tensor, dg: Tensor, norm: nn.GroupNorm
) -> list[Tensor]:
    """Return output, gradient to the weight, and the tangents of output and images' gradient."""
    x, scratch = images.movedim(1, 3), Scratch(images)
    layer = MapLayer("0", w, norm, Direct(images.dtype, scratch), scratch)
    total, direction = layer.zeros(), layer.direction(v)
    state, output = layer.forward(x, scratch)
    results = [output.clone()]
    layer.backward(state, g, total, scratch)
    results.append(layer.weight_gradient(total))
    results.append(layer.forward_tangent(state, direction, torch.zeros_like(x)).clone())
    results.append(layer.backward_tangent(state, direction, dg).movedim(3, 1).clone())
    return results


def by_patches(
    images: Tensor,
    w: Tensor,
    v: Tensor,
    g: Tensor,
    dg: Tensor,
    norm: nn.GroupNorm,
    dtype: torch.dtype,
) -> list[Tensor]:
    scratch, memory = Scratch(images), Scratch(images)
    layer = PatchLayer(w, norm, dtype, scratch)
    total, direction = layer.zeros(), layer.direction(v)
    state, output = layer.forward(images, memory)
    results = [output.clone()]
    layer.backward(state, g, total, memory)
    results.append(layer.weight_gradient(total))
    results.append(layer.forward_tangent(state, direction).clone())
    results.append(layer.backward_tangent(state, dg))
    return results


@pytest.mark.parametrize("dtype", [torch.double, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 6, 5), (2, 7, 8)])
def test_passes_are_those_by_maps(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    channels, height, width = shape
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    w, v = draw(5, channels, 3, 3, seed=2), draw(5, channels, 3, 3, seed=3)
    g, dg = (draw(3, height // 2, width // 2, 5, seed=s) for s in (4, 5))
    norm = make_norm(5)
    expected = by_maps(images, w, v, g, dg, norm)
    results = by_patches(images, w, v, g, dg, norm, dtype)
    assert results[0].dtype == results[2].dtype == dtype
    assert results[1].dtype == results[3].dtype == torch.double
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.shape == theirs.shape
        tolerance = 1e-10 if dtype == torch.double else 0.15
        assert float((ours - theirs).norm()) < tolerance * float(theirs.norm())


def test_a_flat_image_has_finite_statistics_in_float32() -> None:
    """Its variance is at the border alone; without padding's, rounding would be all there is."""
    images = torch.cat([torch.full((1, 3, 8, 8), 0.3), torch.zeros(1, 3, 8, 8)])
    layer = PatchLayer(
        draw(5, 3, 3, 3).float(), make_norm(5).float(), torch.float32, Scratch(images)
    )
    state, output = layer.forward(images, Scratch(images))
    assert bool(output.isfinite().all())
    torch.testing.assert_close(state.rate[1], torch.full((1, 5), 1e-5).rsqrt())
