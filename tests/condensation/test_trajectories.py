"""Students that follow experts: a step against the same step in one graph, and whole runs."""

from __future__ import annotations

import copy
import itertools
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from hmn_replay.condensation.condense import condense
from hmn_replay.condensation.config import make_config
from hmn_replay.condensation.matchers import TrajectoryMatcher
from hmn_replay.condensation.steps import (
    RealImages,
    StepContext,
    drawn_orders,
    make_optimizer,
    set_lr,
    trajectory_step,
    warm_start_targets,
)
from hmn_replay.data.augment import STRATEGIES
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import ExpertError, TrainingError
from hmn_replay.memory import HierarchicalMemory, HMNLayout, LearnedMemory
from hmn_replay.objectives.trajectories import Experts, trajectory_matching
from hmn_replay.runtime import make_generator
from hmn_replay.training.train import TrainingConfig, make_network
from tests.support import (
    LAYOUTS,
    LEARNED,
    TINY,
    TINY_MTT,
    Observer,
    assert_close,
    at_call,
    hmn_layout,
    learned_type,
    room_for,
    same,
    tiny,
    values_of,
)

MakeLayout = Callable[..., HMNLayout]
MakeSet = Callable[..., LabelledImages]

every_kind = pytest.mark.parametrize("kind", LEARNED)

pytestmark = pytest.mark.usefixtures("untouched_random_state")


def memory_of(kind: str, classes: Tensor, image_shape: tuple[int, int, int]) -> LearnedMemory:
    """Return a memory of two images a class, or one group of them."""
    layout = LAYOUTS[kind](image_shape, "float32")
    return learned_type(kind)(layout, classes, max(2, layout.group_size), seed=3)


class Scene:
    """A memory of 6 images of labels 4, 9 and -2, an expert, and an optimizer that stands still."""

    def __init__(
        self, data: LabelledImages, memory: LearnedMemory, precision: str, **options: Any
    ) -> None:
        options = {"student_steps": 3, "student_batch": 4, "augmentations": (), **options}
        self.config = make_config(objective="mtt", precision=precision, **options)
        self.real, self.memory = RealImages.of(data), memory
        self.sources = warm_start_targets(memory, drawn_orders(self.real, 0))
        self.network = make_network(data.images, 3, TrainingConfig(width=4))
        self.seen: list[Tensor] = []  # the batches that the student is shown, there and back
        self.network.register_forward_pre_hook(
            lambda _, args: self.seen.append(args[0].detach().clone())
        )
        generator = torch.Generator().manual_seed(5)
        self.start = {
            name: value.detach() + 0.1 * torch.randn(value.shape, generator=generator)
            for name, value in self.network.named_parameters()
        }
        self.target = {
            name: value + 0.02 * torch.randn(value.shape, generator=generator)
            for name, value in self.start.items()
        }
        self.rate = torch.tensor(0.2)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(memory.parameters(), lr=0.0)

    def follow(self, seed: int = 0, first_class: int = 0) -> tuple[int, Tensor]:
        self.seen.clear()
        context = StepContext(
            self.memory,
            self.real,
            self.config,
            self.optimizer,
            first_class,
            sources=self.sources if self.config.fidelity else None,
        )
        generator = make_generator(seed)
        return trajectory_step(context, self.network, self.start, self.target, self.rate, generator)

    def shown(self) -> list[list[int]]:
        """Return which images the student was shown in each of its steps."""
        known = self.memory.decode()[0].flatten(1)
        batches = self.seen[: self.config.student_steps]
        return [torch.cdist(b.flatten(1), known).argmin(dim=1).tolist() for b in batches]

    def loss(self) -> float:
        """Return how far a student ends from its target that is shown all images in each step."""
        images, labels = self.memory.decode()[0], self.memory.class_index
        batches = [torch.arange(len(images))] * self.config.student_steps
        loss = trajectory_matching(
            self.network, self.start, self.target, images, labels, batches, self.rate
        )
        return float(loss.detach())

    def learn(self, rate: float = 0.01) -> None:
        """Let the memory move from now on."""
        self.optimizer = make_optimizer(self.memory, (0.5, 0.99))
        set_lr(self.optimizer, rate)

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.memory.parameters() if p.grad is not None]


@pytest.fixture
def make_scene(make_set: MakeSet) -> Callable[..., Scene]:
    """Return a function that makes a scene; memory kind and settings may be given."""

    def make(kind: str = "hmn", precision: str = "float32", **options: Any) -> Scene:
        data = make_set(num_images=16, labels=(4, 9, -2))
        memory = memory_of(kind, data.classes, data.image_shape)
        return Scene(data, memory, precision, **options)

    return make


# A step.


@every_kind
@pytest.mark.parametrize("fidelity", [0.0, 0.7])
def test_the_gradient_of_a_step_is_that_of_the_whole_training(
    make_scene: Callable[..., Scene], kind: str, fidelity: float
) -> None:
    # Of all images, so that it depends on no draw.
    scene = make_scene(kind, student_batch=1000, fidelity=fidelity)
    memory, network = copy.deepcopy(scene.memory).double(), copy.deepcopy(scene.network).double()
    rate = scene.rate.double().requires_grad_()
    start = {name: value.double() for name, value in scene.start.items()}
    parameters = {name: value.clone().requires_grad_() for name, value in start.items()}
    images = torch.cat([memory(torch.tensor([i])) for i in range(memory.num_images)])
    for _ in range(3):
        logits = functional_call(network, parameters, (images,))
        loss = -logits.log_softmax(dim=1)[torch.arange(len(images)), memory.class_index].mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        parameters = {
            name: value - rate * gradient
            for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
        }
    missed, moved = (
        torch.stack([((v - scene.target[name]) ** 2).sum() for name, v in values.items()]).sum()
        for values in (parameters, start)
    )
    distance = missed / moved
    error = (images - scene.real.data.floats(scene.sources)).square().mean()
    (of_rate,) = torch.autograd.grad(distance, rate, retain_graph=True)
    loss = distance + distance.detach() * fidelity * error.log()
    expected = torch.autograd.grad(loss, list(memory.parameters()))

    num_seen, found = scene.follow()
    assert num_seen == 3 * scene.memory.num_images
    assert_close([*scene.gradients(), found], [*expected, of_rate])


def test_batches_go_through_all_images_before_any_comes_again(
    make_scene: Callable[..., Scene],
) -> None:
    scene, orders = make_scene(student_steps=5), list[Any]()
    for seed in range(4):
        assert scene.follow(seed)[0] == 5 * 3
        shown = scene.shown()
        # Of 6 images, batches of at most 4 are of 3.
        assert [len(batch) for batch in shown] == [3] * 5
        for one, two in zip(shown[0::2], shown[1::2], strict=False):
            assert sorted(one + two) == list(range(6))
        orders.append(shown)
    assert orders[0] != orders[1] or orders[1] != orders[2]


def test_batches_are_of_classes_that_are_condensed(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    scene.follow(first_class=1)
    assert set(itertools.chain(*scene.shown())) == {2, 3, 4, 5}
    scene.learn()
    before = scene.memory.decode()[0]
    scene.memory.freeze_shared()
    scene.follow(first_class=1)
    moved = (scene.memory.decode()[0] != before).flatten(1).any(dim=1)
    assert moved.tolist() == [False] * 2 + [True] * 4


def test_each_image_is_augmented_by_a_draw_of_its_own(make_scene: Callable[..., Scene]) -> None:
    plain, scene = make_scene(student_batch=1000), make_scene(student_batch=1000)
    scene.config = scene.config.replace(augmentations=("cutout",))
    plain.follow()
    scene.follow()
    holes = set()
    for step in range(3):
        # Of the same draw of an order; what is cut out is set to the mean of the data.
        mean = scene.real.mean.view(-1, 1, 1)
        cut = (scene.seen[step] - mean).abs().amax(dim=1) < 1e-6
        assert bool(cut.flatten(1).any(dim=1).all())
        holes |= {hole.numpy().tobytes() for hole in cut}
    assert len(holes) > 6  # of 18 images that were shown


def test_a_batch_is_moved_as_an_experts_is(
    make_scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, drawn = make_scene(student_steps=40), list[set[str]]()

    usual = StepContext.draw_augmentation

    def note(*args: Any, **options: Any) -> Any:
        augmentation = usual(*args, **options)
        drawn.append(set(augmentation.names))
        return augmentation

    monkeypatch.setattr(StepContext, "draw_augmentation", note)
    scene.config = scene.config.replace(augmentations=STRATEGIES)
    scene.follow()
    moving = {"crop", "scale", "rotate"}
    assert {len(names & moving) for names in drawn} == {1}
    assert set().union(*drawn) == set(STRATEGIES)


def test_large_images_are_decoded_in_groups(make_set: MakeSet) -> None:
    shape = (1, 224, 224)
    memory = HierarchicalMemory(hmn_layout(shape, "float32"), [0, 1, 2], 4, seed=3)
    options: dict[str, Any] = {"student_batch": 1000, "student_steps": 1}
    scene, sizes = Scene(make_set(6, shape), memory, "float32", **options), list[int]()
    memory.register_forward_hook(lambda _, __, out: sizes.append(len(out)))
    scene.follow()
    assert sizes == [5, 5, 2] * 2
    images = memory(torch.arange(12))
    batches, labels = [torch.arange(12)], memory.class_index
    start, target = scene.start, scene.target
    loss = trajectory_matching(scene.network, start, target, images, labels, batches, scene.rate)
    assert_close(scene.gradients(), list(torch.autograd.grad(loss, list(memory.parameters()))))


def test_gradients_do_not_add_up_over_the_steps(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    scene.follow()
    once = [gradient.clone() for gradient in scene.gradients()]
    scene.follow()
    assert same(scene.gradients(), once)


def test_the_same_generator_makes_the_same_step(make_scene: Callable[..., Scene]) -> None:
    memories = []
    for seed in (7, 7, 8):
        scene = make_scene(augmentations=("color", "crop"))
        scene.learn()
        scene.follow(seed)
        memories.append(values_of(scene.memory))
    assert same(memories[0], memories[1])
    assert not same(memories[0], memories[2])


def test_in_bfloat16_the_gradient_points_the_same_way(make_scene: Callable[..., Scene]) -> None:
    flat = []
    for precision in ("float32", "bfloat16"):
        scene = make_scene(precision=precision)
        scene.follow()
        flat.append(torch.cat([gradient.flatten() for gradient in scene.gradients()]))
    exact, rough = flat
    assert not exact.equal(rough)
    assert float(torch.cosine_similarity(exact, rough, dim=0)) > 0.9


def test_matching_comes_nearer_to_the_expert(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(student_batch=1000)
    before = scene.loss()
    scene.learn(0.03)
    for seed in range(15):
        scene.follow(seed)
    assert scene.loss() < 0.8 * before


# The matcher.


@pytest.fixture
def make_matcher(make_set: MakeSet, tmp_path: Path) -> Callable[..., TrajectoryMatcher]:
    """Return a function that makes a matcher with experts of its own."""

    def make(**options: Any) -> TrajectoryMatcher:
        settings = {**TINY_MTT, "network_width": 3, "precision": "float32", **options}
        config, data = make_config(**settings), make_set()
        memory = memory_of("pixels", data.classes, data.image_shape)
        optimizer = make_optimizer(memory, (0.5, 0.99))
        set_lr(optimizer, 0.01)
        experts = Experts(
            tmp_path,
            data.images,
            data.class_indices,
            3,
            num_experts=2,
            num_epochs=2,
            config=config.expert_training,
        )
        context = StepContext(memory, RealImages.of(data), config, optimizer)
        return TrajectoryMatcher(context, 1, experts)

    return make


def test_students_start_at_any_epoch_of_any_expert(
    make_matcher: Callable[..., TrajectoryMatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = make_matcher()
    read, asked = matcher.experts.read, list[tuple[int, ...]]()

    def watched(number: int, *epochs: int) -> Any:
        asked.append((number, *epochs))
        return read(number, *epochs)

    monkeypatch.setattr(matcher.experts, "read", watched)
    assert matcher.images_per_step == 3 * 4
    for number in range(16):
        assert matcher.step(number) in (3 * 3, 3 * 4)
    # TINY_MTT has two experts, starts at epochs 0 and 1, and ends an epoch later.
    assert set(asked) == {(0, 0, 1), (0, 1, 2), (1, 0, 1), (1, 1, 2)}


def test_the_learning_rate_goes_against_its_gradient(
    make_matcher: Callable[..., TrajectoryMatcher],
) -> None:
    matcher = make_matcher(student_learning_rate=0.03, student_rate_learning_rate=0.1)
    assert matcher.results()["student_rate"] == pytest.approx(0.03)
    matcher.step(0)
    gradient = matcher.lr["logarithm"].grad
    assert gradient is not None and float(gradient) != 0
    # Adam's first step on the logarithm is its learning rate, whatever the gradient's size.
    expected = 0.03 * math.exp(-0.1 * math.copysign(1, float(gradient)))
    assert matcher.results()["student_rate"] == pytest.approx(expected, rel=1e-4)


def test_the_learning_rate_may_be_left(make_matcher: Callable[..., TrajectoryMatcher]) -> None:
    matcher = make_matcher(student_learning_rate=0.03, student_rate_learning_rate=0)
    before = matcher.results()
    matcher.step(0)
    assert matcher.results() == before == {"student_rate": pytest.approx(0.03)}


def test_experts_that_are_gone_are_recorded_again(
    make_matcher: Callable[..., TrajectoryMatcher],
) -> None:
    path = make_matcher().experts.path(1)
    before = path.read_bytes()
    path.unlink()
    make_matcher()
    assert path.read_bytes() == before


# Runs.


@every_kind
def test_a_memory_of_any_kind_is_condensed(make_set: MakeSet, kind: str) -> None:
    data, layout = make_set(60), LAYOUTS[kind]((3, 8, 8), "int8")
    budget = room_for(layout, 3, 9 * layout.group_size)
    memory = tiny(data, layout, budget=budget, **TINY_MTT)
    assert len(memory.to_bytes()) == memory.file_bytes <= budget
    assert memory.classes.equal(data.classes)
    report: dict[str, Any] = memory.report
    assert list(report["phases"]) == ["experts", "warm_start", "matching", "pruning"]
    assert report["phases"]["experts"]["images"] == 2 * 2 * 12
    assert report["phases"]["experts"]["seconds"] > 0
    assert report["seconds"] == pytest.approx(
        sum(phase["seconds"] for phase in report["phases"].values())
    )
    assert report["student_rate"] not in (0.02, None)
    unmatched = tiny(data, layout, budget=budget, **{**TINY_MTT, "outer_steps": 0})
    assert not memory.decode()[0].equal(unmatched.decode()[0])


def test_without_a_step_there_are_no_experts(make_set: MakeSet, make_layout: MakeLayout) -> None:
    for options in ({"outer_steps": 0}, {"objective": "dm"}):
        report: dict[str, Any] = tiny(make_set(), make_layout(), **{**TINY_MTT, **options}).report
        assert "experts" not in report["phases"]
        assert report["student_rate"] is None


@every_kind
def test_new_classes_are_condensed_and_old_ones_keep_every_bit(
    make_set: MakeSet, kind: str
) -> None:
    layout = LAYOUTS[kind]((3, 8, 8), "int8")
    budget = room_for(layout, 5, 15 * layout.group_size)
    memory = tiny(make_set(60), layout, budget=budget, **TINY_MTT)
    options = {**TINY_MTT, "over_budget": 0, "budget": budget}
    grown = tiny(make_set(60, labels=(7, 8)), layout, memory=memory, **options)
    images, labels = grown.decode()
    known = {image.numpy().tobytes() for image in memory.decode()[0]}
    kept = images[torch.isin(labels, memory.classes)]
    assert len(kept)
    assert all(image.numpy().tobytes() in known for image in kept)
    options["outer_steps"] = 0
    unmatched = tiny(make_set(60, labels=(7, 8)), layout, memory=memory, **options)
    new = torch.isin(labels, torch.tensor([7, 8]))
    assert not images[new].equal(unmatched.decode()[0][new])


def test_experts_know_the_classes_that_are_condensed(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    data, layout = make_set(labels=(7, 8)), make_layout()
    memory = tiny(make_set(), layout, **{**TINY_MTT, "outer_steps": 0})
    options = {**TINY_MTT, "experts": str(tmp_path), "beta_grid": (), "precision": "float32"}
    tiny(data, layout, memory=memory, budget=room_for(layout, 5, 16), **options)
    settings = {name: value for name, value in {**TINY, **options}.items() if name != "device"}
    config = make_config(**settings)
    # They are of the new images alone, and have logits of all classes.
    known = Experts(
        tmp_path,
        data.images,
        3 + data.class_indices,
        5,
        num_experts=2,
        num_epochs=2,
        networks=config.network,
        config=config.expert_training,
    )
    assert known.missing() == []


@pytest.mark.parametrize("labels", [(4,), (4, 5)])
def test_one_class_or_one_image_of_each_will_do(
    make_set: MakeSet, make_layout: MakeLayout, labels: tuple[int, ...]
) -> None:
    layout = make_layout()
    budget = room_for(layout, len(labels), len(labels))
    data = make_set(num_images=len(labels), labels=labels)
    memory = tiny(data, layout, budget=budget, **TINY_MTT)
    assert bool(memory.decode()[0].isfinite().all())


def test_the_seed_gives_the_file_bit_for_bit(make_set: MakeSet, make_layout: MakeLayout) -> None:
    data, layout = make_set(), make_layout()
    first = tiny(data, layout, seed=1, **TINY_MTT).to_bytes()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(99)
        assert tiny(data, layout, seed=1, **TINY_MTT).to_bytes() == first
    assert tiny(data, layout, seed=2, **TINY_MTT).to_bytes() != first


def test_several_architectures_take_turns(make_set: MakeSet, make_layout: MakeLayout) -> None:
    options = {**TINY_MTT, "network": ("convnet", "resnet18"), "outer_steps": 1, "inner_steps": 2}
    options |= {"over_budget": 0, "student_steps": 1, "expert_images": 4, "max_start_epoch": 0}
    memory = tiny(make_set(), make_layout(), **options)
    assert memory.report["network"] == ("convnet", "resnet18")
    assert bool(memory.decode()[0].isfinite().all())


def test_a_network_with_dropout_is_followed_alike_whatever_was_drawn_before(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    def with_dropout(image_shape: Any, num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(192, num_classes))

    files = set()
    for state in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(state)
            before = torch.get_rng_state()
            memory = tiny(make_set(), make_layout(), **{**TINY_MTT, "network": with_dropout})
            files.add(memory.to_bytes())
            assert torch.get_rng_state().equal(before)
    assert len(files) == 1


def test_a_rate_that_diverges_is_reported(make_set: MakeSet, make_layout: MakeLayout) -> None:
    with pytest.raises(TrainingError, match=r"lower .*student_learning_rate"):
        tiny(make_set(), make_layout(), **TINY_MTT, student_learning_rate=1e30)


# Where experts are.


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_temporary_folder_is_gone_afterwards(
    make_set: MakeSet, make_layout: MakeLayout, temporary: Path
) -> None:
    there: list[list[str]] = []
    team = Observer(agree=lambda *_: there.append(os.listdir(temporary)))
    tiny(make_set(), make_layout(), team=team, **TINY_MTT)
    assert os.listdir(temporary) == []
    assert max(map(len, there)) == 1

    def stop() -> None:
        assert len(os.listdir(temporary)) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny(make_set(), make_layout(), team=Observer(sum_gradients=at_call(8, stop)), **TINY_MTT)
    assert os.listdir(temporary) == []


def test_beside_a_checkpoint_experts_stay(
    make_set: MakeSet, make_layout: MakeLayout, temporary: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.checkpoint"
    tiny(make_set(), make_layout(), checkpoint=path, **TINY_MTT)
    experts = tmp_path / "run.checkpoint.experts"
    names = ["expert-0000.safetensors", "expert-0001.safetensors"]
    assert sorted(os.listdir(experts)) == names
    assert os.listdir(temporary) == []


def test_runs_of_other_kinds_and_budgets_use_the_same_experts(
    make_set: MakeSet, tmp_path: Path
) -> None:
    data = make_set(60)
    options: dict[str, Any] = {**TINY, **TINY_MTT, "experts": str(tmp_path / "experts")}
    budget = room_for(LAYOUTS["pixels"]((3, 8, 8), "int8"), 3, 15)
    first = condense(data, budget, kind="pixels", **options)
    assert first.report["phases"]["experts"]["images"] == 48
    for kind, num_bytes in (("hmn", 2000), ("pixels", budget + 500)):
        again = condense(data, num_bytes, kind=kind, **{**options, "student_steps": 2})
        assert again.report["phases"]["experts"]["images"] == 0
    recorded_here = condense(data, budget, kind="pixels", **{**options, "experts": None})
    assert recorded_here.to_bytes() == first.to_bytes()


def test_experts_of_another_run_are_refused_before_any_work(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    options = {**TINY_MTT, "experts": str(tmp_path)}
    tiny(make_set(), make_layout(), **options)

    def work() -> None:
        raise AssertionError("a step was taken")

    options["team"] = Observer(sum_gradients=at_call(1, work))
    with pytest.raises(ExpertError, match="with width 3, not 4; delete"):
        tiny(make_set(), make_layout(), **options, network_width=4)
    with pytest.raises(ExpertError, match="with other images or labels"):
        tiny(make_set(seed=1), make_layout(), **options)


def test_the_seconds_of_recording_count(
    make_set: MakeSet, make_layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    record = Experts.record

    def slow(self: Experts, *args: Any) -> None:
        now[0] += 50
        record(self, *args)

    monkeypatch.setattr(Experts, "record", slow)
    options = {**TINY_MTT, "max_seconds": 100.0}
    report: dict[str, Any] = tiny(make_set(), make_layout(), **options).report
    assert report["phases"]["experts"]["seconds"] == 100
    assert report["phases"]["matching"]["images"] == 0


def test_a_bar_shows_the_recording(
    make_set: MakeSet, make_layout: MakeLayout, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny(make_set(), make_layout(), progress=True, **TINY_MTT)
    err = capfd.readouterr().err
    assert "experts: 100%" in err
    assert "48.0/48.0" in err
