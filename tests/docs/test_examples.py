"""The code of pages on other hosts runs, block after block, as it is printed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import hmn_replay
from tests.hub import Hub

DOCS = Path(__file__).parents[2] / "docs"
HOSTS = ("models.er", "avalanche")


def run_page(name: str, host: str = "") -> dict[str, Any]:
    """Run the blocks of a page in one namespace: those that name a host, or none of them."""
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for block in re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.S | re.M):
            if any(other in block for other in HOSTS if other != host) or host not in block:
                continue
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


def test_mammoths_model_gets_its_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Er:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.buffer: Any = None

    models: Any = ModuleType("models.er")
    models.Er = Er
    monkeypatch.setitem(sys.modules, "models", ModuleType("models"))
    monkeypatch.setitem(sys.modules, "models.er", models)
    model = run_page("replay.md", "models.er")["ErHmn"](None, None, None, None)
    data = hmn_replay.load_dataset("digits")
    model.buffer.add_data(data.images[:60] / 255, data.labels[:60])
    assert model.buffer.is_empty()
    model.end_task(None)
    images, labels = model.buffer.get_data(8)
    assert images.shape == (8, 1, 8, 8) and labels.dtype == torch.int64
    other = run_page("replay.md", "models.er")["ErHmn"](None, None, None, None)
    other.load_buffer(model.buffer.serialize())
    assert len(other.buffer) == len(model.buffer) > 0


def test_memories_are_shared_and_shown(hub: Hub) -> None:
    pytest.importorskip("datasets", reason="needs the extra hub")
    names = run_page("sharing.md")
    assert Path("stream.html").read_text().count("<figcaption>experience 1 · ") == 10
    assert 0 < len(hub.repositories["someone/digits-4k"]["memory.hmn"]) <= 4096
    assert names["again"].file_bytes <= 2048


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
def test_memories_are_watched() -> None:
    pytest.importorskip("tensorboard", reason="Avalanche's logger needs it")
    evaluator = run_page("sharing.md", "avalanche")["evaluator"]
    assert any("Memory_bytes" in str(metric) for metric in evaluator.metrics)
