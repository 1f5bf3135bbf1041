"""The objectives and their gradients, against references written out in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import ConfigError, DataError
from hmn_replay.objectives import (
    OBJECTIVES,
    Objective,
    ObjectiveFunction,
    cosine_matching,
    distribution_matching,
    get_objective,
    gradient_matching,
    last_block_matching,
)
from hmn_replay.objectives.gradients import CompiledMatch
from hmn_replay.registry import name_of
from hmn_replay.training.networks import Network, StagedNetwork, build_network
from tests.support import CountingBackend, tiny

Batches = tuple[Tensor, Tensor, Tensor, Tensor]

FUNCTIONS: dict[str, ObjectiveFunction] = {
    "gradient": gradient_matching,
    "dc": cosine_matching,
    "dsa": cosine_matching,
    "distribution": distribution_matching,
    "dm": last_block_matching,
}
objectives = pytest.mark.parametrize("objective", dict.fromkeys(FUNCTIONS.values()))


def some_network(num_classes: int = 3, width: int = 4, seed: int = 0) -> Network:
    network = build_network(
        "convnet", (3, 8, 8), num_classes, width=width, depth=2, mean=(0.5,) * 3, std=(0.25,) * 3
    ).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # biases and norms begin at 0 and 1, which would hide mistakes
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.double)
            parameter.add_(noise, alpha=0.2)
    return network


def some_batches(num_real: int = 5, num_decoded: int = 4, seed: int = 1) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    real = torch.rand(num_real, 3, 8, 8, generator=generator, dtype=torch.double)
    decoded = torch.rand(num_decoded, 3, 8, 8, generator=generator, dtype=torch.double)
    num_classes = min(3, num_real, num_decoded)  # of real and decoded images alike
    real_labels = torch.randperm(num_real, generator=generator) % num_classes
    decoded_labels = torch.randperm(num_decoded, generator=generator) % num_classes
    return real, real_labels, decoded, decoded_labels


def written_out(weights: dict[str, Tensor], images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the blocks' outputs and the logits of :func:`some_network`, one image at a time."""
    outputs: list[list[Tensor]] = [[], []]
    logits = []
    for image in images:
        x = (image - 0.5) / 0.25
        for block in range(2):
            weight, bias = (
                weights[f"body.stages.{block}.0.weight"],
                weights[f"body.stages.{block}.0.bias"],
            )
            x = F.conv2d(x[None], weight, bias, padding=1)[0]
            mean, var = x.mean(dim=(1, 2)), x.var(dim=(1, 2), unbiased=False)
            x = (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
            gain, shift = (
                weights[f"body.stages.{block}.1.weight"],
                weights[f"body.stages.{block}.1.bias"],
            )
            x = (x * gain[:, None, None] + shift[:, None, None]).clamp(min=0)
            x = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
            outputs[block].append(x)
        logits.append(weights["body.head.1.weight"] @ x.flatten() + weights["body.head.1.bias"])
    return [torch.stack(of_block) for of_block in outputs], torch.stack(logits)


def differentiate(objective: ObjectiveFunction, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the loss, and its gradient to the decoded images."""
    network, real, real_labels, decoded, labels = arguments
    decoded = decoded.detach().requires_grad_()
    loss = objective(network, real, real_labels, decoded, labels)
    return loss.detach(), torch.autograd.grad(loss, decoded)[0]


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone().requires_grad_() for k, v in network.named_parameters()}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    own = logits[torch.arange(len(labels)), labels]
    return (logits.logsumexp(dim=1) - own).mean()


def naive_gradient_matching(network: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    real, real_labels, decoded, decoded_labels = batches
    weights = parameters_of(network)
    convolutions = [weights["body.stages.0.0.weight"], weights["body.stages.1.0.weight"]]
    decoded = decoded.detach().clone().requires_grad_()
    wanted = torch.autograd.grad(
        cross_entropy(written_out(weights, real)[1], real_labels), convolutions
    )
    found = torch.autograd.grad(
        cross_entropy(written_out(weights, decoded)[1], decoded_labels),
        convolutions,
        create_graph=True,
    )
    loss = sum(((a - b) ** 2).sum() for a, b in zip(found, wanted, strict=True))
    assert isinstance(loss, Tensor)
    return loss.detach(), torch.autograd.grad(loss, decoded)[0]


def naive_cosine_matching(network: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    real, real_labels, decoded, decoded_labels = batches
    weights = parameters_of(network)
    matrices = [
        weights[f"{name}.weight"] for name in ("body.stages.0.0", "body.stages.1.0", "body.head.1")
    ]
    decoded = decoded.detach().clone().requires_grad_()
    wanted = torch.autograd.grad(
        cross_entropy(written_out(weights, real)[1], real_labels), matrices
    )
    found = torch.autograd.grad(
        cross_entropy(written_out(weights, decoded)[1], decoded_labels),
        matrices,
        create_graph=True,
    )
    loss = torch.zeros((), dtype=torch.double)
    for of_layer, wanted_of_layer in zip(found, wanted, strict=True):
        for of_filter, wanted_of_filter in zip(of_layer, wanted_of_layer, strict=True):
            a, b = of_filter.flatten(), wanted_of_filter.flatten()
            loss = loss + 1 - (a @ b) / ((a @ a).sqrt() * (b @ b).sqrt() + 1e-6)
    return loss.detach(), torch.autograd.grad(loss, decoded)[0]


def mean_of(images: list[Tensor]) -> Tensor:
    return torch.stack(images).sum(dim=0) / len(images)


def naive_distribution_matching(network: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    real, real_labels, decoded, decoded_labels = batches
    weights = parameters_of(network)
    decoded = decoded.detach().clone().requires_grad_()
    loss = torch.zeros((), dtype=torch.double)
    for of_real, of_decoded in zip(
        written_out(weights, real)[0], written_out(weights, decoded)[0], strict=True
    ):
        for label in set(real_labels.tolist()):
            mean_real = mean_of(
                [x for x, y in zip(of_real, real_labels, strict=True) if y == label]
            )
            mean = mean_of(
                [x for x, y in zip(of_decoded, decoded_labels, strict=True) if y == label]
            )
            loss = loss + ((mean - mean_real) ** 2).sum() / mean.numel()
    return loss.detach(), torch.autograd.grad(loss, decoded)[0]


def naive_last_block_matching(network: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    real, real_labels, decoded, decoded_labels = batches
    weights = parameters_of(network)
    decoded = decoded.detach().clone().requires_grad_()
    ours, theirs = (written_out(weights, images)[0][-1] for images in (decoded, real))
    loss = torch.zeros((), dtype=torch.double)
    for label in set(real_labels.tolist()):
        mean_real = mean_of([x for x, y in zip(theirs, real_labels, strict=True) if y == label])
        mean = mean_of([x for x, y in zip(ours, decoded_labels, strict=True) if y == label])
        loss = loss + ((mean - mean_real) ** 2).sum()
    return loss.detach(), torch.autograd.grad(loss, decoded)[0]


NAIVE: dict[ObjectiveFunction, Callable[[nn.Module, Batches], tuple[Tensor, Tensor]]] = {
    gradient_matching: naive_gradient_matching,
    cosine_matching: naive_cosine_matching,
    distribution_matching: naive_distribution_matching,
    last_block_matching: naive_last_block_matching,
}


@objectives
@pytest.mark.parametrize("num_decoded", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_equal_a_naive_reference(
    objective: ObjectiveFunction, num_decoded: int, seed: int
) -> None:
    network, batches = some_network(seed=seed), some_batches(5, num_decoded, seed)
    loss, gradient = differentiate(objective, network, *batches)
    expected_loss, expected = NAIVE[objective](network, batches)
    assert gradient.shape == batches[2].shape
    assert float((loss - expected_loss).abs()) <= 1e-9 * float(expected_loss)
    assert float((gradient - expected).norm()) <= 1e-9 * float(expected.norm())
    assert float(expected.norm()) > 1e-6


@pytest.mark.parametrize("objective", [gradient_matching, cosine_matching])
def test_a_compiled_match_is_the_plain_one_whatever_the_number_of_images(
    objective: Callable[..., Tensor],
) -> None:
    backend = CountingBackend()
    match = CompiledMatch(backend)
    for seed, (num_real, num_decoded) in enumerate([(6, 5), (7, 4), (9, 3), (6, 5)]):
        network, batches = some_network(seed=seed), some_batches(num_real, num_decoded, seed)
        expected = differentiate(objective, network, *batches)
        found = differentiate(partial(objective, match=match), network, *batches)
        torch.testing.assert_close(found, expected)
    assert backend.count == 2  # of the real batch, and of the decoded one
    with torch.no_grad():
        loss = objective(network, *batches, match=match)
    torch.testing.assert_close(loss, expected[0])
    assert backend.count == 2


def test_what_normalises_by_the_batch_is_matched_without_compiling() -> None:
    backend = CountingBackend()
    network, batches = build_network("vgg16", (3, 8, 8), 3).double(), some_batches()
    expected = differentiate(gradient_matching, network, *batches)
    compiled = partial(gradient_matching, match=CompiledMatch(backend))
    found = differentiate(compiled, network, *batches)
    assert found[0].equal(expected[0])
    assert found[1].equal(expected[1])
    assert backend.count == 0


@objectives
def test_the_gradient_is_the_slope_of_the_loss(objective: ObjectiveFunction) -> None:
    network, (real, real_labels, decoded, labels) = some_network(), some_batches()
    _, gradient = differentiate(objective, network, real, real_labels, decoded, labels)
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        direction = torch.randn(decoded.shape, generator=generator, dtype=torch.double)
        up, _ = differentiate(
            objective, network, real, real_labels, decoded + 1e-6 * direction, labels
        )
        down, _ = differentiate(
            objective, network, real, real_labels, decoded - 1e-6 * direction, labels
        )
        slope = float(up - down) / 2e-6
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


@objectives
def test_the_batch_itself_is_matched_perfectly(objective: ObjectiveFunction) -> None:
    real, labels, _, _ = some_batches()
    loss, gradient = differentiate(objective, some_network(), real, labels, real.clone(), labels)
    # The floor under the cosine's norms leaves a trace.
    trace = 2e-2 if objective is cosine_matching else 1e-10
    assert float(loss) == pytest.approx(0, abs=trace**2)
    assert float(gradient.abs().max()) < trace


@objectives
def test_a_step_against_the_gradient_lowers_the_loss(objective: ObjectiveFunction) -> None:
    network, (real, real_labels, decoded, labels) = some_network(), some_batches()
    loss, gradient = differentiate(objective, network, real, real_labels, decoded, labels)
    step = 1e-3 * loss / gradient.square().sum()
    lower, _ = differentiate(
        objective, network, real, real_labels, decoded - step * gradient, labels
    )
    assert float(lower) < float(loss)


def test_gradient_matching_reads_convolution_weights_alone() -> None:
    """A part that has no convolution may be anything: its own gradients are not compared."""
    network, batches = some_network(), some_batches()
    scaled = copy.deepcopy(network)
    # Twice the head's weights with half of its input's scale: the same logits and the same
    # gradients of the convolutions, but another gradient of head and norm.
    with torch.no_grad():
        scaled.get_parameter("body.head.1.weight").mul_(2)
        scaled.get_parameter("body.stages.1.1.weight").mul_(0.5)
        scaled.get_parameter("body.stages.1.1.bias").mul_(0.5)
    loss, gradient = differentiate(gradient_matching, network, *batches)
    same_loss, same_gradient = differentiate(gradient_matching, scaled, *batches)
    torch.testing.assert_close(same_loss, loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(same_gradient, gradient, rtol=1e-9, atol=1e-15)


@objectives
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_network_and_the_batches_are_left_as_they_were(
    objective: ObjectiveFunction, frozen: bool, training: bool
) -> None:
    network, batches = some_network(), some_batches()
    network.train(training)
    network.requires_grad_(not frozen)
    network.get_parameter("body.head.1.bias").requires_grad_(frozen)
    network.get_parameter("body.stages.0.0.weight").grad = torch.ones(
        4, 3, 3, 3, dtype=torch.double
    )
    state = copy.deepcopy(network.state_dict())
    flags = [parameter.requires_grad for parameter in network.parameters()]
    copies = [batch.clone() for batch in batches]
    decoded = batches[2].requires_grad_()

    loss = objective(network, *batches)
    torch.autograd.backward(2 * loss)

    assert all(module.training == training for module in network.modules())
    assert flags == [parameter.requires_grad for parameter in network.parameters()]
    assert all(state[name].equal(value) for name, value in network.state_dict().items())
    for name, parameter in network.named_parameters():
        if name == "body.stages.0.0.weight":
            assert parameter.grad is not None
            assert parameter.grad.eq(1).all()
        else:
            assert parameter.grad is None
    assert all(batch.equal(before) for batch, before in zip(batches, copies, strict=True))
    assert decoded.grad is not None
    torch.testing.assert_close(decoded.grad, 2 * differentiate(objective, network, *batches)[1])


@objectives
def test_without_gradients_the_loss_is_the_same_and_has_no_graph(
    objective: ObjectiveFunction,
) -> None:
    network, batches = some_network(), some_batches()
    expected, _ = differentiate(objective, network, *batches)
    assert objective(network, *batches).equal(expected)
    batches[2].requires_grad_()
    with torch.no_grad():
        loss = objective(network, *batches)
        assert not torch.is_grad_enabled()
    assert loss.equal(expected)
    assert not loss.requires_grad


@objectives
def test_the_loss_is_one_of_the_image_and_what_decoded_it(objective: ObjectiveFunction) -> None:
    network, (real, real_labels, decoded, labels) = some_network(), some_batches()
    _, gradient = differentiate(objective, network, real, real_labels, decoded, labels)
    code = (decoded / 3).requires_grad_()
    loss = objective(network, real, real_labels, 3 * code, labels)
    (of_code,) = torch.autograd.grad(loss, code)
    torch.testing.assert_close(of_code, 3 * gradient)


@objectives
@pytest.mark.parametrize("is_convnet", [True, False])
def test_weights_cast_without_a_graph_do_no_harm(
    objective: ObjectiveFunction, is_convnet: bool
) -> None:
    network = some_network().float()
    if not is_convnet:
        body = network.body
        assert isinstance(body, StagedNetwork)
        body.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    real, real_labels, decoded, labels = some_batches()
    batches = (real.float(), real_labels, decoded.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        expected = differentiate(objective, network, *batches)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            network(batches[0])
        found = differentiate(objective, network, *batches)
    assert found[0].equal(expected[0])
    assert found[1].equal(expected[1])


@objectives
def test_the_default_dtype_does_not_matter(objective: ObjectiveFunction) -> None:
    network, (real, real_labels, decoded, labels) = some_network().float(), some_batches()
    batches = (real.float(), real_labels, decoded.float(), labels)
    expected = differentiate(objective, network, *batches)
    torch.set_default_dtype(torch.float64)
    try:
        found = differentiate(objective, network, *batches)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert found[0].equal(expected[0])
    assert found[1].equal(expected[1])


@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_flags_are_restored_when_a_network_fails(name: str) -> None:
    network = build_network(name, (3, 8, 8), 3, width=4).double()
    real, labels, decoded, _ = some_batches()
    network.requires_grad_(False)
    with pytest.raises(IndexError):
        gradient_matching(network, real, labels + 99, decoded, labels[:4])
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("objective", [distribution_matching, last_block_matching])
def test_matching_means_sums_over_classes(objective: ObjectiveFunction) -> None:
    network, (real, real_labels, decoded, labels) = some_network(), some_batches(9, 7)
    together = differentiate(objective, network, real, real_labels, decoded, labels)
    total, gradient = torch.zeros((), dtype=torch.double), torch.zeros_like(decoded)
    for label in range(3):
        of_real, own = real_labels == label, labels == label
        loss, gradient[own] = differentiate(
            objective, network, real[of_real], real_labels[of_real], decoded[own], labels[own]
        )
        total += loss
    torch.testing.assert_close(together[0], total)
    torch.testing.assert_close(together[1], gradient)


@pytest.mark.parametrize("objective", [distribution_matching, last_block_matching])
def test_decoded_images_of_other_classes_than_the_real_ones_are_refused(
    objective: ObjectiveFunction,
) -> None:
    real, real_labels, decoded, labels = some_batches()
    with pytest.raises(DataError, match=r"of the real ones, \[0, 1, 2\], got \[3, 4, 5\]"):
        objective(some_network(), real, real_labels, decoded, labels + 3)


@objectives
def test_bfloat16_is_near_float32(objective: ObjectiveFunction) -> None:
    network = some_network(width=16).float()
    real, real_labels, decoded, labels = some_batches(16, 16)
    batches = (real.float(), real_labels, decoded.float(), labels)
    loss, gradient = differentiate(objective, network, *batches)
    with torch.autocast("cpu", torch.bfloat16):
        near, rough = differentiate(objective, network, *batches)
    assert rough.dtype == torch.float32
    assert float(near) == pytest.approx(float(loss), rel=0.2)
    assert float(F.cosine_similarity(rough.flatten(), gradient.flatten(), dim=0)) > 0.9


@objectives
def test_threads_with_a_network_each_do_not_disturb_each_other(
    objective: ObjectiveFunction,
) -> None:
    networks = [some_network(seed=seed) for seed in range(4)] * 4
    expected = [differentiate(objective, network, *some_batches()) for network in networks[:4]]

    def run(network: Network) -> tuple[Tensor, Tensor]:
        return differentiate(objective, copy.deepcopy(network), *some_batches())

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, networks))
    for (loss, gradient), (own_loss, own_gradient) in zip(found, expected * 4, strict=True):
        assert loss.equal(own_loss)
        assert gradient.equal(own_gradient)


def test_cosine_matching_reads_directions_alone() -> None:
    network, (real, real_labels, decoded, labels) = some_network(), some_batches()
    loss, _ = differentiate(cosine_matching, network, real, real_labels, decoded, labels)
    num_filters = 4 + 4 + 3
    assert 0 < float(loss) < 2 * num_filters
    # Shown twice, a batch has the same mean gradient; a filter that is passed over, none at all.
    twice, _ = differentiate(
        cosine_matching, network, real.repeat(2, 1, 1, 1), real_labels.repeat(2), decoded, labels
    )
    assert float(twice) == pytest.approx(float(loss), rel=1e-9)
    with torch.no_grad():
        network.get_parameter("body.head.1.weight").zero_()
    unseen, gradient = differentiate(cosine_matching, network, real, real_labels, decoded, labels)
    assert 8 <= float(unseen) <= 8 + 2 * 3
    assert gradient.isfinite().all()


def test_of_one_block_dm_takes_the_sum_and_distribution_matching_the_mean() -> None:
    network = build_network("convnet", (3, 8, 8), 3, width=4, depth=1).double()
    total, gradient = differentiate(last_block_matching, network, *some_batches())
    mean, mean_gradient = differentiate(distribution_matching, network, *some_batches())
    torch.testing.assert_close(total, 4 * 4 * 4 * mean)
    torch.testing.assert_close(gradient, 4 * 4 * 4 * mean_gradient)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_known_by_its_name(name: str) -> None:
    objective = get_objective(name)
    assert objective.loss is FUNCTIONS.get(name)
    assert objective.compares_trainings == (name == "mtt")


def test_the_table_says_what_published_loops_do() -> None:
    loops = {
        name: (o.augments, o.learns_from, o.network_augments, o.network_cutmix, o.fresh_network)
        for name in OBJECTIVES
        for o in [get_objective(name)]
        if o.learns_from != "nothing"
    }
    assert loops == {
        "gradient": (True, "real", True, True, False),
        "dc": (False, "decoded", False, False, False),
        "dsa": (True, "decoded", True, False, False),
        "distribution": (True, "real", True, True, False),
    }
    assert get_objective("dm").fresh_network


def test_another_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        ConfigError, match="gradient, dc, dsa, distribution, dm, mtt; got 'gradeint'"
    ):
        get_objective("gradeint")
    with pytest.raises(ConfigError, match="or a function; got 3"):
        get_objective(3)  # type: ignore[arg-type]


def test_a_function_is_an_objective_with_the_defaults() -> None:
    registered = get_objective("distribution")
    defaults = replace(registered, several_classes=False, matches_features=False, compiled=None)
    assert get_objective(distribution_matching) == defaults
    plain = Objective(distribution_matching, augments=False)
    assert name_of(plain) == "hmn_replay.objectives.features.distribution_matching"
    assert get_objective(plain) is plain
    network, batches = some_network(), some_batches()
    assert plain(network, *batches).equal(distribution_matching(network, *batches))


def test_an_objective_from_outside_is_condensed_with(
    make_set: Callable[..., LabelledImages],
    make_layout: Callable[..., Any],
    register_objective: Callable[[ObjectiveFunction], str],
) -> None:
    sizes = set[tuple[int, int]]()

    def match_means(
        network: nn.Module, real: Tensor, real_labels: Tensor, decoded: Tensor, labels: Tensor
    ) -> Tensor:
        sizes.add((len(real), len(decoded)))
        return (real.mean(dim=0) - decoded.mean(dim=0)).square().sum()

    name = register_objective(match_means)
    data, layout = make_set(), make_layout()
    memory = tiny(data, layout, objective=name)
    assert memory.report["objective"] == name
    assert sizes == {(2, 2), (3, 3)}  # of the trial before any work, and of steps
    OBJECTIVES.remove(name)
    with pytest.raises(ConfigError, match=r"objective must be one of gradient, .*; got 'test-0'"):
        tiny(data, layout, objective=name)
    OBJECTIVES.add(name, match_means)
    given = tiny(data, layout, objective=match_means)
    assert str(given.report["objective"]).endswith("match_means")
    assert given.decode()[0].equal(memory.decode()[0])
    plain = tiny(data, layout, objective=Objective(match_means, augments=False))
    assert not plain.decode()[0].equal(memory.decode()[0])


def test_an_objective_must_return_a_scalar_with_a_graph() -> None:
    network, batches = some_network(), some_batches()
    batches[2].requires_grad_()
    spoiled: list[tuple[Any, str]] = [
        (lambda *_: 0.5, "must return a scalar tensor; .* returned 0.5"),
        (lambda *_: batches[2], r"must return a scalar tensor; .* returned shape \(4, 3, 8, 8\)"),
        (lambda *_: batches[2].detach().sum(), "does not depend on decoded_images"),
    ]
    for function, message in spoiled:
        with pytest.raises(ConfigError, match=message):
            Objective(function)(network, *batches)
    with pytest.raises(ConfigError, match="compares whole trainings"):
        get_objective("mtt")(network, *batches)


def test_a_network_without_convolutions_is_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()
    with pytest.raises(ConfigError, match="convolution weights; Sequential has none"):
        gradient_matching(network, *some_batches())


def test_a_network_without_matrices_is_refused() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()).double()
    with pytest.raises(ConfigError, match="convolutions and linear layers; Sequential has none"):
        cosine_matching(network, *some_batches())


@pytest.mark.parametrize("objective", [distribution_matching, last_block_matching])
def test_a_network_without_features_is_refused(objective: ObjectiveFunction) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    with pytest.raises(ConfigError, match=r"needs a network with features\(images\); Sequential"):
        objective(network, *some_batches())


@objectives
def test_running_statistics_are_left_as_they_are(objective: ObjectiveFunction) -> None:
    network = build_network("vgg16", (3, 8, 8), 3).double()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    objective(network, *some_batches())
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())
    network(some_batches()[0])
    assert int(network.get_buffer("body.stages.0.1.num_batches_tracked")) == 1


def test_weights_behind_a_parametrization_are_matched() -> None:
    normed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).double()
    nn.utils.parametrizations.weight_norm(normed[0])
    batches = some_batches()
    batches[2].requires_grad_()
    loss = gradient_matching(normed, *batches)
    (gradient,) = torch.autograd.grad(loss, batches[2])
    assert bool(loss > 0) and bool(gradient.any())
    direction = normed.get_parameter("0.parametrizations.weight.original1")

    def gradients(images: Tensor, labels: Tensor) -> Tensor:
        return torch.autograd.grad(F.cross_entropy(normed(images), labels), direction)[0]

    real, decoded = gradients(*batches[:2]), gradients(*batches[2:])
    torch.testing.assert_close(loss.detach(), (real - decoded).square().sum())
