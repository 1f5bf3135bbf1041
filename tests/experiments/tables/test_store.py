"""Cells are computed once, and kept for runs of the same configuration."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.tables.store import Store
from hmn_replay.errors import BudgetError, ConfigError, TrainingError


def fail_with(error: Exception) -> dict[str, Any]:
    raise error


def test_a_cell_is_computed_once_and_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "folder", {"width": (1, 2)})
    first = store.once("memory", {"ipc": 1}, lambda: {"images": 3})
    assert first == {"what": "memory", "ipc": 1, "images": 3}
    with pytest.raises(ConfigError, match="another run writes to"):
        Store(store.folder, {"width": (1, 2)})
    store.release()
    again = Store(store.folder, {"width": (1, 2)})
    assert again.once("memory", {"ipc": 1}, lambda: fail_with(ValueError())) == first
    assert again.once("training", {"ipc": 1}, lambda: {"accuracy": 0.5})["accuracy"] == 0.5
    assert again.find("memory") == [first] and again.find("memory", ipc=2) == []
    assert json.loads(again.path.read_text())["cells"] == again.report["cells"]
    assert again.failed == []


def test_other_configurations_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, {"width": 1})
    store.agree("images", [3, 4])  # before there is a cell
    store.release()
    with pytest.raises(ConfigError, match="is of width = 1, and now it is 2; give another --out"):
        Store(tmp_path, {"width": 2})
    again = Store(tmp_path, {"width": 1})
    again.agree("images", [3, 4])
    with pytest.raises(ConfigError, match=r"is of images = \[3, 4\], and now it is \[3, 5\]; give"):
        again.agree("images", [3, 5])


@pytest.mark.parametrize("name", ["torch", "python", "hmn_replay"])
def test_other_versions_are_refused(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path, {})
    store.report["versions"][name] = "0"
    store.write()
    store.release()
    with pytest.raises(ConfigError, match=f"is of {name} = '0'"):
        Store(tmp_path, {})


def test_errors_are_kept_apart_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path, {})
    errors = (
        BudgetError("too small"),
        torch.cuda.OutOfMemoryError("too large"),
        TrainingError("diverged"),
        ValueError("a bug"),
    )
    for ipc, error in enumerate(errors):
        store.once("memory", {"ipc": ipc}, partial(fail_with, error))
    # That a budget or a device is too small is no failure.
    assert store.failed == ["memory, ipc 2", "memory, ipc 3"]
    assert store.find("memory") == [] and store.errors(ipc=0) == ["BudgetError: too small"]
    assert store.seen("memory", "ipc") == [(0,), (1,), (2,), (3,)]
    # Whatever no user can mend comes with where it happened.
    assert "ValueError: a bug" in capsys.readouterr().err
    store.once("memory", {"ipc": 3}, lambda: {"images": 3})
    assert store.errors() == [f"{type(error).__name__}: {error}" for error in errors[:3]]
    assert [cell["ipc"] for cell in store.report["cells"]] == [0, 1, 2, 3]


def test_an_interrupt_is_no_error(tmp_path: Path) -> None:
    store = Store(tmp_path, {})

    def stop() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.once("memory", {}, stop)
    assert store.report["cells"] == [] and not store.path.exists()
