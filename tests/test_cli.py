"""The command, from its arguments to its output and exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hmn_replay
from hmn_replay import cli, commands
from hmn_replay.baselines.selection import SELECTIONS
from hmn_replay.cli import main
from hmn_replay.errors import DataError
from hmn_replay.memory.registry import CONTAINERS
from hmn_replay.training.networks import NETWORKS
from hmn_replay.training.train import TrainingConfig
from tests.console import BUDGET, Console


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
    assert cli._NETWORKS == tuple(NETWORKS)
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
