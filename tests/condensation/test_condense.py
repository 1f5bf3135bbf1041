"""Condensation from end to end on tiny data: what it makes, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hmn_replay import build_network
from hmn_replay.condensation import steps
from hmn_replay.condensation.condense import condense
from hmn_replay.condensation.config import CondenseConfig, make_config
from hmn_replay.condensation.labelling import LabelConfig, train_teacher
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    HMNReplayError,
    HMNReplayWarning,
    TrainingError,
    UnknownOptionError,
)
from hmn_replay.memory import NUMBER_FORMATS, HierarchicalMemory, HMNLayout, LearnedMemory, load
from hmn_replay.objectives import Objective, distribution_matching, get_objective, gradient_matching
from hmn_replay.training.train import MAX_LEARNING_RATE
from tests.support import (
    LAYOUTS,
    LEARNED,
    REAL,
    TINY,
    TINY_MTT,
    learned_type,
    room_for,
    tiny,
)

MakeLayout = Callable[..., HMNLayout]
MakeSet = Callable[..., LabelledImages]

pytestmark = pytest.mark.usefixtures("untouched_random_state")


def check(memory: LearnedMemory, data: LabelledImages) -> None:
    """Check what holds for every memory that was condensed."""
    assert memory.budget_bytes is not None
    assert len(memory.to_bytes()) == memory.file_bytes <= memory.budget_bytes
    planned = memory.max_images(memory.layout, memory.budget_bytes, data.classes.tolist())
    # What is coded is pruned in bytes.
    is_coded = memory.layout.is_coded
    assert memory.num_images >= planned if is_coded else memory.num_images == planned
    assert memory.classes.equal(data.classes)
    assert max(memory.images_per_class) - min(memory.images_per_class) <= 1
    images, labels = memory.decode()
    assert images.shape == (memory.num_images, *data.image_shape)
    assert bool(images.isfinite().all())
    assert labels.unique().equal(data.classes)


# What it makes.


@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
@pytest.mark.parametrize("objective", ["gradient", "distribution"])
def test_a_set_becomes_a_memory_within_its_budget(
    make_set: MakeSet, make_layout: MakeLayout, number_format: str, objective: str
) -> None:
    data = make_set()
    before = data.images.clone()
    memory = tiny(data, make_layout(number_format), objective=objective)
    check(memory, data)
    assert data.images.equal(before)
    assert memory.layout.number_format == number_format


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20), (1, 9, 15)])
def test_images_may_be_grey_and_need_not_be_square(
    make_set: MakeSet, make_layout: MakeLayout, shape: tuple[int, int, int]
) -> None:
    data = make_set(image_shape=shape)
    check(tiny(data, make_layout(image_shape=shape)), data)


def test_labels_may_be_any_integers(make_set: MakeSet, make_layout: MakeLayout) -> None:
    data = make_set(labels=(10**12, 5, -3))
    memory = tiny(data, make_layout())
    check(memory, data)
    assert memory.classes.tolist() == [-3, 5, 10**12]
    # Each class looks like its own images, not like another's.
    images, labels = tiny(data, make_layout(), warm_start_steps=150, outer_steps=0).decode()
    for label in memory.classes.tolist():
        own = data.floats(data.of_class(label)).mean()
        assert float(images[labels == label].mean()) == pytest.approx(float(own), abs=0.1)


def test_a_class_may_have_fewer_images_than_instance_memories(make_layout: MakeLayout) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (14, 3, 8, 8), generator=generator, dtype=torch.uint8)
    data = LabelledImages(images, torch.tensor([7] * 11 + [8] * 2 + [9]))
    memory = tiny(data, make_layout())
    # Of 10 images, one and two are all that the small classes have; the third gets the others.
    assert memory.images_per_class == [7, 2, 1]
    assert 0 <= memory.report["unused_bytes"] < 10


@pytest.mark.parametrize("num_images", [3, 6])
def test_a_class_has_no_more_images_than_real_ones(
    make_set: MakeSet, make_layout: MakeLayout, num_images: int
) -> None:
    data, layout = make_set(num_images=num_images), make_layout()
    enough = room_for(layout, 3, num_images)
    with pytest.warns(HMNReplayWarning, match=f"is planned for 10 .*; {enough:,} bytes are enough"):
        memory = tiny(data, layout)
    assert memory.images_per_class == [num_images // 3] * 3
    assert memory.report["unused_bytes"] == (memory.budget_bytes or 0) - enough
    assert memory.report["beta"] is None


@pytest.mark.parametrize("kind", LEARNED)
def test_a_budget_far_above_what_the_data_can_use_is_capped_and_said(kind: str) -> None:
    """A gigabyte for 20 images: no memory of millions is begun, in the kind's own format."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 8, 8), generator=generator, dtype=torch.uint8)
    with pytest.warns(HMNReplayWarning, match=r"real images for (20|16) of them only"):
        memory = condense((images, torch.arange(20) % 4), "1 GiB", kind=kind, **TINY)
    assert max(memory.images_per_class) <= 5
    assert memory.file_bytes < 20_000


def test_there_may_be_one_class_alone(make_set: MakeSet, make_layout: MakeLayout) -> None:
    data = make_set(labels=(4,))
    check(tiny(data, make_layout()), data)


def test_there_may_be_more_classes_than_a_step_draws(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    data = make_set(num_images=36, labels=tuple(range(12)))
    drawn = list[int]()

    def recorded(*batches: Any) -> Any:
        drawn.append(int(batches[4][0]))
        return gradient_matching(*batches)

    for classes_per_step, expected in ((5, 5), (None, 12), (99, 12)):
        drawn.clear()
        options = {"classes_per_step": classes_per_step, "objective": recorded, "beta_grid": ()}
        memory = tiny(data, make_layout(), **options)
        assert memory.report["objective"].endswith("recorded")
        del drawn[0]  # of the trial before any work
        draws = [drawn[i : i + expected] for i in range(0, len(drawn), expected)]
        assert len(draws) == 2 * 3
        assert all(len(set(draw)) == expected for draw in draws)
        assert len({tuple(draw) for draw in draws}) > 1  # another draw every step


def test_no_shared_value_is_clipped_in_the_end(make_set: MakeSet, make_layout: MakeLayout) -> None:
    memory = tiny(make_set(), make_layout("int8"), memory_learning_rate=0.1)
    # Those of images are of all that were condensed, the pruned ones too.
    names = [f"{name}_scale" for name, own in memory.tensors.items() if own.rows != "image"]
    scales = {name: value.clone() for name, value in memory.named_buffers() if name in names}
    assert len(scales) > 2
    memory.update_scales()
    for name, scale in scales.items():
        assert memory.get_buffer(name).equal(scale), name


def test_bfloat16_is_for_the_computation_alone(make_set: MakeSet, make_layout: MakeLayout) -> None:
    data = make_set()
    memory = tiny(data, make_layout(), precision="bfloat16")
    check(memory, data)
    assert all(parameter.dtype == torch.float32 for parameter in memory.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"warm_start_steps": 0},
        {"outer_steps": 0},
        {"inner_steps": 0},
        {"network_images": 0},
        {"over_budget": 0},
        {"over_budget": 2.0},
        {"beta_grid": (0.5,)},
        {"augmentations": ()},
        {"warm_start_batch": 1000, "real_batch": 1000, "decoded_batch": 1000},
        {
            "network": "resnet18",
            "outer_steps": 1,
            "inner_steps": 1,
            "beta_grid": (),
            "over_budget": 0,
        },
    ],
    ids=str,
)
def test_every_part_may_be_left_out_or_be_large(
    make_set: MakeSet, make_layout: MakeLayout, options: dict[str, Any]
) -> None:
    data = make_set()
    check(tiny(data, make_layout(), **options), data)


def test_the_layout_is_chosen_where_none_is_given(make_set: MakeSet) -> None:
    data = make_set(image_shape=(3, 32, 32))
    memory = condense(data, "60 KiB", **{**TINY, "warm_start_steps": 1, "outer_steps": 0})
    num_real = len(data) // data.num_classes
    assert memory.layout == HierarchicalMemory.choose_layout(
        "60 KiB", (3, 32, 32), 3, "entropy", num_real
    )
    assert memory.report["number_format"] == "entropy"
    assert memory.file_bytes <= 60 * 1024


def test_images_of_more_bytes_are_fewer(make_set: MakeSet) -> None:
    options: dict[str, Any] = {**TINY, "warm_start_steps": 1, "outer_steps": 0}
    memories = [
        condense(make_set(300), "3 KiB", image_bytes=image_bytes, **options)
        for image_bytes in (8, 24)
    ]
    assert [memory.layout.image_bytes for memory in memories] == [8, 24]
    assert memories[0].num_images > memories[1].num_images
    assert memories[1].report["image_bytes"] == 24
    with pytest.raises(ConfigError, match="image_bytes plans the code of an image"):
        condense(make_set(), "3 KiB", image_bytes=8, number_format="int8", **options)


@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
@pytest.mark.parametrize("effort", ["quick", "paper"])
def test_a_layout_decides_the_number_format(
    make_set: MakeSet, make_layout: MakeLayout, number_format: str, effort: str
) -> None:
    layout = make_layout(number_format)
    options = {**TINY, "warm_start_steps": 1, "outer_steps": 0, "over_budget": 0}
    budget = room_for(layout, 3, 10)
    memory = condense(make_set(), budget, effort=effort, layout=layout, **options)
    assert memory.layout == layout
    assert memory.report["number_format"] == number_format
    assert memory.report["effort"] == effort


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_the_precision_may_be_chosen(
    make_set: MakeSet, make_layout: MakeLayout, precision: str
) -> None:
    data = make_set()
    memory = tiny(data, make_layout(), precision=precision)
    check(memory, data)
    resolved = {"float32"} if precision == "float32" else {"float32", "bfloat16"}
    assert memory.report["precision"] in resolved


def test_networks_are_compiled_where_it_pays_and_not_without_a_compiler(
    make_set: MakeSet, make_layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_config(max_seconds=299).network_training.compile is False
    assert make_config(network=("convnet", "vgg16")).network_training.compile is False
    assert make_config(max_seconds=299, compile=True).network_training.compile is True
    config = make_config(max_seconds=300, compile="auto")
    assert config.network_training.compile == config.expert_training.compile == "auto"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert tiny(make_set(), make_layout()).report["compile"] is False


def test_any_source_of_labelled_images_will_do(make_set: MakeSet, make_layout: MakeLayout) -> None:
    data, layout = make_set(), make_layout()
    budget = room_for(layout, 3, 10)
    expected = condense(data, budget, layout=layout, **TINY).to_bytes()
    for source in ((data.images, data.labels), [(data[i][0], data[i][1]) for i in range(24)]):
        assert condense(source, budget, layout=layout, **TINY).to_bytes() == expected


def test_what_was_saved_is_what_was_condensed(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    memory = tiny(make_set(), make_layout())
    memory.save(tmp_path / "memory.hmn")
    images, labels = memory.decode()
    loaded_images, loaded_labels = load(tmp_path / "memory.hmn").decode()
    assert loaded_images.numpy().tobytes() == images.numpy().tobytes()
    assert loaded_labels.equal(labels)


# That it learns.


def test_the_warm_start_brings_the_images_near_real_ones(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    data, layout = make_set(), make_layout()
    few, many = (
        tiny(data, layout, warm_start_steps=number, outer_steps=0).report["warm_start_psnr"]
        for number in (1, 100)
    )
    assert isinstance(few, float)
    assert isinstance(many, float)
    assert many > few + 3


@pytest.mark.parametrize("objective", [gradient_matching, distribution_matching])
def test_matching_moves_the_memory_to_a_lower_loss(
    make_set: MakeSet, make_layout: MakeLayout, objective: Callable[..., Any]
) -> None:
    losses: list[float] = []

    def recorded(*batches: Any) -> Any:
        loss = objective(*batches)
        losses.append(float(loss.detach()))
        return loss

    tiny(
        make_set(num_images=60),
        make_layout("float32"),
        objective=recorded,
        warm_start_steps=0,
        outer_steps=1,
        inner_steps=30,
        real_batch=100,
        decoded_batch=100,
        network_images=0,
        network_width=8,
        augmentations=(),
        over_budget=0,
        memory_learning_rate=0.02,
        beta_grid=(),
    )
    del losses[0]  # of the trial before any work
    assert len(losses) == 30 * 3
    assert sum(losses[-15:]) < 0.5 * sum(losses[:15])


# What it tells.


def test_the_report_tells_settings_and_measurements(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    report: dict[str, Any] = tiny(make_set(), make_layout(), seed=5).report
    assert report["kind"] == "hmn"
    assert report["effort"] == "quick"
    assert report["seed"] == 5
    assert {name: report[name] for name in TINY if name != "device"} == {
        name: value for name, value in TINY.items() if name != "device"
    }
    assert list(report["phases"]) == ["warm_start", "matching", "pruning"]
    for phase in report["phases"].values():
        assert phase["seconds"] > 0
        assert phase["images"] > 0
        assert phase["images_per_second"] == pytest.approx(phase["images"] / phase["seconds"])
        assert type(phase["peak_memory_bytes"]) is int
        assert phase["peak_memory_bytes"] >= 0
    assert report["seconds"] == pytest.approx(
        sum(phase["seconds"] for phase in report["phases"].values())
    )
    assert report["warm_start_psnr"] > 5
    assert list(report["beta_accuracies"]) == ["0.0", "1.0"]
    assert all(0 <= accuracy <= 1 for accuracy in report["beta_accuracies"].values())
    best = max(report["beta_accuracies"], key=report["beta_accuracies"].__getitem__)
    assert report["beta"] == float(best)
    json.dumps(report)


@pytest.mark.parametrize("options", [{"over_budget": 0}, {"labels": (4,)}], ids=str)
def test_where_nothing_was_pruned_there_is_no_beta(
    make_set: MakeSet, make_layout: MakeLayout, options: dict[str, Any]
) -> None:
    data = make_set(labels=options.pop("labels", (0, 1, 2)))
    report = tiny(data, make_layout(), **options).report
    assert report["beta"] is None
    assert report["beta_accuracies"] == {}


def test_without_a_warm_start_there_is_no_psnr(make_set: MakeSet, make_layout: MakeLayout) -> None:
    report = tiny(make_set(), make_layout(), warm_start_steps=0).report
    assert report["warm_start_psnr"] is None
    json.dumps(report)


def test_bars_are_for_those_who_ask(
    make_set: MakeSet, make_layout: MakeLayout, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny(make_set(), make_layout())
    assert capfd.readouterr() == ("", "")
    tiny(make_set(), make_layout(), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    for name in ("warm start", "matching", "AUM", "beta 0", "beta 1"):
        assert name in err
    assert "img/s" in err


# That the seed decides, and nothing else.


def test_the_seed_gives_the_file_bit_for_bit(make_set: MakeSet, make_layout: MakeLayout) -> None:
    data, layout = make_set(), make_layout()
    first = tiny(data, layout, seed=1).to_bytes()
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert tiny(data, layout, seed=1).to_bytes() == first
    assert tiny(data, layout, seed=2).to_bytes() != first


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bfloat16"}, {"objective": "distribution"}, {**TINY_MTT}],
    ids=["gradient", "bfloat16", "distribution", "mtt"],
)
def test_the_callers_modes_are_neither_read_nor_changed(
    make_set: MakeSet, make_layout: MakeLayout, options: dict[str, Any]
) -> None:
    data, layout = make_set(), make_layout()
    expected = tiny(data, layout, **options).to_bytes()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        made = tiny(data, layout, **options).to_bytes()
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert made == expected
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trained_networks": 1, "trained_passes": 20}, "of trained_networks=1 trained networks"),
        ({"objective": "mtt", "num_experts": 1}, "of num_experts=1 trained networks in all"),
    ],
)
def test_every_architecture_has_a_trained_network(
    make_set: MakeSet, make_layout: MakeLayout, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(make_set(), make_layout(), network=("convnet", "resnet18"), **options)


def test_a_refused_run_leaves_no_checkpoint(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    def too_narrow(image_shape: Sequence[int], num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), num_classes - 1))

    options = {"network": too_narrow, "objective": "dc", "checkpoint": tmp_path / "run.ckpt"}
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"logits \(B, K\), K of 3 or more"):
            tiny(make_set(), make_layout(), **options)
        assert not (tmp_path / "run.ckpt").exists()


def test_a_thread_that_draws_numbers_neither_disturbs_nor_is_disturbed(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    """All of its numbers come from torch's global generator, which nobody seeds or restores."""
    data, layout = make_set(), make_layout()
    options: dict[str, Any] = {"trained_networks": 1, "trained_passes": 20, "network_width": 96}
    options |= {"outer_steps": 1, "inner_steps": 1, "beta_grid": (0.5,), "pruning_width": 96}
    expected = tiny(data, layout, **options).to_bytes()
    drawn, is_over = [], threading.Event()

    def draw() -> None:
        while not is_over.wait(timeout=1e-3):
            drawn.append(float(torch.rand(())))

    state = torch.get_rng_state()
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        made = tiny(data, layout, **options).to_bytes()
    finally:
        is_over.set()
        thread.join()
    assert made == expected and drawn
    torch.set_rng_state(state)
    assert drawn == [float(torch.rand(())) for _ in drawn]
    torch.set_rng_state(state)


def test_calls_in_several_threads_do_not_mix(make_set: MakeSet, make_layout: MakeLayout) -> None:
    data, layout = make_set(), make_layout()
    expected = tiny(data, layout).to_bytes()
    with ThreadPoolExecutor(3) as pool:
        memories = list(pool.map(lambda _: tiny(data, layout), range(3)))
    assert [memory.to_bytes() == expected for memory in memories] == [True] * 3


def test_settings_may_be_given_as_an_object(make_set: MakeSet, make_layout: MakeLayout) -> None:
    data, layout = make_set(), make_layout()
    budget = room_for(layout, 3, 10)
    options = {name: value for name, value in TINY.items() if name != "device"}
    config = CondenseConfig(**options)
    memory = condense(data, budget, layout=layout, config=config, device="cpu")
    assert memory.to_bytes() == tiny(data, layout).to_bytes()
    with pytest.raises(ConfigError, match="give it alone, without effort="):
        condense(data, budget, layout=layout, config=config, effort="paper")


# What it refuses.


@pytest.mark.parametrize(
    "options",
    [
        {"warm_start_learning_rate": 1e30, "outer_steps": 0},
        {"memory_learning_rate": 1e30},
        {"network_learning_rate": 1e30},
    ],
    ids=str,
)
@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
def test_an_optimisation_that_diverges_is_told(
    make_set: MakeSet,
    make_layout: MakeLayout,
    number_format: str,
    options: dict[str, Any],
) -> None:
    with pytest.raises(TrainingError, match=r"lower .*learning.rate"):
        tiny(make_set(), make_layout(number_format), **options).to_bytes()


def test_a_budget_too_small_is_refused_with_one_that_does(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    data, layout = make_set(), make_layout()
    with pytest.raises(BudgetError, match="the smallest that does is") as error:
        tiny(data, layout, budget=999)
    smallest = re.findall(r"([\d,]+) bytes", str(error.value))[-1]
    memory = tiny(data, layout, budget=f"{smallest.replace(',', '')} B")
    check(memory, data)
    assert memory.images_per_class == [1, 1, 1]


def test_the_budget_is_that_of_the_memory_that_is_added_to(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    memory = tiny(make_set(labels=(1, 2)), make_layout(), budget=1600)
    options, budget = {"memory": memory, **TINY}, memory.budget_bytes
    assert budget is not None
    grown = condense(make_set(labels=(7,)), **options)
    assert grown.to_bytes() == condense(make_set(labels=(7,)), budget, **options).to_bytes()
    assert grown.classes.tolist() == [1, 2, 7]
    assert grown.file_bytes <= budget == grown.budget_bytes
    memory.budget_bytes = None
    with pytest.raises(BudgetError, match="expected a budget, or a memory to add to that has one"):
        condense(make_set(labels=(7,)), **options)
    with pytest.raises(BudgetError, match='got neither; pass the bytes of the file, such as "120 '):
        condense(make_set())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"effort": "slow"}, ConfigError, "effort must be one of draft, quick"),
        ({"outer_step": 3}, UnknownOptionError, "no option 'outer_step'; did you mean"),
        ({"outer_steps": -1}, ConfigError, "outer_steps must be greater than or equal to 0"),
        ({"config": CondenseConfig()}, ConfigError, "without beta_grid="),
        ({"device": "gpu"}, ConfigError, "device 'gpu' cannot be used"),
        ({"number_format": "float32"}, ConfigError, "the layout is for int8 images of"),
        ({"budget": "much"}, BudgetError, "cannot read 'much' as a budget"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_an_option_that_cannot_be_is_refused(
    make_set: MakeSet,
    make_layout: MakeLayout,
    options: dict[str, Any],
    error: type[HMNReplayError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        tiny(make_set(), make_layout(), **options)


def test_data_that_cannot_be_is_refused(make_set: MakeSet, make_layout: MakeLayout) -> None:
    with pytest.raises(
        ConfigError, match=r"the layout is for int8 images of \(3, 8, 8\); the data"
    ):
        tiny(make_set(image_shape=(3, 9, 8)), make_layout())
    with pytest.raises(DataError, match=r"8 to 224 pixels; got 6 x 6 .*\(data, size=8\)"):
        condense(make_set(image_shape=(3, 6, 6)), "1 MiB", **TINY)
    with pytest.raises(DataError):
        condense((torch.full((4, 3, 8, 8), float("nan")), torch.zeros(4)), "1 MiB", **TINY)


def test_condensation_is_the_same_inside_other_modes(
    make_layout: MakeLayout, make_set: MakeSet
) -> None:
    data = make_set()
    wanted = tiny(data, make_layout())
    with torch.inference_mode():
        memory = tiny(make_set(), make_layout())
        budget = room_for(memory.layout, 5, 17)
        grown = tiny(make_set(labels=(7, 8)), memory.layout, memory=memory, budget=budget)
    assert memory.to_bytes() == wanted.to_bytes()
    assert grown.num_classes == 5
    options = {"trained_networks": 1, "trained_passes": 20}
    trained = tiny(data, make_layout(), **options)
    labels = LabelConfig(labels="soft", teacher_width=4, teacher_passes=20)
    teacher = train_teacher(data, labels, device="cpu")
    given = {**labels.model_dump(), "teacher": teacher, "budget": 1_720}
    labelled = tiny(data, make_layout(), **given)
    torch.set_default_dtype(torch.float64)
    try:
        assert tiny(data, make_layout()).to_bytes() == wanted.to_bytes()
        assert tiny(data, make_layout(), **options).to_bytes() == trained.to_bytes()
        assert tiny(data, make_layout(), **given).to_bytes() == labelled.to_bytes()
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_seed_that_is_no_integer_is_refused(make_layout: MakeLayout, make_set: MakeSet) -> None:
    with pytest.raises(ConfigError, match="seed must be an integer, got None"):
        tiny(make_set(), make_layout(), seed=None)


# Entropy-coded memories.


LONGER = {"warm_start_steps": 100, "warm_start_batch": 30, "outer_steps": 0}


def textured(num_images: int = 60) -> LabelledImages:
    """Images with structure at several scales, so that bits buy likeness."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(num_images, 3, 2, 2, generator=generator)
    fine = torch.rand(num_images, 3, 8, 8, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear")
    return LabelledImages(
        (0.8 * images + 0.2 * fine).mul(255).to(torch.uint8), torch.arange(num_images) % 3
    )


def test_a_coded_memory_fills_its_budget_without_a_knob(make_layout: MakeLayout) -> None:
    layout = make_layout("entropy", image_bytes=3, instance_channels=4)
    budget = room_for(layout, 3, 60)
    options = {**LONGER, "warm_start_steps": 200, "over_budget": 0.0}
    memory = condense(textured(), budget, layout=layout, **{**TINY, **options})
    assert memory.num_images == HierarchicalMemory.max_images(layout, budget, 3)
    assert 0.97 * budget < memory.file_bytes == len(memory.to_bytes()) <= budget


def test_coded_images_are_pruned_in_bytes(make_layout: MakeLayout) -> None:
    layout = make_layout("entropy", image_bytes=8, instance_channels=8)
    budget = room_for(layout, 3, 60)
    options = {**LONGER, "over_budget": 0.3, "beta_grid": (0.5,)}
    memory = condense(textured(90), budget, layout=layout, **{**TINY, **options})
    assert 60 <= memory.num_images < 78
    assert 0.97 * budget < memory.file_bytes <= budget
    assert max(memory.images_per_class) - min(memory.images_per_class) <= 1


def test_more_bits_an_image_make_it_more_like_what_it_was(make_layout: MakeLayout) -> None:
    psnr: list[Any] = []
    for image_bytes in (2, 6):
        layout = make_layout("entropy", image_bytes=image_bytes, instance_channels=8)
        budget = room_for(layout, 3, 60)
        memory = condense(textured(), budget, layout=layout, **{**TINY, **LONGER})
        psnr.append(memory.report["warm_start_psnr"])
    assert psnr == sorted(psnr)
    assert psnr[-1] > psnr[0] + 1


def test_dropping_coded_images_gives_their_bytes_back(make_layout: MakeLayout) -> None:
    layout = make_layout("entropy", image_bytes=5)
    memory = condense(textured(), room_for(layout, 3, 60), layout=layout, **TINY)
    images, _ = memory.decode()
    before = memory.file_bytes
    kept = range(0, memory.num_images, 3)
    memory.keep(kept)
    assert memory.file_bytes < before - 0.4 * 5 * (len(images) - len(kept))
    assert memory.file_bytes == len(memory.to_bytes())
    assert memory.decode()[0].equal(images[::3])


@pytest.mark.parametrize("kind", [kind for kind in LEARNED if not learned_type(kind).codes_entropy])
def test_another_kind_is_not_entropy_coded(kind: str, make_set: MakeSet) -> None:
    with pytest.raises(ConfigError, match="number format"):
        condense(make_set(), "9 KiB", kind=kind, **TINY, number_format="entropy")


@pytest.mark.parametrize("kind", LEARNED)
def test_every_kind_is_condensed(kind: str, make_set: MakeSet) -> None:
    data, layout = make_set(60), LAYOUTS[kind]((3, 8, 8), "int8")
    budget = room_for(layout, 3, 4 * 3 * layout.group_size)
    memory = tiny(data, layout, budget=budget)
    assert memory.report["kind"] == memory.kind == kind
    assert memory.images_per_class == [4 * layout.group_size] * 3
    assert len(memory.to_bytes()) == memory.file_bytes <= budget


@pytest.mark.parametrize("kind", REAL)
def test_nothing_is_condensed_in_a_kind_of_real_images(kind: str, make_set: MakeSet) -> None:
    with pytest.raises(ConfigError, match=f"'{kind}' holds real images"):
        condense(make_set(), "9 KiB", kind=kind, **TINY)


def test_a_checkpoint_in_a_folder_that_is_not_there_is_refused(
    make_set: MakeSet, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="No such folder"):
        condense(make_set(), "9 KiB", checkpoint=tmp_path / "absent/run", **TINY)
    assert not list(tmp_path.iterdir())


def test_an_unknown_kind_is_refused(make_set: MakeSet) -> None:
    with pytest.raises(ConfigError, match=r"must be one of .*; did you mean 'pixels'"):
        condense(make_set(), "9 KiB", kind="pixel", **TINY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "x"}, "memory is one to add to, such as condense"),
        ({"layout": "x"}, "the layout of memory kind 'hmn' is a HMNLayout; got 'x'"),
        ({"kind": ["hmn"]}, "memory kind must be one of"),
        ({"config": "x"}, "config is a CondenseConfig; got 'x'"),
        ({"team": "x"}, "team is what hmn_replay.distributed.join"),
        ({"checkpoint": 3}, "checkpoint is the path of a file; got 3"),
        ({"checkpoint": "a\0b"}, "checkpoint is the path of a file"),
        ({"experts": "a\0b"}, "experts must match pattern"),
        ({"warm_start_learning_rate": 1e38}, "warm_start_learning_rate must be less than"),
        ({"num_experts": 10**30}, "num_experts must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_argument_of_another_type_is_refused_in_a_line(
    make_set: MakeSet, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        condense(make_set(), "2 kB", **options)


@pytest.mark.filterwarnings("ignore:the budget of .* is planned for")
@pytest.mark.parametrize("kind", LEARNED)
def test_the_largest_learning_rates_end_in_a_memory_or_in_a_line(
    make_set: MakeSet, kind: str
) -> None:
    rates = {
        "warm_start_learning_rate": MAX_LEARNING_RATE,
        "memory_learning_rate": MAX_LEARNING_RATE,
        "network_learning_rate": MAX_LEARNING_RATE,
    }
    with contextlib.suppress(TrainingError):
        memory = condense(make_set(), "6 kB", kind=kind, **{**TINY, **rates})
        assert memory.decode()[0].isfinite().all()


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_batches_by_order_leave_room_for_labels(
    make_set: MakeSet, make_layout: MakeLayout, labels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    least: list[int] = []
    match = steps.match_step

    def note(context: steps.StepContext, *args: Any, **kwargs: Any) -> int:
        assert context.least_images is not None
        least.append(context.least_images)
        return match(context, *args, **kwargs)

    monkeypatch.setattr(steps, "match_step", note)
    data, layout = make_set(num_images=90), make_layout()
    budget = room_for(layout, 6, 30)
    options = {"pruning": "order", "beta_grid": (), "teacher_passes": 32, "labels": labels}
    tiny(data, layout, budget=budget, expected_classes=6, **options)
    hard = HierarchicalMemory.max_images(layout, budget, 6) // 6
    assert hard == 5
    assert least and all(0 < each < hard if labels == "soft" else each == hard for each in least)


@pytest.mark.parametrize("expected_classes", ["ten", -5, 5000, 0])
def test_a_number_of_classes_that_cannot_be_is_refused_whatever_else_is_given(
    make_set: MakeSet, make_layout: MakeLayout, expected_classes: Any
) -> None:
    data = make_set()
    memory = tiny(data, make_layout())
    for given in ({"memory": memory}, {"layout": make_layout()}, {}):
        with pytest.raises(ConfigError, match="expected_classes is 1 to 1000; got"):
            condense(data, 5000, expected_classes=expected_classes, **given, **TINY)


@pytest.mark.parametrize("seed", [np.int64(3), torch.tensor(3)], ids=["numpy", "torch"])
def test_seeds_are_integers_of_any_library(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path, seed: Any
) -> None:
    options: dict[str, Any] = {"trained_networks": 1, "trained_passes": 24, "beta_grid": ()}
    memory = tiny(make_set(), make_layout(), seed=seed, checkpoint=tmp_path / "run", **options)
    assert memory.to_bytes() == tiny(make_set(), make_layout(), seed=3, **options).to_bytes()
    assert json.loads(json.dumps(memory.report))["seed"] == 3


def test_something_has_to_be_learned(make_set: MakeSet, make_layout: MakeLayout) -> None:
    with pytest.raises(ConfigError, match=r"nothing is learned: set .* got 0, 0 and 3"):
        tiny(make_set(), make_layout(), warm_start_steps=0, outer_steps=0)


def _towards(value: float, network: Any, *batches: Tensor) -> Tensor:
    del network
    return (batches[2] - value).square().mean()


def test_images_are_pruned_by_scores_of_ones_own(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def brightness(images: Tensor, class_indices: Tensor) -> Tensor:
        scores = images.mean(dim=(1, 2, 3))
        calls.append((images, class_indices, scores))
        return scores

    memory = tiny(make_set(), make_layout(), pruning=brightness, beta=1.0, beta_grid=())
    assert len(calls) == 2  # before any work, and in the end
    images, classes, scores = calls[-1]
    assert len(images) > memory.num_images
    kept, labels = memory.decode()
    for label in classes.unique().tolist():
        stay = labels == memory.classes[label]
        brightest = scores[classes == label].sort(descending=True).values[: int(stay.sum())]
        torch.testing.assert_close(
            kept[stay].mean(dim=(1, 2, 3)).sort(descending=True).values, brightest
        )
    assert memory.report["pruning"] == f"{__name__}.{brightness.__qualname__}"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda images: images.mean(dim=(1, 2, 3)).tolist(), "as a tensor; .* returned"),
        (lambda images: images.mean(), r"returned torch.float32 \(\)"),
        (lambda images: images.mean(dim=(1, 2, 3)) / 0 * 0, "returned NaN or infinity"),
    ],
)
def test_what_is_no_score_of_each_image_is_refused_before_any_work(
    returned: Callable[[Tensor], Any],
    message: str,
    make_set: MakeSet,
    make_layout: MakeLayout,
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=f"a finite number for each of the .*{message}"):
        tiny(
            make_set(),
            make_layout(),
            pruning=lambda images, _: returned(images),
            beta_grid=(),
            checkpoint=tmp_path / "run",
        )
    assert not list(tmp_path.iterdir())


def test_scores_of_ones_own_may_be_drawn_at_random(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    def drawn(images: Tensor, _: Tensor) -> Tensor:
        return torch.rand(len(images))

    files = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            files.append(tiny(make_set(), make_layout(), pruning=drawn, beta_grid=()).to_bytes())
            assert torch.get_rng_state().equal(before)
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning": lambda images: images}, r"pruning is called with \(images, class_indices\)"),
        ({"objective": lambda network, images: images}, r"objective is called with \(network, .*"),
        ({"objective": lambda *_: None}, "an objective must return a scalar tensor"),
        (
            {"objective": lambda network, *_: next(network.parameters()).sum()},
            "does not depend on decoded_images",
        ),
        (
            {"objective": lambda _, real, __, own, ___: -(real.mean() * own.mean())},
            r"is -0\.\d+ for real images .* return a distance: finite, and 0 or more",
        ),
        ({"experts": "file", "trained_networks": 1}, "A file stands where the folder"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_work_and_without_a_checkpoint(
    options: dict[str, Any],
    message: str,
    make_set: MakeSet,
    make_layout: MakeLayout,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises((ConfigError, OSError), match=message):
        tiny(make_set(), make_layout(), **options, beta_grid=(), checkpoint=tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_labeller_that_does_not_know_added_classes_is_not_lost_silently(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    options = {"pruning": "order", "beta_grid": (), "teacher_passes": 32, "labeller_width": 2}
    layout = make_layout()
    budget = room_for(layout, 5, 20) + 2500
    memory = tiny(make_set(330), layout, budget=budget, labels="labeller", **options)
    assert memory.labeller is not None
    more = make_set(330, labels=(3, 4))
    with pytest.warns(HMNReplayWarning, match="labeller does not know the classes") as caught:
        grown = tiny(more, layout, budget=budget, memory=memory, **options)
    assert grown.labeller is None and caught[0].filename.endswith("support.py")
    again = tiny(more, layout, budget=budget, memory=memory, labels="labeller", **options)
    assert again.labeller is not None


def test_an_objective_that_is_not_finite_is_refused_before_any_work(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    def endless(network: Any, real: Tensor, _: Any, decoded: Tensor, __: Any) -> Tensor:
        return decoded.sum() * math.inf

    with pytest.raises(ConfigError, match=r"endless is -?(inf|nan) for real images"):
        tiny(make_set(), make_layout(), objective=endless)


def test_what_an_objective_learns_from_is_checked() -> None:
    with pytest.raises(
        ConfigError, match=r"learns_from must be one of real, .*did you mean 'real'"
    ):
        Objective(gradient_matching, learns_from="Real")  # type: ignore[arg-type]


def test_a_checkpoint_knows_functions_of_one_name_apart(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    def scaled(factor: float) -> Any:
        def match(network: Any, real: Tensor, _: Any, decoded: Tensor, __: Any) -> Tensor:
            return factor * (decoded.mean(dim=0) - real.mean(dim=0)).square().sum()

        return match

    def narrow(width: int) -> Any:
        return lambda shape, num_classes: build_network("convnet", shape, num_classes, width=width)

    def run(objective: Any, network: Any) -> LearnedMemory:
        options = {"checkpoint": tmp_path / "run", "beta_grid": ()}
        return tiny(make_set(), make_layout(), objective=objective, network=(network,), **options)

    done = run(scaled(1.0), narrow(2))
    assert run(scaled(1.0), narrow(2)).to_bytes() == done.to_bytes()
    for other in ((scaled(2.0), narrow(2)), (scaled(1.0), narrow(3))):
        with pytest.raises(CheckpointError, match="another run, with other functions"):
            run(*other)


def test_a_checkpoint_knows_what_an_objective_was_given(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    def run(objective: Any) -> LearnedMemory:
        path = tmp_path / "run"
        return tiny(make_set(), make_layout(), objective=objective, checkpoint=path, beta_grid=())

    first = partial(_towards, 0.0)
    name = f"{__name__}._towards(0.0)"
    assert run(first).report["objective"] == name
    for other in (partial(_towards, 1.0), Objective(first, augments=False)):
        with pytest.raises(CheckpointError, match=r"with (other )?objective"):
            run(other)
    assert get_objective(other).name == f"{name}(augments=False)"
