"""Draw accuracy against seconds, as the table "What it takes on a CPU" of results.md has them.

python docs/seconds.py --out docs/images/seconds.png
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from matplotlib.figure import Figure

from hmn_replay.cli import HelpFormatter

RESULTS = Path(__file__).with_name("results.md")
HEADER = "| memory | images | seconds | accuracy % |"
# What memories were matched on before, in the words of the table.
BEFORE = ("six networks", "nothing compiled", "gradients in place")


def read_table(text: str) -> list[tuple[str, float | None, float]]:
    """Return the rows of the table: what it is, its seconds or None, its accuracy in percent."""
    lines = text[text.index(HEADER) :].split("\n\n")[0].splitlines()[2:]
    rows = []
    for line in lines:
        name, _, seconds, accuracy = (cell.strip() for cell in line.strip("|").split("|"))
        number = None if seconds == "-" else float(seconds.replace(",", ""))
        rows.append((re.sub(r"[`*]", "", name), number, float(accuracy)))
    return rows


def draw(rows: list[tuple[str, float | None, float]]) -> Figure:
    """Draw condensed memories as points, before and since, and what takes no time as lines."""
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for label, is_before, marker in (("before", True, "s"), ("since", False, "o")):
        points = sorted(
            (seconds, accuracy)
            for name, seconds, accuracy in rows
            if seconds is not None and is_before == any(word in name for word in BEFORE)
        )
        axes.plot(*zip(*points, strict=True), marker=marker, linestyle="", label=f"HMN, {label}")
    for name, style in (("JPEG", ":"), ("all 50,000 real images", "-.")):
        (accuracy,) = (own for title, _, own in rows if title.startswith(name))
        axes.axhline(accuracy, color="gray", linestyle=style, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("processor seconds on one core")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("seconds.png"), help="the figure to write")
    args = parser.parse_args()
    draw(read_table(RESULTS.read_text(encoding="utf-8"))).savefig(args.out)


if __name__ == "__main__":
    main()
