"""Time to accuracy on the digits: its rows, going on without doing anything twice, its reports."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import hmn_replay
from experiments.benchmarks import time_to_accuracy
from experiments.benchmarks.command import main
from experiments.reference import ReferenceLoop

Calls = dict[str, list[Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Record what is condensed (options), evaluated (seeds) and stepped (positions).

    Nothing is trained to be evaluated, and no figure drawn: one test does both.
    """
    recorded: Calls = {"condense": [], "evaluate": [], "step": []}
    condense, step = hmn_replay.condense, ReferenceLoop.take_step

    def condense_recorded(*args: Any, **options: Any) -> Any:
        recorded["condense"].append(options)
        return condense(*args, **options)

    def evaluate_recorded(*args: Any, **options: Any) -> Any:
        recorded["evaluate"].append(options["seed"])
        return None, 0.5

    def step_recorded(self: ReferenceLoop) -> None:
        recorded["step"].append(self.step)
        step(self)

    monkeypatch.setattr(hmn_replay, "condense", condense_recorded)
    monkeypatch.setattr(hmn_replay, "evaluate", evaluate_recorded)
    monkeypatch.setattr(ReferenceLoop, "take_step", step_recorded)
    monkeypatch.setattr(time_to_accuracy, "draw", lambda *_: None)
    # What takes no longer on a busy machine: 30 ms from one look at the clock to the next.
    monkeypatch.setattr(time, "perf_counter", partial(next, count(0, 0.03)))
    return recorded


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    """Return a function that runs the sub-command into ``tmp_path / "out.json"``."""

    def call(*arguments: str) -> int:
        usual = ["--smoke", "--device", "cpu", "--out", str(tmp_path / "out.json")]
        usual += ["--times", "0.05,0.1", "--seconds", "0.1"]
        return main(["time-to-accuracy", *usual, *arguments])

    return call


def read(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return results


def test_every_row_has_seconds_bytes_and_accuracy(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--json") == 0
    printed = capsys.readouterr()
    results = read(tmp_path)
    assert json.loads(printed.out) == results
    assert list(results["ours"]) == ["0.05", "0.1"]
    assert list(results["reference"]) == ["0.05", "0.1"]
    for rows in (results["ours"], results["reference"]):
        seconds = [row["seconds"] for row in rows.values()]
        assert seconds[0] >= 0.05 and seconds[1] >= 0.1
        for row in rows.values():
            assert 0 < row["bytes"] <= 4096 and row["num_images"] > 0
            assert len(row["accuracies"]) == 1 and 0 <= row["accuracies"][0] <= 1
    assert results["reference"]["0.1"]["num_images"] == 40
    assert results["ours"]["0.1"]["phases"]["matching"]["seconds"] > 0
    for key, row in results["ours"].items():
        memory = hmn_replay.load(tmp_path / "out" / f"ours-{key}.hmn")
        assert memory.file_bytes == row["bytes"] and memory.num_images == row["num_images"]
    table = (tmp_path / "out.md").read_text()
    assert "HMN, ours" in table and table.splitlines()[-1] in printed.err
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_finished_run_computes_nothing_again(run: Any, tmp_path: Path, calls: Calls) -> None:
    assert run() == 0
    before = read(tmp_path)
    assert len(calls["condense"]) == 2 and len(calls["evaluate"]) == 4 and calls["step"]
    for recorded in calls.values():
        recorded.clear()
    (tmp_path / "out" / "reference-0.05.pt").unlink()  # what is finished needs no snapshot
    assert run() == 0
    assert calls == {"condense": [], "evaluate": [], "step": []}
    assert read(tmp_path) == before


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_stopped_run_goes_on_where_it_was(
    run: Any, tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    evaluate = hmn_replay.evaluate

    def stop(*args: Any, **options: Any) -> Any:
        if len(calls["evaluate"]) == stop_at - 1:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hmn_replay, "evaluate", stop)
        run()
    stopped = read(tmp_path)
    assert run() == 0
    results = read(tmp_path)
    assert len(calls["condense"]) == 2
    assert calls["evaluate"] == [0, 0, 0, 0]
    assert calls["step"] == list(range(results["reference"]["0.1"]["steps"]))
    for name in ("ours", "reference"):
        for key, row in stopped[name].items():
            assert {**results[name][key], "accuracies": []} == {**row, "accuracies": []}


def test_more_is_added_to_what_is_there(run: Any, tmp_path: Path, calls: Calls) -> None:
    assert run() == 0
    before = read(tmp_path)
    for recorded in calls.values():
        recorded.clear()
    assert run("--times", "0.1,0.15", "--seconds", "0.2", "--repeats", "2") == 0
    results = read(tmp_path)
    assert list(results["ours"]) == ["0.05", "0.1", "0.15"]
    assert list(results["reference"]) == ["0.05", "0.1", "0.2"]
    assert [options["max_seconds"] for options in calls["condense"]] == [0.15]
    assert calls["step"][0] == before["reference"]["0.1"]["steps"]
    assert calls["evaluate"] == [1, 0, 1, 1, 0, 1]
    assert results["ours"]["0.05"] == before["ours"]["0.05"]
    assert results["settings"]["repeats"] == 2


def test_results_of_other_settings_are_not_mixed(
    run: Any, tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    before = (tmp_path / "out.json").read_bytes()
    calls["condense"].clear()
    assert run("--width", "5") == 1
    assert "is of width = 4, and now it is 5" in capsys.readouterr().err
    assert not calls["condense"] and (tmp_path / "out.json").read_bytes() == before
    # Without its results, a snapshot may be of any settings.
    (tmp_path / "out.json").unlink()
    calls["step"].clear()
    assert run("--reference-width", "2") == 0
    assert calls["step"][0] == 0


def test_warm_start_takes_its_share(run: Any, tmp_path: Path, calls: Calls) -> None:
    assert run("--warm-share", "0.25") == 0
    bounds = [(o["warm_start_seconds"], o["max_seconds"]) for o in calls["condense"]]
    assert bounds == [(0.0125, 0.05), (0.025, 0.1)]
    calls["condense"].clear()
    (tmp_path / "out.json").unlink()
    assert run("--set", "warm_start_seconds=0.01") == 0
    assert [options["warm_start_seconds"] for options in calls["condense"]] == [0.01, 0.01]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--warm-share", "0"], r"--warm-share must be in \(0, 1\]"),
        (["--set", "outer_stepz=1"], "outer_stepz"),
    ],
)
def test_bad_arguments_are_refused(
    run: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 1
    assert re.search(message, capsys.readouterr().err)


def make_rows(**accuracies: list[float]) -> dict[str, Any]:
    return {
        name: {
            "seconds": float(name[1:]),
            "accuracies": values,
            "num_images": 40,
            "bytes": 122880,
        }
        for name, values in accuracies.items()
    }


def test_speedup_is_of_the_fastest_run_that_is_as_accurate() -> None:
    reference = make_rows(s100=[0.2], s900=[0.3, 0.32], s1800=[0.29, 0.31])
    ours = make_rows(s10=[0.1], s60=[0.25, 0.34], s90=[0.3, 0.3], s120=[0.4])
    assert time_to_accuracy.speedup(ours, reference) == {
        "reference_accuracy": pytest.approx(0.3),
        "reference_seconds": 1800.0,
        "reference_first_seconds": 900.0,
        "ours_seconds": 90.0,
        "speedup": pytest.approx(20.0),
    }
    del ours["s90"], ours["s120"]
    missed = time_to_accuracy.speedup(ours, reference)
    assert missed["speedup"] is None and missed["ours_seconds"] is None


def test_what_a_stopped_run_has_not_evaluated_is_left_out() -> None:
    rows = make_rows(s10=[0.1], s60=[])
    assert list(time_to_accuracy.evaluated(rows).values()) == [rows["s10"]]


def test_table_and_figure_tell_the_same(tmp_path: Path) -> None:
    results: dict[str, Any] = {
        "ours": make_rows(s120=[0.4, 0.42], s90=[0.3]),
        "reference": make_rows(s1800=[0.3]),
    }
    results |= time_to_accuracy.speedup(results["ours"], results["reference"])
    lines = time_to_accuracy.make_table(results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:5]]
    assert cells[0] == ["HMN, ours", "90.0", "40", "122,880", "30.0", "1"]
    assert cells[1][4:] == ["41.0 ± 1.4", "2"]
    assert cells[2][:2] == ["IDC, reference", "1,800.0"]
    assert lines[-1].endswith("20.00 times sooner.")
    time_to_accuracy.draw(results, "digits", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    results |= {"speedup": None}
    assert "None of our runs" in time_to_accuracy.make_table(results)


def test_snapshots_load_without_pickle(run: Any, tmp_path: Path, calls: Calls) -> None:
    assert run() == 0 and calls["step"]
    state = torch.load(tmp_path / "out" / "reference-0.1.pt", weights_only=True)
    row = read(tmp_path)["reference"]["0.1"]
    assert state["step"] == row["steps"] and state["seconds"] == row["seconds"]
