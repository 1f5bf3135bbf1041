"""Cells become rows, and rows become Markdown without a number for what was not run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from experiments.tables.rows import accuracies, memories, number, sections
from experiments.tables.store import Store


def test_a_summary_is_over_all_seeds_and_trainings(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    for seed, seconds in ((0, 10.0), (1, 20.0)):
        found = {"images": 3, "bytes": 40, "values": 9, "seconds": seconds}
        store.once("memory", {"system": "hmn", "seed": seed}, partial(dict, found))
        for training in range(2):
            which = {"system": "hmn", "seed": seed, "training": training}
            store.once("training", which, partial(dict, accuracy=(seed + training) / 4))
    assert accuracies(store, system="hmn") == [0.0, 0.25, 0.25, 0.5]
    assert accuracies(store, system="hmn", seed=1) == [0.25, 0.5]
    assert memories(store, system="hmn") == {
        "system": "hmn",
        "images": 3,
        "bytes": 40,
        "values": 9,
        "seconds": 15.0,
        "errors": [],
    }
    nothing = memories(store, system="idc")
    assert accuracies(store, system="idc") == nothing["errors"] == []
    assert {nothing[name] for name in ("images", "bytes", "values", "seconds")} == {None}


def test_numbers() -> None:
    assert (number(None), number(0), number(1234.5), number(65.7, ".1f")) == (
        "-",
        "0",
        "1,234",
        "65.7",
    )


def test_sections_are_by_ipc_and_tell_of_errors() -> None:
    rows = [
        {"ipc": 1, "label": "HMN", "errors": []},
        {"ipc": 1, "label": "HaBa", "errors": ["BudgetError: too small"]},
        {"ipc": 10, "label": "HMN", "errors": []},
    ]
    assert sections(rows, ["memory"], lambda row: [row["label"]]).split("\n\n") == [
        "## 1 IPC",
        "| memory |\n|-------:|\n|    HMN |\n|   HaBa |",
        "- HaBa: BudgetError: too small",
        "## 10 IPC",
        "| memory |\n|-------:|\n|    HMN |",
    ]
