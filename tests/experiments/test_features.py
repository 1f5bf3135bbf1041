"""Features and images at equal bytes, on next to nothing."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from experiments.features import main, parse_row
from hmn_replay import EFFORTS
from hmn_replay.errors import ConfigError

ARGUMENTS = ["--budgets", "4500", "--backbone-passes", "600", "--head-passes", "300"]
ROWS = "features,raw-features,jpeg-20"
if find_spec("faiss") is not None:
    ROWS += ",pq-4x2"


def run(out: Path, *arguments: str) -> dict[str, Any]:
    assert main([*ARGUMENTS, "--rows", ROWS, "--device", "cpu", "--out", str(out), *arguments]) == 0
    report: dict[str, Any] = json.loads((out / "results.json").read_text())
    return report


def test_every_row_has_an_accuracy_within_its_budget_and_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for effort in ("draft", "quick"):
        monkeypatch.setitem(EFFORTS, effort, {"warm_start_steps": 60})
    report = run(tmp_path, "--mode", "once")
    report = run(tmp_path)
    cells = [cell for cell in report["cells"] if cell["what"] == "training"]
    assert len(cells) == 2 * len(ROWS.split(","))
    for cell in cells:
        assert 0 < cell["accuracy"] <= 1 and cell["bytes"] <= 4500 and cell["images"] > 0
    (discriminant,) = [cell for cell in report["cells"] if cell["what"] == "lda"]
    assert discriminant["accuracy"] > 0.5
    table = (tmp_path / "table.md").read_text()
    assert "raw-features" in table and "stream %" in table and "once %" in table
    before = (tmp_path / "results.json").read_bytes()
    run(tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.parametrize("row", ["pq-4", "pq-4x", "jpeg", "jpeg-x", "hmn"])
def test_a_row_that_there_is_not_is_refused(row: str) -> None:
    with pytest.raises(ConfigError, match="--rows has features, raw-features, pq-MxB and jpeg-Q"):
        parse_row(row)


@pytest.mark.parametrize("option", ["--backbone-passes", "--head-passes"])
def test_a_wrong_number_of_passes_is_told_before_the_backbone_is_trained(
    tmp_path: Path, option: str
) -> None:
    with pytest.raises(ConfigError, match="num_passes must be"):
        main(["--data", "digits", option, "0", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
