"""Rows of a table, from the cells of its store; what was not run has no number."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from experiments.results import markdown_table
from experiments.tables.settings import Settings
from experiments.tables.store import Store

Row: TypeAlias = "dict[str, Any]"

NOTHING = "-"


def accuracies(store: Store, **identity: Any) -> list[float]:
    """Return the accuracies of all trainings of an identity, in [0, 1]."""
    return [cell["accuracy"] for cell in store.find("training", **identity)]


def memories(store: Store, **identity: Any) -> Row:
    """Return what there is of a system's memories, over all seeds.

    Returns:
        The identity; ``images``, ``bytes`` and ``values`` of the first memory (those of another
        seed differ where values are entropy-coded); the mean of ``seconds``; and ``errors``, those
        of trainings too. A number is None where nothing was run.
    """
    cells = store.find("memory", **identity)
    first = cells[0] if cells else {}
    return {
        **identity,
        **{name: first.get(name) for name in ("images", "bytes", "values")},
        "seconds": statistics.fmean(cell["seconds"] for cell in cells) if cells else None,
        "errors": store.errors(**identity),
    }


def budgets(settings: Settings, store: Store) -> list[int]:
    """Return the IPC that were asked for, by this run or an earlier one."""
    return sorted({*settings.ipc, *(ipc for (ipc,) in store.seen("memory", "ipc"))})


def number(value: float | None, form: str = ",.0f") -> str:
    """Return a number as text; a dash for None."""
    return NOTHING if value is None else format(value, form)


def sections(rows: Sequence[Row], head: Sequence[str], line: Callable[[Row], list[str]]) -> str:
    """Return a Markdown table for each IPC, of a line a row, and below it what went wrong."""
    parts = []
    for ipc in dict.fromkeys(row["ipc"] for row in rows):
        group = [row for row in rows if row["ipc"] == ipc]
        parts += [f"## {ipc} IPC", markdown_table([head, *map(line, group)])]
        if notes := [f"- {row['label']}: {error}" for row in group for error in row["errors"]]:
            parts.append("\n".join(notes))
    return "\n\n".join(parts)
