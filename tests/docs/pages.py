"""Reads and runs what is printed on a page of the documentation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def blocks(page: Path, language: str = "python") -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run_blocks(
    scripts: list[str],
    replace: Mapping[str, str] | None = None,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run blocks one after the other, and return the names that they leave.

    Args:
        scripts: The blocks.
        replace: Words of theirs and what stands in their place, to make sizes smaller.
        given: Names that the first begins with.
    """
    names: dict[str, Any] = dict(given or {})
    changes = dict(replace or {})
    assert all(any(word in script for script in scripts) for word in changes)
    with torch.random.fork_rng():
        for script in scripts:
            for word, smaller in changes.items():
                script = script.replace(word, smaller)
            exec(compile(script, "page", "exec"), names)
    return names
