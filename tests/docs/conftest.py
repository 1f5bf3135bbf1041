"""What the pages' code runs on, to the letter, in a test: fewer digits, and quicker efforts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hmn_replay


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run in an empty folder, on a quarter of the digits, with little effort."""
    monkeypatch.chdir(tmp_path)
    settings = {"warm_start_steps": 40, "outer_steps": 1, "inner_steps": 2}
    networks = {"trained_networks": 1, "trained_passes": 64}
    pruning = {"pruning_passes": 500, "pruning_width": 8}
    for effort in ("draft", "quick"):
        monkeypatch.setitem(hmn_replay.EFFORTS, effort, settings | networks | pruning)
    load = hmn_replay.load_dataset

    def load_fewer(name: Any, split: Any = "train", **options: Any) -> hmn_replay.LabelledImages:
        data = load(name, split, **options)
        return data.take(torch.arange(0, len(data), 4))

    monkeypatch.setattr(hmn_replay, "load_dataset", load_fewer)
