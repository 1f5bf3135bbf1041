"""The command: what each sub-command does and prints, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hmn_replay
from hmn_replay.cli import main
from hmn_replay.errors import CheckpointError
from tests.console import BUDGET, TINY_CONDENSATION, TINY_TRAINING, Console
from tests.support import KINDS, PosterMemory
from tests.support import REAL as REAL_KINDS
from tests.support import registered as memory_kind


def test_the_whole_way_on_the_digits(run: Console, tmp_path: Path) -> None:
    path = tmp_path / "digits.hmn"
    common = ["--budget", BUDGET, "--seed", 3, "--device", "cpu"]
    made = run.json("condense", "--data", "digits", "--out", path, *common, *TINY_CONDENSATION)
    assert "warm start" in run.err, "a bar for each phase"
    assert path.stat().st_size == made["file_bytes"] <= made["budget_bytes"] == 8 * 1024
    assert made["file"] == str(path)
    assert made["num_classes"] == 10
    assert made["num_images"] >= 10
    assert made["seconds"] > 0
    assert made["effort"] == "quick"
    assert made["kind"] == "hmn"
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits.hmn"], "no checkpoint is left"

    told = run.json("inspect", path)
    for key in ("file_bytes", "budget_bytes", "num_images", "num_classes", "number_format"):
        assert told[key] == made[key]

    scored = run.json("evaluate", path, "--data", "digits", *TINY_TRAINING, "--device", "cpu")
    assert scored["num_images"] == made["num_images"]
    assert scored["repeats"] == 2
    assert 0 <= scored["accuracy_mean"] <= 1

    run("export", path, tmp_path / "pictures")
    assert len(hmn_replay.load_dataset(tmp_path / "pictures")) == made["num_images"]

    real = run.json("baseline", "--kind", "jpeg", "--qualities", "10,60", *common, *TINY_TRAINING)
    assert real["file_bytes"] <= made["budget_bytes"]
    assert [one["quality"] for one in real["tried"]] == [10, 60]

    again = tmp_path / "again.hmn"
    run("condense", "--out", again, *common, *TINY_CONDENSATION, "--quiet")
    assert run.err == ""
    assert again.read_bytes() == path.read_bytes(), "digits are the default, and the seed decides"


@pytest.mark.filterwarnings("ignore:the file fills")
@pytest.mark.parametrize("labels", ["soft", "labeller"])
def test_labels_are_made_shown_and_learned_from(run: Console, tmp_path: Path, labels: str) -> None:
    path, other = tmp_path / "digits.hmn", tmp_path / "jpeg.hmn"
    settings = [f"labels={labels}", "teacher_passes=50", "teacher_width=2", "labeller_width=2"]
    common = ["--budget", BUDGET, "--device", "cpu"]
    given = [word for setting in settings for word in ("--set", setting)]
    made = run.json("condense", "--out", path, *common, *TINY_CONDENSATION, *given)
    assert made["labels"] == labels
    assert path.stat().st_size == made["file_bytes"] <= 8 * 1024
    told = run.json("inspect", path)
    stored = {"soft": "label_code", "labeller": "labeller_code"}[labels]
    assert 0 < told["stored"][stored]["bytes"] <= told["label_bytes"]
    assert told["bits"][{"soft": "soft_labels"}.get(labels, labels)] == 8 * told["label_bytes"]
    assert re.search(rf"^labels +{labels}$", run("inspect", path), re.M)
    training = [*TINY_TRAINING, "--device", "cpu"]
    scored = run.json("evaluate", path, *training)
    assert scored["labels"] == labels
    assert ("labeller_accuracy" in scored) == (labels == "labeller")
    assert run.json("evaluate", path, *training, "--labels", "hard")["labels"] == "hard"
    half = run.json("evaluate", path, *training, "--label-weight", "0.5")
    assert half["accuracies"] == scored["accuracies"], "the default of learned images"
    run("evaluate", path, *training, "--label-weight", "2", code=2)
    assert (
        run("evaluate", path, *training, "--labels", "soft", code=2 * (labels != "soft"))
        or labels != "soft"
    )
    baseline = ["--kind", "jpeg", "--qualities", "30", "--labels", labels, "--out", other]
    real = run.json("baseline", *baseline, *common, *TINY_TRAINING, *given[2:])
    assert real["labels"] == run.json("inspect", other)["labels"] == labels
    assert real["file_bytes"] <= 8 * 1024


def test_inspect_prints_all_that_is_in_the_file(run: Console, memory_file: Path) -> None:
    told = run.json("inspect", memory_file)
    memory = hmn_replay.load(memory_file)
    assert memory.summary().items() <= told.items()
    assert told["stored"]["values"]["dtype"] == "int8"
    parts = sum(tensor["bytes"] for tensor in told["stored"].values())
    assert parts + told["header_bytes"] == told["file_bytes"]
    assert told["file_bytes"] == memory_file.stat().st_size
    assert told["budget_bytes"] == 20_000
    assert told["classes"] == [0, 1, 7]
    assert told["images_per_class"] == [4, 3, 2]
    text = run("inspect", memory_file)
    for part in (
        "9 of 1 x 8 x 8",
        "3, 2 to 4 images each",
        "int8",
        "20,000",
        "9 x 2 x 2 x 2",
        *memory.bits(),
    ):
        assert part in text
    assert run.err == ""


def test_inspect_lists_the_classes(run: Console, memory_file: Path, tmp_path: Path) -> None:
    def by_class(file: Path) -> str:
        found = re.findall(r"^by class +(.+)$", run("inspect", file), re.M)
        assert len(found) == 1
        return str(found[0])

    assert by_class(memory_file) == "0 (4), 1 (3), 7 (2)"
    names = {0: "cat", 1: "two\nlines"}
    labels = torch.tensor([0, 0, 1, 2**32, 2**32 + 1, 3 * 2**32 + 5])
    images = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    data = hmn_replay.LabelledImages(images, labels, names)
    path = tmp_path / "tasks.hmn"
    hmn_replay.raw_images(data, "9 kB").save(path)
    found = r"0 'cat' (2), 1 'two\nlines' (1), task 1: 0 (1), task 1: 1 (1), task 3: 5 (1)"
    assert by_class(path) == found
    told = run.json("inspect", path)
    assert told["classes"] == labels.unique().tolist()
    assert told["class_names"] == ["cat", "two\nlines", None, None, None]
    assert told["images_per_class"] == [2, 1, 1, 1, 1]

    many = torch.arange(100) - 2
    hmn_replay.raw_images((torch.zeros(100, 1, 8, 8, dtype=torch.uint8), many), "9 kB").save(path)
    assert by_class(path).startswith("-2 (1), -1 (1), 0 (1)")
    assert by_class(path).endswith("7 (1), ..., 97 (1)")


@pytest.mark.parametrize("kind", KINDS)
def test_every_memory_kind_is_made_inspected_exported_and_evaluated(
    run: Console, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"{kind}.hmn"
    options = ["--kind", kind, "--budget", BUDGET, "--device", "cpu", "--out", path]
    if issubclass(hmn_replay.MEMORIES[kind], hmn_replay.RealMemory):
        options += ["--qualities", 20] if kind == "jpeg" else []
        made = run.json("baseline", *options, *TINY_TRAINING, "--repeats", 1)
    else:
        made = run.json("condense", *options, *TINY_CONDENSATION)
    assert made["file"] == str(path)
    assert made["kind"] == kind
    assert path.stat().st_size == made["file_bytes"] <= 8 * 1024
    told = run.json("inspect", path)
    for key in ("kind", "file_bytes", "num_images"):
        assert told[key] == made[key]
    assert kind in run("inspect", path)
    run("export", path, tmp_path / "pictures")
    assert len(hmn_replay.load_dataset(tmp_path / "pictures")) == made["num_images"]
    scored = run.json("evaluate", path, *TINY_TRAINING, "--repeats", 1, "--device", "cpu")
    assert scored["num_images"] == made["num_images"]


def test_evaluate_repeats_with_seeds_in_a_row(
    run: Console, memory_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def evaluate(source: Any, test: Any, **options: Any) -> tuple[None, float]:
        asked.append(options)
        return None, 0.5 + 0.1 * len(asked)

    monkeypatch.setattr(hmn_replay, "evaluate", evaluate)
    options = ["--seed", 5, "--network", "vgg16", "--device", "cpu", "--quiet"]
    result = run.json("evaluate", memory_file, *options)
    assert [one["seed"] for one in asked] == [5, 6, 7]
    assert {one["device"] for one in asked} == {"cpu"}
    assert not any(one["progress"] for one in asked)
    assert asked[0]["config"] == hmn_replay.TrainingConfig(network="vgg16")
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
    assert run("evaluate", memory_file, "--repeats", 1).endswith("  60.00 % (1 seed)\n")
    asked.clear()
    options = ["--passes", 9, "--precision", "auto"]
    assert "70.00 % ± 10.00 (3 seeds)" in run("evaluate", memory_file, *options)
    assert "seed 2: 80.00%" in run.err
    assert asked[0]["config"] == hmn_replay.TrainingConfig(num_passes=9, precision="auto")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of digits, five of each class, without splits and of 10 x 8 pixels."""
    digits = hmn_replay.load_dataset("digits")
    folder = tmp_path / "pictures"
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for position in digits.of_class(label)[:5].tolist():
            pixels = torch.nn.functional.pad(digits.images[position, 0], (0, 0, 1, 1))
            Image.fromarray(pixels.numpy()).save(folder / str(label) / f"{position}.png")
    return folder


def test_a_folder_without_a_test_split_is_tested_on_a_share(
    pictures: Path, run: Console, tmp_path: Path
) -> None:
    where = ["--data", pictures, "--test-share", 0.2]
    raw = [*where, "--kind", "raw", "--budget", "8 KiB", *TINY_TRAINING, "--quiet"]
    assert run.json("baseline", *raw)["num_images"] == 40
    out = tmp_path / "out.hmn"
    sized = [*where, "--size", 8]
    made = run.json("condense", *sized, "--budget", BUDGET, "--out", out, *TINY_CONDENSATION)
    # Pictures are brought to the memory's size, if no other is given.
    found = [run.json("evaluate", out, *each, *TINY_TRAINING) for each in (where, sized)]
    assert found[0]["accuracies"] == found[1]["accuracies"]
    assert found[0]["num_images"] == made["num_images"] <= 40
    page = tmp_path / "page.html"
    run("gallery", out, page, *where)
    assert page.exists()
    assert "has no test split: " in run("evaluate", out, "--data", pictures, code=1) + run.err
    run("evaluate", out, *where, "--size", 9, code=1)
    assert "the source has images of (1, 8, 8) and the test set of (1, 9, 9)" in run.err
    run("evaluate", out, "--data", pictures, "--test-share", 1, code=2)
    assert "expected a share above 0 and below 1, got '1'" in run.err


def test_baseline_goes_on_past_the_edge_where_the_best_quality_is(
    run: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(source: Any, test: Any, **options: Any) -> tuple[None, float]:
        return None, 1 / source.num_images

    monkeypatch.setattr(hmn_replay, "evaluate", evaluate)
    options = ["--kind", "jpeg", "--budget", "20 kB", "--repeats", 1, "--quiet"]
    result = run.json("baseline", *options)
    tried = [one["quality"] for one in result["tried"]]
    # At 5 and at 10 all images fit: the fewer bytes would buy nothing.
    assert tried == [10, 20, 35, 50, 75, 95, 98, 99, 100]
    assert result["quality"] == 100


def test_baseline_goes_on_below_the_lowest_quality_where_higher_ones_do_not_fit(
    run: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(source: Any, test: Any, **options: Any) -> tuple[None, float]:
        return None, source.num_images / 1e6

    monkeypatch.setattr(hmn_replay, "evaluate", evaluate)
    options = ["--kind", "jpeg", "--budget", 700, "--repeats", 1, "--quiet"]
    result = run.json("baseline", *options)
    tried = [one["quality"] for one in result["tried"]]
    assert tried[:3] == [1, 2, 5] and max(tried) < 100 and result["quality"] == 1


def test_baseline_takes_the_best_quality_and_lists_all(
    run: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def evaluate(source: Any, test: Any, **options: Any) -> tuple[None, float]:
        drawn.append(options["seed"])
        return None, 1 / source.num_images

    monkeypatch.setattr(hmn_replay, "evaluate", evaluate)
    options = ["--kind", "jpeg", "--budget", "4 kB", "--qualities", "5,20,5,90,90"]
    result = run.json("baseline", *options, "--repeats", 2, "--quiet")
    assert drawn == [0, 1] * 3
    assert result["kind"] == "jpeg"
    assert result["quality"] == 90
    assert [one["quality"] for one in result["tried"]] == [5, 20, 90]
    best = result["tried"][-1]
    for key in ("accuracy_mean", "accuracy_std", "num_images", "file_bytes", "repeats"):
        assert result[key] == best[key]
    assert result["budget_bytes"] == 4000
    assert all(one["file_bytes"] <= 4000 for one in result["tried"])
    assert result["network"] == "convnet"
    lines = run("baseline", *options).splitlines()
    assert [line for line in lines if line.endswith("best")] == [lines[-1]]


def test_baseline_of_raw_images(run: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hmn_replay, "evaluate", lambda source, test, **_: (None, 0.25))
    result = run.json("baseline", "--kind", "raw", "--budget", 5000, "--quiet")
    assert result["accuracy_mean"] == 0.25
    assert result["accuracy_std"] == 0.0
    assert result["repeats"] == 3
    assert 5000 - 64 - 24 < result["file_bytes"] <= 5000
    assert len(result["tried"]) == 1
    text = run("baseline", "--kind", "raw", "--budget", 5000)
    assert "25.00 % ± 0.00" in text
    assert "best" not in text


def test_baseline_trains_no_teacher_where_its_labels_have_no_room(
    run: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(hmn_replay, "train_teacher", never)
    for kind in (["raw"], ["jpeg", "--qualities", "30"]):
        run("baseline", "--kind", *kind, "--budget", "2KiB", "--labels", "labeller", code=2)
        assert re.search(r"one image of each of 10 classes beside labels='labeller'", run.err)


@pytest.mark.parametrize("kind", REAL_KINDS)
def test_baseline_chooses_once_a_seed(
    kind: str, run: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digits = hmn_replay.load_dataset("digits").take(torch.arange(100))
    images, labels = digits.images.movedim(1, -1).numpy(), digits.labels.numpy()
    arrays: dict[str, Any] = {"x_train": images, "y_train": labels}
    arrays |= {"x_test": images, "y_test": labels}
    np.savez(tmp_path / "data.npz", **arrays)
    asked: list[dict[str, Any]] = []

    def choose(data: hmn_replay.LabelledImages, method: str, **options: Any) -> torch.Tensor:
        asked.append({"method": method, **options})
        return torch.arange(len(data) - 7 * options["seed"])

    monkeypatch.setattr(hmn_replay, "select_images", choose)
    trained_on = []

    def evaluate(source: hmn_replay.Memory, test: Any, **_: Any) -> tuple[None, float]:
        trained_on.append(source.num_images)
        return None, 0.25

    monkeypatch.setattr(hmn_replay, "evaluate", evaluate)
    options = ["--data", tmp_path / "data.npz", "--kind", kind, "--budget", 10**6, "--repeats", 2]
    options += ["--qualities", "5,20"] if kind == "jpeg" else []
    options += ["--selection", "herding", "--width", 4, "--device", "cpu", "--quiet"]
    result = run.json("baseline", *options)
    assert result["selection"] == "herding"
    assert result["num_images"] == 100
    assert trained_on == [100, 93] * len(result["tried"])
    assert [one["seed"] for one in asked] == [0, 1]
    assert {one["method"] for one in asked} == {"herding"}
    assert {one["num_images"] for one in asked} == {10**6 // 64 if kind == "raw" else None}
    assert asked[0]["config"] == hmn_replay.TrainingConfig(width=4)
    assert asked[0]["device"] == "cpu"
    assert asked[0]["progress"] is False


class Negative(hmn_replay.RawMemory):
    """Pixels, stored as a negative."""

    def encode(self, images: torch.Tensor) -> list[bytes]:
        return super().encode(255 - images)

    def _read(self, payloads: Sequence[bytes]) -> torch.Tensor:
        return 255 - super()._read(payloads)


class Graded(hmn_replay.JPEGMemory):
    """JPEG, whose quality is to be given."""


def test_baseline_of_a_registered_kind(run: Console, tmp_path: Path) -> None:
    options = ["--budget", 5000, *TINY_TRAINING, "--repeats", 1, "--device", "cpu"]
    with memory_kind(Negative) as kind, memory_kind(Graded) as other:
        result = run.json("baseline", "--kind", kind, *options, "--out", tmp_path / "own.hmn")
        assert isinstance(hmn_replay.load(tmp_path / "own.hmn"), Negative)
        run("baseline", "--kind", other, *options, code=2)
        assert f"invalid choice: {other!r}" in run.err
    raw = run.json("baseline", "--kind", "raw", *options)
    assert abs(result["num_images"] - raw["num_images"]) <= 1


@pytest.mark.parametrize("selection", hmn_replay.SELECTIONS)
def test_baseline_of_every_selection(run: Console, selection: str) -> None:
    options = ["--kind", "raw", "--budget", 2000, *TINY_TRAINING, "--repeats", 1, "--device", "cpu"]
    text = run("baseline", *options, "--selection", selection)
    assert f"selection  {selection}\n" in text


def test_export_writes_what_is_asked(run: Console, memory_file: Path, tmp_path: Path) -> None:
    folder, arrays, sheet = (tmp_path / name for name in ("out", "out.npz", "sheet.png"))
    result = run.json("export", memory_file, folder, "--npz", arrays)
    assert result["num_images"] == 9
    assert result["contact_sheet"] == str(folder / "contact_sheet.png")
    assert (folder / "contact_sheet.png").is_file()
    assert hmn_replay.load_dataset(folder).classes.tolist() == [0, 1, 7]
    assert hmn_replay.load_dataset(arrays).classes.tolist() == [0, 1, 7]
    run("export", memory_file, "--contact-sheet", sheet, "--columns", 2)
    assert sheet.is_file()
    run("export", memory_file, folder, code=2)
    assert "exists already and is not an empty folder" in run.err
    run("export", memory_file, code=2)
    assert "name a DIR, --npz FILE, --contact-sheet FILE or --dd-ranking DIR" in run.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--contact-sheet sheet.jpg", "a contact sheet is a .png file; got 'sheet.jpg'"),
        ("--npz absent/x.npz", "the folder of 'absent/x.npz' does not exist; make it first"),
        ("--dd-ranking ranking", "(1, 8, 8); all of its have 3 channels"),
        ("--dd-ranking pictures", "DIR must be empty when pictures are written; got 'pictures'"),
        ("--dd-ranking pictures/x", "--dd-ranking 'pictures/x' in it: name a folder beside it"),
        ("--dd-ranking absent/x", "the folder of 'absent/x' does not exist; make it first"),
        ("--npz x.npz --contact-sheet absent/x.png", "the folder of 'absent/x.png' does not exist"),
    ],
)
def test_export_that_fails_has_written_nothing(
    run: Console, memory_file: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.chdir(memory_file.parent)
    run("export", memory_file, "pictures", *line.split(), code=2)
    assert message in run.err
    assert not Path("pictures").exists() and not Path("x.npz").exists()


def test_export_writes_into_the_folder_that_it_makes(
    run: Console, memory_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(memory_file.parent)
    run("export", memory_file, "out", "--npz", "out/x.npz", "--contact-sheet", "out/sheet.png")
    assert Path("out/x.npz").is_file() and Path("out/sheet.png").is_file()


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("export MEMORY --npz MEMORY", "--npz"),
        ("export MEMORY pictures --contact-sheet LINK", "--contact-sheet"),
        ("gallery MEMORY other.html LINK", "OUT"),
        ("gallery MEMORY page.html --data page.html", "OUT"),
    ],
)
def test_what_is_read_is_not_written_over(
    run: Console, memory_file: Path, monkeypatch: pytest.MonkeyPatch, line: str, option: str
) -> None:
    monkeypatch.chdir(memory_file.parent)
    held = memory_file.read_bytes()
    Path("link.html").symlink_to(memory_file.name)
    line = line.replace("MEMORY", memory_file.name).replace("LINK", "link.html")
    run(*line.split(), code=2)
    assert f"error: {option}: " in run.err
    assert "is read by this command; name another file" in run.err
    assert memory_file.read_bytes() == held
    assert not Path("pictures").exists()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces condense(); holds the options of the last call."""
    options: dict[str, Any] = {}

    def condense(data: hmn_replay.LabelledImages, budget: Any, **given: Any) -> hmn_replay.Memory:
        options.clear()
        options.update(given, data=data, budget=budget)
        given["checkpoint"].write_text("half of the work")
        if given["seed"] == 13:
            raise KeyboardInterrupt
        if given["seed"] == 14:
            raise CheckpointError("the checkpoint belongs to another run; delete it")
        memory = hmn_replay.raw_images(data, "9 kB")
        phase = {"seconds": 1.5, "images": 30, "images_per_second": 20.0}
        memory.report = {"seconds": 1.5, "phases": {"warm_start": phase}}
        return memory

    monkeypatch.setattr(hmn_replay, "condense", condense)
    return options


def test_condense_passes_its_options_on(
    run: Console, asked: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "digits.hmn"
    common = ["condense", "--budget", "50kB", "--out", out]
    run(*common)
    assert asked["effort"] == "quick"
    assert asked["kind"] == "hmn"
    assert asked["seed"] == 0
    assert asked["device"] == "auto"
    assert asked["progress"] is True
    assert asked["checkpoint"] == tmp_path / "digits.hmn.checkpoint"
    assert asked["budget"] == "50kB"
    assert len(asked["data"]) == 1437
    assert not {"number_format", "objective", "labels"} & set(asked)

    options = ["--effort", "standard", "--number-format", "float16", "--quiet"]
    options += ["--objective", "distribution", "--kind", "idc", "--set", "outer-steps=7"]
    options += ["--labels", "soft"]
    text = run(*common, *options, "--set", "beta_grid=0,0.5", "--set", "classes_per_step=none")
    assert asked["progress"] is False
    assert asked["effort"] == "standard"
    assert asked["number_format"] == "float16"
    assert asked["objective"] == "distribution"
    assert asked["labels"] == "soft"
    assert asked["kind"] == "idc"
    assert asked["outer_steps"] == "7"
    assert asked["beta_grid"] == "0,0.5"
    assert asked["classes_per_step"] == "none"
    assert "1.5 s, 20 images/s" in text
    assert run.err == ""


def test_condense_goes_on_from_a_checkpoint_or_restarts(
    run: Console, asked: dict[str, Any], tmp_path: Path
) -> None:
    out, checkpoint = tmp_path / "digits.hmn", tmp_path / "digits.hmn.checkpoint"
    common = ["condense", "--budget", "50kB", "--out", out]
    run(*common, "--seed", 13, code=130)
    assert checkpoint.exists()
    assert (
        f"interrupted; the work so far is in {checkpoint}: the same command resumes it" in run.err
    )
    run(*common, "--seed", 13, "--restart", code=130)
    assert "the same command without --restart resumes it" in run.err
    assert "resuming" not in run.err
    run(*common, "--seed", 14, code=1)
    assert "belongs to another run; delete it; --restart deletes it" in run.err
    for *wrong, code in (
        ("--budget", "4KX", 2),
        ("--set", "outer_steps=-1", 2),
        ("--data", tmp_path / "nothing.npz", 1),
    ):
        run(*common, "--restart", *wrong, code=code)
        assert checkpoint.exists()
    run(*common)
    assert f"resuming from {checkpoint}" in run.err
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
    run(*common, "--objective", "mtt", "--set", f"experts={elsewhere}")
    assert asked["objective"] == "mtt"
    assert asked["experts"] == str(elsewhere)
    assert os.listdir(elsewhere) == ["expert-0000.safetensors"]


def test_what_a_user_keeps_beside_a_checkpoint_stays(
    run: Console, asked: dict[str, Any], tmp_path: Path
) -> None:
    """Of a run that makes no experts, and of one that deletes those that it made."""
    common = ["condense", "--budget", "50kB", "--out", tmp_path / "digits.hmn"]
    experts = tmp_path / "digits.hmn.checkpoint.experts"
    experts.mkdir()
    for name in ("expert-0000.safetensors", "notes.txt"):
        (experts / name).touch()
    run(*common)
    assert sorted(os.listdir(experts)) == ["expert-0000.safetensors", "notes.txt"]
    run(*common, "--restart")
    assert os.listdir(experts) == ["notes.txt"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
@pytest.mark.parametrize("more", [[], ["--restart"]], ids=["", "restart"])
@pytest.mark.timeout(60)
def test_what_is_no_checkpoint_is_neither_waited_for_nor_deleted(
    run: Console, asked: dict[str, Any], tmp_path: Path, make: Any, more: list[str]
) -> None:
    checkpoint = tmp_path / "digits.hmn.checkpoint"
    make(checkpoint)
    run("condense", "--budget", "50kB", "--out", tmp_path / "digits.hmn", *more, code=2)
    assert "where the checkpoint is to be; move it away, or name another --out" in run.err
    assert checkpoint.exists()
    assert not asked


def test_ctrl_c_elsewhere_just_stops(
    run: Console, memory_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hmn_replay, "evaluate", stop)
    assert run("evaluate", memory_file, code=130) == ""
    assert run.err == "hmn-replay: interrupted\n"


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ("inspect absent.hmn", 1, "No such file or directory: 'absent.hmn'"),
        ("inspect .", 1, "Is a directory: '.'"),
        ("evaluate memory.hmn --data nothing", 1, "no data set is called 'nothing'"),
        ("evaluate memory.hmn --device warp", 2, "device 'warp' cannot be used"),
        ("evaluate memory.hmn --device meta", 2, "device 'meta' cannot be used"),
        ("evaluate bare.hmn", 1, "expected a source of one image or more; it has none"),
        ("evaluate bare.hmn --scores", 1, "expected a memory of one image or more; it has none"),
        ("inspect damaged.hmn", 1, "cannot read 'damaged.hmn': "),
        ("condense --budget lots --out x.hmn", 2, "cannot read 'lots' as a budget"),
        ("condense --budget 9 --out x.hmn", 2, "does not hold one image"),
        ("condense --budget 50kB --out no/x.hmn", 2, "--out: 'no/x.hmn' must be a file, in a"),
        ("condense --budget 50kB --out .", 2, "--out: '.' must be a file"),
        ("condense --budget 50kB --out x.hmn --set outer_step=1", 2, "did you mean 'outer_steps'"),
        ("condense --budget 50kB --out x.hmn --set outer_steps=x", 2, "outer_steps must"),
        (
            "condense --budget 50kB --out x.hmn --objective gradient --set objective=mtt",
            2,
            "both --objective and --set objective=... are given",
        ),
        (
            "condense --budget 50kB --out x.hmn --labels hard --set labels=soft",
            2,
            "both --labels and --set labels=... are given",
        ),
        ("condense --budget 50kB --out x.hmn --set outer_steps=-1", 2, "outer_steps must"),
        *(
            (f"condense --budget 50kB --out x.hmn --set {name}=3", 2, f"no option '{name}'")
            for name in ("budget", "checkpoint", "device", "effort", "expected_classes", "kind")
        ),
        ("condense --budget 50kB --out x.hmn --set seed=3", 2, "no option 'seed'; pass --seed"),
        ("evaluate memory.hmn --scores --labels soft", 2, "--scores are by hard labels; got"),
        (
            "baseline --kind raw --budget 9kB --qualities 5",
            2,
            "--qualities are of JPEG; got --kind",
        ),
        ("baseline --kind raw --budget 9kB --set label_views=2", 2, "--labels hard makes none"),
        ("baseline --kind raw --budget 9kB --set labels=soft", 2, "'labels'; pass --labels by"),
        ("condense --budget 50kB --out x.hmn --data ~no_such/x", 1, "no data set is called"),
        ("baseline --kind raw --budget 50", 2, "a budget of 50 bytes does not hold one image"),
        ("export memory.hmn out.npz", 2, "got 'out.npz': write a file by --npz FILE, or by"),
        ("export memory.hmn a/sheet.PNG", 2, "write a file by --npz FILE, or by --contact-sheet"),
        (
            "export memory.hmn",
            2,
            "name a DIR, --npz FILE, --contact-sheet FILE or --dd-ranking DIR",
        ),
    ],
)
def test_an_error_is_one_line(
    run: Console,
    memory_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: str,
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(memory_file.parent)
    Path("damaged.hmn").write_bytes(memory_file.read_bytes()[:-1])
    bare = hmn_replay.load(memory_file)
    bare.keep([])
    bare.save("bare.hmn")
    assert run(*argv.split(), "--json", code=code) == ""
    assert run.err.startswith("hmn-replay: error: ")
    assert message in run.err
    assert run.err.count("\n") == 1


def test_data_that_do_not_fit_are_said_not_to_have_been_named(
    run: Console, memory_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "large.hmn"
    images = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    hmn_replay.raw_images((images, torch.arange(10)), "40 kB").save(path)
    for command in ("evaluate", "evaluate --scores --passes 10 --width 4"):
        run(*command.split(), path, code=1)
        assert re.search(r"images of \(\d, .*\(\d, \d", run.err)
        assert "(3, 32, 32)" in run.err and "(1, 8, 8)" in run.err
        assert "; --data was not given, so the data set is digits: name yours\n" in run.err
        assert run.err.count("\n") == 1 or "--scores" in command
    run("evaluate", path, "--data", "digits", code=1)
    assert "(1, 8, 8)" in run.err and "--data" not in run.err
    run("condense", "--size", "4", "--out", tmp_path / "small.hmn", "--budget", "4KiB", code=1)
    assert "4 x 4" in run.err and "--data" not in run.err
    assert "(default: digits)" in " ".join(run("evaluate", "--help").split())
    assert "(default: digits)" not in " ".join(run("gallery", "--help").split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "COMMAND"),
        ("condense --out x.hmn", "--budget"),
        ("condense --budget 9kB --out x --set outer_steps", "expected FIELD=VALUE"),
        ("condense --budget 9kB --out x --effort great", "invalid choice: 'great'"),
        ("condense --budget 9kB --out x --kind box", "invalid choice: 'box'"),
        (
            "condense --budget 9kB --out x --kind jpeg",
            "'jpeg' holds real images: hmn-replay baseline --kind jpeg --out FILE makes it",
        ),
        ("evaluate x --repeats 0", "expected a whole number of 1 or more, got '0'"),
        ("evaluate x --network lenet", "network must be one of convnet"),
        ("baseline --budget 9kB", "--kind"),
        ("baseline --kind raw --budget 9kB --selection best", "invalid choice: 'best'"),
        ("baseline --kind jpeg --budget 9kB --qualities 5,x", "1 or more, got 'x'"),
        ("baseline --kind subsampled --budget 9kB --factor x", "1 or more, got 'x'"),
        ("baseline --kind jpeg --budget 9kB --qualities 101", "qualities from 1 to 100"),
        (
            "baseline --quality=30",
            "hmn-replay baseline: error: unrecognized arguments: --quality; did you mean "
            "'--qualities'? See hmn-replay baseline --help\n",
        ),
        (
            "condense --budget 9kB --out x --sed 3 --xyz",
            "arguments: --sed --xyz; did you mean '--seed'? See hmn-replay condense --help\n",
        ),
        (
            "condense --budget 9kB --out x --outer-steps 4",
            "--outer-steps; it is a setting: give --set outer_steps=VALUE; see hmn-replay condense",
        ),
        (
            "baseline --kind raw --budget 9kB --outer-steps 4",
            "unrecognized arguments: --outer-steps; see hmn-replay baseline --help\n",
        ),
        ("--json inspect a", "unrecognized arguments: --json; write --json after COMMAND; see"),
        ("condense --buget 9kB --out x", "--buget; did you mean '--budget'?"),
        ("inspect a -- --b", "unrecognized arguments: --b; see hmn-replay inspect --help\n"),
        ("inspect a b", "unrecognized arguments: b; see hmn-replay inspect --help\n"),
        ("--sed inspect a", "unrecognized arguments: --sed; see hmn-replay --help\n"),
        ("condense --budget 9kB --out x --labels firm", "invalid choice: 'firm'"),
    ],
)
def test_wrong_usage_is_exit_code_2(run: Console, argv: str, message: str) -> None:
    assert run(*argv.split(), code=2) == ""
    assert message in run.err
    assert run.err.count("\n") == 1


def test_memory_that_runs_out_is_an_error_and_a_bug_is_not_hidden(
    run: Console, memory_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[tuple[Exception, str]] = [
        (CheckpointError("two\n  lines"), "error: two lines\n"),
        (
            MemoryError("Unable to allocate 1.50 GiB for an array with shape (3, 4)"),
            "error: out of memory: 1.50 GiB could not be allocated; lower --width, or choose",
        ),
        (MemoryError(), "error: out of memory: the memory that was needed could not be allocated"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
            "out of memory: 20.00 GiB could not be allocated on the GPU; lower --width, or choose "
            "another --network; or pass --device cpu\n",
        ),
        (
            RuntimeError("CPUAllocator: can't allocate memory: you tried to allocate 98765 bytes."),
            "out of memory: 98,765 bytes could not be allocated; lower --width, or choose another "
            "--network\n",
        ),
    ]
    errors = [*(error for error, _ in cases), RuntimeError("a bug")]

    def fail(*_: object, **__: object) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(hmn_replay, "evaluate", fail)
    for _, message in cases:
        run("evaluate", memory_file, code=1)
        assert message in run.err
        assert run.err.count("\n") == 1
    with pytest.raises(RuntimeError, match="a bug"):
        main(["evaluate", str(memory_file)])


def test_a_large_picture_that_is_refused_is_one_line(run: Console, tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    picture = Image.new("1", (9600, 9400))
    picture.save(tmp_path / "train" / "a" / "large.png")
    run("condense", "--data", tmp_path, "--budget", "9kB", "--out", tmp_path / "x", code=1)
    assert "sides of 8 to 224 pixels; got 9400 x 9600" in run.err and "(--size)" in run.err
    assert run.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--set", "warm_start_learning_rate=1e38"],
        ["--set", "network_learning_rate=1e308"],
        ["--set", "num_experts=1000000000000"],
        ["--size", "1000000000"],
    ],
    ids=lambda words: words[-1],
)
def test_a_value_far_outside_its_range_is_one_line(
    run: Console, tmp_path: Path, words: list[str]
) -> None:
    run("condense", "--budget", "9kB", "--out", tmp_path / "x", *words, code=2)
    assert run.err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_experts_that_are_a_file_are_told_before_the_work(run: Console, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["--objective", "mtt", "--set", f"experts={tmp_path / 'file'}", "--quiet"]
    run("condense", "--budget", "9kB", "--out", tmp_path / "x", *words, code=1)
    assert "A file stands where the folder of the experts is to be" in run.err
    assert run.err.count("\n") == 1


@pytest.mark.parametrize(
    "command", ["condense", "options", "evaluate", "inspect", "export", "gallery", "baseline"]
)
def test_every_command_has_a_help_with_an_example(run: Console, command: str) -> None:
    text = run(command, "--help")
    assert f"Example:\n  hmn-replay {command} " in text
    assert "--json" in text
    assert command in run("--help")


def test_names_and_defaults_of_the_help_are_those_of_the_package(run: Console) -> None:
    text = " ".join(run("evaluate", "--help").split())
    config = hmn_replay.TrainingConfig()
    assert f"channels of ConvNet's blocks (default: {config.width})" in text
    assert f"images that a network is shown in all (default: {config.num_passes})" in text
    assert ", ".join(hmn_replay.NETWORKS) in text
    kinds = run("condense", "--help") + run("baseline", "--help")
    assert all(name in kinds for name in (*KINDS, *hmn_replay.OBJECTIVES, *hmn_replay.EFFORTS))
    assert ",".join(hmn_replay.SELECTIONS) in kinds.replace("\n", "").replace(" ", "")


def test_what_is_registered_is_in_the_help(run: Console) -> None:
    with registered(hmn_replay.OBJECTIVES, "other"):
        assert "other" in run("condense", "--help")
        assert "other" in run.json("options")["objective"]["values"]
    assert "other" not in run("condense", "--help")


@contextlib.contextmanager
def registered(registry: Any, name: str) -> Iterator[None]:
    registry.add(name, next(iter(registry.values())))
    try:
        yield
    finally:
        registry.remove(name)


def test_options_lists_every_setting_with_its_range_and_default(run: Console) -> None:
    told = run.json("options")
    assert list(told) == list(hmn_replay.CondenseConfig.model_fields)
    assert all(setting["values"] and setting["description"] for setting in told.values())
    assert told["outer_steps"]["values"] == "whole number >= 0"
    assert told["outer_steps"]["default"] == hmn_replay.CondenseConfig().outer_steps
    assert "none" in told["max_seconds"]["values"]
    assert told["compile"]["values"] == "auto or true or false"
    assert told["objective"]["values"] == "one of " + ", ".join(hmn_replay.OBJECTIVES)
    more = run.json("options", "--effort", "standard")
    assert more["outer_steps"]["default"] == hmn_replay.EFFORTS["standard"]["outer_steps"]
    text = run("options")
    assert f"outer_steps={told['outer_steps']['default']}    (whole number >= 0)\n" in text
    assert max(map(len, text.splitlines())) <= 200


def as_process(*argv: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hmn_replay", *argv],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(hmn_replay.__file__).parent.parent,
    )


def test_python_m_hmn_replay_is_the_same_command(memory_file: Path) -> None:
    done = as_process("inspect", str(memory_file), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_images"] == 9
    assert done.stderr == ""


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
def test_a_reader_who_has_had_enough_is_no_error_to_tell(memory_file: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = as_process("inspect", str(memory_file), stdout=writer)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == ""


def test_an_out_that_cannot_be_written_is_told_before_the_work(
    run: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("condensed")

    monkeypatch.setattr(hmn_replay, "condense", fail)
    data, link, pipe = tmp_path / "data.npz", tmp_path / "link", tmp_path / "pipe"
    data.write_bytes(b"")
    link.symlink_to(data)
    os.mkfifo(pipe)
    common = ["condense", "--budget", BUDGET, "--data", data, "--out"]
    for out, message in (
        (data, "is read by this command"),
        (link, "is read by this command"),
        (pipe, "Not a regular file"),
    ):
        run(*common, out, code=2 if "read by" in message else 1)
        assert message in run.err
    assert data.read_bytes() == b""


def test_baseline_sets_what_a_registered_kind_takes(
    run: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hmn_replay, "evaluate", lambda source, test, **_: (None, 0.25))
    with memory_kind(PosterMemory) as kind:
        options = ["baseline", "--kind", kind, "--budget", 5000, "--quiet"]
        assert run.json(*options)["levels"] == 4
        result = run.json(*options, "--set", "levels=8", "--out", tmp_path / "own.hmn")
        assert result["levels"] == result["tried"][0]["levels"] == 8
        assert hmn_replay.load(tmp_path / "own.hmn").summary()["levels"] == 8
        assert "levels  images  bytes" in run(*options, "--set", "levels=8")
        for given, message in (
            ("levels=1", "levels is 2 to 256; got 1"),
            ("levels=x", f"--set of --kind {kind}: invalid literal"),
            ("level=8", "--set has no option 'level'; did you mean"),
        ):
            run(*options, "--set", given, code=2)
            assert message in run.err
    run("baseline", "--kind", "raw", "--budget", 5000, "--set", "levels=8", code=2)
    assert "--set has no option 'levels'" in run.err
    run("baseline", "--kind", "subsampled", "--budget", 5000, "--set", "factor=3", code=2)
    assert "pass --factor by itself" in run.err


def test_baseline_takes_the_factor_of_subsampled_images(
    run: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hmn_replay, "evaluate", lambda source, test, **_: (None, 0.25))
    options = ["baseline", "--kind", "subsampled", "--budget", 5000, "--quiet"]
    counts = [run.json(*options, *more)["num_images"] for more in ([], ["--factor", 4])]
    assert run.json(*options)["factor"] == 2
    assert counts[1] > 3 * counts[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--kind raw --factor 4", "--factor is of subsampled images; got --kind raw"),
        ("--kind raw --label-weight 0.3", "hard labels alone are learned from: leave it out"),
        ("--kind raw --labels soft --set outer_steps=3", "it has teacher_width"),
    ],
)
def test_options_that_baseline_has_no_use_for_are_refused(
    run: Console, options: str, message: str
) -> None:
    run("baseline", "--budget", 5000, *options.split(), code=2)
    assert message in run.err


def test_a_weight_of_labels_is_for_labels(run: Console, memory_file: Path) -> None:
    run("evaluate", memory_file, "--label-weight", 0.3, code=2)
    run("evaluate", memory_file, "--scores", "--label-weight", 0.3, code=2)
    assert "hard labels alone are learned from: leave it out" in run.err
    assert "hard labels alone are learned from: leave it out" in run.err
