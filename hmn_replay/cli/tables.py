"""What the command prints: a memory in words, and rows as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hmn_replay
from hmn_replay.data.images import show_label

__all__ = [
    "describe_memory",
    "show_accuracy",
    "show_classes",
    "show_deviation",
    "show_shape",
    "show_value",
    "table",
]


def show_accuracy(scores: Mapping[str, Any]) -> str:
    """Return mean and deviation in percent, and of how many seeds."""
    repeats, seeds = scores["repeats"], "seeds" if scores["repeats"] > 1 else "seed"
    deviation = show_deviation(scores["accuracy_std"], repeats)
    return f"{100 * scores['accuracy_mean']:.2f} %{deviation} ({repeats} {seeds})"


def show_deviation(std: float, repeats: int) -> str:
    """Return what follows a mean in percent: nothing where one seed has no deviation."""
    return f" ± {100 * std:.2f}" if repeats > 1 else ""


def describe_memory(file: Path, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a memory is, from its summary: names and values."""
    budget, counts = summary["budget_bytes"], summary["images_per_class"]
    each = f"{min(counts):,}" + (f" to {max(counts):,}" if max(counts) > min(counts) else "")
    what = "features" if hmn_replay.MEMORIES[summary["kind"]].holds_features else "images"
    lines = [
        ("file", str(file)),
        ("size", f"{summary['file_bytes']:,} bytes" + (f" of {budget:,}" if budget else "")),
        ("kind", summary["kind"]),
        (what, f"{summary['num_images']:,} of {show_shape(summary['image_shape'])}"),
        ("classes", f"{summary['num_classes']:,}, {each} images each"),
    ]
    shown = {"kind", "budget_bytes", "file_bytes", "num_images", "num_classes"}
    return lines + [
        (name.replace("_", " "), show_value(value))
        for name, value in summary.items()
        if name not in shown and isinstance(value, (int, float, str))
    ]


def show_value(value: Any) -> str:
    """Return a value, a whole number with commas."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def show_classes(summary: Mapping[str, Any]) -> str:
    """Return label, name and number of images of the classes, or of some where they are many."""
    columns = (summary[name] for name in ("classes", "class_names", "images_per_class"))
    shown = [
        f"{show_label(label)}{f' {name!r}' if name else ''} ({count:,})"
        for label, name, count in zip(*columns, strict=True)
    ]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:10], "...", shown[-1]])


def show_shape(shape: Sequence[int]) -> str:
    """Return a shape, as ``3 x 32 x 32``."""
    return " x ".join(map(str, shape))


def table(rows: Sequence[Sequence[str]], align: str = "<<") -> str:
    """Join rows to lines, their cells aligned by ``<`` or ``>``, one for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{c:{a}{w}}" for c, a, w in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    )
