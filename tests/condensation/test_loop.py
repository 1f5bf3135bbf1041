"""The loop: its phases, and that a run goes on where it was stopped, to the same bits."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hmn_replay.budget import Budget
from hmn_replay.condensation.checkpoint import Checkpoint, flatten_state, write_checkpoint
from hmn_replay.condensation.config import make_config
from hmn_replay.condensation.matchers import BatchMatcher, RandomNetworks
from hmn_replay.condensation.steps import RealImages, StepContext, make_optimizer, set_lr
from hmn_replay.data.images import LabelledImages, mean_psnr
from hmn_replay.data.lookup import ImageLookup, Images
from hmn_replay.errors import BudgetError, CheckpointError, DistributedError, TrainingError
from hmn_replay.memory import HierarchicalMemory, HMNLayout, load
from hmn_replay.objectives import gradient_matching
from tests.support import (
    HMN_FIELDS,
    LAYOUTS,
    TINY,
    TINY_MTT,
    Observer,
    at_call,
    registered,
    room_for,
    tiny,
)

MakeLayout = Callable[..., HMNLayout]
MakeSet = Callable[..., LabelledImages]

EVERY_STEP: dict[str, Any] = {"checkpoint_seconds": 0}

pytestmark = pytest.mark.usefixtures("untouched_random_state")


class Interruption(Exception):
    pass


def stop() -> None:
    raise Interruption


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def state_of(checkpoint: Path) -> dict[str, Any]:
    with safe_open(checkpoint, framework="pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["hmn_replay_checkpoint"])["state"]
    return state


# The phases.


def test_old_and_new_images_are_scored_together(make_set: MakeSet, make_layout: MakeLayout) -> None:
    layout = make_layout()
    budget = room_for(layout, 4, 16)
    memory = tiny(make_set(labels=(0, 1)), layout, budget=budget)
    scored: list[int] = []
    team = Observer(add_up=lambda _, values: scored.append(values.numel()))
    options: dict[str, Any] = {"team": team, "beta_grid": ()}
    tiny(make_set(labels=(2, 3)), layout, budget=budget, memory=memory, **options)
    # All the old images, and the new ones with two a class that are over the budget.
    assert set(scored) == {memory.num_images + 2 * (4 + 2)}


def test_a_few_new_images_are_warmed_up_as_often_as_many(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    layout = make_layout()
    budget = room_for(layout, 6, 60)
    options: dict[str, Any] = {"warm_start_steps": 60, "outer_steps": 0, "over_budget": 0}
    memory = tiny(make_set(100, labels=(0, 1, 2, 3, 4)), layout, budget=budget, **options)
    grown = tiny(make_set(labels=(5,)), layout, budget=budget, memory=memory, **options)
    shown = [
        mem.report["phases"]["warm_start"]["images"] / num_new
        for mem, num_new in ((memory, memory.num_images), (grown, grown.images_per_class[-1]))
    ]
    assert shown[1] == pytest.approx(shown[0], rel=0.15)


class Movements:
    """How far the fastest values of a memory move from one step to the next."""

    def __init__(self) -> None:
        self.of_steps: list[float] = []
        self._before: dict[int, Tensor] = {}

    def __call__(self, _: int, parts: Any) -> None:
        now = {id(parameter): parameter.detach().clone() for parameter, _ in parts}
        if now.keys() == self._before.keys():
            moved = [float((now[key] - self._before[key]).abs().max()) for key in now]
            self.of_steps.append(max(moved))
        self._before = now


def test_seconds_end_a_phase_and_bring_its_rate_down(
    make_set: MakeSet, make_layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))  # a second at every look
    moved = Movements()
    bounds = {"warm_start_seconds": 30.0, "max_seconds": 90.0}
    many: dict[str, Any] = {"warm_start_steps": 10**6, "outer_steps": 10**6, "over_budget": 0}
    many |= {"network_images": 0, "team": Observer(sum_gradients=moved)}
    report: dict[str, Any] = tiny(make_set(), make_layout(), **bounds, **many).report
    warm_start, matching = (
        report["phases"][name]["seconds"] for name in ("warm_start", "matching")
    )
    assert 30 <= warm_start <= 33 and 90 <= warm_start + matching <= 93
    num_warm = round(warm_start) - 2
    assert moved.of_steps[num_warm - 1] < 0.1 * moved.of_steps[0]
    assert moved.of_steps[-1] < 0.1 * moved.of_steps[num_warm + 2]


def test_seconds_of_the_warm_start_are_its_own_and_matchings_bound_is_of_all(
    make_set: MakeSet, make_layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: 10.0 * next(clock))
    bounds = {"warm_start_seconds": 50.0, "max_seconds": 400.0, "outer_steps": 10**6}
    trained: dict[str, Any] = {"trained_networks": 5, "trained_passes": 24, "compile": False}
    memory = tiny(make_set(), make_layout(), warm_start_steps=10**6, **bounds, **trained)
    seconds = {name: phase["seconds"] for name, phase in memory.report["phases"].items()}
    assert seconds["experts"] > 50 <= seconds["warm_start"] <= 80
    assert 400 <= sum(seconds.values()) - seconds["pruning"] <= 430


def test_beta_is_the_one_whose_images_teach_most_about_held_out_ones(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    data, layout = make_set(num_images=60), make_layout()
    options: dict[str, Any] = {"over_budget": 1.0, "pruning_passes": 200}
    memory = tiny(data, layout, beta_grid=(0.0, 0.5, 1.0), **options)
    accuracies: dict[str, float] = memory.report["beta_accuracies"]
    assert list(accuracies) == ["0.0", "0.5", "1.0"]
    best = memory.report["beta"]
    assert accuracies[str(best)] == max(accuracies.values())
    # A grid of one value twice keeps as many images back, and chooses that value.
    for beta in (0.0, 1.0, best):
        alone = tiny(data, layout, beta_grid=(beta, beta), **options)
        assert alone.report["beta"] == beta
        assert alone.report["beta_accuracies"] == {str(beta): accuracies[str(beta)]}
        assert (alone.to_bytes() == memory.to_bytes()) == (beta == best)


def test_without_a_search_beta_is_taken_as_it_is(
    make_set: MakeSet, make_layout: MakeLayout
) -> None:
    data, layout = make_set(num_images=60), make_layout()
    memories = {
        beta: tiny(data, layout, beta=beta, beta_grid=(), over_budget=1.0) for beta in (0.0, 1.0)
    }
    for beta, memory in memories.items():
        assert memory.report["beta"] == beta
        assert memory.report["beta_accuracies"] == {}
    assert memories[0.0].to_bytes() != memories[1.0].to_bytes()


@pytest.mark.parametrize("kind", ["idc", "haba"])
def test_images_that_share_values_are_pruned_together(make_set: MakeSet, kind: str) -> None:
    layout, data = LAYOUTS[kind]((3, 8, 8), "int8"), make_set(90)
    size = layout.group_size
    options: dict[str, Any] = {"budget": room_for(layout, 3, 9 * size), "outer_steps": 0}
    whole = tiny(
        data, layout, over_budget=0, **{**options, "budget": room_for(layout, 3, 18 * size)}
    )
    pruned = tiny(data, layout, over_budget=1.0, beta_grid=(), **options)
    assert (whole.images_per_class, pruned.images_per_class) == ([6 * size] * 3, [3 * size] * 3)
    # Both were fitted alike: what stays is whole groups of what was there.
    groups = [group.numpy().tobytes() for group in whole.decode()[0].split(size)]
    assert all(group.numpy().tobytes() in groups for group in pruned.decode()[0].split(size))


def test_the_mean_of_ratios_is_over_images() -> None:
    errors = torch.tensor([0.1, 0.001, 0.0])
    assert mean_psnr(errors) == pytest.approx((10 + 30 + 100) / 3)


def test_the_psnr_of_the_warm_start_is_that_to_the_images_it_starts_from(
    make_set: MakeSet,
) -> None:
    data, layout = make_set(6), LAYOUTS["pixels"]((3, 8, 8), "int8")
    options: dict[str, Any] = {"budget": room_for(layout, 3, 6), "over_budget": 0}
    memory = tiny(data, layout, outer_steps=0, **options)
    real, images = data.floats()[data.class_indices.argsort(stable=True)], memory.decode()[0]
    errors = torch.cdist(images.flatten(1), real.flatten(1)).amin(dim=1) ** 2 / 192
    expected = sum(-10 * math.log10(error) for error in errors.tolist()) / 6
    assert memory.report["warm_start_psnr"] == pytest.approx(expected, abs=0.3)
    assert expected > 45


# Images that are decoded when they are asked for.


class Lazy(HierarchicalMemory):
    """Decodes whenever images are asked for, as where all of them take too much memory."""

    def decoded(self, dtype: torch.dtype = torch.float32) -> Images:
        def fetch(positions: Tensor | None) -> Tensor:
            return self.decode(positions, dtype=dtype)[0]

        return ImageLookup(fetch, (self.num_images, *self.image_shape), dtype)


@pytest.fixture
def lazy() -> Iterator[str]:
    """A memory kind that never holds all of its images decoded."""
    with registered(Lazy) as kind:
        yield kind


def test_images_decoded_when_asked_for_are_pruned_alike(
    make_set: MakeSet, make_layout: MakeLayout, lazy: str
) -> None:
    layout, made = make_layout(), []
    budget = room_for(layout, 5, 20)
    for kind in ("hmn", lazy):
        memory = tiny(make_set(60), layout, budget=budget, kind=kind)
        grown = tiny(
            make_set(60, labels=(2, 3, 4)), layout, budget=budget, memory=memory, kind=kind
        )
        made.append((memory.decode()[0], grown.decode()[0], grown.report["beta_accuracies"]))
    assert made[0][0].equal(made[1][0])
    assert made[0][1].equal(made[1][1])
    assert made[0][2] == made[1][2]


# Checkpoints.


def test_checkpoints_change_nothing(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    data, layout = make_set(), make_layout()
    path = tmp_path / "run.checkpoint"
    memory = tiny(data, layout, checkpoint=path, **EVERY_STEP)
    assert memory.to_bytes() == tiny(data, layout).to_bytes()
    assert os.listdir(tmp_path) == [path.name]
    # What was done is not done again: no step, and no training.
    team = Observer(sum_gradients=at_call(1, stop))
    again = tiny(data, layout, checkpoint=str(path), team=team)
    assert again.to_bytes() == memory.to_bytes()
    # What is left, to drop the images that go, is measured anew.
    before, after = dict[str, Any](memory.report), dict[str, Any](again.report)
    for report in (before, after):
        del report["seconds"], report["checkpoint_seconds"]
        for name in ("seconds", "images_per_second", "peak_memory_bytes"):
            del report["phases"]["pruning"][name]
    assert after == before


@pytest.mark.parametrize(
    ("options", "kind", "number_format"),
    [
        ({}, "hmn", "int8"),
        ({"objective": "distribution"}, "hmn", "entropy"),
        (TINY_MTT, "hmn", "float32"),
        ({"trained_networks": 2, "trained_passes": 30}, "hmn", "int8"),
        ({}, "haba", "int8"),
        ({}, "pixels", "int8"),
    ],
    ids=["gradient", "entropy", "mtt", "trained", "haba", "pixels"],
)
def test_interrupted_at_any_moment_it_ends_as_if_it_had_not_been(
    make_set: MakeSet, tmp_path: Path, options: dict[str, Any], kind: str, number_format: str
) -> None:
    data, layout = make_set(60), LAYOUTS[kind]((3, 8, 8), number_format)
    options = {**options, "budget": room_for(layout, 3, 12 * layout.group_size), **EVERY_STEP}
    team = Observer()
    expected = tiny(data, layout, checkpoint=tmp_path / "whole", team=team, **options).to_bytes()
    # Each step, and each step of a training, ends in a sum.
    num_moments = team.calls["sum"]
    assert num_moments > 4 + 2 * 3 + 2
    for number in random.Random(0).sample(range(1, num_moments), 3):
        path = tmp_path / f"interrupted at {number}"
        with pytest.raises(Interruption):
            tiny(data, layout, checkpoint=path, team=Observer(sum=at_call(number, stop)), **options)
        assert tiny(data, layout, checkpoint=path, **options).to_bytes() == expected, number


@pytest.mark.parametrize("grows", [False, True])
def test_the_rate_control_goes_on_as_if_it_had_not_been_interrupted(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path, grows: bool
) -> None:
    data, layout = make_set(300), make_layout("entropy")
    options: dict[str, Any] = {"beta_grid": (), "budget": 2000, "outer_steps": 0, **EVERY_STEP}
    options |= {"warm_start_steps": 12}
    if grows:
        first = make_set(300, labels=(7, 8), seed=1)
        options["memory"] = tiny(first, layout, beta_grid=(), budget=2000, outer_steps=0)
    expected = tiny(data, layout, **options).to_bytes()
    for number in (2, 5):
        path = tmp_path / f"interrupted at {number}"
        with pytest.raises(Interruption):
            team = Observer(sum_gradients=at_call(number, stop))
            tiny(data, layout, checkpoint=path, team=team, **options)
        assert state_of(path)["step"] == number - 1
        assert tiny(data, layout, checkpoint=path, **options).to_bytes() == expected


def test_interrupted_again_and_again_between_rare_checkpoints_it_ends_the_same(
    make_set: MakeSet,
    make_layout: MakeLayout,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, layout = make_set(), make_layout()
    options: dict[str, Any] = {"network_images": 4, "seed": 3}
    expected = tiny(data, layout, **options).to_bytes()
    rng, ticks = random.Random(0), [0.0]

    def monotonic() -> float:
        ticks[0] += rng.choice((0.0, 30.0))
        return ticks[0]

    monkeypatch.setattr("time.monotonic", monotonic)
    path, num_interruptions = tmp_path / "run.checkpoint", 0
    for _ in range(12):
        team = Observer(sum_gradients=at_call(rng.randrange(2, 9), stop))
        try:
            memory = tiny(data, layout, checkpoint=path, team=team, **options)
        except Interruption:
            num_interruptions += 1
            continue
        assert memory.to_bytes() == expected
    assert num_interruptions >= 4
    assert tiny(data, layout, checkpoint=path, **options).to_bytes() == expected


def test_an_error_while_writing_leaves_the_checkpoint_before(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
            tiny(data, layout, checkpoint=path, **EVERY_STEP)
    assert os.listdir(tmp_path) == [path.name]
    memory = tiny(data, layout, checkpoint=path)
    assert memory.to_bytes() == tiny(data, layout).to_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "with seed 0 in place of 1; delete"),
        ({"budget": 1600}, "with budget 1,.* bytes in place of 1,600 bytes; delete"),
        ({"real_batch": 4}, "with real_batch 3 in place of 4; delete"),
        ({"beta_grid": ()}, r"with beta_grid \(0.0, 1.0\) in place of \(\); delete"),
        ({"precision": "bfloat16"}, "with precision 'float32' in place of 'bfloat16'; delete"),
        ({"compile": True}, "with compile False in place of True; delete"),
        (
            {"objective": gradient_matching},
            "with objective 'distribution' in place of '.*matching'",
        ),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(
    make_set: MakeSet,
    make_layout: MakeLayout,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    data, layout, path = make_set(), make_layout(), tmp_path / "run.checkpoint"
    options: dict[str, Any] = {"checkpoint": path, "outer_steps": 0}
    options |= {"precision": "float32", "compile": False}
    tiny(data, layout, **options)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=message):
        tiny(data, layout, **{**options, **change})
    assert path.read_bytes() == before


def test_a_checkpoint_of_another_torch_is_refused(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.0.9")
        tiny(make_set(), make_layout(), checkpoint=path, outer_steps=0)
    with pytest.raises(
        CheckpointError, match=re.escape(f"torch 2.0.9 in place of {torch.__version__}")
    ):
        tiny(make_set(), make_layout(), checkpoint=path, outer_steps=0)


def test_auto_is_the_precision_that_it_means(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    path = tmp_path / "run.checkpoint"
    options: dict[str, Any] = {"checkpoint": path, "outer_steps": 0}
    meant = tiny(make_set(), make_layout(), precision="auto", **options).report["precision"]
    other = "float32" if meant == "bfloat16" else "bfloat16"
    tiny(make_set(), make_layout(), precision=meant, **options)
    with pytest.raises(CheckpointError, match=f"precision '{meant}' in place of '{other}'"):
        tiny(make_set(), make_layout(), precision=other, **options)


def test_the_checkpoint_of_other_data_or_shapes_is_refused(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    data, path = make_set(300), tmp_path / "run.checkpoint"
    options: dict[str, Any] = {"checkpoint": path, "outer_steps": 0, "budget": 2000}
    tiny(data, make_layout(), **options)
    images = data.images.clone()
    images[-1, -1, -1, -1] ^= 1
    others = [
        LabelledImages(images, data.labels),
        LabelledImages(data.images, data.labels.flip(0)),
    ]
    for other in others:
        with pytest.raises(CheckpointError, match="with other data; delete"):
            tiny(other, make_layout(), **options)
    with pytest.raises(CheckpointError, match="with other layout; delete"):
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


def mutated(
    state: dict[str, Any], tensors: dict[str, torch.Tensor], rng: random.Random
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the content of a checkpoint, something of which is as no run would write it."""
    state, tensors = json.loads(json.dumps(state)), dict(tensors)
    junk = rng.choice([None, True, -1, 10**9, 1e308, math.nan, "x", [], {}, [0], {"x": 1}])
    name, what = rng.choice(list(tensors)), rng.randrange(8)
    if what == 0:
        tensors[name] = tensors[name].flatten()[:1].repeat(3)
    elif what == 1:
        tensors[name] = tensors[name].to(torch.complex64 if rng.random() < 0.3 else torch.float16)
    elif what == 2:
        del tensors[name]
    elif what == 3:
        tensors[name + "x"] = tensors.pop(name)
    elif what == 4:
        tensors[name] = tensors[name] + 1
    else:
        node = state
        while isinstance(node[key := rng.choice(list(node))], dict) and node[key]:
            if rng.random() < 0.3:
                break
            node = node[key]
        if rng.random() < 0.2:
            del node[key]
        else:
            node[key] = junk
    return state, tensors


@pytest.mark.parametrize(
    ("number_format", "more"),
    [("int8", {}), ("entropy", {}), ("int8", {**TINY_MTT})],
    ids=["int8", "entropy", "mtt"],
)
def test_a_crafted_checkpoint_is_refused_or_gone_on_from(
    make_set: MakeSet,
    make_layout: MakeLayout,
    tmp_path: Path,
    number_format: str,
    more: dict[str, Any],
) -> None:
    """Of the right run, with a digest that fits: nothing in it is used before it is checked."""
    data, layout, rng = make_set(), make_layout(number_format), random.Random(0)
    options = {**EVERY_STEP, "warm_start_steps": 2, "outer_steps": 1, **more}
    kept: dict[str, bytes] = {}

    def keep(*_: Any) -> None:
        if path.exists() and (found := path.read_bytes()):
            kept.setdefault("{phase} {step}".format(**state_of(path)), found)

    path = tmp_path / "run.checkpoint"
    tiny(data, layout, checkpoint=path, team=Observer(sum=keep), **options)
    kept.pop("warm_start 0")
    assert len(kept) > 5
    num_refused = 0
    for _ in range(30):
        whole = rng.choice(list(kept.values()))
        path.unlink()
        path.write_bytes(whole)
        with safe_open(path, framework="pt") as file:
            content = json.loads(file.metadata()["hmn_replay_checkpoint"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        state, tensors = mutated(content["state"], tensors, rng)
        write_checkpoint(path, content["identity"], state, tensors)
        try:
            tiny(data, layout, checkpoint=path, **options)
        except CheckpointError:
            num_refused += 1
        except (TrainingError, BudgetError):  # of values that are the forger's own
            continue
    assert num_refused > 12


# Ctrl-C, and worse.


@pytest.mark.parametrize(
    ("call", "phase"), [(3, "warm_start"), (4 + 1 + 1 + 1 + 1 + 1, "matching")]
)
def test_ctrl_c_keeps_the_work_up_to_the_end_of_the_step(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path, call: int, phase: str
) -> None:
    data, layout, path = make_set(), make_layout(), tmp_path / "run.checkpoint"
    expected = tiny(data, layout).to_bytes()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        team = Observer(sum_gradients=at_call(call, ctrl_c))  # in the middle of a step
        tiny(data, layout, checkpoint=path, team=team)
    assert signal.getsignal(signal.SIGINT) is handler
    state = state_of(path)
    assert (state["phase"], state["step"]) == (phase, 3)
    assert tiny(data, layout, checkpoint=path).to_bytes() == expected


def test_ctrl_c_during_a_training_of_the_pruning_keeps_what_came_before(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    data, layout, path = make_set(), make_layout(), tmp_path / "run.checkpoint"
    team = Observer()
    expected = tiny(data, layout, team=team).to_bytes()
    with pytest.raises(KeyboardInterrupt):  # in the last training, that of the second beta
        late = Observer(sum_gradients=at_call(team.calls["sum_gradients"], ctrl_c))
        tiny(data, layout, checkpoint=path, team=late)
    assert list(state_of(path)["beta_accuracies"]) == ["0.0"]
    rest = Observer()
    assert tiny(data, layout, checkpoint=path, team=rest).to_bytes() == expected
    assert rest.calls["sum_gradients"] < team.calls["sum_gradients"] / 3


class FirstOfTwo(Observer):
    """The first of two processes, of which the other one does nothing."""

    size = 2


def test_processes_ask_each_other_for_ctrl_c_now_and_then_during_a_training(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    """Each question waits for all of them; one alone hears at once, as the tests above say."""
    data, layout, path = make_set(), make_layout(), tmp_path / "run.checkpoint"
    options = {"beta_grid": (), "pruning_passes": 1000}  # of a dozen images in a step
    whole, before = FirstOfTwo(), FirstOfTwo()
    tiny(data, layout, team=before, **{**options, "pruning_passes": 1})
    tiny(data, layout, team=whole, **options)
    num_steps = whole.calls["sum_gradients"] - before.calls["sum_gradients"]
    assert whole.calls["sum"] - before.calls["sum"] < num_steps / 5
    call = whole.calls["sum_gradients"] - num_steps // 2
    late = FirstOfTwo(sum_gradients=at_call(call, ctrl_c))
    with pytest.raises(KeyboardInterrupt):
        tiny(data, layout, checkpoint=path, team=late, **options)
    assert call <= late.calls["sum_gradients"] < call + 16


def test_ctrl_c_during_a_recording_keeps_the_experts_that_are_done(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    data, layout, path = make_set(), make_layout(), tmp_path / "run.checkpoint"
    expected = tiny(data, layout, **TINY_MTT)
    with pytest.raises(KeyboardInterrupt):
        # Of the warm start's 4 steps, and of the experts' 2 epochs of 3 steps each.
        team = Observer(sum_gradients=at_call(4 + 2 * 3 + 2, ctrl_c))
        tiny(data, layout, checkpoint=path, team=team, **TINY_MTT)
    folder = tmp_path / "run.checkpoint.experts"
    assert os.listdir(folder) == ["expert-0000.safetensors"]
    memory = tiny(data, layout, checkpoint=path, **TINY_MTT)
    assert memory.to_bytes() == expected.to_bytes()
    phases: list[Any] = [found.report["phases"] for found in (memory, expected)]
    assert phases[0]["experts"]["images"] == phases[1]["experts"]["images"] == 48


def test_ctrl_c_after_the_last_step_is_heard(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    class Interrupting(HierarchicalMemory):
        def shrink(self, budget: Budget | int | str | None = None) -> None:
            ctrl_c()
            super().shrink(budget)

    data, layout, path = make_set(), make_layout(), tmp_path / "run.checkpoint"
    with registered(Interrupting) as kind, pytest.raises(KeyboardInterrupt):
        tiny(data, layout, kind=kind, checkpoint=path)
    with pytest.raises(CheckpointError, match="kind"):
        tiny(data, layout, checkpoint=path)


def test_a_second_ctrl_c_does_not_wait(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    def impatient() -> None:
        ctrl_c()
        ctrl_c()
        raise AssertionError("the second one was not heard")

    with pytest.raises(KeyboardInterrupt):
        team = Observer(sum_gradients=at_call(2, impatient))
        tiny(make_set(), make_layout(), checkpoint=tmp_path / "run.checkpoint", team=team)


@pytest.mark.parametrize(
    ("checkpoint", "advice"),
    [(None, "without a checkpoint, its work is lost"), ("run.checkpoint", "the work so far is in")],
)
def test_after_the_loss_of_a_process_there_is_advice(
    make_set: MakeSet,
    make_layout: MakeLayout,
    tmp_path: Path,
    checkpoint: str | None,
    advice: str,
) -> None:
    def lose() -> None:
        raise DistributedError("process 1 was lost")

    path = None if checkpoint is None else tmp_path / checkpoint
    with pytest.raises(DistributedError, match=f"process 1 was lost; {advice}"):
        team = Observer(sum_gradients=at_call(2, lose))
        tiny(make_set(), make_layout(), checkpoint=path, team=team)


def test_two_runs_with_one_checkpoint_and_one_file_end_right_or_are_told(
    make_set: MakeSet, make_layout: MakeLayout, tmp_path: Path
) -> None:
    """Each goes on from what the other has written, or is told that it cannot."""
    data, layout, path = make_set(), make_layout(), tmp_path / "run.checkpoint"
    expected, out = tiny(data, layout).to_bytes(), tmp_path / "out.hmn"

    def work(_: int) -> bytes | None:
        try:
            memory = tiny(data, layout, checkpoint=path, **EVERY_STEP)
            memory.save(out)
        except (CheckpointError, OSError):
            return None
        return memory.to_bytes()

    with ThreadPoolExecutor(3) as pool:
        ends = list(pool.map(work, range(3)))
    assert set(ends) <= {expected, None}
    assert expected in ends
    assert out.read_bytes() == expected
    assert sorted(os.listdir(tmp_path)) == ["out.hmn", "run.checkpoint"]


KILLED = """
    import json, os, random, signal, sys, time
    import torch, torch._dynamo
    from hmn_replay.condensation.condense import condense
    from hmn_replay.memory import HMNLayout

    torch.set_num_threads(1)
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    layout = HMNLayout((3, 8, 8), "int8", **json.loads(sys.argv[4]))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(60) % 3

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
    for _ in range(5):
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
    options = json.dumps({**TINY, **EVERY_STEP, "inner_steps": 6})
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(KILLED),
            str(tmp_path),
            options,
            "0",
            json.dumps(HMN_FIELDS),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["kills"] >= 1
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert load(tmp_path / "killed").num_classes == 3


# Matching on one network after another.


@pytest.fixture
def make_matcher(make_set: MakeSet, make_layout: MakeLayout) -> Callable[..., BatchMatcher]:
    def make(first_class: int = 0, **options: Any) -> BatchMatcher:
        usual = {name: value for name, value in TINY.items() if name != "device"}
        config, data = make_config(**{**usual, **options}), make_set()
        memory = HierarchicalMemory(make_layout(), data.classes, [3, 5, 2], seed=1)
        optimizer = make_optimizer(memory, (0.5, 0.99))
        set_lr(optimizer, 0.01)
        context = StepContext(memory, RealImages.of(data), config, optimizer, first_class)
        return BatchMatcher(context, RandomNetworks(context, seed=7), seed=7)

    return make


@pytest.mark.parametrize(
    ("objective", "expected"), [("gradient", [0, 0, 0, 1, 1, 1, 2]), ("dm", [0, 1, 2, 3, 4, 5, 6])]
)
def test_a_network_is_drawn_as_often_as_it_learns_nothing_more(
    make_matcher: Callable[..., BatchMatcher], objective: str, expected: list[int]
) -> None:
    matcher, networks = make_matcher(objective=objective, inner_steps=3), list[Any]()
    for number in range(7):
        matcher.step(number)
        if matcher.networks.network not in networks:
            networks.append(matcher.networks.network)
        assert networks.index(matcher.networks.network) == expected[number]


@pytest.mark.parametrize(("network_images", "learns"), [(8, True), (0, False)])
def test_the_network_learns_between_steps(
    make_matcher: Callable[..., BatchMatcher], network_images: int, learns: bool
) -> None:
    matcher = make_matcher(network_images=network_images, inner_steps=9)
    matcher.step(0)
    before = [parameter.clone() for parameter in matcher.networks.network.parameters()]
    matcher.step(1)
    after = list(matcher.networks.network.parameters())
    assert learns == any(not a.equal(b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("first_class", "options", "expected"),
    [
        (0, {"decoded_batch": 3}, (9, 8)),
        (0, {"decoded_batch": 99}, (15, 10)),
        (1, {"decoded_batch": 3}, (6, 5)),
        (0, {"decoded_batch": 1, "classes_per_step": 2}, (2, 2)),
    ],
)
def test_images_of_a_step_are_estimated_beforehand_and_counted_afterwards(
    make_matcher: Callable[..., BatchMatcher],
    first_class: int,
    options: dict[str, Any],
    expected: tuple[int, int],
) -> None:
    matcher = make_matcher(first_class, **options)
    assert (matcher.images_per_step, matcher.step(0)) == expected


@pytest.mark.parametrize("number", [1, 3, 4])
def test_it_goes_on_with_the_network_that_was_kept(
    make_matcher: Callable[..., BatchMatcher], number: int
) -> None:
    matcher = make_matcher(inner_steps=3)
    for step in range(number):
        matcher.step(step)
    kept = {"memory": matcher.context.memory, **matcher.kept()}
    tensors = {
        name: value.clone()
        for owner_name, owner in kept.items()
        for name, value in flatten_state(owner_name, owner).items()  # type: ignore[arg-type]
    }
    matcher.step(number)
    checkpoint = Checkpoint({}, tensors)
    again = make_matcher(inner_steps=3)
    again.context.memory.load_state_dict(checkpoint.group("memory"))
    again.resume(checkpoint, number)
    again.step(number)
    assert matcher.results() == {}
    for one, two in zip(
        again.networks.network.parameters(), matcher.networks.network.parameters(), strict=True
    ):
        assert one.equal(two)
