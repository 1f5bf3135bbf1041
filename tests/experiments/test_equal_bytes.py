"""The comparison at equal bytes, on next to nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hmn_replay
from experiments import equal_bytes
from experiments.equal_bytes import best_quality, condensation, main, make_rows, parse_arguments
from experiments.tables.settings import UNBOUNDED
from experiments.tables.store import Store
from hmn_replay.errors import ConfigError, UnknownOptionError

TINY = "--budgets 2500,4000 --seeds 0,1 --qualities 5,50 --width 2 --passes 20 --device cpu"
TINY_OPTIONS = (
    "inner_steps=2 warm_start_batch=8 real_batch=2 decoded_batch=2 network_width=2 "
    "trained_networks=0 network_images=4 network_batch=4 pruning_passes=20 pruning_width=2"
)
ARGUMENTS = [
    *TINY.split(),
    *("--seconds", "0.2"),
    *(f"--set={option}" for option in TINY_OPTIONS.split()),
]


# Raw pixels of every class do not fit into the smaller budget.
pytestmark = pytest.mark.filterwarnings("ignore:4 of 12 test images are of classes")


def run(cifar10: Path, out: Path, rows: str, *arguments: str) -> int:
    return main(["--data", str(cifar10), "--out", str(out), "--rows", rows, *ARGUMENTS, *arguments])


def test_all_kinds_of_rows_are_within_their_budgets(
    cifar10: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = "raw,jpeg,lossless,subsampled,int8,entropy,entropy-warm"
    assert run(cifar10, tmp_path, rows) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert [(row["budget"], row["row"]) for row in report["rows"]] == [
        (budget, name) for budget in (2500, 4000) for name in rows.split(",")
    ]
    for row in report["rows"]:
        assert 0 < row["bytes"] <= row["budget"]
        assert len(row["accuracies"]) == 2
        assert (row["psnr"] is None) == (row["row"] in ("raw", "jpeg", "lossless", "subsampled"))
    for path in tmp_path.glob("*.hmn"):
        _, budget, _ = path.stem.rsplit("-", 2)
        assert path.stat().st_size <= int(budget)
    assert not list(tmp_path.glob("*.checkpoint*"))
    assert (tmp_path / "rate-accuracy.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("(quality ") == table.count("## ") == 2

    # Everything is there: nothing is computed again.
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(hmn_replay, "condense", never)
    monkeypatch.setattr(hmn_replay, "evaluate", never)
    assert run(cifar10, tmp_path, rows) == 0
    assert (tmp_path / "table.md").read_text() == table


def test_kinds_of_labels_are_columns_of_their_own(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[str] = []

    def train_teacher(source: Any, labels: Any, **options: Any) -> Any:
        taught.append(labels.labels)
        return make_teacher(source, labels, **options)

    make_teacher = hmn_replay.train_teacher
    monkeypatch.setattr(hmn_replay, "train_teacher", train_teacher)
    settings = ["teacher_passes=20", "teacher_width=2", "labeller_width=2"]
    arguments = [f"--set={setting}" for setting in settings]
    arguments += ["--labels", "hard,soft,labeller", "--budgets", "4000", "--seeds", "0"]
    assert run(cifar10, tmp_path, "raw,jpeg,int8", *arguments) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    found = {(row["row"], row["labels"]): row for row in report["rows"]}
    assert len(found) == 9
    assert taught == ["soft", "labeller"], "once for all memories, learned ones as well"
    for (_, labels), row in found.items():
        assert row["bytes"] <= 4_000
        assert (row["label_bytes"] > 0) == (labels != "hard")
        assert len(row["labeller_accuracies"]) == (labels == "labeller")
    for path in tmp_path.glob("*.hmn"):
        assert hmn_replay.load(path).richest_labels == path.stem.split("-")[1]
    lines = (tmp_path / "table.md").read_text().splitlines()
    (head,) = (line for line in lines if line.startswith("| memory"))
    columns = [cell.strip() for cell in head.split("|")]
    for labels in ("hard", "soft", "labeller"):
        assert f"{labels} labels: accuracy %" in columns
    assert columns.count("labeller itself %") == 1
    assert columns.count("images") == columns.count("seeds") == 3

    # What a later run adds learns from the same teachers.
    made = {path: path.read_bytes() for path in tmp_path.glob("raw-*.hmn")}
    for path in made:
        path.unlink()
    (tmp_path / "results.json").unlink()
    assert run(cifar10, tmp_path, "raw", *arguments) == 0
    assert taught == ["soft", "labeller"]
    assert {path: path.read_bytes() for path in made} == made


def test_jpeg_is_shown_at_its_best_quality(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.25, 0.375, 0.125, 0.5, 0.5, 0.0, 0.125, 0.25])

    def evaluate(*_: Any, **__: Any) -> tuple[None, float]:
        return None, next(scores)

    monkeypatch.setattr(hmn_replay, "evaluate", evaluate)
    assert run(cifar10, tmp_path, "jpeg") == 0
    store = Store(tmp_path, json.loads((tmp_path / "results.json").read_text())["configuration"])
    assert [best_quality(store, budget) for budget in (2500, 4000)] == [50, 5]
    first, second = make_rows(store)
    assert (first["quality"], first["accuracies"]) == (50, [0.375, 0.5])
    assert (second["quality"], second["accuracies"]) == (5, [0.5, 0.125])


def test_every_format_has_the_same_seconds_and_an_effort_its_own_settings() -> None:
    args = parse_arguments(["--seconds", "8", "--set", "real_batch=7"])
    bounds = {"warm_start_seconds": 4, "max_seconds": 8, "real_batch": 7}
    for row in ("float32", "float16", "int8", "entropy"):
        options = condensation(row, args)
        assert bounds.items() <= options.items()
        assert options["number_format"] == row
        assert options["warm_start_steps"] == options["outer_steps"] == UNBOUNDED
    warm = condensation("int8-warm", args)
    assert (warm["warm_start_seconds"], warm["outer_steps"], warm["over_budget"]) == (8, 0, 0)
    assert condensation("standard", args) == {"effort": "standard", "real_batch": 7}


def test_a_row_may_be_another_memory_kind(cifar10: Path, tmp_path: Path) -> None:
    args = parse_arguments(["--set", "real_batch=7"])
    assert condensation("fred-draft", args) == {"effort": "draft", "real_batch": 7}
    fast = ("--set", "outer_steps=0", "--set", "over_budget=0", "--seeds", "0", "--budgets", "4000")
    assert run(cifar10, tmp_path, "fred-draft,pixels-draft", *fast) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert [row["row"] for row in report["rows"]] == ["fred-draft", "pixels-draft"]
    kinds = {hmn_replay.load(path).kind for path in tmp_path.glob("*.hmn")}
    assert kinds == {"fred", "pixels"}


def test_a_budget_that_holds_no_image_is_a_finding(cifar10: Path, tmp_path: Path) -> None:
    assert run(cifar10, tmp_path, "raw,jpeg", "--budgets", "300", "--seeds", "0") == 0
    table = (tmp_path / "table.md").read_text()
    assert "raw, 300 bytes: BudgetError: " in table


def test_what_is_wrong_is_told_before_anything_is_made(cifar10: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--rows has no 'webp'; choose from raw, jpeg, los"):
        run(cifar10, tmp_path, "raw,webp")
    with pytest.raises(UnknownOptionError, match="nothing_such"):
        run(cifar10, tmp_path, "int8", "--set", "nothing_such=1")
    for setting in ("number_format=int8", "max_seconds=9", "warm_start_seconds=9"):
        with pytest.raises(ConfigError, match=f"'float16' sets {setting.split('=')[0]} itself"):
            run(cifar10, tmp_path, "raw,float16", "--set", setting)
    with pytest.raises(ConfigError, match="--labels sets labels itself"):
        run(cifar10, tmp_path, "raw,draft", "--set", "labels=soft")
    with pytest.raises(ConfigError, match="quality"):
        run(cifar10, tmp_path, "jpeg", "--qualities", "10,500")
    with pytest.raises(ConfigError, match="--seeds is a number"):
        run(cifar10, tmp_path, "raw", "--seeds", "one")
    assert not list(tmp_path.iterdir())
    assert run(cifar10, tmp_path, "raw") == 0
    with pytest.raises(ConfigError, match="is of passes = 20, and now it is 30"):
        run(cifar10, tmp_path, "raw", "--passes", "30")
    with pytest.raises(ConfigError, match=r"is of label_weight = None, and now it is 0.3"):
        run(cifar10, tmp_path, "raw", "--label-weight", "0.3")


def test_a_stopped_run_tells_how_to_go_on(
    cifar10: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[str] = []
    usual = equal_bytes.measure

    def stop(study: equal_bytes.Study, row: str, *arguments: Any) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(row)
        usual(study, row, *arguments)

    monkeypatch.setattr(equal_bytes, "measure", stop)
    assert run(cifar10, tmp_path, "raw,jpeg") == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert " raw |" in (tmp_path / "table.md").read_text()
