"""What `time_to_accuracy.py` makes of its rows: the speed-up, a table, a figure."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from experiments.figures import save
from experiments.results import deviation, markdown_table

LABELS = {"ours": "HMN, ours", "reference": "IDC, reference"}


def speedup(ours: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Return how many times sooner ours is as accurate as the reference in the end.

    Returns:
        ``reference_accuracy`` and ``reference_seconds`` of its last snapshot;
        ``reference_first_seconds``, of the first that was as accurate; ``ours_seconds``, of our
        fastest run that is, and ``speedup``, None where there is none.
    """
    last = max(reference.values(), key=lambda row: row["seconds"])
    goal = statistics.fmean(last["accuracies"])

    def first(rows: dict[str, Any]) -> float | None:
        reached = [r["seconds"] for r in rows.values() if statistics.fmean(r["accuracies"]) >= goal]
        return min(reached, default=None)

    seconds = first(ours)
    return {
        "reference_accuracy": goal,
        "reference_seconds": last["seconds"],
        "reference_first_seconds": first(reference),
        "ours_seconds": seconds,
        "speedup": None if seconds is None else last["seconds"] / seconds,
    }


def make_table(results: dict[str, Any]) -> str:
    """Return the rows as a Markdown table, and what they come to."""
    cells = [["loop", "seconds", "images", "bytes", "accuracy %", "evaluations"]]
    for name, label in LABELS.items():
        for row in by_seconds(results[name]):
            accuracies = [100 * accuracy for accuracy in row["accuracies"]]
            cells.append(
                [
                    label,
                    f"{row['seconds']:,.1f}",
                    f"{row['num_images']:,}",
                    f"{row['bytes']:,}",
                    f"{statistics.fmean(accuracies):.1f} ± {deviation(accuracies):.1f}",
                    str(len(accuracies)),
                ]
            )
    goal = f"{100 * results['reference_accuracy']:.1f} %"
    if results["speedup"] is None:
        conclusion = f"None of our runs is as accurate as the reference in the end, {goal}."
    else:
        conclusion = (
            f"As accurate as the reference after {results['reference_seconds']:,.1f} s ({goal}, "
            f"which it first had after {results['reference_first_seconds']:,.1f} s), ours is after "
            f"{results['ours_seconds']:,.1f} s: {results['speedup']:.2f} times sooner."
        )
    return f"{markdown_table(cells)}\n\n{conclusion}\n"


def draw(results: dict[str, Any], title: str, path: Path) -> None:
    """Draw accuracy over seconds, with a bar of one deviation over evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for (name, label), colour in zip(LABELS.items(), ("tab:red", "tab:blue"), strict=True):
        rows = by_seconds(results[name])
        accuracies = [[100 * accuracy for accuracy in row["accuracies"]] for row in rows]
        axes.errorbar(
            [row["seconds"] for row in rows],
            [statistics.fmean(values) for values in accuracies],
            yerr=[deviation(values) for values in accuracies],
            label=f"{label}, {rows[-1]['num_images']:,} images in {rows[-1]['bytes']:,} bytes",
            color=colour,
            marker="o",
            markersize=4,
            capsize=3,
        )
    axes.axhline(100 * results["reference_accuracy"], color="tab:blue", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of condensation")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, loc="lower right")
    save(figure, path)


def by_seconds(rows: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(rows.values(), key=lambda row: row["seconds"])
