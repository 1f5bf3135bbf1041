"""The figure of accuracy against seconds, which is drawn from a table of the documentation."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("seconds", DOCS / "seconds.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_read_with_and_without_seconds(script: ModuleType) -> None:
    text = (
        "Before.\n\n| memory | images | seconds | accuracy % |\n|---|---|---|---|\n"
        "| HMN, `quick` | 1,249 | 1,419 | 62.3 |\n| JPEG | 1,623 | - | 58.2 |\n\nAfter | it.\n"
    )
    rows = script.read_table(text)
    assert rows == [("HMN, quick", 1419.0, 62.3), ("JPEG", None, 58.2)]


def test_the_table_of_the_results_is_drawn(script: ModuleType) -> None:
    rows = script.read_table((DOCS / "results.md").read_text(encoding="utf-8"))
    before, since, jpeg, real = script.draw(rows).axes[0].get_lines()
    timed = [row for row in rows if row[1] is not None]
    assert len(before.get_xdata()) + len(since.get_xdata()) == len(timed)
    assert min(len(before.get_xdata()), len(since.get_xdata())) > 2
    assert 50 < jpeg.get_ydata()[0] < max(since.get_ydata()) < real.get_ydata()[0]
