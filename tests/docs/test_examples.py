"""The code of pages on other hosts runs, block after block, as it is printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import hmn_replay

DOCS = Path(__file__).parents[2] / "docs"


def run_page(name: str) -> dict[str, Any]:
    """Run the blocks of a page in one namespace, and return it."""
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for block in re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.S | re.M):
            exec(compile(block, name, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run in an empty folder; only "quick" is quicker."""
    monkeypatch.chdir(tmp_path)
    settings = {"warm_start_steps": 40, "outer_steps": 1, "inner_steps": 2, "pruning_passes": 200}
    monkeypatch.setitem(hmn_replay.EFFORTS, "quick", {**settings, "pruning_width": 8})


def test_replay_in_a_loop_of_ones_own() -> None:
    names = run_page("replay.md")
    assert Path("seen.hmn").stat().st_size <= 2048
    assert hmn_replay.load("seen.hmn").num_classes == 10
    assert names["memory"].memory.num_classes == 5
    assert torch.load("memory.pt", weights_only=True)["num_updates"] == 2
