"""The command that makes the paper's tables, on next to nothing."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hmn_replay
from experiments import paper_tables
from experiments.benchmarks.common import in_fresh_process
from experiments.paper_tables import main
from experiments.tables import memory
from experiments.tables.store import Store
from experiments.tables.study import KINDS
from hmn_replay.errors import ConfigError, HMNReplayError, TrainingError

TINY = "--ipc 1,4 --trainings 1 --width 2 --passes 20 --device cpu"
TINY_OPTIONS = (
    "outer_steps=1 inner_steps=2 warm_start_steps=2 real_batch=2 decoded_batch=2 network_width=2 "
    "trained_networks=0 network_images=4 network_batch=4 pruning_passes=20 pruning_width=2"
)
ARGUMENTS = [*TINY.split(), *(f"--set={option}" for option in TINY_OPTIONS.split())]


@pytest.fixture
def make(cifar10: Path, tmp_path: Path) -> Callable[..., int]:
    """Return a function that makes a table of that data in ``tmp_path / "out"``."""

    def make(table: str, *arguments: str) -> int:
        places = ["--data", str(cifar10), "--out", str(tmp_path / "out")]
        return main(["--table", table, *places, *ARGUMENTS, *arguments])

    return make


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count condensations and evaluations."""
    counts = {"condense": 0, "evaluate": 0}

    def count(name: str) -> Callable[..., Any]:
        function = getattr(hmn_replay, name)

        def counted(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*args, **options)

        return counted

    for name in counts:
        monkeypatch.setattr(hmn_replay, name, count(name))
    return counts


def results(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return report


def table(folder: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Return the lines of table.md by IPC, and by the cells of their first two columns."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    ipc, head = "", None
    for line in (folder / "out" / "table.md").read_text().splitlines():
        if line.startswith("## "):
            ipc, head = line.removeprefix("## "), None
        if not line.startswith("| "):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if head is None:
            head = cells
        else:
            found[ipc, cells[0], cells[1]] = dict(zip(head, cells, strict=True))
    return found


def test_containers(make: Callable[..., int], tmp_path: Path) -> None:
    assert make("containers", "--rows", "hmn,haba,pixels,dm,random,ccs") == 0
    lines = table(tmp_path)
    hmn = lines["1 IPC", "HMN", "gradient"]
    # 16 x 16 x 3 values for each of 3 classes.
    assert 0 < int(hmn["values"].replace(",", "")) <= 3 * 768
    assert hmn["paper %"] == "65.7" and 0 <= float(hmn["ours %"]) <= 100
    raw = lines["4 IPC", "learned pixels", "gradient"]
    assert (raw["images"], raw["values"]) == ("12", "9,216")
    assert lines["4 IPC", "DM", "dm"]["ours %"] != "-"
    # A byte a value; the header comes on top, as for learned memories.
    random = lines["1 IPC", "real images, random", "-"]
    assert (random["images"], random["values"]) == ("12", "9,216")
    assert hmn_replay.load(tmp_path / "out" / "ccs-ipc4-seed0.hmn").num_images > 40
    assert hmn_replay.load(tmp_path / "out" / "hmn-ipc1-seed0.hmn").num_images == int(hmn["images"])
    # What was not run, and what could not be, has no number, but the paper's.
    for name, loss, paper in (("IDC", "gradient", "50.0"), ("LinBa + BPTT", "bptt", "66.4")):
        line = lines["1 IPC", name, loss]
        assert (line.pop("paper %"), line.pop("memory"), line.pop("loss")) == (paper, name, loss)
        assert set(line.values()) == {"-"}
    assert lines["1 IPC", "HaBa", "gradient"]["ours %"] == "-"
    assert lines["4 IPC", "HaBa", "gradient"]["ours %"] != "-"
    assert "- HaBa: BudgetError: a budget of" in (tmp_path / "out" / "table.md").read_text()
    rows = results(tmp_path)["rows"]
    assert [row["accuracies"] for row in rows if row["system"] == "idc"] == [[], []]
    assert not list((tmp_path / "out").glob("*.checkpoint"))


def test_other_data_has_no_numbers_of_the_paper(
    make: Callable[..., int], cifar10: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.npz"
    other.write_bytes(cifar10.read_bytes())
    assert make("containers", "--rows", "pixels", "--ipc", "4", "--data", str(other)) == 0
    line = table(tmp_path)["4 IPC", "learned pixels", "gradient"]
    assert line["paper %"] == "-" and line["ours %"] != "-"


def test_a_stopped_run_goes_on_and_computes_nothing_twice(
    make: Callable[..., int],
    tmp_path: Path,
    calls: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("containers", "--rows", "pixels,idc", "--ipc", "4", "--trainings", "2")
    evaluate = hmn_replay.evaluate

    def stop_at_the_second(*args: Any, **options: Any) -> Any:
        if calls["evaluate"] == 1:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(hmn_replay, "evaluate", stop_at_the_second)
        assert make(*arguments) == 130
    assert calls == {"condense": 1, "evaluate": 1}
    assert "the same command goes on" in capsys.readouterr().err
    lines = table(tmp_path)
    assert "±" not in lines["4 IPC", "learned pixels", "gradient"]["ours %"] != "-"
    assert lines["4 IPC", "IDC", "gradient"]["ours %"] == "-"
    first = results(tmp_path)["cells"]

    assert make(*arguments) == 0
    assert calls == {"condense": 2, "evaluate": 4}
    assert results(tmp_path)["cells"][: len(first)] == first
    assert "±" in table(tmp_path)["4 IPC", "IDC", "gradient"]["ours %"]

    assert make(*arguments) == 0
    assert calls == {"condense": 2, "evaluate": 4}
    # More seeds, rows and budgets add to it.
    assert make(*arguments, "--seeds", "0,1") == 0
    assert calls == {"condense": 4, "evaluate": 8}
    assert len(results(tmp_path)["rows"][0]["accuracies"]) == 0
    assert [len(row["accuracies"]) for row in results(tmp_path)["rows"] if row["images"]] == [4, 4]


def test_a_stopped_condensation_goes_on_from_its_checkpoint(
    make: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["containers", "--rows", "pixels", "--ipc", "4", "--set", "inner_steps=6"]
    arguments += ["--set", "checkpoint_seconds=0"]
    steps: Any = importlib.import_module("hmn_replay.condensation.steps")
    match_step, taken = steps.match_step, []

    def stop_at_the_fifth(*args: Any) -> Any:
        taken.append(args)
        if len(taken) == 5:
            raise KeyboardInterrupt
        return match_step(*args)

    monkeypatch.setattr(steps, "match_step", stop_at_the_fifth)
    assert make(*arguments) == 130
    assert results(tmp_path)["cells"] == []
    assert [path.name for path in (tmp_path / "out").glob("*.checkpoint")]
    assert make(*arguments) == 0
    assert len(taken) == 7
    assert not list((tmp_path / "out").glob("*.checkpoint"))


def test_other_settings_are_refused(
    make: Callable[..., int], cifar10: Path, tmp_path: Path
) -> None:
    arguments = ("containers", "--rows", "pixels", "--ipc", "4")
    assert make(*arguments) == 0
    kept = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(ConfigError, match=r"results\.json is of width = 2, and now it is 3; give"):
        make(*arguments, "--width", "3")
    with pytest.raises(ConfigError, match="is of table = 'containers', and now it is 'pruning'"):
        make("pruning")
    assert (tmp_path / "out" / "results.json").read_bytes() == kept
    with np.load(cifar10) as file:
        np.savez(tmp_path / "less.npz", **{name: array[:-3] for name, array in file.items()})
    whole = cifar10.read_bytes()
    try:
        cifar10.write_bytes((tmp_path / "less.npz").read_bytes())
        with pytest.raises(ConfigError, match=r"images of cifar10 = \[60, 12\], and now .*57, 9"):
            make(*arguments)
    finally:
        cifar10.write_bytes(whole)


def test_one_rows_failure_leaves_the_others_theirs_and_is_tried_again(
    make: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    condense = hmn_replay.condense

    def fail_for_idc(*args: Any, kind: str, **options: Any) -> Any:
        if kind == "idc":
            raise TrainingError("it diverged")
        return condense(*args, kind=kind, **options)

    with monkeypatch.context() as patch:
        patch.setattr(hmn_replay, "condense", fail_for_idc)
        assert make("containers", "--rows", "idc,pixels", "--ipc", "4") == 1
    assert "failed: memory, system idc, ipc 4, seed 0" in capsys.readouterr().err
    text = (tmp_path / "out" / "table.md").read_text()
    assert "- IDC: TrainingError: it diverged" in text
    assert table(tmp_path)["4 IPC", "learned pixels", "gradient"]["ours %"] != "-"
    assert make("containers", "--rows", "idc,pixels", "--ipc", "4") == 0
    assert "TrainingError" not in (tmp_path / "out" / "table.md").read_text()
    assert [cell["system"] for cell in results(tmp_path)["cells"]] == [
        "pixels",
        "pixels",
        "idc",
        "idc",
    ]


def test_architectures(make: Callable[..., int], tmp_path: Path) -> None:
    pools = ("--networks", "convnet,convnet+resnet18", "--evaluate-on", "convnet,resnet18")
    assert make("architectures", *pools, "--rows", "hmn", "--ipc", "1") == 0
    cells = results(tmp_path)["cells"]
    matched = [cell["report"]["network"] for cell in cells if cell["what"] == "memory"]
    assert matched == [["convnet"], ["convnet", "resnet18"]]
    (line,) = (
        line.split("|")
        for line in (tmp_path / "out" / "table.md").read_text().splitlines()
        if "HMN, convnet " in line
    )
    cells = [cell.strip() for cell in line][5:13]
    assert cells[0::2] == ["65.7", "58.5", "56.8", "50.7"]
    assert "-" not in (cells[1], cells[5]) and cells[3] == cells[7] == "-"
    with pytest.raises(ConfigError, match="--networks has no 'alexnet'; choose from convnet, "):
        make("architectures", "--networks", "convnet,vgg16+alexnet")


@pytest.mark.parametrize("name", ["architectures", "memory"])
def test_all_rows_of_a_table_that_was_not_run(tmp_path: Path, name: str) -> None:
    arguments = paper_tables.parse_arguments(["--table", name, "--rows", "all", *ARGUMENTS])
    table: Any = importlib.import_module(f"experiments.tables.{name}")
    settings = paper_tables.make_settings(arguments)
    rows = table.make_rows(arguments, settings, Store(tmp_path, {}))
    assert {row["system"] for row in rows} == set(KINDS)
    assert {row["images"] for row in rows} == {None}
    lines = [line for line in table.markdown(rows).splitlines() if line.startswith("| ")]
    last = [line.split("|")[-2].strip() for line in lines]
    assert last.count("-") == len(rows) and set(last) == {"-", last[0]}


def test_pruning(make: Callable[..., int], tmp_path: Path, calls: dict[str, int]) -> None:
    arguments = ("--rows", "0,10,20", "--betas", "0,0.5,1", "--ipc", "1")
    assert make("pruning", *arguments) == 0
    assert calls == {"condense": 3, "evaluate": 1 + 3 + 3}
    memories = [cell for cell in results(tmp_path)["cells"] if cell["what"] == "memory"]
    kept = memories[0]["images"]
    assert [cell["kept"] for cell in memories] == [kept] * 3
    for cell, rate in zip(memories, (0, 0.1, 0.2), strict=True):
        # Whole images of each of three classes.
        assert kept / (1 - rate) <= cell["images"] < kept / (1 - rate) + 3
    lines = table(tmp_path)
    assert all("-" not in line.values() for line in lines.values()) and len(lines) == 3
    unpruned = lines["1 IPC", "0 %", str(kept)]
    assert unpruned["beta 0, %"] == unpruned["beta 1, %"]
    with Image.open(tmp_path / "out" / "pruning-ipc1.png") as picture:
        assert picture.width > picture.height > 300


@pytest.mark.parametrize(("rows", "betas"), [("0,95", "0"), ("-1", "0"), ("0", "1.5"), ("0", "a")])
def test_rates_and_betas_are_checked(make: Callable[..., int], rows: str, betas: str) -> None:
    with pytest.raises(ConfigError, match=r"0 to 90; got|--betas are"):
        make("pruning", f"--rows={rows}", "--betas", betas)


def test_memory(make: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Here the processes would be what takes the time.
    monkeypatch.setattr(memory, "in_fresh_process", lambda function: function())
    monkeypatch.setattr(memory, "SHAPE", (3, 16, 16))
    monkeypatch.setattr(memory, "REAL_IMAGES", 4)
    assert make("memory", "--rows", "haba", "--objectives", "gradient") == 0
    assert make("memory", "--rows", "pixels", "--objectives", "gradient,dm", "--ipc", "4") == 0
    rows = {(row["system"], row["objective"], row["ipc"]): row for row in results(tmp_path)["rows"]}
    assert len(rows) == 3 * 2
    assert rows["pixels", "dm", 4]["images"] == 40 and rows["pixels", "dm", 4]["peak_bytes"] >= 0
    assert (
        rows["haba", "gradient", 1]["peak_bytes"] is rows["pixels", "dm", 1]["peak_bytes"] is None
    )
    lines = table(tmp_path)
    assert lines["1 IPC", "HaBa", "gradient"]["paper MB"] == "3,368"
    assert lines["1 IPC", "HaBa", "gradient"]["ours MB"] == "-"
    assert lines["4 IPC", "HaBa", "gradient"]["ours MB"] != "-"
    assert lines["4 IPC", "learned pixels", "dm"]["paper MB"] == "-"
    with Image.open(tmp_path / "out" / "memory.png") as picture:
        assert picture.width > picture.height > 300


def test_a_peak_is_what_a_condensation_adds(tmp_path: Path) -> None:
    arguments = paper_tables.parse_arguments(["--table", "memory", *ARGUMENTS])
    settings = paper_tables.make_settings(arguments)
    # In this process, what earlier tests freed would be used again.
    small, large = (
        in_fresh_process(partial(memory.measure_peak, settings, "pixels", "dm", ipc))
        for ipc in (1, 100)
    )
    assert (small["images"], large["images"]) == (10, 1000)
    # Pixels, their gradient and Adam's two moments.
    assert large["peak_bytes"] - small["peak_bytes"] > 3 * 4 * 3072 * 990


def test_a_fresh_process_is_one_and_its_errors_come_back() -> None:
    assert in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        in_fresh_process(partial(int, "a"))


def test_datasets(make: Callable[..., int], cifar10: Path, tmp_path: Path) -> None:
    second = tmp_path / "set-2.npz"
    second.write_bytes(cifar10.read_bytes())
    sets = ("--datasets", f"{cifar10},{second}")
    assert make("datasets", *sets, "--rows", "hmn,pixels,idc", "--ipc", "4") == 0
    rows = {row["data"]: row for row in results(tmp_path)["rows"]}
    assert set(rows) == {"cifar10", "cifar100", "svhn", "tiny_imagenet", "imagenet10", "set2"}
    assert rows["cifar10"]["systems"]["linba"]["accuracies"] == []
    lines = table(tmp_path)
    best = max(("pixels", "idc"), key=lambda name: rows["set2"]["systems"][name]["accuracies"])
    line = lines["", "set2", "4"]
    assert line["which"] == {"pixels": "learned pixels", "idc": "IDC"}[best] and line["of"] == "2"
    assert "-" in lines["", "svhn", "4"].values()
    with pytest.raises(ConfigError, match="of different names"):
        make("datasets", "--datasets", f"{cifar10},{cifar10}")


def test_the_help_is_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python experiments/paper_tables.py --table containers --download" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rows hmn,alexnet", "--rows has no 'alexnet'; choose from hmn, linba, "),
        ("--rows linba-bptt", "--rows has no 'linba-bptt'"),
        ("--ipc 1,a", "--ipc is a number, or several as 0,1,2; got '1,a'"),
        ("--set number_format=int8", "--number-format"),
        ("--set outer_step=3", "no option 'outer_step'"),
        ("--seconds 0", "max_seconds must be|warm_start_seconds must be"),
        ("--width 0", "width must be greater than or equal to 1; got 0"),
        ("--passes 0", "num_passes must be greater than or equal to 1; got 0"),
        ("--trainings 0", "--trainings is 1 or more; got 0"),
    ],
)
def test_arguments_are_checked_before_anything_is_written(
    make: Callable[..., int], tmp_path: Path, arguments: str, message: str
) -> None:
    with pytest.raises(HMNReplayError, match=message):
        make("containers", *arguments.split())
    assert not (tmp_path / "out" / "results.json").exists()
