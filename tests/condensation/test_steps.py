"""Single steps of a condensation, against the same step written out, and what they draw."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hmn_replay.condensation import steps
from hmn_replay.condensation.config import CondenseConfig, make_config
from hmn_replay.condensation.rate import RateControl
from hmn_replay.data.images import LabelledImages, channel_stats
from hmn_replay.distributed import ALONE, GradientPart, Team
from hmn_replay.errors import ConfigError
from hmn_replay.memory import NUMBER_FORMATS, HierarchicalMemory, HMNLayout
from hmn_replay.objectives import Objective, gradient_matching
from hmn_replay.runtime import make_generator
from tests.support import assert_close, hmn_layout, same, values_of

MakeLayout = Callable[..., HMNLayout]
MakeSet = Callable[..., LabelledImages]
Augment = Callable[[Tensor], Tensor]

# Batches of all the images that a class has, so that a step depends on no draw.
WHOLE: dict[str, Any] = {
    "classes_per_step": None,
    "real_batch": 1000,
    "decoded_batch": 1000,
    "augmentations": (),
    "network_width": 4,
    "precision": "float32",
}

both_objectives = pytest.mark.parametrize("objective", ["gradient", "distribution"])

pytestmark = pytest.mark.usefixtures("untouched_random_state")


class Scene:
    """A memory, real images, a network that matches them, and an optimizer that stands still."""

    def __init__(
        self, data: LabelledImages, layout: HMNLayout, counts: list[int], **options: Any
    ) -> None:
        self.config: CondenseConfig = make_config(**{**WHOLE, **options})
        self.data = data
        self.real = steps.RealImages.of(data)
        self.memory = HierarchicalMemory(layout, data.classes, counts, seed=3)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.memory.parameters(), lr=0.0)
        self.network, self.learner = steps.fresh_network(self.context(), 5)

    def context(self, team: Team = ALONE, **fields: Any) -> steps.StepContext:
        """Return what the steps share."""
        memory, optimizer = self.memory, self.optimizer
        return steps.StepContext(memory, self.real, self.config, optimizer, team=team, **fields)

    def warm(self, indices: Tensor, wanted: Tensor, team: Team = ALONE) -> None:
        steps.warm_start_step(self.context(team), indices, wanted)

    def match(self, seed: int = 0, team: Team = ALONE) -> int:
        sources = steps.warm_start_targets(self.memory, steps.drawn_orders(self.real, 0))
        context = self.context(team, sources=sources if self.config.fidelity else None)
        return steps.match_step(context, self.network, make_generator(seed))

    def train(self, seed: int = 0, team: Team = ALONE) -> None:
        steps.train_step(self.context(team), self.network, self.learner, make_generator(seed))

    def learn(self, rate: float = 0.01) -> None:
        """Let the memory move from now on."""
        self.optimizer = steps.make_optimizer(self.memory, (0.5, 0.99))
        steps.set_lr(self.optimizer, rate)


@pytest.fixture
def make_scene(make_set: MakeSet, make_layout: MakeLayout) -> Callable[..., Scene]:
    """Return a function that makes a scene of three classes with labels 4, 9 and -2."""

    def make(
        number_format: str = "float32",
        counts: tuple[int, ...] = (3, 2, 4),
        num_images: int = 16,
        **options: Any,
    ) -> Scene:
        data = make_set(num_images=num_images, labels=(4, 9, -2))
        return Scene(data, make_layout(number_format), list(counts), **options)

    return make


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=3), least=st.integers(1, 50))
def test_batches_by_order_are_of_the_first_images_of_a_class(counts: list[int], least: int) -> None:
    layout = hmn_layout((3, 8, 8), "float32")
    labels = torch.arange(len(counts)).repeat_interleave(2)
    data = LabelledImages(torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8), labels)
    scene = Scene(data, layout, counts)
    numbers: set[int] = set()
    for seed in range(20):
        drawn = steps._draw_matches(scene.context(least_images=least), make_generator(seed))
        assert len(drawn) == len(counts)
        for match in drawn:
            start, most = sum(counts[: match.label]), counts[match.label]
            own = (match.decoded - start).sort().values.tolist()
            assert own == list(range(len(own)))
            assert min(least, most) <= len(own) <= most
            numbers.add(len(own))
    if max(counts) > 4 * least:
        assert len(numbers) > 2


def gradients_of(memory: nn.Module) -> list[Tensor]:
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in memory.parameters()]


def matching_gradients(
    scene: Scene, dtype: torch.dtype, augment: Augment = lambda images: images
) -> list[Tensor]:
    """Return the gradients of the loss of all classes, through one graph from end to end."""
    memory = copy.deepcopy(scene.memory).to(dtype)
    loss = matching_distance(scene, dtype, augment, memory)
    gradients = torch.autograd.grad(loss, list(memory.parameters()), allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(memory.parameters(), gradients, strict=True)
    ]


def matching_distance(
    scene: Scene,
    dtype: torch.dtype,
    augment: Augment = lambda images: images,
    memory: HierarchicalMemory | None = None,
) -> Tensor:
    """Return the loss of all classes, with a graph to the memory, a copy where none is given."""
    memory = copy.deepcopy(scene.memory).to(dtype) if memory is None else memory
    network = copy.deepcopy(scene.network).to(dtype)
    kernels = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d)]

    def described(images: Tensor, index: int) -> list[Tensor]:
        if scene.config.objective == "distribution":
            return [stage.mean(dim=0) for stage in network.features(images)]
        loss = -F.log_softmax(network(images), dim=1)[:, index].mean()
        return list(torch.autograd.grad(loss, kernels, create_graph=True))

    losses = []
    for index, label in enumerate(memory.classes.tolist()):
        own = [i for i in range(memory.num_images) if int(memory.labels[i]) == label]
        if not own:
            continue
        decoded = torch.cat([memory(torch.tensor([i])) for i in own])
        real = scene.data.images[scene.data.labels == label].to(dtype) / 255
        for a, b in zip(
            described(augment(decoded), index), described(augment(real), index), strict=True
        ):
            squares = (a - b.detach()).square()
            losses.append(
                squares.mean() if scene.config.objective == "distribution" else squares.sum()
            )
    return sum(losses, torch.zeros(()))


# Real images.


def test_real_images_are_sorted_by_class(make_set: MakeSet) -> None:
    data = make_set(num_images=11, labels=(4, 9, -2))
    real = steps.RealImages.of(data)
    assert [data.labels[members].tolist() for members in real.members] == [
        [-2] * 3,
        [4] * 4,
        [9] * 4,
    ]
    assert torch.cat(real.members).sort().values.tolist() == list(range(11))
    assert data.classes[real.class_indices].equal(data.labels)
    mean, std = channel_stats(data.images)
    assert real.mean.equal(mean)
    assert real.std.equal(std)


# The optimizer.


def test_the_optimizer_has_every_parameter_once(make_scene: Callable[..., Scene]) -> None:
    memory = make_scene().memory
    optimizer = steps.make_optimizer(memory, (0.5, 0.99))
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, memory.parameters()))
    assert all(group["betas"] == (0.5, 0.99) for group in optimizer.param_groups)


@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
def test_the_tensors_learn_at_the_rates_that_the_memory_declares(
    make_scene: Callable[..., Scene], number_format: str
) -> None:
    memory = make_scene(number_format).memory
    optimizer = steps.make_optimizer(memory, (0.9, 0.99))
    for rate in (0.01, 0.25, 0.0):
        steps.set_lr(optimizer, rate)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, tensor in memory.tensors.items():
            assert rates[id(memory.get_parameter(name))] == pytest.approx(rate * tensor.rate)


# The warm start.


def test_each_image_starts_from_one_of_its_class(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(counts=(3, 5, 4))
    orders = [steps.drawn_orders(scene.real, seed) for seed in (1, 1, 2)]
    targets, same, other = (steps.warm_start_targets(scene.memory, each) for each in orders)
    assert targets.dtype == torch.int64
    assert scene.data.labels[targets].equal(scene.memory.labels)
    assert len(targets.unique()) == 12  # no real image twice
    assert targets.equal(same)
    assert not targets.equal(other)


def test_a_class_of_few_images_takes_them_in_turn(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(num_images=8, counts=(5, 0, 7))  # 2, 3 and 3 real images
    orders = steps.drawn_orders(scene.real, seed=0)
    targets = steps.warm_start_targets(scene.memory, orders).tolist()
    few, many = targets[:5], targets[5:]
    assert few == [few[0], few[1]] * 2 + [few[0]]
    assert sorted(set(few)) == scene.real.members[0].tolist()
    assert many == many[:3] * 2 + many[:1]
    assert sorted(set(many)) == scene.real.members[2].tolist()


@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
def test_a_warm_start_step_follows_the_gradient_of_the_squared_error(
    make_scene: Callable[..., Scene], number_format: str
) -> None:
    scene = make_scene(number_format)
    indices = torch.tensor([7, 0, 3])
    wanted = scene.data.floats(torch.tensor([2, 5, 1]))
    memory = copy.deepcopy(scene.memory)
    total = torch.zeros(())
    for i, image in zip(indices, wanted, strict=True):
        total = total + (memory(i[None])[0] - image).square().mean() / 3
    total.backward()
    scene.warm(indices, wanted)
    assert_close(gradients_of(scene.memory), gradients_of(memory))


def test_a_warm_start_step_of_large_images_is_taken_in_parts(make_set: MakeSet) -> None:
    shape = (1, 224, 224)
    scene, sizes = Scene(make_set(6, shape), hmn_layout(shape), [12, 0, 0]), list[int]()
    scene.memory.register_forward_hook(lambda _, __, out: sizes.append(len(out)))
    indices, wanted = torch.arange(12), scene.data.floats(torch.arange(12) % 6)
    scene.warm(indices, wanted)
    assert sizes == [10, 2]
    loss = F.mse_loss(scene.memory(indices), wanted)
    expected = torch.autograd.grad(loss, list(scene.memory.parameters()), allow_unused=True)
    assert_close(gradients_of(scene.memory), [g for g in expected if g is not None])


def test_warm_start_steps_bring_the_images_near(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene("int8")
    scene.learn()
    wanted = scene.data.floats(torch.arange(9))

    def error() -> float:
        return float((scene.memory.decode()[0] - wanted).square().mean())

    before = error()
    for _ in range(60):
        scene.warm(torch.arange(9), wanted)
    assert error() < 0.5 * before


# Matching.


@both_objectives
@pytest.mark.parametrize(
    ("number_format", "dtype"),
    [("float32", torch.float32), ("float32", torch.float64), ("int8", torch.float32)],
    ids=["float32", "float64", "int8"],
)
def test_the_gradient_of_a_step_is_that_of_the_loss_of_all_classes(
    make_scene: Callable[..., Scene],
    number_format: str,
    dtype: torch.dtype,
    objective: str,
) -> None:
    scene = make_scene(number_format, objective=objective)
    assert scene.match() == 9
    expected = matching_gradients(scene, dtype)
    assert all(float(gradient.abs().max()) > 0 for gradient in expected)
    assert_close(gradients_of(scene.memory), expected)


def test_a_network_that_normalises_by_the_batch_sees_one_class_at_a_time(
    make_scene: Callable[..., Scene],
) -> None:
    found = []
    for decoded_batch in (1000, 10**6):  # all classes in a group, and one
        scene = make_scene(
            counts=(16, 12, 14),
            num_images=48,
            network="resnet18",
            decoded_batch=decoded_batch,
        )
        scene.match()
        found.append(gradients_of(scene.memory))
    assert any(bool(gradient.any()) for gradient in found[0])
    assert_close(*found)


@both_objectives
@pytest.mark.parametrize("decoded_batch", [1000, 10**6])  # all classes at once, and one by one
def test_with_fidelity_the_gradient_is_that_of_both_logarithms(
    make_scene: Callable[..., Scene], objective: str, decoded_batch: int
) -> None:
    scene = make_scene(objective=objective, fidelity=0.7, decoded_batch=decoded_batch)
    scene.match()
    memory = scene.memory
    sources = steps.warm_start_targets(memory, steps.drawn_orders(scene.real, 0))
    distance = matching_distance(scene, torch.float32).detach()
    error = F.mse_loss(memory(torch.arange(9)), scene.data.floats(sources))
    of_error = torch.autograd.grad(distance * 0.7 * error.log(), list(memory.parameters()))
    of_distance = matching_gradients(scene, torch.float32)
    expected = [one + other for one, other in zip(of_distance, of_error, strict=True)]
    assert_close(gradients_of(memory), expected)


def test_with_fidelity_images_that_are_their_sources_have_small_gradients(
    make_scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = [make_scene(fidelity=fidelity) for fidelity in (0.0, 1000.0)]
    for scene in scenes:
        monkeypatch.setattr(steps.StepContext, "offsets", lambda *given: 1e-8 * given[2].detach())
        scene.match()
    without, with_it = (gradients_of(scene.memory) for scene in scenes)
    for one, other in zip(without, with_it, strict=True):
        assert bool(other.isfinite().all())
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.1 * float(one.abs().max()) + 1e-12)


def test_real_images_of_several_classes_are_shown_in_bounded_groups(
    make_scene: Callable[..., Scene],
) -> None:
    found, shown = [], list[int]()
    for real_batch in (16, 10**6):  # of those that there are
        scene = make_scene(objective="distribution", decoded_batch=9, real_batch=real_batch)
        first = next(m for m in scene.network.modules() if isinstance(m, nn.Conv2d))
        first.register_forward_pre_hook(lambda _, given: shown.append(len(given[0])))
        scene.match()
        found.append((max(shown), gradients_of(scene.memory)))
        shown.clear()
    (together, once), (apart, one_by_one) = found
    assert (together, apart) == (16, 6)
    assert_close(once, one_by_one)


@pytest.mark.parametrize("first_class", [0, 1])
def test_with_fidelity_images_that_match_nothing_come_nearer_to_their_sources(
    make_scene: Callable[..., Scene], first_class: int
) -> None:
    def objective(_: Any, __: Any, ___: Any, own: Tensor, ____: Any) -> Tensor:
        return 1 + 0 * own.sum()

    scene = make_scene(objective=objective, fidelity=1.0)
    scene.learn()
    num_old = sum(scene.memory.images_per_class[:first_class])
    orders = steps.drawn_orders(scene.real, 0, first_class)
    sources = steps.warm_start_targets(scene.memory, orders, first_class)
    context = scene.context(sources=sources, first_class=first_class)

    def error() -> float:
        decoded = scene.memory.decode()[0][num_old:]
        return float(F.mse_loss(decoded, scene.data.floats(sources)))

    before = error()
    for seed in range(5):
        steps.match_step(context, scene.network, make_generator(seed))
    assert error() < 0.8 * before


def nearest(images: Tensor, known: Tensor) -> Tensor:
    """Return which of the known images each one is, to float error."""
    distances, found = torch.cdist(images.flatten(1), known.flatten(1)).min(dim=1)
    assert float(distances.max()) < 1e-2
    return found


def test_both_batches_are_augmented_alike_and_the_gradient_goes_through_it(
    make_scene: Callable[..., Scene],
) -> None:
    ramp = torch.arange(192.0).view(3, 8, 8) / 192
    flips = list[bool]()

    def flipped(images: Tensor, known: Tensor) -> bool:
        is_plain = float(torch.cdist(images.flatten(1), known.flatten(1)).amin(dim=1).max()) < 1e-2
        nearest(images, known if is_plain else known.flip(3))
        return not is_plain

    def objective(_: Any, real: Tensor, labels: Tensor, own: Tensor, __: Tensor) -> Tensor:
        members = scene.real.members[int(labels[0])]
        flips.append(flipped(own.detach(), decoded))
        assert flips[-1] == flipped(real, scene.data.floats(members))
        return (own * ramp).sum()

    for seed in range(4):
        scene = make_scene(objective=objective, augmentations=("flip",))
        decoded = scene.memory.decode()[0]
        flips_before = len(flips)
        scene.match(seed)
        # Classes are drawn in a random order; their gradient is that of a ramp, flipped or not.
        wanted = torch.zeros(())
        generator = make_generator(seed)
        order = torch.randperm(3, generator=generator).tolist()
        for label, flip in zip(order, flips[flips_before:], strict=True):
            own = (scene.memory.class_index == label).nonzero().flatten()
            wanted = wanted + (scene.memory(own) * (ramp.flip(2) if flip else ramp)).sum()
        expected = torch.autograd.grad(wanted, list(scene.memory.parameters()))
        assert_close(gradients_of(scene.memory), list(expected))
    assert set(flips) == {False, True}


def test_an_objective_of_trainings_has_no_batches_to_match(
    make_scene: Callable[..., Scene],
) -> None:
    with pytest.raises(ConfigError, match="objective 'mtt' compares trainings, not batches"):
        make_scene(objective="mtt").match()


def test_gradients_do_not_add_up_over_the_steps(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    indices, wanted = torch.arange(4), scene.data.floats(torch.arange(4))
    for _ in range(2):
        scene.warm(indices, wanted)
    expected = F.mse_loss(scene.memory(indices), wanted)
    assert_close(
        [g for g in gradients_of(scene.memory) if g.any()],
        [g for g in torch.autograd.grad(expected, list(scene.memory.parameters())) if g.any()],
    )
    for seed in (0, 1):
        scene.match(seed)
    assert_close(gradients_of(scene.memory), matching_gradients(scene, torch.float64))


@both_objectives
def test_grouping_of_classes_changes_nothing_but_the_last_bits(
    make_scene: Callable[..., Scene], objective: str
) -> None:
    decoded, gradients = list[list[int]](), list[list[Tensor]]()
    for decoded_batch in (1000, 2048, 10**6):  # all classes at once, two, one
        scene, sizes = make_scene(objective=objective, decoded_batch=decoded_batch), list[int]()
        scene.memory.register_forward_hook(lambda _, __, out, sizes=sizes: sizes.append(len(out)))
        assert scene.match() == 9
        decoded.append(sizes)
        gradients.append(gradients_of(scene.memory))
    assert [len(sizes) for sizes in decoded] == [1, 2, 3]
    assert [sum(sizes) for sizes in decoded] == [9, 9, 9]
    assert_close(gradients[1], gradients[0])
    assert_close(gradients[2], gradients[0])


def test_batches_are_of_the_sizes_asked_for_and_of_one_class_each(
    make_scene: Callable[..., Scene],
) -> None:
    seen: list[tuple[int, int, int]] = []

    def objective(
        network: nn.Module, real: Tensor, real_labels: Tensor, own: Tensor, own_labels: Tensor
    ) -> Tensor:
        assert torch.cat([real_labels, own_labels]).unique().numel() == 1
        label = scene.data.classes[own_labels[0]]
        nearest(real, scene.data.floats(scene.data.of_class(int(label))))
        seen.append((int(own_labels[0]), len(real), len(own)))
        return gradient_matching(network, real, real_labels, own, own_labels)

    options: dict[str, Any] = {"classes_per_step": 2, "real_batch": 4, "decoded_batch": 3}
    scene = make_scene(objective=objective, counts=(5, 2, 9), **options)
    classes = set[int]()
    for seed in range(8):
        seen.clear()
        assert scene.match(seed) == sum(num_decoded for _, _, num_decoded in seen)
        assert len({index for index, _, _ in seen}) == 2
        classes.update(index for index, _, _ in seen)
        for index, num_real, num_decoded in seen:
            assert num_real == 4
            assert num_decoded == (3, 2, 3)[index]
    assert classes == {0, 1, 2}


@both_objectives
def test_classes_without_images_are_passed_over(
    make_scene: Callable[..., Scene], objective: str
) -> None:
    scene = make_scene(counts=(3, 0, 4), objective=objective)
    assert scene.match() == 7
    assert_close(gradients_of(scene.memory), matching_gradients(scene, torch.float64))
    scene.learn()
    before = copy.deepcopy(scene.memory)
    scene.match()
    for name in ("class_memory", "extractor_weight", "extractor_bias"):
        moved = (scene.memory.get_parameter(name) != before.get_parameter(name)).flatten(1).any(1)
        assert moved.tolist() == [True, False, True], name


@pytest.mark.parametrize("number_format", ["int8", "entropy"])
def test_a_step_that_draws_no_class_with_images_moves_nothing(
    make_scene: Callable[..., Scene], number_format: str
) -> None:
    scene = make_scene(number_format, counts=(0, 3, 0), classes_per_step=1)
    scene.learn()
    coded = scene.memory.layout.is_coded
    control = RateControl(scene.memory, code_bytes=999, kept_images=3) if coded else None
    before, numbers = values_of(scene.memory), list[int]()
    for seed in range(8):
        context = scene.context(rate_control=control)
        numbers.append(steps.match_step(context, scene.network, make_generator(seed)))
        assert same(values_of(scene.memory), before) == (numbers[-1] == 0)
        before = values_of(scene.memory)
    assert set(numbers) == {0, 3}


def test_the_same_generator_makes_the_same_step(make_scene: Callable[..., Scene]) -> None:
    options: dict[str, Any] = {
        "classes_per_step": 2,
        "real_batch": 2,
        "decoded_batch": 2,
        "augmentations": ("color", "crop", "cutout"),
    }
    memories = []
    for seed in (7, 7, 8):
        scene = make_scene("int8", **options)
        scene.learn()
        scene.match(seed)
        memories.append(values_of(scene.memory))
    assert same(memories[0], memories[1])
    assert not same(memories[0], memories[2])


def test_a_step_leaves_the_network_and_what_is_not_in_it_alone(
    make_scene: Callable[..., Scene],
) -> None:
    scene = make_scene("int8")
    scene.learn()
    scene.network.eval()
    scene.network.requires_grad_(False)
    network, images = values_of(scene.network), scene.data.images.clone()
    memory = values_of(scene.memory)
    scene.match()
    assert not same(values_of(scene.memory), memory)
    assert same(values_of(scene.network), network)
    assert scene.data.images.equal(images)
    assert not scene.network.training
    assert all(p.grad is None and not p.requires_grad for p in scene.network.parameters())


def test_scales_follow_the_values(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene("int8")
    scene.learn(rate=1.0)
    scene.match()
    matched = values_of(scene.memory)
    scene.memory.update_scales()
    assert same(values_of(scene.memory), matched)
    wanted = scene.data.floats(torch.arange(9))
    scene.warm(torch.arange(9), wanted)
    fitted = values_of(scene.memory)
    assert not same(fitted, matched)
    scene.memory.update_scales()
    assert same(values_of(scene.memory), fitted)


@both_objectives
def test_in_bfloat16_the_gradient_points_the_same_way(
    make_scene: Callable[..., Scene], objective: str
) -> None:
    gradients = []
    for precision in ("float32", "bfloat16"):
        scene = make_scene(objective=objective, precision=precision, network_width=16)
        scene.match()
        gradient = torch.cat([g.flatten() for g in gradients_of(scene.memory)])
        assert gradient.dtype == torch.float32
        gradients.append(gradient)
    exact, rounded = gradients
    assert not exact.equal(rounded)
    assert float(F.cosine_similarity(exact, rounded, dim=0)) > 0.95


# The networks.


def test_a_fresh_network_is_what_the_settings_say(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(network_width=6, network_learning_rate=0.03)
    network, learner = steps.fresh_network(scene.context(), 1)
    assert network.mean.flatten().equal(scene.real.mean)
    assert network.std.flatten().equal(scene.real.std)
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    assert network.features(torch.zeros(1, 3, 8, 8))[0].shape[1] == 6
    (group,) = learner.param_groups
    assert sorted(map(id, group["params"])) == sorted(map(id, network.parameters()))
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.03, 0.9, 5e-4)
    again, _ = steps.fresh_network(scene.context(), 1)
    other, _ = steps.fresh_network(scene.context(), 2)
    assert same(values_of(again), values_of(network))
    assert not same(values_of(other), values_of(network))


def test_a_training_step_changes_the_network_and_nothing_else(
    make_scene: Callable[..., Scene],
) -> None:
    networks = []
    for seed in (1, 1, 2):
        scene = make_scene(network_images=8, augmentations=("color", "crop", "cutout"))
        network, memory = values_of(scene.network), values_of(scene.memory)
        images = scene.data.images.clone()
        scene.train(seed)
        assert not same(values_of(scene.network), network)
        assert all(bool(value.isfinite().all()) for value in values_of(scene.network))
        assert same(values_of(scene.memory), memory)
        assert scene.data.images.equal(images)
        assert all(p.grad is None for p in scene.memory.parameters())
        networks.append(values_of(scene.network))
    assert same(networks[0], networks[1])
    assert not same(networks[0], networks[2])


def test_a_training_step_is_sgd_on_real_images(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(network_images=6, network_batch=4, network_cutmix_probability=0.0)
    network, data = copy.deepcopy(scene.network), scene.data
    parameters = list(network.parameters())
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    for chosen in torch.randint(16, (6,), generator=make_generator(4)).split(4):
        labels = torch.searchsorted(data.classes, data.labels[chosen])
        loss = F.cross_entropy(network(data.images[chosen] / 255), labels)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient, v in zip(parameters, gradients, velocity, strict=True):
                v.mul_(0.9).add_(gradient + 5e-4 * parameter)
                parameter.sub_(0.01 * v)
    scene.train(4)
    for actual, expected in zip(scene.network.parameters(), parameters, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def seen_by(network: nn.Module) -> list[Tensor]:
    """Collect the batches that a network is shown from now on."""
    batches = list[Tensor]()
    network.register_forward_pre_hook(lambda _, args: batches.append(args[0].detach().clone()))
    return batches


def test_a_training_step_goes_by_batches(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(network_images=11, network_batch=4)
    batches = seen_by(scene.network)
    scene.train()
    assert [len(batch) for batch in batches] == [4, 4, 3]


def test_training_steps_teach_the_network_the_classes(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(num_images=60, network_images=32, network_batch=16, network_width=8)
    for step in range(25):
        scene.train(step)
    data = scene.data
    with torch.no_grad():
        answers = scene.network(data.floats()).argmax(dim=1)
    assert float((data.classes[answers] == data.labels).float().mean()) > 0.9


@both_objectives
def test_a_lone_image_is_enough_for_batch_normalisation(
    objective: str, make_layout: MakeLayout, make_set: MakeSet
) -> None:
    scene = Scene(
        make_set(3),
        make_layout(),
        [1, 1, 1],
        network="vgg16",
        objective=objective,
        real_batch=1,
        network_images=3,
        network_batch=2,
    )
    assert scene.match() == 3
    scene.train()
    gradient = scene.memory.instance_memory.grad
    assert gradient is not None
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("learns_from", ["real", "decoded", "nothing"])
def test_the_network_learns_from_what_the_objective_says(
    make_scene: Callable[..., Scene], learns_from: Any
) -> None:
    objective = Objective(gradient_matching, learns_from=learns_from)
    options = {"network_images": 6, "network_batch": 6, "network_cutmix_probability": 0.0}
    scene = make_scene(objective=objective, **options)
    batches = seen_by(scene.network)
    scene.train(0)
    assert len(batches) == (learns_from != "nothing")
    for batch in batches:
        nearest(batch, scene.data.floats() if learns_from == "real" else scene.memory.decode()[0])


@pytest.mark.parametrize(("augments", "mixes"), [(True, False), (False, True), (False, False)])
def test_its_batches_are_augmented_and_mixed_as_the_objective_says(
    make_scene: Callable[..., Scene], augments: bool, mixes: bool
) -> None:
    objective = Objective(gradient_matching, network_augments=augments, network_cutmix=mixes)
    options = {"network_images": 30, "network_batch": 6, "network_cutmix_probability": 1.0}
    scene = make_scene(objective=objective, augmentations=("color",), **options)
    batches = seen_by(scene.network)
    scene.train(0)
    distances = torch.cdist(torch.cat(batches).flatten(1), scene.data.floats().flatten(1))
    assert bool((distances.amin(dim=1) > 1e-2).any()) == (augments or mixes)


@pytest.mark.parametrize(
    ("objective", "augments", "mixes"),
    [("gradient", True, True), ("dsa", True, False), ("dc", False, False)],
)
def test_the_network_is_trained_as_the_objectives_paper_does(
    make_scene: Callable[..., Scene], objective: str, augments: bool, mixes: bool
) -> None:
    def trained(names: tuple[str, ...], probability: float) -> list[Tensor]:
        scene = make_scene(
            objective=objective,
            augmentations=names,
            network_cutmix_probability=probability,
            network_images=6,
            network_batch=6,
        )
        scene.train(0)
        return values_of(scene.network)

    plain = trained((), 0.0)
    assert same(trained(("color", "crop"), 0.0), plain) == (not augments)
    assert same(trained((), 1.0), plain) == (not mixes)


class Member(Team):
    """A process of several that keeps its share of the gradients to itself."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.summed: list[dict[int, Any]] = []

    def sum_gradients(self, parts: Iterable[GradientPart]) -> None:
        self.summed.append({id(parameter): rows for parameter, rows in parts})


@pytest.mark.parametrize("size", [2, 5])
def test_the_shares_of_a_step_add_up_to_the_step(
    make_scene: Callable[..., Scene], size: int
) -> None:
    options: dict[str, Any] = {
        "classes_per_step": 2,
        "real_batch": 3,
        "decoded_batch": 2,
        "augmentations": ("color", "crop", "cutout"),
        "network_images": 7,
        "network_batch": 7,
    }

    def gradients(kind: str, team: Team) -> list[Tensor]:
        scene = make_scene("int8", **options)
        owner: nn.Module = scene.network if kind == "train" else scene.memory
        if kind == "warm start":
            indices, wanted = torch.arange(7), scene.data.floats(torch.arange(7))
            scene.warm(indices, wanted, team)
        elif kind == "match":
            assert scene.match(team=team) == 4
        else:
            scene.train(team=team)
        if isinstance(team, Member):
            (rows,) = team.summed
            assert list(rows) == [id(parameter) for parameter in owner.parameters()]
            if kind == "match":
                # Of classes and images, those that were drawn by all; what is shared, whole.
                memory = scene.memory
                assert len(rows[id(memory.instance_memory)]) == 4
                assert len(rows[id(memory.class_memory)]) == 2
                assert rows[id(memory.dataset_memory)] is ...
        return gradients_of(owner)

    for kind in ("warm start", "match", "train"):
        shares = [gradients(kind, Member(rank, size)) for rank in range(size)]
        whole = gradients(kind, ALONE)
        assert_close([sum(parts, torch.zeros(())) for parts in zip(*shares, strict=True)], whole)


@pytest.mark.parametrize("augments", [True, False])
def test_both_batches_are_augmented_unless_the_objective_says_not(
    make_scene: Callable[..., Scene], augments: bool
) -> None:
    shifts = list[float]()

    def loss(_: Any, real: Tensor, labels: Tensor, own: Tensor, __: Tensor) -> Tensor:
        known = scene.data.floats(scene.real.members[int(labels[0])])
        shifts.append(float(torch.cdist(real.flatten(1), known.flatten(1)).amin(dim=1).max()))
        return own.square().mean()

    scene = make_scene(objective=Objective(loss, augments=augments), augmentations=("color",))
    scene.match()
    assert all((shift > 1e-2) == augments for shift in shifts)
    assert len(shifts) == 3
