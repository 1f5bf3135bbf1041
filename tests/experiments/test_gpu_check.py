"""The check of a GPU, rehearsed on the CPU in a tiny size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hmn_replay
from experiments import gpu_check
from experiments.benchmarks import matching, training
from hmn_replay.errors import ConfigError
from hmn_replay.memory import LearnedMemory


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs the script here, without fresh processes, and its report."""
    for module in (matching, training):
        monkeypatch.setattr(module, "in_fresh_process", lambda function, *rest: function(*rest))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "restored afterwards")

    def run(*options: str) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "report.json"
        code = gpu_check.main(["--device", "cpu", "--smoke", "--out", str(out), *options])
        return code, json.loads(out.read_text())

    return run


def test_every_part_answers_in_a_table_and_in_a_file(
    check: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = check("--parts", "matching,training,quick,timed")
    assert code == 0 and report["machine"]["torch"] == torch.__version__
    parts = report["parts"]
    assert list(parts) == ["matching", "training", "quick", "timed"]
    assert parts["matching"]["widths"]["32"]["ratio"] > 0 and parts["training"]["ratio"] > 0
    for name in ("quick", "timed"):
        assert 0 < parts[name]["accuracy"] < 1
        assert 0 < parts[name]["file_bytes"] <= 4096 == parts[name]["budget_bytes"]
        assert parts[name]["seconds"] > 0 and parts[name]["peak_memory_bytes"] > 0
    printed = capsys.readouterr().out
    assert f"{100 * parts['quick']['accuracy']:.1f} % from" in printed


def test_a_part_that_fails_is_reported_and_the_next_one_runs(
    check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    condense = hmn_replay.condense

    def out_of_memory(data: Any, budget: Any, **options: Any) -> LearnedMemory:
        if "max_seconds" in options:
            return condense(data, budget, **options)
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(hmn_replay, "condense", out_of_memory)
    code, report = check("--parts", "quick,timed")
    assert code == 1
    assert report["parts"]["quick"]["error"] == "OutOfMemoryError: too large"
    assert report["parts"]["timed"]["accuracy"] > 0


def test_the_tests_marked_gpu_are_run_and_no_others(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU")
    (tmp_path / "tests").mkdir()
    file = tmp_path / "tests" / "test_some.py"
    text = "import pytest\n\n@pytest.mark.gpu\ndef test_one(): assert {}\n\ndef test_two(): 1 / 0\n"
    file.write_text(text.format("True"))
    code, report = check("--parts", "tests")
    assert code == 0 and "1 passed, 1 deselected" in report["parts"]["tests"]["summary"]
    file.write_text(text.format("False"))
    code, report = check("--parts", "tests")
    assert code == 1 and report["parts"]["tests"]["exit_code"] == 1
    assert "assert False" in report["parts"]["tests"]["output"]


def test_wrong_arguments_are_refused(check: Any) -> None:
    with pytest.raises(ConfigError, match="--parts has no 'speed'"):
        check("--parts", "quick,speed")
