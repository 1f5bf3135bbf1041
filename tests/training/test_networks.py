"""Shapes, parameter counts and randomness of the networks."""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import ConfigError
from hmn_replay.evaluation import evaluate
from hmn_replay.runtime import derive_seed
from hmn_replay.training.networks import (
    NETWORKS,
    Network,
    NetworkFactory,
    StagedNetwork,
    build_network,
    default_depth,
    find_head,
    is_built_in,
    linear_head,
    logits_and_features,
)
from tests.stripes import PLAIN, stripes
from tests.support import TINY_MTT, CountingBackend, hmn_layout, tiny


def conv_weights(network: Network) -> list[torch.Tensor]:
    return [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def penultimate_features(network: nn.Module, images: Tensor) -> Tensor:
    return logits_and_features(network, find_head(network, images), images)[1]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Plain:
    """A factory that cannot be hashed."""

    hidden: int

    def __call__(self, image_shape: Sequence[int], num_classes: int) -> nn.Module:
        layers = nn.Linear(math.prod(image_shape), self.hidden), nn.Linear(self.hidden, num_classes)
        return nn.Sequential(nn.Flatten(), *layers)


@dataclass
class Means:
    """An objective that cannot be hashed."""

    weight: float

    def __call__(self, _: nn.Module, real: Tensor, __: Tensor, own: Tensor, ___: Tensor) -> Tensor:
        return self.weight * (own.mean(0) - real.mean(0)).square().sum()


def test_factories_and_objectives_may_be_any_callable_objects() -> None:
    images, labels = stripes(12)
    data = LabelledImages(images, labels)
    _, accuracy = evaluate(data, data, network=Plain(4), num_passes=24, batch_size=4, device="cpu")
    assert 0 <= accuracy <= 1
    layout = hmn_layout((3, 8, 8), "int8")
    assert tiny(data, layout, network=(Plain(4), Plain(4)), objective="dc").num_images
    assert tiny(data, layout, network=Plain(4), objective=Means(2.0)).num_images


def test_features_are_learned_without_seeding_global_generators() -> None:
    assert is_built_in(linear_head)


def test_a_linear_head_has_the_weights_that_a_seed_gave_before_it_was_built_in() -> None:
    weight = build_network(linear_head, (8, 1, 1), 3, seed=4).get_parameter("body.1.weight")
    assert weight[0, :3].tolist() == pytest.approx([0.285003, 0.247796, 0.291003], abs=1e-6)
    assert pickle.loads(pickle.dumps(linear_head)) is linear_head


def test_convnet_3_has_the_parameters_of_the_literature() -> None:
    assert num_parameters(build_network("convnet", (3, 32, 32), 10)) == 320_010


@pytest.mark.parametrize(
    ("name", "expected"),
    # torchvision's counts, less ImageNet's 1000-way head and stem, plus ours (bias-free VGG).
    [
        ("resnet18", 11_689_512 - 513_000 + 5_130 - 3 * 64 * (49 - 9)),
        ("densenet121", 7_978_856 - 1_025_000 + 10_250 - 3 * 64 * (49 - 9)),
        ("vgg16", 14_723_136 - 4_224 + 5_130),
    ],
)
def test_torchvision_networks_have_the_known_parameters(name: str, expected: int) -> None:
    assert num_parameters(build_network(name, (3, 32, 32), 10)) == expected


def test_convnet_equals_the_published_one_with_instance_norm() -> None:
    network = build_network("convnet", (3, 16, 16), 5, width=8, mean=(0.4,) * 3, std=(0.2,) * 3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(noise(*parameter.shape), alpha=0.3)
    images = noise(4, 3, 16, 16)
    x = (images - 0.4) / 0.2
    body = network.body
    assert isinstance(body, StagedNetwork)
    for stage in body.stages:
        assert isinstance(stage, nn.Sequential)
        convolution, norm = stage[0], stage[1]
        instance_norm = nn.InstanceNorm2d(8, affine=True)
        instance_norm.load_state_dict(norm.state_dict())
        x = nn.functional.avg_pool2d(instance_norm(convolution(x)).relu(), 2)
    head = body.head
    assert isinstance(head, nn.Sequential)
    torch.testing.assert_close(network(images), head[1](x.flatten(1)), rtol=1e-4, atol=1e-4)


def flat(image_shape: Sequence[int], num_classes: int, width: int = 7, depth: int = 1) -> nn.Module:
    layers = nn.Flatten(), nn.Linear(math.prod(image_shape), width), nn.Linear(width, num_classes)
    return nn.Sequential(*layers)


def test_a_size_that_a_partial_has_bound_stays_bound() -> None:
    made = {
        factory: build_network(factory, (1, 4, 4), 2, width=5).body[1].out_features  # type: ignore[index]
        for factory in (flat, partial(flat, width=9), partial(flat, depth=2))
    }
    assert list(made.values()) == [5, 9, 5]


def test_a_function_that_takes_other_arguments_is_refused() -> None:
    wanted = r"network is called with \(image_shape, num_classes\); .* takes \(shape\)"
    with pytest.raises(ConfigError, match=wanted):
        build_network(lambda shape: nn.Identity(), (1, 4, 4), 2)


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 8), (3, 64)])
@pytest.mark.parametrize("name", NETWORKS)
def test_forward_and_backward_at_usual_sizes(name: str, side: int, channels: int) -> None:
    network = build_network(name, (channels, side, side), 7, width=8)
    logits = network(noise(2, channels, side, side))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    torch.autograd.backward(logits.square().sum())
    gradients = [weight.grad for weight in conv_weights(network)]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert sum(float(gradient.norm()) for gradient in gradients if gradient is not None) > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_features_end_in_what_the_head_sees(name: str) -> None:
    network = build_network(name, (3, 32, 32), 4, width=8).eval()
    images = noise(2, 3, 32, 32)
    features = network.features(images)
    sides = {"convnet": [16, 8, 4], "vgg16": [16, 8, 4, 2, 1]}.get(name)
    if name == "resnet18":
        sides = [32, 32, 16, 8, 4]
    elif name == "densenet121":
        sides = [32, 16, 8, 4, 4]
    assert [feature.shape[-1] for feature in features] == sides
    body = network.body
    assert isinstance(body, StagedNetwork)
    assert torch.equal(body.head(features[-1]), network(images))
    # No later stage may have written into an earlier one's output.
    assert torch.equal(features[0], network.features(images)[0])
    assert torch.equal(features[0], body.stages[0]((images - network.mean) / network.std))


@pytest.mark.parametrize(
    ("height", "width", "depth"),
    [
        (4, 4, 2),
        (8, 8, 2),
        (15, 15, 2),
        (15, 60, 2),
        (16, 16, 3),
        (20, 20, 3),
        (28, 28, 3),
        (48, 48, 3),
        (64, 64, 4),
        (128, 128, 5),
        (224, 224, 6),
        (7, 30, 2),
        (2, 2, 1),
    ],
)
def test_depth_follows_the_size(height: int, width: int, depth: int) -> None:
    assert default_depth(height, width) == depth
    network = build_network("convnet", (1, height, width), 3, width=4)
    features = network.features(noise(2, 1, height, width))
    assert len(features) == depth
    assert features[-1].shape[2:] == (height >> depth, width >> depth)
    # Two images are told apart: no map was normalised to nothing.
    logits = network(noise(2, 1, height, width))
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_large_images_keep_the_imagenet_stem(name: str) -> None:
    small, large = (build_network(name, (3, side, side), 2) for side in (64, 128))
    assert conv_weights(small)[0].shape == (64, 3, 3, 3)
    assert conv_weights(large)[0].shape == (64, 3, 7, 7)
    assert large.features(noise(1, 3, 128, 128))[0].shape[-1] == 32


@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_weights_come_from_the_seed_alone(name: str) -> None:
    before = torch.random.get_rng_state()

    def weights(seed: int) -> Tensor:
        network = build_network(name, (3, 8, 8), 2, width=4, seed=seed)
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))
    assert torch.equal(before, torch.random.get_rng_state())


def test_inputs_are_normalised_by_the_buffers() -> None:
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    plain = build_network("convnet", (3, 8, 8), 2, width=4)
    normalising = build_network("convnet", (3, 8, 8), 2, width=4, mean=mean, std=std)
    images = noise(3, 3, 8, 8)
    expected = plain((images - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(normalising(images), expected)
    assert {"mean", "std", "classes"} <= set(normalising.state_dict())


def test_classes_are_positions_until_they_are_known() -> None:
    network: Network = build_network("convnet", (1, 8, 8), 3, width=4)
    assert network.classes.tolist() == [0, 1, 2]
    assert network.training


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ("lenet", (3, 32, 32), 10),
            {},
            "must be one of convnet, vgg16, resnet18.*; got 'lenet'",
        ),
        (("convnet", (32, 32), 10), {}, r"image_shape must be \(C, H, W\), got \(32, 32\)"),
        (("convnet", (3, 8, 8), 10), {"depth": 4}, r"depth must be in \[1, 3\].*8 x 8, got 4"),
        (("convnet", (3, 8, 8), 10), {"depth": 0}, r"depth must be in \[1, 3\]"),
        (("convnet", (3, 8, 1), 10), {}, "sides of 2 or more, got 8 x 1"),
        (("densenet121", (3, 4, 4), 10), {}, "sides of 8 or more"),
        (("convnet", (3, 8, 8), 0), {}, "num_classes and width must be 1 or more"),
        (("convnet", (3, 8, 8), 2), {"mean": (0.5,)}, "mean must be 3 finite numbers"),
        (("convnet", (1, 8, 8), 2), {"std": (0.0,)}, "std must be above 0"),
    ],
)
def test_refuses(
    arguments: tuple[str, tuple[int, ...], int],
    options: dict[str, int],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_network(*arguments, **options)  # type: ignore[arg-type]


def test_weights_do_not_depend_on_the_default_dtype() -> None:
    wanted = build_network("convnet", (3, 8, 8), 2, width=3, seed=1)
    torch.set_default_dtype(torch.float64)
    try:
        network = build_network("convnet", (3, 8, 8), 2, width=3, seed=1)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for found, value in zip(
        network.state_dict().values(), wanted.state_dict().values(), strict=True
    ):
        assert found.equal(value)


# Networks from outside.


class Linear(nn.Module):
    """One layer, without features."""

    def __init__(self, image_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(math.prod(image_shape), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits


def plain(image_shape: Sequence[int], num_classes: int, width: int = 7) -> nn.Module:
    """A network of torch's own modules, whose `features` are a module."""
    network = nn.Sequential(
        OrderedDict(
            features=nn.Sequential(nn.Conv2d(image_shape[0], width, 3), nn.ReLU()),
            pool=nn.AdaptiveAvgPool2d(2),
            flatten=nn.Flatten(),
            head=nn.Linear(4 * width, num_classes),
        )
    )
    return network


def test_a_function_is_a_network() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    network = build_network(plain, (3, 8, 8), 5, width=6, depth=3, mean=mean, std=std)
    images = noise(2, 3, 8, 8)
    network.eval()
    normalised = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(network(images), network.body(normalised))
    assert conv_weights(network)[0].shape[0] == 6
    (features,) = network.features(images)
    assert features.shape == (2, 6, 6, 6)
    assert penultimate_features(network, images).shape == (2, 24)
    again = build_network(plain, (3, 8, 8), 5, width=6)
    assert all(a.equal(b) for a, b in zip(again.parameters(), network.parameters(), strict=True))
    assert build_network(Linear, (3, 8, 8), 5)(images).shape == (2, 5)


def test_a_network_from_outside_is_registered_by_one_call() -> None:
    NETWORKS.add("plain", plain)
    try:
        assert conv_weights(build_network("plain", (3, 8, 8), 5, width=6))[0].shape[0] == 6
    finally:
        NETWORKS.remove("plain")
    with pytest.raises(ConfigError, match="network must be one of"):
        build_network("plain", (3, 8, 8), 5)


def test_what_a_network_lacks_is_said_when_it_is_needed() -> None:
    network = build_network(Linear, (3, 8, 8), 5)
    with pytest.raises(ConfigError, match=r"Linear has no features\(images\), which distribution"):
        network.features(noise(2, 3, 8, 8))
    with pytest.raises(ConfigError, match="Flatten has no linear layer"):
        penultimate_features(nn.Flatten(), noise(2, 3, 8, 8))
    with pytest.raises(ConfigError, match=r"must return an nn\.Module; got list"):
        build_network(lambda *_: [], (3, 8, 8), 5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="got a module, Flatten: give a function that makes it"):
        build_network(nn.Flatten(), (3, 8, 8), 5)


class Tangled(nn.Module):
    """A network whose head is registered first, beside layers that make no logits.

    Args:
        convert: From the head's output to what the network returns. Default: as it is.
    """

    def __init__(self, convert: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Dropout(0.5))
        self.called, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)
        self.convert = convert

    def forward(self, images: Tensor) -> Any:
        features = self.body(images)
        logits = self.head(features)
        self.projected = self.called(features)
        return logits if self.convert is None else self.convert(logits)


def without_the_second(logits: Tensor) -> Tensor:
    return logits.masked_fill(torch.tensor([False, True, False]), -1000)


@pytest.mark.parametrize("convert", [None, Tensor.double, without_the_second])
def test_the_head_is_the_layer_that_makes_the_logits(
    convert: Callable[[Tensor], Tensor] | None,
) -> None:
    network, images = Tangled(convert), noise(5, 3, 8, 8)
    network.body[0].eval()
    modes = [module.training for module in network.modules()]
    state = torch.get_rng_state()
    assert find_head(network, images[:2]) is network.head
    assert [module.training for module in network.modules()] == modes
    assert torch.get_rng_state().equal(state)
    network.eval()
    features = network.body(images)
    assert penultimate_features(network, images).equal(features)
    logits, found = logits_and_features(network, network.head, images)
    assert logits.equal(network(images)) and found.equal(features)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("compiled", ["in place", "wrapped"])
def test_the_head_of_a_compiled_network_is_found_too(compiled: str) -> None:
    network, images = Tangled().eval(), noise(5, 3, 8, 8)
    features = network.body(images)
    shown: Any = network
    if compiled == "wrapped":
        shown = torch.compile(network, backend=CountingBackend())
    else:
        network.compile(backend=CountingBackend())
    for _ in range(2):  # before and after it is compiled
        assert find_head(shown, images) is network.head
        assert penultimate_features(shown, images).equal(features)
        shown(images)


def test_a_head_may_take_more_than_images() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(192, 3), nn.Linear(192, 3)])

        def forward(self, images: Tensor, tasks: Tensor) -> Any:
            return self.heads[int(tasks[0])](images.flatten(1))

    network, images = Heads(), noise(2, 3, 8, 8)
    for task in (0, 1):
        assert find_head(network, images, torch.tensor([task] * 2)) is network.heads[task]


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (torch.neg, r"none of the 4 linear layers of Tangled makes its logits \(2, 3\), and a"),
        (torch.sum, r"of Tangled makes its logits \(\), and a network is needed"),
        (lambda logits: (logits,), "Tangled returns tuple, and a network is needed whose logits"),
    ],
)
def test_where_no_layer_makes_the_logits_there_is_no_head(
    convert: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_head(Tangled(convert), noise(2, 3, 8, 8))


def test_a_layer_whose_output_is_changed_in_place_is_no_head() -> None:
    class Doubled(nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return logits.mul_(2)

    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), Doubled())
    with pytest.raises(ConfigError, match="of Sequential makes its logits"):
        find_head(network, noise(2, 3, 8, 8))


def test_equal_images_do_not_tell_which_logits_are_masked() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.unused = nn.Linear(192, 5), nn.Linear(192, 5)

        def forward(self, images: Tensor) -> Tensor:
            rows = images.flatten(1)
            self.unused(rows)
            hidden = torch.tensor([False, False, False, True, True])
            logits: Tensor = self.head(input=rows)
            return logits.masked_fill(hidden, -1000)

    network = Masked()
    assert find_head(network, noise(2, 3, 8, 8)) is network.head
    with pytest.raises(ConfigError, match="of Masked makes its logits"):
        find_head(network, noise(1, 3, 8, 8).expand(2, -1, -1, -1))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda shape, _: Linear(shape, 5), r"Linear gives \(2, 5\) for 2 images of 3 classes"),
        (lambda shape, k: nn.Linear(7, k), r"Linear does not take images \(2, 3, 8, 8\)"),
        (lambda *_: nn.Flatten(), r"Flatten gives \(2, 192\) .*; expected logits \(2, 3\)"),
    ],
)
def test_a_network_of_other_logits_is_refused_before_it_is_trained(
    factory: NetworkFactory, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(stripes(12), stripes(12), network=factory, config=PLAIN)


@pytest.mark.parametrize("factory", [plain, Linear])
def test_a_network_from_outside_is_trained_and_scored(factory: NetworkFactory) -> None:
    images, labels = stripes(60)
    network, accuracy = evaluate(
        (images, labels), (images, labels), network=factory, config=PLAIN, learning_rate=0.05
    )
    assert accuracy > 0.5
    assert network.classes.tolist() == [-3, 7, 1000]


@pytest.mark.parametrize("objective", ["gradient", "dc", "distribution", "mtt"])
def test_a_network_from_outside_is_condensed_with(
    objective: str, make_set: Callable[..., Any], make_layout: Callable[..., Any]
) -> None:
    options = {**TINY_MTT, "num_experts": 1} if objective == "mtt" else {"objective": objective}
    memory = tiny(make_set(), make_layout(), network=plain, outer_steps=1, **options)
    assert memory.report["network"] == (f"{__name__}.plain",)
    assert memory.report["beta"] is not None  # pruned by that network, too


@pytest.mark.parametrize("name", NETWORKS)
def test_the_weights_are_those_that_torch_would_draw_with_such_a_seed(name: str) -> None:
    """From a generator of its own: the global one is not touched, not even for a moment."""
    before = torch.get_rng_state()
    torch.manual_seed(derive_seed(3, "network", name))
    expected = NETWORKS[name]((3, 8, 8), 2).state_dict()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        found = build_network(name, (3, 8, 8), 2, seed=3).body.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.get_rng_state().equal(state)
    assert all(found[key].equal(value) for key, value in expected.items())
    torch.set_rng_state(before)


def test_a_network_of_a_users_own_may_draw_from_the_global_generator() -> None:
    def drawing(image_shape: Any, num_classes: int) -> nn.Module:
        network = nn.Linear(4, num_classes)
        network.register_buffer("drawn", torch.randperm(100))
        return network

    before = torch.get_rng_state()
    one, two, other = (build_network(drawing, (1, 2, 2), 3, seed=seed).body for seed in (0, 0, 1))
    assert torch.get_rng_state().equal(before)
    assert one.get_buffer("drawn").equal(two.get_buffer("drawn"))
    assert not one.get_buffer("drawn").equal(other.get_buffer("drawn"))
