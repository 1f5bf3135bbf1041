"""What each command does and prints, and how its options reach what it calls."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hmn_replay import commands
from hmn_replay.baselines.selection import SELECTIONS
from hmn_replay.data.images import LabelledImages
from hmn_replay.data.sources import load_dataset
from hmn_replay.errors import CheckpointError
from hmn_replay.memory.file import load
from hmn_replay.memory.hierarchical import HierarchicalMemory
from hmn_replay.memory.layout import Layout
from hmn_replay.training.train import TrainingConfig
from tests.console import BUDGET, TINY_CONDENSATION, TINY_TRAINING, Console


def test_the_whole_way_on_the_digits(run: Console, tmp_path: Path) -> None:
    path = tmp_path / "digits.hmn"
    common = ["--budget", BUDGET, "--seed", 3, "--device", "cpu"]
    made = run.json("condense", "--data", "digits", "--out", path, *common, *TINY_CONDENSATION)
    assert "warm start" in run.err, "a bar for each phase"
    assert path.stat().st_size == made["file_bytes"] <= made["budget_bytes"] == 40 * 1024
    assert made["file"] == str(path)
    assert made["num_classes"] == 10
    assert made["num_images"] >= 10
    assert made["seconds"] > 0
    assert made["effort"] == "quick"
    assert made["number_format"] == "int8"
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits.hmn"], "no checkpoint is left"

    told = run.json("inspect", path)
    for key in ("file_bytes", "budget_bytes", "num_images", "num_classes", "number_format"):
        assert told[key] == made[key]

    scored = run.json("evaluate", path, "--data", "digits", *TINY_TRAINING, "--device", "cpu")
    assert scored["num_images"] == made["num_images"]
    assert scored["repeats"] == 2
    assert 0 <= scored["accuracy_mean"] <= 1

    run("export", path, tmp_path / "pictures")
    assert len(load_dataset(tmp_path / "pictures")) == made["num_images"]

    rival = run.json("baseline", "--kind", "jpeg", "--qualities", "10,60", *common, *TINY_TRAINING)
    assert rival["file_bytes"] <= made["budget_bytes"]
    assert [one["quality"] for one in rival["qualities"]] == [10, 60]

    again = tmp_path / "again.hmn"
    run("condense", "--out", again, *common, *TINY_CONDENSATION, "--quiet")
    assert run.err == ""
    assert again.read_bytes() == path.read_bytes(), "digits are the default, and the seed decides"


def test_inspect_tells_all_that_is_in_the_file(run: Console, memory_file: Path) -> None:
    told = run.json("inspect", memory_file)
    memory = load(memory_file)
    assert told["file_bytes"] == memory_file.stat().st_size
    assert told["budget_bytes"] == 20_000
    assert told["number_format"] == "int8"
    assert told["image_shape"] == [1, 8, 8]
    assert told["num_images"] == 9
    assert told["num_classes"] == 3
    assert told["classes"] == [0, 1, 7]
    assert told["images_per_class"] == [4, 3, 2]
    assert told["bits_per_class"] == 8 * told["file_bytes"] / 3
    assert told["num_floats"] == memory.num_floats
    assert told["tiers"]["instances"] == {"shape": [9, 2, 2, 2], "bytes": 72, "dtype": "I8"}
    parts = sum(tier["bytes"] for tier in told["tiers"].values())
    assert parts + told["header_bytes"] == told["file_bytes"]

    text = run("inspect", memory_file)
    for part in ("9 of 1 x 8 x 8", "3, 2 to 4 images each", "int8", f"{memory.num_floats:,}"):
        assert part in text
    assert run.err == ""


@pytest.mark.parametrize("container", ["raw", "idc", "haba", "linba"])
def test_any_container_may_be_condensed_and_inspected(
    run: Console, tmp_path: Path, container: str
) -> None:
    path = tmp_path / f"{container}.hmn"
    options = ["--container", container, "--budget", BUDGET, "--device", "cpu", "--quiet"]
    made = run.json("condense", "--out", path, *options, *TINY_CONDENSATION)
    assert made["container"] == made["report"]["container"] == container
    assert path.stat().st_size == made["file_bytes"] <= 40 * 1024
    told = run.json("inspect", path)
    for key in ("container", "file_bytes", "num_images", "num_classes", "num_floats"):
        assert told[key] == made[key]
    memory = load(path)
    learned = [tier for name, tier in told["tiers"].items() if name in memory.layout.learned]
    assert sum(math.prod(tier["shape"]) for tier in learned) == memory.num_floats
    assert f"container       {container}\n" in run("inspect", path)


def test_evaluate_repeats_with_seeds_in_a_row(
    run: Console, memory_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def evaluate(source: Any, test: Any, **options: Any) -> tuple[None, float]:
        asked.append(options)
        return None, 0.5 + 0.1 * len(asked)

    monkeypatch.setattr(commands, "evaluate", evaluate)
    options = ["--seed", 5, "--network", "vgg16", "--device", "cpu", "--quiet"]
    result = run.json("evaluate", memory_file, *options)
    assert [one["seed"] for one in asked] == [5, 6, 7]
    assert {one["device"] for one in asked} == {"cpu"}
    assert not any(one["progress"] for one in asked)
    assert asked[0]["config"] == TrainingConfig(network="vgg16")
    assert result["accuracy_mean"] == pytest.approx(0.7)
    assert result["accuracy_std"] == pytest.approx(0.1), "that of a sample"
    assert result["accuracies"] == pytest.approx([0.6, 0.7, 0.8])
    assert result["repeats"] == 3
    assert result["network"] == "vgg16"
    assert result["num_images"] == 9
    assert result["file_bytes"] == memory_file.stat().st_size
    assert run.err == ""

    asked.clear()
    assert run.json("evaluate", memory_file, "--repeats", 1)["accuracy_std"] == 0.0
    asked.clear()
    assert "70.00 % ± 10.00 (3 seeds)" in run("evaluate", memory_file, "--passes", 9)
    assert "seed 2: 80.00%" in run.err
    assert asked[0]["config"] == TrainingConfig(num_passes=9)


def test_baseline_takes_the_best_quality_and_lists_all(
    run: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def evaluate(source: Any, test: Any, **options: Any) -> tuple[None, float]:
        drawn.append(options["seed"])
        return None, 1 / source.num_images

    monkeypatch.setattr(commands, "evaluate", evaluate)
    options = ["--kind", "jpeg", "--budget", "4 kB", "--qualities", "5,20,90"]
    result = run.json("baseline", *options, "--repeats", 2, "--quiet")
    assert drawn == [0, 1] * 3
    assert result["kind"] == "jpeg"
    assert result["quality"] == 90
    assert [one["quality"] for one in result["qualities"]] == [5, 20, 90]
    best = result["qualities"][-1]
    for key in ("accuracy_mean", "accuracy_std", "num_images", "file_bytes", "repeats"):
        assert result[key] == best[key]
    assert result["budget_bytes"] == 4000
    assert all(draw["file_bytes"] <= 4000 for one in result["qualities"] for draw in one["draws"])
    assert result["network"] == "convnet"
    lines = run("baseline", *options).splitlines()
    assert [line for line in lines if line.endswith("best")] == [lines[-1]]


def test_baseline_of_raw_images(run: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "evaluate", lambda source, test, **_: (None, 0.25))
    result = run.json("baseline", "--kind", "raw", "--budget", 5000, "--quiet")
    assert result["accuracy_mean"] == 0.25
    assert result["accuracy_std"] == 0.0
    assert result["repeats"] == 3
    assert 5000 - 64 - 24 < result["file_bytes"] <= 5000
    assert [draw["num_images"] for draw in result["draws"]] == [result["num_images"]] * 3
    assert "qualities" not in result
    assert "25.00 % ± 0.00" in run("baseline", "--kind", "raw", "--budget", 5000)


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_baseline_chooses_once_a_seed(
    kind: str, run: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def choose(data: LabelledImages, method: str, **options: Any) -> torch.Tensor:
        asked.append({"method": method, **options})
        return torch.arange(len(data) - 7 * options["seed"])

    monkeypatch.setattr(commands, "select_images", choose)
    monkeypatch.setattr(commands, "evaluate", lambda source, test, **_: (None, 0.25))
    options = ["--kind", kind, "--budget", 10**6, "--qualities", "5,20", "--repeats", 2]
    options += ["--selection", "herding", "--width", 4, "--device", "cpu", "--quiet"]
    result = run.json("baseline", *options)
    assert result["selection"] == "herding"
    assert [draw["num_images"] for draw in result["draws"]] == [1437, 1430]
    assert [one["seed"] for one in asked] == [0, 1]
    assert {one["method"] for one in asked} == {"herding"}
    assert {one["num_images"] for one in asked} == {10**6 // 64 if kind == "raw" else None}
    assert asked[0]["config"] == TrainingConfig(width=4)
    assert asked[0]["device"] == "cpu"
    assert asked[0]["progress"] is False


@pytest.mark.parametrize("selection", SELECTIONS)
def test_baseline_of_every_selection(run: Console, selection: str) -> None:
    options = ["--kind", "raw", "--budget", 2000, *TINY_TRAINING, "--device", "cpu"]
    text = run("baseline", *options, "--selection", selection)
    assert f"selection  {selection}\n" in text


def test_export_writes_what_is_asked(run: Console, memory_file: Path, tmp_path: Path) -> None:
    folder, arrays, sheet = (tmp_path / name for name in ("out", "out.npz", "sheet.png"))
    result = run.json("export", memory_file, folder, "--npz", arrays)
    assert result["num_images"] == 9
    assert result["contact_sheet"] == str(folder / "contact_sheet.png")
    assert (folder / "contact_sheet.png").is_file()
    assert load_dataset(folder).classes.tolist() == [0, 1, 7]
    assert load_dataset(arrays).classes.tolist() == [0, 1, 7]
    run("export", memory_file, "--contact-sheet", sheet, "--columns", 2)
    assert sheet.is_file()
    run("export", memory_file, folder, code=1)
    assert "exists already and is not an empty folder" in run.err
    run("export", memory_file, code=2)
    assert "name a DIR, --npz FILE or --contact-sheet FILE" in run.err


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, make_layout: Callable[..., Layout]) -> dict[str, Any]:
    """Replaces condense(); holds the options of the last call."""
    options: dict[str, Any] = {}

    def condense(data: LabelledImages, budget: Any, **given: Any) -> HierarchicalMemory:
        options.clear()
        options.update(given, data=data, budget=budget)
        given["checkpoint"].write_text("half of the work")
        if given["seed"] == 13:
            raise KeyboardInterrupt
        if given["seed"] == 14:
            raise CheckpointError("the checkpoint belongs to another run; delete it")
        memory = HierarchicalMemory(make_layout(image_shape=data.image_shape), range(10), 2)
        phase = {"seconds": 1.5, "images": 30, "images_per_second": 20.0}
        memory.report = {"seconds": 1.5, "phases": {"warm_start": phase}}
        return memory

    monkeypatch.setattr(commands, "condense", condense)
    return options


def test_condense_passes_its_options_on(
    run: Console, asked: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "digits.hmn"
    common = ["condense", "--budget", "50kB", "--out", out]
    run(*common)
    assert asked["effort"] == "quick"
    assert asked["container"] == "hmn"
    assert asked["seed"] == 0
    assert asked["device"] == "auto"
    assert asked["progress"] is True
    assert asked["checkpoint"] == tmp_path / "digits.hmn.checkpoint"
    assert asked["budget"].num_bytes == 50_000
    assert len(asked["data"]) == 1437
    assert not {"number_format", "objective"} & set(asked)

    options = ["--effort", "standard", "--number-format", "float16", "--quiet"]
    options += ["--objective", "distribution", "--container", "idc", "--set", "outer-steps=7"]
    text = run(*common, *options, "--set", "beta_grid=0,0.5", "--set", "classes_per_step=none")
    assert asked["progress"] is False
    assert asked["effort"] == "standard"
    assert asked["number_format"] == "float16"
    assert asked["objective"] == "distribution"
    assert asked["container"] == "idc"
    assert asked["outer_steps"] == 7
    assert asked["beta_grid"] == (0.0, 0.5)
    assert asked["classes_per_step"] is None
    assert "1.5 s, 20 images/s" in text
    assert run.err == ""


def test_condense_goes_on_from_a_checkpoint_or_restarts(
    run: Console, asked: dict[str, Any], tmp_path: Path
) -> None:
    out, checkpoint = tmp_path / "digits.hmn", tmp_path / "digits.hmn.checkpoint"
    common = ["condense", "--budget", "50kB", "--out", out]
    run(*common, "--seed", 13, code=130)
    assert checkpoint.exists()
    assert f"interrupted; the work so far is in {checkpoint}: run the same command" in run.err
    run(*common, "--seed", 13, "--restart", code=130)
    assert "run the same command without --restart to go on" in run.err
    assert "going on" not in run.err
    run(*common, "--seed", 14, code=1)
    assert "belongs to another run; delete it; --restart throws it away" in run.err
    run(*common)
    assert f"going on from {checkpoint}" in run.err
    assert not checkpoint.exists()
    assert out.exists()


def test_experts_go_with_the_checkpoint_that_they_lie_beside(
    run: Console, asked: dict[str, Any], tmp_path: Path
) -> None:
    common = ["condense", "--budget", "50kB", "--out", tmp_path / "digits.hmn"]
    experts = tmp_path / "digits.hmn.checkpoint.experts"
    elsewhere = tmp_path / "elsewhere"
    for folder in (experts, elsewhere):
        folder.mkdir()
        (folder / "expert-0000.safetensors").touch()
    run(*common, "--seed", 13, code=130)
    assert experts.exists()
    run(*common, "--seed", 13, "--restart", code=130)
    assert not experts.exists()
    experts.mkdir()
    run(*common, "--objective", "mtt", "--set", f"experts={elsewhere}")
    assert asked["objective"] == "mtt"
    assert asked["experts"] == str(elsewhere)
    assert not experts.exists()
    assert os.listdir(elsewhere) == ["expert-0000.safetensors"]
