"""Students that follow experts: a step against the same step in one graph, and whole runs."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from hmn_replay.condensation import students
from hmn_replay.condensation.condense import condense
from hmn_replay.condensation.config import make_config
from hmn_replay.condensation.steps import RealImages, make_optimizer, set_rate
from hmn_replay.condensation.students import (
    TrajectoryStepper,
    needs_experts,
    open_experts,
    trajectory_step,
)
from hmn_replay.data.augment import draw_augmentation
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import ExpertError, TrainingError
from hmn_replay.memory.file import serialise
from hmn_replay.memory.layout import Layout
from hmn_replay.memory.registry import CONTAINERS, make_container
from hmn_replay.objectives.trajectories import Experts, trajectory_matching
from hmn_replay.runtime import make_generator
from hmn_replay.training.train import TrainingConfig, make_network
from tests.support import TINY, TINY_MTT, assert_close, same, tiny, values_of

MakeLayout = Callable[..., Layout]
MakeSet = Callable[..., LabelledImages]

every_container = pytest.mark.parametrize("container", CONTAINERS)

pytestmark = pytest.mark.usefixtures("untouched_random_state")


class Scene:
    """A memory of 6 images of labels 4, 9 and -2, an expert, and an optimizer that stands still."""

    def __init__(self, data: LabelledImages, container: str = "hmn", **options: Any) -> None:
        options = {"student_steps": 3, "student_batch": 4, "augmentations": (), **options}
        self.config = make_config(precision="float32", **options)
        self.real = RealImages.of(data)
        layout = CONTAINERS[container].choose(8000, data.image_shape, 3, "float32")
        self.memory = make_container(layout, data.classes, max(2, layout.group_size), seed=3)
        self.network = make_network(data.images, 3, TrainingConfig(width=4))
        generator = torch.Generator().manual_seed(5)
        self.start = {
            name: value + 0.1 * torch.randn(value.shape, generator=generator)
            for name, value in self.network.state_dict(keep_vars=True).items()
            if value.requires_grad
        }
        self.start = {name: value.detach() for name, value in self.start.items()}
        self.target = {
            name: value + 0.02 * torch.randn(value.shape, generator=generator)
            for name, value in self.start.items()
        }
        self.rate = torch.tensor(0.2)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.memory.parameters(), lr=0.0)

    def follow(self, seed: int = 0, first_class: int = 0) -> tuple[int, Tensor]:
        return trajectory_step(
            self.memory,
            self.optimizer,
            self.network,
            self.start,
            self.target,
            self.rate,
            self.real,
            self.config,
            make_generator(seed),
            first_class,
        )

    def learn(self, rate: float = 0.01) -> None:
        """Let the memory move from now on."""
        self.optimizer = make_optimizer(self.memory, (0.5, 0.99))
        set_rate(self.optimizer, rate)

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.memory.parameters() if p.grad is not None]


@pytest.fixture
def make_scene(make_set: MakeSet) -> Callable[..., Scene]:
    """Return a function that makes a scene; container and settings may be given."""

    def make(container: str = "hmn", **options: Any) -> Scene:
        return Scene(make_set(num_images=16, labels=(4, 9, -2)), container, **options)

    return make


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Collect what trajectory_matching is given, and return it with its loss in front."""
    seen: list[tuple[Any, ...]] = []

    def watched(*args: Any) -> Any:
        result = trajectory_matching(*args)
        seen.append((float(result.detach()), *args))
        return result

    monkeypatch.setattr(students, "trajectory_matching", watched)
    return seen


# A step.


@every_container
def test_the_gradient_of_a_step_is_that_of_the_whole_training(
    make_scene: Callable[..., Scene], container: str
) -> None:
    scene = make_scene(container, student_batch=1000)  # all images, so that it depends on no draw
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
    missed = sum(((v - scene.target[name]) ** 2).sum() for name, v in parameters.items())
    moved = sum(((v - scene.target[name]) ** 2).sum() for name, v in start.items())
    *expected, of_rate = torch.autograd.grad(missed / moved, [*memory.parameters(), rate])

    num_seen, found = scene.follow()
    assert num_seen == 3 * scene.memory.num_images
    assert_close([*scene.gradients(), found], [*expected, of_rate])


def test_batches_go_through_all_images_before_any_comes_again(
    make_scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(monkeypatch)
    scene = make_scene(student_steps=5)
    known = scene.memory.decode()[0].flatten(1)
    orders = []
    for seed in range(4):
        assert scene.follow(seed)[0] == 5 * 3
        _, _, _, _, images, labels, batches, *_ = seen[-1]
        # Of 6 images, batches of at most 4 are of 3.
        assert [len(batch) for batch in batches] == [3] * 5
        owners = torch.cdist(images.flatten(1), known).argmin(dim=1)
        shown = [owners[batch].tolist() for batch in batches]
        for one, two in zip(shown[0::2], shown[1::2], strict=False):
            assert sorted(one + two) == list(range(6))
        assert labels.equal(scene.memory.class_index[owners])
        orders.append(shown)
    assert orders[0] != orders[1] or orders[1] != orders[2]


def test_batches_are_of_classes_that_are_condensed(
    make_scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(monkeypatch)
    scene = make_scene()
    scene.learn()
    before = scene.memory.decode()[0]
    scene.memory.freeze_shared()
    scene.follow(first_class=1)
    assert seen[-1][5].unique().tolist() == [1, 2]
    moved = (scene.memory.decode()[0] != before).flatten(1).any(dim=1)
    assert moved.tolist() == [False] * 2 + [True] * 4


def test_each_image_is_augmented_by_a_draw_of_its_own(
    make_scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []

    def watched(names: Any, size: Any, generator: Any, **options: Any) -> Any:
        assert (names, size) == (("color", "cutout"), (8, 8))
        augment = draw_augmentation(names, size, generator, **options)
        drawn.append((options, augment))
        return augment

    monkeypatch.setattr(students, "draw_augmentation", watched)
    seen = watch(monkeypatch)
    scene = make_scene(augmentations=("color", "cutout"))
    scene.follow()
    assert seen[-1][-1] == [augment for _, augment in drawn]
    assert len(drawn) == 3
    for options, augment in drawn:
        assert options["batch"] == 3
        assert options["fill"].equal(scene.real.mean)
        assert options["std"].equal(scene.real.std)
        assert len(augment.color.unique(dim=1)[0]) == 3
    assert not drawn[0][1].color.equal(drawn[1][1].color)


@every_container
def test_decoding_in_groups_changes_nothing_but_the_last_bits(
    make_scene: Callable[..., Scene], container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, gradients = list[list[int]](), list[list[Tensor]]()
    for pixels in (2**30, 4 * 64, 1):
        monkeypatch.setattr(students, "_PIXELS_PER_GROUP", pixels)
        scene, sizes = make_scene(container, student_batch=1000), list[int]()
        scene.memory.register_forward_hook(lambda _, __, out, sizes=sizes: sizes.append(len(out)))
        scene.follow()
        decoded.append(sizes)
        gradients.append(scene.gradients())
    count = scene.memory.num_images
    assert [max(sizes) for sizes in decoded] == [count, 4, 1]
    assert [sum(sizes) for sizes in decoded] == [2 * count] * 3
    assert_close(gradients[1], gradients[0])
    assert_close(gradients[2], gradients[0])


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
        scene = make_scene()
        scene.config = make_config(**{**vars(scene.config), "precision": precision})
        scene.follow()
        flat.append(torch.cat([gradient.flatten() for gradient in scene.gradients()]))
    exact, rough = flat
    assert not exact.equal(rough)
    assert float(torch.cosine_similarity(exact, rough, dim=0)) > 0.9


# The stepper.


@pytest.fixture
def make_stepper(make_set: MakeSet, tmp_path: Path) -> Callable[..., TrajectoryStepper]:
    """Return a function that makes a stepper with experts of its own."""

    def make(**options: Any) -> TrajectoryStepper:
        config = make_config(
            **{**TINY_MTT, "network_width": 3, "experts": str(tmp_path), "precision": "float32"},
            **options,
        )
        data = make_set()
        real = RealImages.of(data)
        layout = CONTAINERS["raw"].choose(8000, data.image_shape, 3, "float32")
        memory = make_container(layout, data.classes, 3, seed=3)
        with open_experts(memory, real, config, seed=1) as experts:
            assert experts is not None
            return TrajectoryStepper(memory, real, config, 1, experts=experts)

    return make


def test_students_start_at_any_epoch_of_any_expert(
    make_stepper: Callable[..., TrajectoryStepper], monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper = make_stepper()
    read, asked = stepper.experts.read, list[tuple[int, ...]]()

    def watched(number: int, *epochs: int) -> Any:
        asked.append((number, *epochs))
        return read(number, *epochs)

    monkeypatch.setattr(stepper.experts, "read", watched)
    optimizer = make_optimizer(stepper.memory, (0.5, 0.99))
    assert stepper.images_per_step == 3 * 4
    for number in range(24):
        assert stepper.step(optimizer, number) in (3 * 3, 3 * 4)
    # TINY_MTT has two experts, starts at epochs 0 and 1, and ends an epoch later.
    assert set(asked) == {(0, 0, 1), (0, 1, 2), (1, 0, 1), (1, 1, 2)}


def test_the_learning_rate_goes_against_its_gradient(
    make_stepper: Callable[..., TrajectoryStepper], monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper = make_stepper(student_learning_rate=0.03, student_rate_learning_rate=0.1)
    optimizer = make_optimizer(stepper.memory, (0.5, 0.99))
    rates = [stepper.results()["student_rate"]]
    assert rates[0] == pytest.approx(0.03)
    gradients = iter([-2.0, 5.0])

    def watched(*args: Any) -> tuple[int, Tensor]:
        rates.append(float(args[5]))
        return 0, torch.tensor(next(gradients))

    monkeypatch.setattr(students, "trajectory_step", watched)
    for number in range(2):
        stepper.step(optimizer, number)
    assert rates[1] == rates[0]
    # Adam's first step on the logarithm is its learning rate, whatever the gradient's size.
    assert rates[2] == pytest.approx(0.03 * math.exp(0.1))
    assert stepper.results()["student_rate"] < rates[2]


def test_the_learning_rate_may_be_left(make_stepper: Callable[..., TrajectoryStepper]) -> None:
    stepper = make_stepper(student_learning_rate=0.03, student_rate_learning_rate=0)
    optimizer = make_optimizer(stepper.memory, (0.5, 0.99))
    before = stepper.results()
    stepper.step(optimizer, 0)
    assert stepper.results() == before == {"student_rate": pytest.approx(0.03)}


def test_experts_that_are_gone_are_recorded_again(
    make_stepper: Callable[..., TrajectoryStepper],
) -> None:
    path = make_stepper().experts.path(1)
    before = path.read_bytes()
    path.unlink()
    make_stepper()
    assert path.read_bytes() == before


# Runs.


@every_container
def test_a_memory_of_any_container_is_condensed(make_set: MakeSet, container: str) -> None:
    data = make_set()
    layout = CONTAINERS[container].choose(9000, data.image_shape, 3, "int8")
    memory = tiny(data, layout, budget=9000, **TINY_MTT)
    assert len(serialise(memory)) == memory.file_bytes <= 9000
    assert memory.classes.equal(data.classes)
    report: dict[str, Any] = memory.report
    assert list(report["phases"]) == ["warm_start", "experts", "matching", "pruning"]
    assert report["phases"]["experts"]["images"] == 2 * 2 * 12
    assert report["phases"]["experts"]["seconds"] > 0
    assert report["seconds"] == pytest.approx(
        sum(phase["seconds"] for phase in report["phases"].values())
    )
    assert report["student_rate"] not in (0.02, None)
    unmatched = tiny(data, layout, budget=9000, **{**TINY_MTT, "outer_steps": 0})
    assert not memory.decode()[0].equal(unmatched.decode()[0])


def test_without_a_step_there_are_no_experts(make_set: MakeSet, make_layout: MakeLayout) -> None:
    for options in ({"outer_steps": 0}, {"objective": "dm"}):
        report: dict[str, Any] = tiny(make_set(), make_layout(), **{**TINY_MTT, **options}).report
        assert "experts" not in report["phases"]
        assert report["student_rate"] is None
    assert needs_experts(make_config(objective="mtt"))


@every_container
def test_new_classes_are_condensed_and_old_ones_keep_every_bit(
    make_set: MakeSet, container: str
) -> None:
    layout = CONTAINERS[container].choose(20_000, (3, 8, 8), 5, "int8")
    memory = tiny(make_set(), layout, budget=20_000, **TINY_MTT)
    options = {**TINY_MTT, "over_budget": 0}
    grown = tiny(make_set(labels=(7, 8)), layout, memory=memory, budget=20_000, **options)
    assert grown.report["drift_psnr"] is None
    images, labels = grown.decode()
    known = {image.numpy().tobytes() for image in memory.decode()[0]}
    kept = images[torch.isin(labels, memory.classes)]
    assert len(kept)
    assert all(image.numpy().tobytes() in known for image in kept)
    options["outer_steps"] = 0
    unmatched = tiny(make_set(labels=(7, 8)), layout, memory=memory, budget=20_000, **options)
    new = torch.isin(labels, torch.tensor([7, 8]))
    assert not images[new].equal(unmatched.decode()[0][new])


def test_experts_know_the_classes_that_are_condensed(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_set(labels=(7, 8))
    memory = tiny(make_set(), make_layout(), **{**TINY_MTT, "outer_steps": 0})
    given: list[Any] = []

    class Watched(Experts):
        def __init__(self, *args: Any, **options: Any) -> None:
            given.append(args)
            super().__init__(*args, **options)

    monkeypatch.setattr(students, "Experts", Watched)
    options = {**TINY_MTT, "experts": str(tmp_path), "beta_grid": (0.5,)}
    tiny(data, make_layout(), memory=memory, budget=9000, **options)
    _, images, class_indices, num_classes = given[0]
    assert images[:].equal(data.images)
    assert class_indices.equal(3 + data.class_indices)
    assert num_classes == 5


@pytest.mark.parametrize("labels", [(4,), (4, 5)])
def test_one_class_or_one_image_of_each_will_do(
    make_set: MakeSet, make_layout: MakeLayout, labels: tuple[int, ...]
) -> None:
    layout = make_layout()
    budget = layout.file_bytes(len(labels), len(labels), 9999)
    data = make_set(num_images=len(labels), labels=labels)
    memory = tiny(data, layout, budget=budget, **TINY_MTT)
    assert bool(memory.decode()[0].isfinite().all())


def test_matching_comes_nearer_to_the_experts(
    make_set: MakeSet, make_layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(monkeypatch)
    tiny(
        make_set(num_images=60),
        make_layout("float32"),
        **{
            **TINY_MTT,
            "warm_start_steps": 0,
            "outer_steps": 60,
            "inner_steps": 1,
            "student_batch": 100,
            "network_width": 8,
            "augmentations": (),
            "over_budget": 0,
            "memory_learning_rate": 0.01,
        },
    )
    losses = [loss for loss, *_ in seen]
    assert sum(losses[-15:]) < 0.7 * sum(losses[:15])


def test_the_seed_gives_the_file_bit_for_bit(make_set: MakeSet, make_layout: MakeLayout) -> None:
    data, layout = make_set(), make_layout()
    first = serialise(tiny(data, layout, seed=1, **TINY_MTT))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(99)
        assert serialise(tiny(data, layout, seed=1, **TINY_MTT)) == first
    assert serialise(tiny(data, layout, seed=2, **TINY_MTT)) != first


def test_several_architectures_take_turns(make_set: MakeSet, make_layout: MakeLayout) -> None:
    options = {**TINY_MTT, "network": ("convnet", "resnet18"), "outer_steps": 1, "inner_steps": 2}
    memory = tiny(make_set(), make_layout(), **{**options, "over_budget": 0, "student_steps": 1})
    assert memory.report["network"] == ("convnet", "resnet18")
    assert bool(memory.decode()[0].isfinite().all())


def test_a_rate_that_leaves_the_real_numbers_is_told(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
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
    make_set: MakeSet, make_layout: MakeLayout, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[list[str]] = []

    def watched(*args: Any) -> Any:
        there.append(os.listdir(temporary))
        if len(there) == 8:
            raise KeyboardInterrupt
        return trajectory_step(*args)

    monkeypatch.setattr(students, "trajectory_step", watched)
    tiny(make_set(), make_layout(), **TINY_MTT)
    assert os.listdir(temporary) == []
    with pytest.raises(KeyboardInterrupt):
        tiny(make_set(), make_layout(), **TINY_MTT)
    assert os.listdir(temporary) == []
    assert all(len(names) == 1 for names in there)


def test_beside_a_checkpoint_experts_stay(
    make_set: MakeSet, make_layout: MakeLayout, temporary: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.checkpoint"
    tiny(make_set(), make_layout(), checkpoint=path, **TINY_MTT)
    experts = tmp_path / "run.checkpoint.experts"
    names = ["expert-0000.safetensors", "expert-0001.safetensors"]
    assert sorted(os.listdir(experts)) == names
    assert os.listdir(temporary) == []


def test_runs_of_other_containers_and_budgets_use_the_same_experts(
    make_set: MakeSet, tmp_path: Path
) -> None:
    data, options = make_set(), {**TINY, **TINY_MTT, "experts": str(tmp_path / "experts")}
    first = condense(data, 9000, container="raw", **options)
    assert first.report["phases"]["experts"]["images"] == 48  # type: ignore[index]
    for container, budget in (("hmn", 9000), ("raw", 12_000)):
        again = condense(data, budget, container=container, **{**options, "student_steps": 2})
        assert again.report["phases"]["experts"]["images"] == 0  # type: ignore[index]
    recorded_here = condense(data, 9000, container="raw", **{**options, "experts": None})
    assert serialise(recorded_here) == serialise(first)


def test_experts_of_another_run_are_refused_before_any_work(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**TINY_MTT, "experts": str(tmp_path)}
    tiny(make_set(), make_layout(), **options)
    monkeypatch.setattr("hmn_replay.condensation.steps.warm_start_step", None)
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
