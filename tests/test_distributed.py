"""Several processes do what one does, and end when one of them is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmn_replay.distributed import ALONE, Team, join, launched
from hmn_replay.errors import ConfigError
from hmn_replay.memory import load
from tests.support import TINY, TINY_MTT

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]


class Outcomes:
    """What came of the processes of ``teams.py``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, scene: str, rank: int = 0) -> dict[str, Any]:
        outcome = torch.load(self.folder / f"{scene}-{rank}.pt")
        assert isinstance(outcome, dict)
        return outcome

    def result(self, scene: str, rank: int = 0) -> Any:
        outcome = self(scene, rank)
        assert "result" in outcome, outcome
        return outcome["result"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Play all scenes, once."""
    folder = tmp_path_factory.mktemp("teams")
    options = {**TINY, "precision": "float32", "over_budget": 0.6}
    script = Path(__file__).with_name("teams.py")
    finished = subprocess.run(
        [sys.executable, str(script), str(folder), json.dumps(options), json.dumps(TINY_MTT)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr, finished.stderr
    return Outcomes(folder)


def assert_same(actual: dict[str, Any], expected: dict[str, Any], *, exact: bool = False) -> None:
    """Compare condensed memories: to float error, or to the bit."""
    assert actual["num_images"] == expected["num_images"]
    assert list(actual["state"]) == list(expected["state"])
    for name, values in expected["state"].items():
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(actual["state"][name], values, **tolerance)
    assert float((actual["images"] - expected["images"]).abs().mean()) < 1e-5
    assert actual["psnr"] == pytest.approx(expected["psnr"], abs=1e-3)


# What they make.


@pytest.mark.parametrize(
    "scene", ["new-float32", "new-int8", "new-entropy", "grown-int8", "grown-entropy"]
)
def test_two_processes_condense_to_the_memory_of_one(outcomes: Outcomes, scene: str) -> None:
    assert_same(outcomes.result(f"{scene}-2"), outcomes.result(f"{scene}-1"))
    assert_same(outcomes.result(f"{scene}-2", 1), outcomes.result(f"{scene}-2"), exact=True)


def test_two_processes_fill_another_kind_alike_with_images_that_are_selected(
    outcomes: Outcomes,
) -> None:
    assert_same(outcomes.result("idc-2"), outcomes.result("idc-1"))
    assert_same(outcomes.result("idc-2", 1), outcomes.result("idc-2"), exact=True)


def test_two_processes_follow_the_same_experts(outcomes: Outcomes) -> None:
    # What several do whole, such as a student's steps, may differ in the last bits.
    assert_same(outcomes.result("mtt-2"), outcomes.result("mtt-1"))
    assert_same(outcomes.result("mtt-2", 1), outcomes.result("mtt-2"), exact=True)


def test_the_clock_of_the_first_process_counts(outcomes: Outcomes) -> None:
    slow, fast = outcomes.result("by-seconds"), outcomes.result("by-seconds", 1)
    assert_same(slow, fast, exact=True)
    num_matched = slow["num_images"][1]
    assert outcomes.result("new-float32-1")["num_images"][1] / 6 * 9 * 3 > num_matched > 0


def test_each_may_work_for_itself(outcomes: Outcomes) -> None:
    assert_same(outcomes.result("each-alone"), outcomes.result("new-float32-1"), exact=True)
    other = outcomes.result("each-alone", 1)
    assert not other["images"].equal(outcomes.result("each-alone")["images"])


@pytest.mark.parametrize("network", ["group", "batch"])
def test_a_batch_that_is_shared_has_the_same_gradient(outcomes: Outcomes, network: str) -> None:
    # With batch normalisation, every process does the whole of it.
    whole = outcomes.result("gradients-1")[network]
    for rank in (0, 1):
        shared = outcomes.result("gradients-2", rank)[network]
        torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-6)


# How they end.


def test_ctrl_c_to_one_stops_all_after_the_same_step(outcomes: Outcomes) -> None:
    for rank in (0, 1):
        assert outcomes("interrupted", rank)["error"] == "KeyboardInterrupt"
    for size in (1, 3):
        assert_same(outcomes.result(f"resumed-{size}"), outcomes.result("new-float32-1"))
        # Two steps of three classes were done, and the one in which Ctrl-C came.
        assert outcomes.result(f"resumed-{size}")["num_images"][1] == 2 * 3 * 3 * 3


def test_a_process_that_is_killed_ends_the_others_with_a_checkpoint(outcomes: Outcomes) -> None:
    outcome = outcomes("killed")
    assert outcome["error"] == "DistributedError"
    assert "process 0 of 2 lost another one" in outcome["message"]
    assert f"the work so far is in {outcomes.folder / 'killed.checkpoint'}" in outcome["message"]
    assert "any number of processes goes on" in outcome["message"]
    assert outcome["seconds"] < 20
    assert_same(outcomes.result("after-killed"), outcomes.result("new-float32-1"))


def test_a_process_that_does_not_answer_is_waited_for_as_long_as_was_said(
    outcomes: Outcomes,
) -> None:
    outcome = outcomes("silent")
    assert outcome["error"] == "DistributedError"
    assert "did not answer for 0.5 seconds" in outcome["message"]
    assert "without a checkpoint, its work is lost" in outcome["message"]
    assert outcome["seconds"] < 30  # the other one waits for it, up to a minute


def test_an_error_of_one_process_ends_the_others_though_it_lives_on(outcomes: Outcomes) -> None:
    assert outcomes("failing")["error"] == "OSError"
    other = outcomes("failing", 1)
    assert other["error"] == "DistributedError"
    assert other["seconds"] < 30  # the first one waits for it, up to a minute


def test_processes_that_were_given_different_things_are_told(outcomes: Outcomes) -> None:
    for rank in (0, 1):
        outcome = outcomes("different", rank)
        assert outcome["error"] == "DistributedError"
        what = "data, budget, seed, settings, networks or device"
        assert f"processes [1] were given other {what}" in outcome["message"]


# The command.


def test_the_first_process_alone_writes_and_prints(outcomes: Outcomes) -> None:
    code, printed, complaints = outcomes.result("command")
    assert (code, complaints) == (0, "")
    result = json.loads(printed)
    assert load(result["file"]).num_images == result["num_images"]
    assert outcomes.result("command", 1) == (0, "", "")
    assert not (outcomes.folder / "command.hmn.checkpoint").exists()


def test_the_command_tells_how_to_go_on_after_a_loss(outcomes: Outcomes) -> None:
    code, printed, complaints = outcomes.result("lost-command")
    assert (code, printed) == (1, "")
    assert "hmn-replay: error: process 0 of 2 lost another one" in complaints
    assert f"{outcomes.folder / 'lost-command.hmn.checkpoint'}, from where any" in complaints
    again = complaints.partition("start again: ")[2].strip()
    assert again.startswith("torchrun --nproc-per-node=N -m hmn_replay condense --data digits ")
    assert "--restart" not in again
    assert (outcomes.folder / "lost-command.hmn.checkpoint").exists()


def test_torchrun_starts_the_command(
    make_set: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_set(num_images=48)
    arrays = {"x_train": data.images.numpy(), "y_train": data.labels.numpy()}
    np.savez(tmp_path / "data.npz", **arrays)
    options = {**TINY, "beta_grid": "0.5"}
    del options["device"]
    settings = [word for name in options for word in ("--set", f"{name}={options[name]}")]
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=2", "-m", "hmn_replay", "condense", "--device", "cpu", "--json"),
            *("--data", "data.npz", "--budget", "4KiB", "--out", "out.hmn", *settings),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["num_images"] == load(tmp_path / "out.hmn").num_images


# What they tell each other.


def test_messages_reach_all(outcomes: Outcomes) -> None:
    first, second = outcomes.result("messages"), outcomes.result("messages", 1)
    assert (first["rank"], second["rank"]) == ((0, 2, True), (1, 2, False))
    assert (first["share"][0], second["share"][0]) == ([5, 7], [6])
    assert first["share"][1].tolist() == [0, 2, 4]
    assert second["share"][1].tolist() == [1, 3]
    for heard, own in ((first, 1.0), (second, 2.0)):
        rows, missing, unnamed = heard["gradients"]
        # Rows 1 and 3 alone are summed; who has no gradient adds nothing.
        assert rows.tolist() == [[own, own], [3.0, 3.0], [own, own], [3.0, 3.0]]
        assert missing.flatten().tolist() == list(range(8))
        assert unnamed is None
        assert heard["sum"] == [1.0, 20.0]
        assert heard["agree"] == {"of": 0}
        assert heard["copied"].tolist() == [0.0, 0.0, 0.0]


def test_alone_nothing_is_changed(outcomes: Outcomes) -> None:
    alone = outcomes.result("alone")
    assert alone["rank"] == (0, 1, True)
    assert alone["share"][0] == [5, 6, 7]
    assert alone["gradients"][0].eq(1).all()
    assert alone["sum"] == [0, 10.0]
    assert alone["agree"] == {"of": 0}


@given(st.integers(1, 9), st.integers(0, 40))
def test_shares_are_a_partition_into_parts_as_equal_as_can_be(size: int, count: int) -> None:
    members = []
    for rank in range(size):
        member = Team()
        member.rank, member.size = rank, size
        members.append(member)
    shares = [list(member.share(range(count))) for member in members]
    assert sorted(item for share in shares for item in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    rows = torch.arange(count)
    assert [member.share(rows).tolist() for member in members] == shares


def test_without_others_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert join() is ALONE
    with launched() as team:
        assert team is ALONE
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with launched() as team:
        assert team is ALONE


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan")])
def test_a_timeout_is_a_time(timeout: float) -> None:
    with pytest.raises(ConfigError, match="above 0 seconds and finite"):
        join(timeout)
