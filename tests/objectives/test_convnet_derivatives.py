"""The closed form, against double backward through the same network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hmn_replay.objectives import convnet_derivatives
from hmn_replay.objectives.convnet_derivatives import ConvNet
from hmn_replay.objectives.matching import cosine_matching, gradient_matching
from hmn_replay.training.networks import Network, build_network

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


def check(network: Network, batch: Batch, *, with_head: bool) -> None:
    directions = make_directions(network, with_head=with_head)
    expected, expected_to_images = by_autograd(network, batch, directions)
    convnet = ConvNet(network)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(convnet_derivatives, "Direct")
        check(network, make_batch(3, shape), with_head=with_head)


@pytest.mark.parametrize("num_bytes", [1, 8 * 4 * 64, 3 * 8 * 4 * 64, 2**22])
def test_chunks_do_not_change_what_comes_out(
    monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    monkeypatch.setattr(convnet_derivatives, "_BYTES_PER_CHUNK", num_bytes)
    check(make_network(), make_batch(7), with_head=True)


def test_chunks_are_as_large_as_a_map_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    convnet, (images, labels) = ConvNet(make_network()), make_batch(7)
    monkeypatch.setattr(convnet_derivatives, "_BYTES_PER_CHUNK", 3 * 8 * 4 * 8 * 8)
    _, trace = convnet.weight_gradients(images, labels, keep=True)
    assert [len(chunk.last_map) for chunk in trace.chunks] == [3, 3, 1]
    _, trace = convnet.weight_gradients(images, labels)
    assert trace.chunks == []


def test_a_channel_that_is_switched_off_stops_what_flows_through_it() -> None:
    network = make_network()
    with torch.no_grad():
        network.get_parameter("stages.0.1.weight")[1] = 0
        network.get_parameter("stages.1.1.weight")[2] = 0
    check(network, make_batch(4), with_head=True)


def test_a_flat_image_has_a_gradient_too() -> None:
    """Its maps have no deviation but at their border, and eps is what the rate is of."""
    images, labels = make_batch(2)
    check(make_network(), (torch.full_like(images, 0.5), labels), with_head=True)


@pytest.mark.parametrize("objective", [gradient_matching, cosine_matching])
def test_objectives_take_the_closed_form_of_a_convnet_alone(
    monkeypatch: pytest.MonkeyPatch, objective: object
) -> None:
    assert callable(objective)
    network, real, decoded = make_network(), make_batch(5), make_batch(4)
    calls: list[int] = []
    usual = ConvNet.image_gradient

    def count(self: ConvNet, *args: object) -> Tensor:
        calls.append(1)
        return usual(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(ConvNet, "image_gradient", count)
    ours = objective(network, *real, *decoded)
    assert len(calls) == 1
    theirs = objective(nn.Sequential(network), *real, *decoded)
    assert len(calls) == 1
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_other_networks_are_no_convnets() -> None:
    class Own(Network):
        """May do anything in forward."""

    convnet = make_network()
    assert ConvNet.is_convnet(convnet)
    assert not ConvNet.is_convnet(build_network("resnet18", (3, 8, 8), 3))
    assert not ConvNet.is_convnet(nn.Sequential(convnet))
    mean, std = torch.zeros(3), torch.ones(3)
    assert not ConvNet.is_convnet(Own([*convnet.stages], convnet.head, 3, mean, std))
    other = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    assert not ConvNet.is_convnet(Network([*convnet.stages], other, 3, mean, std))


def test_float32_is_within_the_rounding_of_double_backward() -> None:
    network, real, decoded = make_network(width=32), make_batch(16), make_batch(12)
    _, exact = gradient_matching(network, *real, *decoded)
    network.float()
    batches = (real[0].float(), real[1], decoded[0].float(), decoded[1])
    _, ours = gradient_matching(network, *batches)
    _, theirs = gradient_matching(nn.Sequential(network), *batches)
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
