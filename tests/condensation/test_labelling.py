"""Memories with labels: made by a teacher, within the budget, kept while the memory grows."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hmn_replay
from hmn_replay import (
    LabelConfig,
    Memory,
    TrainingConfig,
    baselines,
    condense,
    evaluate,
    train_teacher,
)
from hmn_replay.condensation import loop
from hmn_replay.condensation.labelling import label_images
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    HMNReplayWarning,
    TrainingError,
)
from hmn_replay.memory import HierarchicalMemory, LearnedMemory, loads
from hmn_replay.memory.labels import NO_LABELS, Labeller
from hmn_replay.memory.real_features import RawFeatureMemory
from hmn_replay.training.networks import build_network
from tests.stripes import stripes
from tests.support import TINY, Observer, at_call, hmn_layout, real_set, tiny

MakeSet = Callable[..., LabelledImages]
SMALL: dict[str, Any] = {"teacher_passes": 60, "teacher_width": 4, "labeller_width": 4}
SOFT, LABELLER = LabelConfig(labels="soft", **SMALL), LabelConfig(labels="labeller", **SMALL)
MAKERS: dict[str, Callable[..., Memory]] = {
    "raw": hmn_replay.raw_images,
    "jpeg": partial(hmn_replay.jpeg_images, quality=30),
    "lossless": hmn_replay.lossless_images,
    "subsampled": hmn_replay.subsampled_images,
}

pytestmark = pytest.mark.usefixtures("untouched_random_state")


def condensed(data: LabelledImages, budget: int, labels: str, **options: Any) -> LearnedMemory:
    layout = hmn_layout(number_format=options.pop("number_format", "entropy"))
    options = {**TINY, **SMALL, "beta_grid": (), "labels": labels, **options}
    return condense(data, budget, layout=layout, **options)


@pytest.mark.parametrize("number_format", ["entropy", "int8"])
@pytest.mark.parametrize("labels", ["soft", "labeller"])
def test_a_budget_is_filled_with_images_and_labels(
    make_set: MakeSet, number_format: str, labels: str
) -> None:
    data = make_set(600)
    plain, memory = (
        condensed(data, 4_000, kind, number_format=number_format) for kind in ("hard", labels)
    )
    assert (plain.richest_labels, memory.richest_labels) == ("hard", labels)
    assert memory.file_bytes == len(memory.to_bytes()) <= 4_000
    if number_format == "int8":
        assert len(memory) < len(plain)
        assert memory.file_bytes > 0.97 * 4_000
    assert loads(memory.to_bytes()).soft_labels().equal(memory.soft_labels())
    assert memory.report["labels"] == labels
    assert memory.report["phases"]["labels"]["images"] == 60


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("config", [SOFT, LABELLER])
def test_real_images_get_the_same_labels_at_the_same_bytes(kind: str, config: LabelConfig) -> None:
    data = real_set(classes=(-3, 7), counts=(150, 150))
    budget = {"raw": 20_000, "lossless": 12_000, "subsampled": 8_000, "jpeg": 5_000}[kind]
    plain = MAKERS[kind](data, budget)
    memory = MAKERS[kind](data, budget, labels=config, device="cpu")
    assert memory.richest_labels == config.labels
    assert len(memory) <= len(plain)
    assert len(memory) < len(plain) or plain.file_bytes + 80 <= budget
    assert 0.97 * budget < memory.file_bytes <= budget
    # The images that stay are the first of those that would be there without labels.
    counts = memory.images_per_class
    images = plain.decode()[0]
    start = plain.images_per_class[0]
    assert memory.decode()[0].equal(
        torch.cat([images[: counts[0]], images[start : start + counts[1]]])
    )


def test_a_teacher_may_be_given() -> None:
    data = real_set(classes=(-3, 7), counts=(20, 20))
    teacher = train_teacher(data, SOFT, device="cpu")
    assert teacher.classes.tolist() == [-3, 7]
    one, two = (
        hmn_replay.raw_images(data, 4_000, labels=SOFT, teacher=given, device="cpu")
        for given in (teacher, None)
    )
    assert one.soft_labels().equal(two.soft_labels())
    with pytest.raises(ConfigError, match="hard labels need no teacher"):
        train_teacher(data, "hard")
    with pytest.raises(ConfigError, match="one of hard, soft, labeller; got 'sort'"):
        hmn_replay.raw_images(data, 4_000, labels="sort")


@pytest.mark.parametrize("labels", ["soft", "labeller"])
def test_a_memory_is_condensed_with_the_teacher_that_is_given(
    make_set: MakeSet, labels: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = make_set(60)
    config = LabelConfig(labels=labels, **SMALL)
    first, second = (train_teacher(data, config, seed=seed, device="cpu") for seed in (0, 1))

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a teacher is trained")

    monkeypatch.setattr(loop, "train_network", never)
    path, options = tmp_path / "run", {"outer_steps": 0, "pruning": "order"}
    memory = condensed(data, 4_000, labels, teacher=first, checkpoint=path, **options)
    if labels == "labeller":
        expected = Labeller.of(first, data.image_shape)
        assert memory.labeller is not None
        assert all(map(torch.equal, memory.labeller.buffers(), expected.buffers()))
    else:
        other = condensed(data, 4_000, labels, teacher=second, **options)
        assert not memory.soft_labels().equal(other.soft_labels())
    with pytest.raises(CheckpointError, match="other teacher"):
        condensed(data, 4_000, labels, teacher=second, checkpoint=path, **options)


def _network(shape: tuple[int, ...], name: str = "convnet", **own: Any) -> Any:
    network = build_network(name, shape, 3, width=own.get("width", 4))
    network.classes.copy_(torch.tensor(own.get("classes", (-3, 7, 1000))))
    with torch.no_grad():
        next(network.parameters()).mul_(own.get("factor", 1.0))
    return network


@pytest.mark.parametrize(
    ("labels", "make_teacher", "error", "message"),
    [
        ("hard", _network, ConfigError, "hard labels need no teacher"),
        (
            "soft",
            partial(_network, classes=(-3, 7, 3)),
            ConfigError,
            "3 classes and the memory 3, and these are not in both: 3, 1000; train it on images of",
        ),
        ("soft", lambda shape: _network((2, *shape[1:])), ConfigError, "does not take images"),
        ("soft", lambda shape: _network((*shape[:1], 16, 16)), ConfigError, "does not take images"),
        ("soft", lambda shape: _network(shape).bfloat16(), ConfigError, "does not take images"),
        ("soft", lambda _: nn.Identity(), ConfigError, "teacher is a network such as train_teach"),
        (
            "soft",
            partial(_network, factor=float("nan")),
            TrainingError,
            "logits are not finite: it",
        ),
        ("labeller", partial(_network, width=3), ConfigError, "3 channels, .* labeller_width=3"),
        ("labeller", partial(_network, name="resnet18"), ConfigError, "a labeller is a ConvNet"),
    ],
)
def test_a_teacher_of_no_use_is_refused_before_any_work(
    labels: str, make_teacher: Callable[..., Any], error: type[Exception], message: str
) -> None:
    data = LabelledImages(*stripes(30))
    teacher = make_teacher(data.image_shape)
    with pytest.raises(error, match=message):
        condensed(data, 4_000, labels, teacher=teacher, warm_start_steps=10**9)
    config = LabelConfig(labels=labels, **SMALL)
    for make in MAKERS.values():
        with pytest.raises(error, match=message):
            make(data, 4_000, labels=config, teacher=teacher, device="cpu")


@pytest.mark.parametrize("labels", ["soft", "labeller"])
def test_a_teacher_may_have_the_classes_in_another_order(labels: str) -> None:
    data = LabelledImages(*stripes(120))
    config = LabelConfig(labels=labels, **SMALL)
    teacher = train_teacher(data, config, device="cpu")
    other = copy.deepcopy(teacher)
    order = torch.tensor([2, 0, 1])
    other.classes.copy_(teacher.classes[order])
    for name in ("weight", "bias"):
        head, permuted = (each.get_parameter(f"body.head.1.{name}") for each in (teacher, other))
        permuted.data.copy_(head[order])
    makers: list[Callable[..., Memory]] = [
        partial(hmn_replay.raw_images, labels=config),
        partial(condensed, labels=labels),
    ]
    for make in makers:
        one, two = (make(data, 4_000, teacher=each) for each in (teacher, other))
        assert one.to_bytes() == two.to_bytes()


def test_a_teacher_is_used_in_evaluation_mode_and_left_as_it_was() -> None:
    def make(shape: Any, num_classes: int) -> nn.Module:
        values = math.prod(shape)
        return nn.Sequential(
            nn.Flatten(), nn.BatchNorm1d(values), nn.Dropout(), nn.Linear(values, num_classes)
        )

    data = LabelledImages(*stripes(30))
    teacher = build_network(make, data.image_shape, 3)
    teacher.classes.copy_(data.classes)
    teacher.eval()
    expected = hmn_replay.raw_images(data, 4_000, labels=SOFT, teacher=teacher).to_bytes()
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    with torch.autocast("cpu"):
        made = hmn_replay.raw_images(data, 4_000, labels=SOFT, teacher=teacher).to_bytes()
    assert made == expected and teacher.training
    assert all(map(torch.equal, before.values(), teacher.state_dict().values()))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_budget_without_room_is_said_to_be_so_whatever_the_teacher(kind: str) -> None:
    images = torch.randint(256, (24, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    data = LabelledImages(images.to(torch.uint8), torch.arange(24) % 12)
    teacher = build_network("convnet", data.image_shape, 12, width=4)
    with pytest.raises(BudgetError, match="does not hold one image of each of 12 classes beside"):
        MAKERS[kind](data, 700, labels=SOFT, teacher=teacher)


def test_labels_are_checked_before_anything_is_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(baselines.fill, "choose_quality", never)
    monkeypatch.setattr(baselines.fill, "select_images", never)
    for make in (hmn_replay.raw_images, hmn_replay.jpeg_images):
        with pytest.raises(ConfigError, match="one of hard, soft, labeller; got 'sort'"):
            make(stripes(30), 4_000, labels="sort", selection="herding")
    features = torch.rand(6, 4, generator=torch.Generator()), torch.arange(6) % 2
    with pytest.raises(ConfigError, match="leave them out for features"):
        baselines.fill.real_images(RawFeatureMemory, features, 4_000, labels="soft")


def test_labels_are_means_over_augmentations_of_all_that_an_image_is() -> None:
    seen: list[Tensor] = []

    class Teacher(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return 4 * images.mean(dim=(2, 3))

    images = stripes(10)[0] // 2
    others = 128 + images
    rows = label_images(Teacher(), [images, others], views=6, seed=3)
    assert rows.shape == (10, 3)
    assert len(seen) == 6
    by_hand = sum((4 * batch.mean(dim=(2, 3))).softmax(dim=1) for batch in seen) / 6
    torch.testing.assert_close(rows, by_hand)
    bright = [float(batch.mean()) for batch in seen]
    assert max(bright[:3]) < min(bright[3:]) or max(bright[3:]) < min(bright[:3])


def test_added_classes_get_labels_and_old_ones_keep_theirs(make_set: MakeSet) -> None:
    first = condensed(make_set(60, labels=(0, 1)), 3_000, "soft")
    before = first.soft_labels()
    added = make_set(60, labels=(4, 5), seed=1)
    settings = {**TINY, **SMALL, "beta_grid": (), "over_budget": 0.0}
    memory = condense(added, 6_000, memory=first, labels="soft", **settings)
    after = memory.soft_labels()
    old = memory.class_index < 2
    assert first.soft_labels().equal(before), "the given memory stays as it is"
    assert after[old][:, :2].equal(before)
    assert not after[old][:, 2:].any()
    assert bool(memory.is_soft.all())
    assert memory.file_bytes <= 6_000
    plain = condense(added, 6_000, memory=first, **settings)
    is_old = plain.class_index < 2
    assert plain.soft_labels()[is_old][:, :2].equal(before)
    assert plain.is_soft.equal(is_old)


def test_a_run_goes_on_to_the_same_labels(make_set: MakeSet, tmp_path: Path) -> None:
    data, checkpoint = make_set(), tmp_path / "run"
    options = {"labels": "soft", **SMALL, "checkpoint_seconds": 0, "budget": 1_720}
    straight = tiny(data, hmn_layout(), **options)

    def stop() -> None:
        raise KeyboardInterrupt

    calls = 0
    for _ in range(40):
        # Once in the labels, once in the pruning, wherever these are among the calls.
        calls += 9
        try:
            again = tiny(
                data,
                hmn_layout(),
                **options,
                checkpoint=checkpoint,
                team=Observer(sum=at_call(calls, stop)),
            )
        except KeyboardInterrupt:
            continue
        break
    assert again.to_bytes() == straight.to_bytes()


def test_evaluation_learns_from_what_is_asked_for() -> None:
    images, labels = stripes(60, labels=(5, -3, 7))
    data = LabelledImages(images, labels)
    memory = hmn_replay.raw_images(data, 20_000)
    config = TrainingConfig(width=8, num_passes=1_600, batch_size=16)
    with pytest.raises(ConfigError, match="no soft labels; make it with labels='soft'"):
        evaluate(memory, data, labels="soft", config=config, device="cpu")
    with pytest.raises(ConfigError, match="no labeller; make it with labels='labeller'"):
        evaluate(memory, data, labels="labeller", config=config, device="cpu")
    with pytest.raises(ConfigError, match="labels must be one of hard, soft, labeller; got 'both'"):
        evaluate(memory, data, labels="both", device="cpu")
    with pytest.raises(ConfigError, match="labels='soft' is for a memory; got a LabelledImages"):
        evaluate(data, data, labels="soft", device="cpu")
    # Each class is said to be the next one: whoever believes the soft labels is always wrong.
    index = memory.class_index
    memory.set_soft_labels(torch.eye(3)[(index + 1) % 3] * 0.98 + 0.01)
    scores = {
        labels: evaluate(memory, data, labels=labels, config=config, device="cpu")[1]
        for labels in ("hard", "soft", None)
    }
    assert scores["hard"] > 0.9
    assert scores["soft"] < 0.2
    assert scores[None] == scores["soft"], "the most that the memory has, by default"


def test_columns_follow_the_classes_of_a_memory_in_any_order() -> None:
    """The classes of a learned memory stand as they came, those of a network ascending."""
    images, labels = stripes(90, labels=(9, 2, 5))
    order = torch.tensor([9, 2, 5])
    made = condense(
        (images, labels),
        60_000,
        kind="pixels",
        number_format="float32",
        outer_steps=0,
        over_budget=0,
        device="cpu",
    )
    assert made.classes.tolist() == [2, 5, 9]
    made.classes = made.classes[[2, 0, 1]]  # as if 9 had come first: its images are those of 2
    said = (order[(torch.arange(3) + 1) % 3] == made.classes[:, None]).float()
    rows = torch.stack([said[:, list(order).index(label)] for label in made.labels])
    made.set_soft_labels(rows * 0.98 + 0.01)
    config = TrainingConfig(width=8, num_passes=3_200, batch_size=16)
    network, _ = evaluate(made, (images, labels), labels="soft", config=config, device="cpu")
    assert network.classes.tolist() == [2, 5, 9]
    answers = network.classes[network(made.decode()[0]).argmax(dim=1)]
    nexts = {9: 2, 2: 5, 5: 9}
    wanted = torch.tensor([nexts[label] for label in made.labels.tolist()])
    assert float((answers == wanted).float().mean()) > 0.9


def test_a_teacher_of_few_images_is_shown_each_200_times() -> None:
    def passes(**options: Any) -> list[int]:
        config = LabelConfig(**options)
        sizes = (5, 799, 800, 9999)
        return [config.teacher_training(n, "float32", False).num_passes for n in sizes]

    assert passes(labels="soft") == [1000, 159_800, 160_000, 160_000]
    assert passes(labels="labeller") == [1000, 159_800, 160_000, 1_000_000]
    assert passes(labels="labeller", teacher_passes=2_000) == [1000, 2_000, 2_000, 2_000]


def test_a_labeller_teaches_and_is_scored() -> None:
    images, labels = stripes(240)
    data = LabelledImages(images, labels)
    config = LabelConfig(labels="labeller", teacher_passes=6_400, labeller_width=8)
    memory = hmn_replay.raw_images(data, 16_000, labels=config, device="cpu")
    test = stripes(90, seed=1)
    assert hmn_replay.labeller_accuracy(memory, test) > 0.9
    strange = torch.where(test[1] == 7, 55, test[1])
    with pytest.warns(HMNReplayWarning, match="30 of 90 test images .* the memory does not have"):
        assert 0.5 < hmn_replay.labeller_accuracy(memory, (test[0], strange)) <= 2 / 3
    with pytest.raises(DataError, match="both must have the same"):
        hmn_replay.labeller_accuracy(memory, (test[0][:, :, :4], test[1]))
    with pytest.raises(DataError, match="with labels of the memory, -3, 7, 1000; got 55: number"):
        hmn_replay.labeller_accuracy(memory, (test[0], torch.full((90,), 55)))
    training = TrainingConfig(width=8, num_passes=3_200, batch_size=16, label_weight=1.0)
    memory.class_index = (memory.class_index + 1) % 3  # now the classes are wrong
    _, accuracy = evaluate(memory, test, config=training, device="cpu")
    assert accuracy > 0.9, "and the labeller is right"
    memory.set_labeller(None)
    with pytest.raises(ConfigError, match="has no labeller"):
        hmn_replay.labeller_accuracy(memory, test)


@pytest.mark.parametrize("number_format", ["entropy", "int8"])
@pytest.mark.parametrize("labels", ["soft", "labeller"])
@pytest.mark.filterwarnings("ignore:the memory has hard labels alone")  # some are of chance
def test_the_smallest_budget_that_is_named_does(labels: str, number_format: str) -> None:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=draws)
    data = LabelledImages(images, torch.arange(60) % 30)
    options: dict[str, Any] = {**TINY, **SMALL, "labels": labels, "number_format": number_format}
    with pytest.raises(BudgetError, match="does not hold one image of each of 30 classes") as told:
        condense(data, 700, **options)
    (smallest,) = re.findall(r"the smallest that does is ([\d,]+) bytes", str(told.value))
    budget = int(smallest.replace(",", ""))
    for own in (budget, budget + 1, budget + 100):
        memory = condense(data, own, **options)
        assert memory.file_bytes == len(memory.to_bytes()) <= own
        assert memory.num_images >= 30


def test_labels_go_where_they_turn_out_too_large(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LabelConfig, "planned_bytes", lambda *_: NO_LABELS)
    data, layout = make_set(60), hmn_layout(number_format="int8")
    with pytest.raises(BudgetError) as told:
        HierarchicalMemory.max_images(layout, 300, data.classes.tolist())
    (smallest,) = re.findall(r"the smallest that does is ([\d,]+) bytes", str(told.value))
    budget = int(smallest.replace(",", ""))
    with pytest.warns(HMNReplayWarning, match="hard labels alone, not labels='soft': a budget of"):
        memory = condensed(data, budget, "soft", number_format="int8")
    assert memory.richest_labels == memory.report["labels"] == "hard"
    assert memory.file_bytes <= budget


@pytest.mark.parametrize("labels", [SOFT, LABELLER], ids=["soft", "labeller"])
@pytest.mark.parametrize("kind", MAKERS)
def test_real_images_without_room_for_labels_are_refused_before_a_teacher_is_trained(
    kind: str, labels: LabelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: Any, **__: Any) -> Any:
        raise AssertionError("trained")

    monkeypatch.setattr(baselines.fill, "train_teacher", train)
    data = real_set((3, 8, 8), tuple(range(5)), (4,) * 5)
    hard = MAKERS[kind](data, 100_000)
    hard.keep(torch.arange(5) * 4)
    for budget in (hard.file_bytes + 20, hard.file_bytes - 30):
        with pytest.raises(BudgetError, match="one image of each of 5 classes beside labels="):
            MAKERS[kind](data, budget, labels=labels, device="cpu")


@pytest.mark.parametrize(
    "parts",
    [[], torch.zeros(4, 3, 8, 8), [torch.zeros(4, 3, 8, 8), torch.zeros(5, 3, 8, 8)]],
    ids=["none", "tensor", "shapes"],
)
def test_images_to_label_are_as_many_of_one_shape(parts: Any) -> None:
    with pytest.raises(DataError, match=r"a list of images \(N, C, H, W\), all of the same shape"):
        label_images(nn.Flatten(), parts)
    with pytest.raises(ConfigError, match="views must be a whole number of 1 or more; got 0"):
        label_images(nn.Flatten(), [torch.zeros(4, 3, 8, 8)], views=0)
