"""The command, from its arguments to its output and exit code."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hmn_replay
from hmn_replay import cli, commands
from hmn_replay.cli import main
from hmn_replay.containers import CONTAINERS
from hmn_replay.data import LabelledImages
from hmn_replay.errors import CheckpointError, DataError
from hmn_replay.layout import Layout
from hmn_replay.memory import HierarchicalMemory
from hmn_replay.networks import NETWORKS
from hmn_replay.selection import SELECTIONS
from hmn_replay.sources import load_dataset
from hmn_replay.storage import load
from hmn_replay.training import TrainingConfig

TINY_CONDENSATION = [
    *("--set", "warm_start_steps=3", "--set", "warm_start_batch=16"),
    *("--set", "outer_steps=1", "--set", "inner_steps=1", "--set", "real_batch=4"),
    *("--set", "decoded_batch=4", "--set", "network_width=4", "--set", "network_images=8"),
    *("--set", "pruning_passes=16", "--set", "pruning_width=4", "--set", "beta_grid=0.5"),
]
TINY_TRAINING = ["--width", "4", "--passes", "200", "--repeats", "2"]
BUDGET = "40KiB"


@pytest.fixture
def memory_file(make_layout: Callable[..., Layout], tmp_path: Path) -> Path:
    """A memory of nine images that look like digits to nobody."""
    layout = make_layout(image_shape=(1, 8, 8))
    path = tmp_path / "memory.hmn"
    HierarchicalMemory(layout, [0, 1, 7], [4, 3, 2], budget=20_000).save(path)
    return path


class Console:
    """Runs the command in this process, and keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *argv: object, code: int = 0) -> str:
        """Return the standard output; standard error is then in ``self.err``."""
        self.capsys.readouterr()
        try:
            found = main([str(word) for word in argv])
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            found = stop.code
        out, self.err = self.capsys.readouterr()
        assert found == code, self.err
        assert "Traceback" not in self.err
        return out

    def json(self, *argv: object) -> dict[str, Any]:
        result = json.loads(self(*argv, "--json"))
        assert isinstance(result, dict)
        return result


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Console:
    return Console(capsys)


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


def test_ctrl_c_elsewhere_just_stops(
    run: Console, memory_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "evaluate", stop)
    assert run("evaluate", memory_file, code=130) == ""
    assert run.err == "hmn-replay: interrupted\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("inspect absent.hmn", "No such file or directory: 'absent.hmn'"),
        ("inspect .", "Is a directory: '.'"),
        ("evaluate memory.hmn --data nothing", "no data set is called 'nothing'"),
        ("evaluate memory.hmn --device warp", "device 'warp' cannot be used"),
        ("inspect damaged.hmn", "cannot read 'damaged.hmn': "),
        ("condense --budget lots --out x.hmn", "cannot read 'lots' as a budget"),
        ("condense --budget 9 --out x.hmn", "does not hold one image of each of 10 classes"),
        ("condense --budget 50kB --out no/x.hmn", "--out: 'no/x.hmn' must be a file, in a folder"),
        ("condense --budget 50kB --out .", "--out: '.' must be a file"),
        ("condense --budget 50kB --out x.hmn --set a=1", "there is no option 'a'"),
        ("condense --budget 50kB --out x.hmn --set outer_steps=x", "outer_steps must be int"),
        ("baseline --kind raw --budget 50", "a budget of 50 bytes does not hold one image"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(
    run: Console,
    memory_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: str,
    message: str,
) -> None:
    monkeypatch.chdir(memory_file.parent)
    Path("damaged.hmn").write_bytes(memory_file.read_bytes()[:-1])
    assert run(*argv.split(), "--json", code=1) == ""
    assert run.err.startswith("hmn-replay: error: ")
    assert message in run.err
    assert run.err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "COMMAND"),
        ("condense --out x.hmn", "--budget"),
        ("condense --budget 9kB --out x --set outer_steps", "expected FIELD=VALUE"),
        ("condense --budget 9kB --out x --effort great", "invalid choice: 'great'"),
        ("condense --budget 9kB --out x --container box", "invalid choice: 'box'"),
        ("evaluate x --repeats 0", "expected a whole number of 1 or more, got '0'"),
        ("evaluate x --network lenet", "invalid choice: 'lenet'"),
        ("baseline --budget 9kB", "--kind"),
        ("baseline --kind raw --budget 9kB --selection best", "invalid choice: 'best'"),
        ("baseline --kind jpeg --budget 9kB --qualities 5,x", "1 or more, got 'x'"),
        ("baseline --kind jpeg --budget 9kB --qualities 101", "qualities from 1 to 100"),
    ],
)
def test_wrong_usage_is_exit_code_2(run: Console, argv: str, message: str) -> None:
    assert run(*argv.split(), code=2) == ""
    assert message in run.err


def test_memory_that_runs_out_is_an_error_and_a_bug_is_not_hidden(
    run: Console, memory_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Exception] = [
        DataError("two\n  lines"),
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("a bug"),
    ]

    def fail(*_: object, **__: object) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(commands, "evaluate", fail)
    for message in ("error: two lines\n", "error: MemoryError\n", *["pass --device cpu"] * 2):
        run("evaluate", memory_file, code=1)
        assert message in run.err
    with pytest.raises(RuntimeError, match="a bug"):
        main(["evaluate", str(memory_file)])


@pytest.mark.parametrize("command", ["condense", "evaluate", "inspect", "export", "baseline"])
def test_every_command_helps_with_an_example(run: Console, command: str) -> None:
    text = run(command, "--help")
    assert f"example:\n  hmn-replay {command} " in text
    for option in ("--seed", "--device", "--json", "--quiet"):
        assert option in text
    assert command in run("--help")


def test_what_the_help_says_of_defaults_is_true(run: Console) -> None:
    text = " ".join(run("evaluate", "--help").split())
    config = TrainingConfig()
    assert f"channels of ConvNet's blocks (default: {config.width})" in text
    assert f"images that a network is shown in all (default: {config.num_passes})" in text
    assert cli._NETWORKS == NETWORKS
    assert cli._SELECTIONS == SELECTIONS
    assert tuple(CONTAINERS) == cli._CONTAINERS
    assert config.network == "convnet"


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

    monkeypatch.setattr(commands, "condense", fail)
    data, link, pipe = tmp_path / "data.npz", tmp_path / "link", tmp_path / "pipe"
    data.write_bytes(b"")
    link.symlink_to(data)
    os.mkfifo(pipe)
    common = ["condense", "--budget", BUDGET, "--data", data, "--out"]
    for out, message in (
        (data, "is the data set itself"),
        (link, "is the data set itself"),
        (pipe, "Not a regular file"),
    ):
        run(*common, out, code=1)
        assert message in run.err
    assert data.read_bytes() == b""


def test_the_folder_of_an_unknown_user_is_no_data_set(run: Console, tmp_path: Path) -> None:
    run(
        "condense", "--data", "~no_such_user/x", "--budget", BUDGET, "--out", tmp_path / "m", code=1
    )
    assert "no data set is called '~no_such_user/x'" in run.err


def test_a_device_without_values_is_refused(run: Console, memory_file: Path) -> None:
    run("evaluate", memory_file, "--device", "meta", code=1)
    assert "device 'meta' cannot be used" in run.err
