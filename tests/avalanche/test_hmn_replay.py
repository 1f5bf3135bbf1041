"""The plugin with the hierarchical memory, from stream to file, and its checkpoints."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint

import hmn_replay
from hmn_replay.avalanche.kinds import HMNReplay
from hmn_replay.avalanche.streams import read_experiences
from hmn_replay.budget import Budget
from hmn_replay.condensation.config import make_config
from hmn_replay.errors import BudgetError, CheckpointError, ConfigError, DataError
from hmn_replay.memory import LearnedMemory, load
from hmn_replay.replay import LearnedKeeper
from tests.streams import (
    Images,
    in_pieces,
    labelled_streams,
    make_strategy,
    streams,
    train,
    weights,
)
from tests.support import TINY

BUDGET = 6000


def make_replay(**options: Any) -> HMNReplay:
    return HMNReplay(BUDGET, **{**TINY, "beta_grid": (0.5,), "batch_size_mem": 4, **options})


def keeper_of(replay: HMNReplay) -> LearnedKeeper:
    assert isinstance(replay.store.keeper, LearnedKeeper)
    return replay.store.keeper


def without_times(report: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k not in ("seconds", "phases")} for entry in report]


def test_the_memory_grows_within_its_budget(tmp_path: Path) -> None:
    replay = make_replay()
    strategy = make_strategy([replay])
    assert replay.memory is None and replay.memory_bytes == 0
    for number, experience in enumerate(streams(num_experiences=4).train_stream):
        strategy.train(experience)
        memory = _memory(replay)
        assert memory.classes.tolist() == list(range(number + 1))
        memory.save(tmp_path / "seen.hmn")
        size = (tmp_path / "seen.hmn").stat().st_size
        assert size == replay.memory_bytes == replay.report[-1]["file_bytes"] <= BUDGET
        assert replay.report[-1]["images_per_class"] == memory.images_per_class
    assert len(replay.report) == 4
    assert {"seconds", "phases", "num_images"} <= set(replay.report[-1])
    images, labels = load(tmp_path / "seen.hmn").decode(dtype=torch.uint8)
    assert (
        torch.equal(images, _memory(replay).decode(dtype=torch.uint8)[0])
        and len(labels.unique()) == 4
    )


def test_classes_that_come_again_are_renewed() -> None:
    replay = make_replay()
    benchmark = labelled_streams((0, 1), (1, 2), (0, 1))
    train(make_strategy([replay]), benchmark.train_stream)
    assert replay.memory is not None
    assert sorted(replay.memory.classes.tolist()) == [0, 1, 2]
    assert replay.memory_bytes <= BUDGET and min(replay.memory.images_per_class) > 0


def test_memory_only_condenses_before_training() -> None:
    replay = make_replay(mode="memory_only")
    train(make_strategy([replay], eval_every=1), streams("ci").train_stream)
    assert [len(entry["images_per_class"]) for entry in replay.report] == [2, 4]


def test_an_online_stream_is_condensed_at_class_boundaries() -> None:
    online = in_pieces(streams().train_stream, 5, access_task_boundaries=True)
    replay = make_replay()
    train(make_strategy([replay]), online)
    assert [len(entry["images_per_class"]) for entry in replay.report] == [2, 4]
    assert not replay.finish()
    assert replay.memory is not None and replay.memory.num_classes == 4


@pytest.mark.parametrize(
    "options",
    [{"renew": "before"}, {"renew": "after"}, {"mode": "memory_only"}, {"distill": 1.0}],
    ids=["before", "after", "memory_only", "distill"],
)
def test_a_run_that_goes_on_from_avalanches_checkpoint_ends_with_the_same_bits(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As torch leaves its package when it is imported: dill then finds no optimizer's class.
    monkeypatch.delattr(torch.optim, "sgd", raising=False)
    stream = streams(num_experiences=3, data=Images((0, 1, 2))).train_stream
    replay = make_replay(**options)
    strategy = make_strategy([replay])
    for number in range(3):
        train(strategy, stream[number : number + 1], seed=number)
        save_checkpoint(strategy, tmp_path / f"{number}.pt")
    for stop in range(2):
        resumed, start = maybe_load_checkpoint(make_strategy(), tmp_path / f"{stop}.pt")
        assert start == stop + 1
        plugin = resumed.plugins[0]
        assert isinstance(plugin, HMNReplay) and plugin is not replay
        for number in range(start, 3):
            train(resumed, stream[number : number + 1], seed=number)
        assert torch.equal(weights(resumed), weights(strategy))
        assert _memory(plugin).to_bytes() == _memory(replay).to_bytes()
        assert without_times(plugin.report) == without_times(replay.report)


def test_a_checkpoint_holds_the_file_and_no_decoded_image(tmp_path: Path) -> None:
    replay = make_replay()
    train(make_strategy([replay]), streams().train_stream)
    torch.save(replay.state_dict(), tmp_path / "state.pt")
    report = len(str(replay.report))
    assert (tmp_path / "state.pt").stat().st_size < replay.memory_bytes + report + 8000


def test_a_state_is_safe_to_load_and_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    stream = streams(num_experiences=3, data=Images((0, 1, 2), each=8)).train_stream
    first = make_replay()
    strategy = make_strategy([first])
    train(strategy, stream[:2])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make_replay()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.report == first.report and second.memory_bytes == first.memory_bytes
    ends = []
    for plugin in (first, second):
        going = make_strategy([plugin], model=copy.deepcopy(strategy.model))
        train(going, stream[2:])
        ends.append(weights(going))
    assert torch.equal(*ends)
    assert _memory(first).to_bytes() == _memory(second).to_bytes()
    assert without_times(first.report) == without_times(second.report)


def test_a_damaged_memory_in_a_state_is_refused() -> None:
    replay = make_replay()
    train(make_strategy([replay]), streams().train_stream[:1])
    state = replay.state_dict()
    state["memory"][-5] ^= 1
    with pytest.raises(CheckpointError, match=r"not a whole state of a replay memory.*digest"):
        make_replay().load_state_dict(state)


def test_settings_are_checked_at_once() -> None:
    with pytest.raises(BudgetError):
        HMNReplay("much")
    with pytest.raises(TypeError, match="did you mean 'outer_steps'"):
        HMNReplay(BUDGET, outer_step=3)
    with pytest.raises(ConfigError):
        HMNReplay(BUDGET, outer_steps=-3)
    with pytest.raises(ConfigError):
        HMNReplay(BUDGET, device="abacus")
    with pytest.raises(ConfigError, match="without outer_steps="):
        HMNReplay(BUDGET, config=make_config("draft"), outer_steps=3)


def test_settings_may_be_given_as_a_whole() -> None:
    settings = {**TINY, "beta_grid": (0.5,)}
    del settings["device"]
    by_name = HMNReplay(BUDGET, **settings)
    as_a_whole = HMNReplay(BUDGET, config=make_config("draft", **settings))
    for replay in (by_name, as_a_whole):
        train(make_strategy([replay]), streams().train_stream[:1])
    assert _memory(by_name).to_bytes() == _memory(as_a_whole).to_bytes()
    assert (by_name.report[0]["effort"], as_a_whole.report[0]["effort"]) == ("draft", None)


@pytest.mark.parametrize("as_a_whole", [False, True])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.3),
        ({"mode": "memory_only"}, 0.0),
        ({"fidelity": 0.0}, 0.0),
        ({"mode": "memory_only", "fidelity": 2.0}, 2.0),
    ],
)
def test_images_that_are_replayed_beside_real_ones_stay_like_these(
    options: dict[str, Any], expected: float, as_a_whole: bool
) -> None:
    if as_a_whole:
        settings = {name: value for name, value in options.items() if name != "mode"}
        options = {**options, "config": make_config("draft", **settings)}
        options.pop("fidelity", None)
    replay = HMNReplay(BUDGET, **options)
    keeper = keeper_of(replay)
    assert isinstance(keeper, LearnedKeeper) and keeper.config.fidelity == expected


@pytest.mark.parametrize("renew", ["before", "after"])
def test_a_budget_that_cannot_do_is_refused_before_training(renew: Any) -> None:
    for options in ({"expected_classes": 900}, {}):
        replay = make_replay(renew=renew, **options)
        strategy = make_strategy([replay])
        before = weights(strategy)
        if not options:
            keeper_of(replay).budget = Budget.parse(150)
        with pytest.raises(BudgetError, match=r"budget of .* bytes"):
            strategy.train(streams().train_stream[0])
        assert torch.equal(weights(strategy), before) and replay.memory is None


def test_a_class_too_many_is_refused_before_training() -> None:
    replay = make_replay(renew="after")
    strategy = make_strategy([replay])
    strategy.train(streams().train_stream[0])
    keeper_of(replay).budget = Budget.parse(replay.memory_bytes // 2)
    before = weights(strategy)
    with pytest.raises(BudgetError, match=r"of each of 4 classes; .* the smallest that does is"):
        strategy.train(streams().train_stream[1])
    assert torch.equal(weights(strategy), before)


def test_a_training_under_autocast_is_condensed_in_full_precision() -> None:
    memories = []
    for enabled in (False, True):
        replay = make_replay()
        strategy = make_strategy([replay])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            train(strategy, streams().train_stream)
            assert torch.is_autocast_enabled("cpu") == enabled
        assert bool(weights(strategy).isfinite().all()) and replay.loss_used == "separated"
        memories.append(_memory(replay))
    plain, under_autocast = memories
    assert plain.to_bytes() == under_autocast.to_bytes()


def test_progress_is_a_line_an_update(capsys: pytest.CaptureFixture[str]) -> None:
    train(make_strategy([make_replay()]), streams().train_stream)
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"hmn_replay, update 0: [\d,]+ images of 2 classes in [\d,]+ bytes, [\d.]+ % of the "
        r"budget, \d+ s \(the memory has an image for every real one of its new classes\)",
        first,
    )
    assert "update 1" in second and "4 classes" in second
    train(make_strategy([make_replay(progress=False)]), streams().train_stream)
    assert capsys.readouterr().err == ""


def test_a_loaded_memory_is_replayed_and_extended(tmp_path: Path) -> None:
    first = make_replay()
    train(make_strategy([first]), streams().train_stream[:1])
    _memory(first).save(tmp_path / "seen.hmn")
    second = make_replay()
    second.memory = load(tmp_path / "seen.hmn")
    train(make_strategy([second]), streams().train_stream[1:])
    assert _memory(second).classes.tolist() == [0, 1, 2, 3]


def test_names_are_imported_when_they_are_asked_for() -> None:
    assert hmn_replay.HMNReplay is HMNReplay
    assert {"HMNReplay", "MemoryReplay", "MemoryBuffer", "LOSSES"} <= set(dir(hmn_replay))
    with pytest.raises(AttributeError, match="has no attribute 'HMNRepaly'"):
        _ = hmn_replay.HMNRepaly


def _memory(replay: HMNReplay) -> LearnedMemory:
    assert isinstance(replay.memory, LearnedMemory)
    return replay.memory


def test_a_memory_of_another_kind_or_shape_is_refused_before_training() -> None:
    experience = streams().train_stream[0]
    shape = (3, 10, 10)
    other = hmn_replay.condense(
        (torch.zeros(8, *shape), torch.arange(8) % 2), BUDGET, **{**TINY, "outer_steps": 0}
    )
    raw = hmn_replay.raw_images(read_experiences([experience], None), BUDGET)
    replay = make_replay(renew="after", loss="balanced")
    with pytest.raises(ConfigError, match="expected a HierarchicalMemory to go on from, got Raw"):
        replay.memory = raw
    replay.memory = other
    strategy = make_strategy([replay])
    before = weights(strategy)
    with pytest.raises(DataError, match="both must have the same"):
        strategy.train(experience)
    assert torch.equal(weights(strategy), before)


@pytest.mark.parametrize("option", ["teacher_passes", "label_views", "labeller_width"])
def test_settings_of_a_teacher_that_there_is_not_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}: in a stream the network that learns"):
        make_replay(labels="soft", **{option: 3})
    with pytest.raises(ConfigError, match="in a stream the network that learns"):
        LearnedKeeper(BUDGET, config=make_config(labels="soft"))
