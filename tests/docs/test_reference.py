"""The API reference has every public name, and tables that scripts print are as printed."""

from __future__ import annotations

import re
import runpy

import pytest

import hmn_replay
from hmn_replay import errors
from tests.docs.pages import DOCS

API = DOCS / "api"


def test_every_public_name_has_an_entry() -> None:
    entries = set(re.findall(r"^::: (\S+)", "".join(p.read_text() for p in API.iterdir()), re.M))
    assert "hmn_replay.errors" in entries
    entries |= {f"hmn_replay.{name}" for name in errors.__all__}
    assert [name for name in hmn_replay.__all__ if f"hmn_replay.{name}" not in entries] == []


def test_every_inclusion_is_one() -> None:
    lines = [line for page in API.parent.rglob("*.md") for line in page.read_text().splitlines()]
    inclusions = [line for line in lines if line.startswith("--8")]
    assert inclusions
    assert [line for line in inclusions if not re.fullmatch(r'--8<-- "[\w./:]+"', line)] == []


def test_the_table_of_budgets_is_the_one_that_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runpy.run_path(str(DOCS / "planning.py"), run_name="__main__")
    assert capsys.readouterr().out in (DOCS / "choosing.md").read_text()
