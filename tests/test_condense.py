"""Condensation from end to end on tiny data: what it makes, and that it can be interrupted."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hmn_replay import steps
from hmn_replay.condense import condense
from hmn_replay.data import LabelledImages
from hmn_replay.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    HMNReplayError,
    TrainingError,
)
from hmn_replay.formats import NUMBER_FORMATS, NumberFormat
from hmn_replay.layout import Layout
from hmn_replay.matching import get_objective
from hmn_replay.memory import HierarchicalMemory
from hmn_replay.runtime import peak_memory_bytes
from hmn_replay.storage import load, serialise

MakeLayout = Callable[..., Layout]
MakeSet = Callable[..., LabelledImages]

# The package's attribute of this name is the function.
MODULE = importlib.import_module("hmn_replay.condense")

TINY: dict[str, Any] = {
    "device": "cpu",
    "warm_start_steps": 4,
    "warm_start_batch": 5,
    "outer_steps": 2,
    "inner_steps": 3,
    "real_batch": 3,
    "decoded_batch": 3,
    "network_width": 3,
    "network_images": 8,
    "network_batch": 4,
    "beta_grid": (0.0, 1.0),
    "over_budget": 0.3,
    "pruning_passes": 20,
    "pruning_width": 3,
}

pytestmark = pytest.mark.usefixtures("untouched_random_state")


class Interruption(Exception):
    pass


def tiny(data: LabelledImages, layout: Layout, **options: Any) -> HierarchicalMemory:
    budget = options.pop("budget", None)
    if budget is None:
        num_classes = data.num_classes
        budget = layout.file_bytes(num_classes, 3 * num_classes + 1, 10**4)
    return condense(data, budget, layout=layout, **{**TINY, **options})


def check(memory: HierarchicalMemory, data: LabelledImages) -> None:
    """Check what holds for every memory that was condensed."""
    assert memory.budget_bytes is not None
    assert len(serialise(memory)) == memory.file_bytes <= memory.budget_bytes
    assert memory.num_images == memory.layout.max_images(memory.budget_bytes, data.num_classes)
    assert memory.classes.equal(data.classes)
    assert max(memory.images_per_class) - min(memory.images_per_class) <= 1
    images, labels = memory.decode()
    assert images.shape == (memory.num_images, *data.image_shape)
    assert bool(images.isfinite().all())
    assert labels.unique().equal(data.classes)


def count_calls(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[int]:
    """Count the calls of a function that a module uses."""
    function, calls = getattr(module, name), [0]

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        return function(*args, **options)

    monkeypatch.setattr(module, name, counted)
    return calls


def interrupt(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    name: str,
    number: int,
    error: BaseException | None = None,
) -> None:
    """Let the call of that number, counted from 0, raise."""
    function, calls = getattr(module, name), [0]

    def interrupted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > number:
            raise error or Interruption
        return function(*args, **options)

    monkeypatch.setattr(module, name, interrupted)


# What it makes.


@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
@pytest.mark.parametrize("objective", ["gradient", "distribution"])
def test_a_set_becomes_a_memory_within_its_budget(
    make_set: MakeSet, make_layout: MakeLayout, number_format: NumberFormat, objective: str
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
    check(memory, data)
    assert min(memory.images_per_class) == 3


def test_every_class_may_have_a_single_image(make_set: MakeSet, make_layout: MakeLayout) -> None:
    data = make_set(num_images=3)
    memory = tiny(data, make_layout())
    check(memory, data)
    assert memory.report["beta"] == 0.0  # nothing can be held out: the first of the grid is taken
    assert memory.report["beta_accuracies"] == {}


def test_there_may_be_one_class_alone(make_set: MakeSet, make_layout: MakeLayout) -> None:
    data = make_set(labels=(4,))
    check(tiny(data, make_layout()), data)


def test_there_may_be_more_classes_than_a_step_draws(
    make_set: MakeSet, make_layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_set(num_images=36, labels=tuple(range(12)))
    original, drawn = get_objective, list[int]()

    def watched(name: str) -> Any:
        def record(*batches: Any) -> Any:
            drawn.append(int(batches[4][0]))
            return original(name)(*batches)

        return record

    monkeypatch.setattr(steps, "get_objective", watched)
    for classes_per_step, expected in ((5, 5), (None, 12), (99, 12)):
        drawn.clear()
        check(tiny(data, make_layout(), classes_per_step=classes_per_step), data)
        draws = [drawn[i : i + expected] for i in range(0, len(drawn), expected)]
        assert len(draws) == 2 * 3
        assert all(len(set(draw)) == expected for draw in draws)
        assert len({tuple(draw) for draw in draws}) > 1  # another draw every step


def test_no_shared_value_is_clipped_in_the_end(make_set: MakeSet, make_layout: MakeLayout) -> None:
    memory = tiny(make_set(), make_layout("int8"), memory_learning_rate=0.1)
    names = ("dataset_scale", "class_scale", "extractor_scale", "decoder_scale")
    scales = {name: memory.get_buffer(name).clone() for name in names}
    memory.update_scales()
    for name in names:
        assert memory.get_buffer(name).equal(scales[name]), name


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
        {"network": "resnet18", "outer_steps": 1, "inner_steps": 1, "beta_grid": (0.0,)},
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
    check(memory, data)
    assert memory.layout == Layout.choose("60 KiB", (3, 32, 32), 3, "int8")
    assert memory.file_bytes > 0.97 * 60 * 1024


@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
@pytest.mark.parametrize("effort", ["quick", "paper"])
def test_a_layout_decides_the_number_format(
    make_set: MakeSet, make_layout: MakeLayout, number_format: NumberFormat, effort: str
) -> None:
    layout = make_layout(number_format)
    options = {**TINY, "warm_start_steps": 1, "outer_steps": 0, "over_budget": 0}
    budget = layout.file_bytes(3, 10, 10_000)
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
    assert memory.report["precision"] == precision


def test_any_source_of_labelled_images_will_do(make_set: MakeSet, make_layout: MakeLayout) -> None:
    data, layout = make_set(), make_layout()
    budget = layout.file_bytes(3, 10, 10_000)
    expected = serialise(condense(data, budget, layout=layout, **TINY))
    for source in ((data.images, data.labels), [(data[i][0], data[i][1]) for i in range(24)]):
        assert serialise(condense(source, budget, layout=layout, **TINY)) == expected


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


@pytest.mark.parametrize("objective", ["gradient", "distribution"])
def test_matching_moves_the_memory_to_a_lower_loss(
    make_set: MakeSet,
    make_layout: MakeLayout,
    objective: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses: list[float] = []
    original = get_objective

    def watched(name: str) -> Any:
        function = original(name)

        def record(*batches: Any) -> Any:
            loss, gradient = function(*batches)
            losses.append(float(loss))
            return loss, gradient

        return record

    monkeypatch.setattr(steps, "get_objective", watched)
    tiny(
        make_set(num_images=60),
        make_layout("float32"),
        objective=objective,
        warm_start_steps=0,
        outer_steps=1,
        inner_steps=60,
        real_batch=100,
        decoded_batch=100,
        network_images=0,
        network_width=8,
        augmentations=(),
        over_budget=0,
        memory_learning_rate=0.01,
    )
    assert len(losses) == 60 * 3
    assert sum(losses[-15:]) < 0.5 * sum(losses[:15])


# What it tells.


def test_the_report_tells_settings_and_measurements(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    report: dict[str, Any] = tiny(make_set(), make_layout(), seed=5).report
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
    peaks = [phase["peak_memory_bytes"] for phase in report["phases"].values()]
    assert 0 <= peaks[0] <= peaks[1] <= peaks[2] <= peak_memory_bytes(torch.device("cpu"))
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
    first = serialise(tiny(data, layout, seed=1))
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert serialise(tiny(data, layout, seed=1)) == first
    assert serialise(tiny(data, layout, seed=2)) != first


def test_the_callers_settings_are_neither_read_nor_changed(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    data, layout = make_set(), make_layout()
    expected = serialise(tiny(data, layout))
    with torch.no_grad():
        assert serialise(tiny(data, layout)) == expected
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


# That it can be interrupted.


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_CHECKPOINT_SECONDS", 0.0)


def test_checkpoints_change_nothing(
    make_set: MakeSet,
    make_layout: MakeLayout,
    tmp_path: Path,
    every_step: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, layout = make_set(), make_layout()
    path = tmp_path / "run.checkpoint"
    memory = tiny(data, layout, checkpoint=path)
    assert serialise(memory) == serialise(tiny(data, layout))
    assert os.listdir(tmp_path) == [path.name]
    # What was done is not done again.
    for module, name in ((steps, "warm_start_step"), (steps, "match_step"), (MODULE, "score")):
        interrupt(monkeypatch, module, name, 0)
    interrupt(monkeypatch, MODULE, "train_network", 0)
    again = tiny(data, layout, checkpoint=str(path))
    assert serialise(again) == serialise(memory)
    # What is left, to drop the images that go, is measured anew.
    before, after = dict[str, Any](memory.report), dict[str, Any](again.report)
    del before["seconds"], after["seconds"]
    for name in ("seconds", "images_per_second", "peak_memory_bytes"):
        before["phases"]["pruning"].pop(name)
        after["phases"]["pruning"].pop(name)
    assert after == before


def test_interrupted_at_any_checkpoint_it_ends_as_if_it_had_not_been(
    make_set: MakeSet,
    make_layout: MakeLayout,
    tmp_path: Path,
    every_step: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, layout = make_set(), make_layout()
    with monkeypatch.context() as patch:
        calls = count_calls(patch, MODULE, "write_checkpoint")
        expected = serialise(tiny(data, layout, checkpoint=tmp_path / "whole"))
    num_writes = calls[0]
    assert num_writes > 4 + 2 * 3 + 2
    for number in [*random.Random(0).sample(range(num_writes - 2), 8), num_writes - 2]:
        path = tmp_path / f"interrupted at {number}"
        with monkeypatch.context() as patch:
            interrupt(patch, MODULE, "write_checkpoint", number)
            with pytest.raises(Interruption):
                tiny(data, layout, checkpoint=path)
        assert serialise(tiny(data, layout, checkpoint=path)) == expected, number


@pytest.mark.parametrize("number_format", ["float32", "int8"])
@pytest.mark.parametrize("objective", ["gradient", "distribution"])
def test_interrupted_again_and_again_between_rare_checkpoints_it_ends_the_same(
    make_set: MakeSet,
    make_layout: MakeLayout,
    tmp_path: Path,
    number_format: NumberFormat,
    objective: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, layout = make_set(), make_layout(number_format)
    options: dict[str, Any] = {"objective": objective, "network_images": 4, "seed": 3}
    expected = serialise(tiny(data, layout, **options))
    rng = random.Random(0)
    ticks = [0.0]

    def monotonic() -> float:
        ticks[0] += rng.choice((0.0, 30.0))
        return ticks[0]

    monkeypatch.setattr("time.monotonic", monotonic)
    path, num_interruptions = tmp_path / "run.checkpoint", 0
    places = [
        (MODULE, "cosine_rate", 3),
        (steps, "draw_batch", 3),
        (steps, "draw_augmentation", 7),
        (MODULE, "margins", 1),
        (MODULE, "score", 1),
    ]
    for module, name, latest in places * 2:
        with monkeypatch.context() as patch:
            interrupt(patch, module, name, rng.randrange(latest), KeyboardInterrupt())
            try:
                memory = tiny(data, layout, checkpoint=path, **options)
            except KeyboardInterrupt:
                num_interruptions += 1
                continue
        assert serialise(memory) == expected
    assert num_interruptions >= 5
    assert serialise(tiny(data, layout, checkpoint=path, **options)) == expected


def test_an_error_while_writing_leaves_the_checkpoint_before(
    make_set: MakeSet,
    make_layout: MakeLayout,
    tmp_path: Path,
    every_step: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, layout, path = make_set(), make_layout(), tmp_path / "run.checkpoint"
    replace, calls = os.replace, [0]

    def full(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise OSError(28, "No space left on device")
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="No space left"):
            tiny(data, layout, checkpoint=path)
    assert os.listdir(tmp_path) == [path.name]
    memory = tiny(data, layout, checkpoint=path)
    assert serialise(memory) == serialise(tiny(data, layout))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"budget": 2222},
        {"real_batch": 4},
        {"beta_grid": (0.0, 0.5)},
        {"objective": "distribution"},
    ],
    ids=str,
)
def test_the_checkpoint_of_another_run_is_refused(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path, change: dict[str, Any]
) -> None:
    data, layout, path = make_set(), make_layout(), tmp_path / "run.checkpoint"
    tiny(data, layout, checkpoint=path, outer_steps=0)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="belongs to a run with other data, budget, seed or"):
        tiny(data, layout, checkpoint=path, outer_steps=0, **change)
    assert path.read_bytes() == before


def test_the_checkpoint_of_other_data_or_shapes_is_refused(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    data, path = make_set(), tmp_path / "run.checkpoint"
    options: dict[str, Any] = {"checkpoint": path, "outer_steps": 0, "budget": 3000}
    tiny(data, make_layout(), **options)
    images = data.images.clone()
    images[-1, -1, -1, -1] ^= 1
    others = [
        LabelledImages(images, data.labels),
        LabelledImages(data.images, data.labels.flip(0)),
    ]
    for other in others:
        with pytest.raises(CheckpointError, match="other data"):
            tiny(other, make_layout(), **options)
    with pytest.raises(CheckpointError, match="other data"):
        tiny(data, make_layout(class_channels=1), **options)


def test_a_damaged_checkpoint_is_refused(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    data, layout, path = make_set(), make_layout(), tmp_path / "run.checkpoint"
    tiny(data, layout, checkpoint=path, outer_steps=0)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-9] ^= 1
    for damaged in (b"", whole[:50], whole[:-1], bytes(flipped), b"\0" * 999):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"delete '.*' to start anew"):
            tiny(data, layout, checkpoint=path, outer_steps=0)
        assert path.read_bytes() == damaged


KILLED = """
    import json, os, random, signal, sys, time
    import torch, torch._dynamo
    from hmn_replay.condense import condense
    from hmn_replay.layout import Layout

    torch.set_num_threads(1)
    sys.modules["hmn_replay.condense"]._CHECKPOINT_SECONDS = 0.0
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    layout = Layout((3, 8, 8), "int8", 4, 3, 2, 2, 2, (5, 4))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(24) % 3

    def start(name):
        # Torch is imported once: each run is a process of its own all the same.
        child = os.fork()
        if child:
            return child
        try:
            path = os.path.join(folder, name)
            memory = condense(
                (images, labels), 1900, layout=layout, checkpoint=path + ".checkpoint", **options
            )
            memory.save(path)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def wait(child):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    begun = time.monotonic()
    assert wait(start("whole")) == 0
    seconds = time.monotonic() - begun
    rng, kills = random.Random(int(sys.argv[3])), 0
    for _ in range(7):
        child = start("killed")
        time.sleep(rng.uniform(0.05, 0.5) * seconds)
        os.kill(child, signal.SIGKILL)
        code = wait(child)
        assert code in (0, -signal.SIGKILL), code
        if code == 0:
            break
        kills += 1
        assert not os.path.exists(os.path.join(folder, "killed"))
    else:
        assert wait(start("killed")) == 0
    print(json.dumps({"kills": kills, "seconds": seconds}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.timeout(120)
def test_a_process_killed_at_random_moments_ends_with_the_same_file(tmp_path: Path) -> None:
    options = json.dumps({**TINY, "inner_steps": 6})
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), options, "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["kills"] >= 1
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert load(tmp_path / "killed").num_classes == 3


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
    number_format: NumberFormat,
    options: dict[str, Any],
) -> None:
    with pytest.raises(TrainingError, match=r"lower .*learning.rate"):
        serialise(tiny(make_set(), make_layout(number_format), **options))


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"effort": "slow"}, ConfigError, "effort is one of quick"),
        ({"outer_step": 3}, ConfigError, "no option 'outer_step'"),
        ({"outer_steps": -1}, ConfigError, "outer_steps must be 0 or more"),
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
    with pytest.raises(ConfigError, match="image_shape is"):
        condense(make_set(image_shape=(3, 6, 6)), "1 MiB", **TINY)
    with pytest.raises(DataError):
        condense((torch.full((4, 3, 8, 8), float("nan")), torch.zeros(4)), "1 MiB", **TINY)
