"""Accuracy of a memory against seconds of condensation: ours, and IDC's loop with IDC's container.

Ours is one run of `condense()` for each of --times, from the start to a file within the budget: the
learning rate comes down in the end of each, so that no run can be read off a longer one. Matching
ends after so many seconds (max_seconds), of which the warm start takes --warm-share
(warm_start_seconds). The reference, experiments/reference.py, is one run of --seconds with
snapshots on the way, after half of that, a quarter, and so on; its rate is constant. Its pixels are
float32 as published, four images to a stored one, and fill the budget without a header.

Seconds are those on the wall, of the whole call of `condense()`, and of the reference's initial
pixels and steps. Evaluation never counts: a fresh network learns from the memory's file, or the
snapshot's images, and is scored on the test set, the same for both; the last epoch counts.

speedup is the reference's seconds in the end over the seconds of our fastest run that is as
accurate; there is none where no run is.

Beside OUT, results.json say: results.png, a figure; results.md, a table; and results/, our memories
and the reference's snapshots. A run that was stopped goes on where it was when it is called again,
and other --times, --seconds, --snapshots and more --repeats add to what is there.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import hmn_replay
from experiments.arguments import add_data, add_settings, load, parse_settings
from experiments.benchmarks.common import description, now, numbers, positive
from experiments.figures import save
from experiments.reference import FACTOR, ReferenceLoop
from experiments.results import deviation, markdown_table, percent, resumed
from hmn_replay.budget import Budget
from hmn_replay.condensation.config import EFFORTS
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import ConfigError
from hmn_replay.evaluation import Decodable
from hmn_replay.files import write_atomically
from hmn_replay.runtime import resolve_device

SMOKE: dict[str, Any] = {
    "data": "digits",
    "budget": "4 KiB",
    "times": [0.2, 0.4],
    "seconds": 0.2,
    "snapshots": 2,
    "width": 4,
    "passes": 50,
    "reference_width": 4,
    "reference_network_images": 8,
    "set": [
        "inner_steps=1",
        "real_batch=2",
        "decoded_batch=2",
        "network_width=2",
        "trained_networks=0",
        "network_images=4",
        "network_batch=4",
        "over_budget=0",
    ],
}

LABELS = {"ours": "HMN, ours", "reference": "IDC, reference"}

# Until max_seconds are over, and no pruning, which max_seconds does not bound.
OPTIONS = (
    *("warm_start_steps=1000000", "outer_steps=1000000", "over_budget=0"),
    "trained_networks=0",  # training them would take the first minute
)

# These may differ when a run goes on: they ask for more of the same rows.
GROWING = ("times", "seconds", "snapshots", "repeats", "data_root", "download")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser, "cifar10")
    parser.add_argument("--budget", default="122880", help="bytes of either memory")
    parser.add_argument(
        "--times",
        type=numbers,
        default=[15, 30, 60, 120, 240, 480],
        help="seconds of our runs",
    )
    parser.add_argument("--seconds", type=float, default=1800, help="of the reference")
    parser.add_argument("--snapshots", type=positive, default=6, help="of the reference")
    parser.add_argument("--effort", default="quick", choices=tuple(EFFORTS), help="ours")
    add_settings(parser, *OPTIONS)
    parser.add_argument(
        "--warm-share", type=float, default=0.5, help="of our seconds, for the warm start"
    )
    parser.add_argument("--reference-width", type=positive, default=128, help="of IDC's network")
    parser.add_argument(
        "--reference-network-images",
        type=positive,
        default=2000,
        help="it learns from after a step",
    )
    parser.add_argument("--seed", type=int, default=0, help="of both condensations")
    parser.add_argument("--network", default="convnet", help="that is evaluated")
    parser.add_argument(
        "--width", type=positive, default=128, help="channels of ConvNet's blocks then"
    )
    parser.add_argument("--passes", type=positive, default=40_000, help="images it is shown")
    parser.add_argument("--repeats", type=positive, default=1, help="evaluations of each memory")
    parser.set_defaults(out=Path("time_to_accuracy/results.json"))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.seconds <= 0:
        raise ConfigError(f"--seconds must be above 0, got {args.seconds}")
    if not 0 < args.warm_share <= 1:
        raise ConfigError(f"--warm-share must be in (0, 1], got {args.warm_share}")
    results = begin(args)
    train, test = load(args, "train"), load(args, "test")
    work = Work(args, results, train, test, resolve_device(args.device))
    work.measure_ours()
    work.measure_reference()
    # Others may be there, of a run that was stopped before it evaluated them.
    shown = results | {name: evaluated(results[name]) for name in LABELS}
    results |= (found := speedup(shown["ours"], shown["reference"]))
    shown |= found
    table = make_table(shown)
    write_atomically(args.out.with_suffix(".md"), table.encode())
    title = f"{Path(args.data).stem}, memories of {Budget.parse(args.budget)}"
    draw(shown, title, args.out.with_suffix(".png"))
    print("\n" + table)
    return results


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """Return the results so far: those in OUT, of the same settings and machine, or none."""
    folder(args).mkdir(parents=True, exist_ok=True)
    results = {**description(args), "ours": {}, "reference": {}}
    if not args.out.exists():
        # What an earlier run left that was of other settings, for all we know.
        for path in folder(args).glob("reference-*.pt"):
            path.unlink()
        return results
    settings = results["settings"]
    compared = {name: value for name, value in settings.items() if name not in GROWING}
    earlier = resumed(
        {**results, "settings": compared}, args.out, resume=True, parts=("settings", "machine")
    )
    return {**earlier, "settings": settings}


def folder(args: argparse.Namespace) -> Path:
    """Return where memories and snapshots go."""
    path: Path = args.out.with_suffix("")
    return path


@dataclass(frozen=True)
class Work:
    """The rows of both loops, made and evaluated one after the other, and written after each.

    A row has ``seconds``, what tells more of its memory, and ``accuracies``, one an evaluation.
    """

    args: argparse.Namespace
    results: dict[str, Any]
    train: LabelledImages
    test: LabelledImages
    device: torch.device

    def measure_ours(self) -> None:
        """Condense for each of the times, and evaluate the files."""
        rows = self.results["ours"]
        for plan in self.args.times:
            path, key = folder(self.args) / f"ours-{plan:g}.hmn", f"{plan:g}"
            if key not in rows:
                rows[key] = self.condense(plan, path)
                self.write()
            self.evaluate("ours", key, partial(hmn_replay.load, path))

    def measure_reference(self) -> None:
        """Take the reference's steps from snapshot to snapshot, and evaluate these."""
        args, rows = self.args, self.results["reference"]
        plans = [args.seconds / 2**halvings for halvings in reversed(range(args.snapshots))]
        loop = ReferenceLoop(
            self.train,
            Budget.parse(args.budget).num_bytes,
            width=args.reference_width,
            network_images=args.reference_network_images,
            seed=args.seed,
            device=self.device,
        )
        for plan in plans:
            path, key = folder(args) / f"reference-{plan:g}.pt", f"{plan:g}"
            if path.exists():
                loop.load_state_dict(torch.load(path, map_location=self.device, weights_only=True))
            elif key in rows and len(rows[key]["accuracies"]) >= args.repeats:
                continue
            loop.run(plan)
            if key not in rows:
                file = io.BytesIO()
                torch.save(loop.state_dict(), file)
                write_atomically(path, file.getvalue())
                rows[key] = {
                    "seconds": loop.seconds,
                    "steps": loop.step,
                    "num_images": FACTOR**2 * len(loop.pixels),
                    "bytes": loop.pixels.numel() * loop.pixels.element_size(),
                    "accuracies": [],
                }
                self.write()
            self.evaluate("reference", key, lambda: loop)

    def condense(self, plan: float, path: Path) -> dict[str, Any]:
        """Condense for about so many seconds, write the memory to a file, and return its row."""
        options = {
            "max_seconds": plan,
            "warm_start_seconds": self.args.warm_share * plan,
            **parse_settings(self.args),
        }
        started = now(self.device)
        memory = hmn_replay.condense(
            self.train,
            self.args.budget,
            effort=self.args.effort,
            seed=self.args.seed,
            device=self.device,
            **options,
        )
        memory.save(path)
        return {
            "seconds": now(self.device) - started,
            "num_images": memory.num_images,
            "bytes": memory.file_bytes,
            "phases": memory.report["phases"],
            "accuracies": [],
        }

    def evaluate(self, name: str, key: str, make_source: Callable[[], Decodable]) -> None:
        """Train networks on what a row is of, as many as are missing."""
        row = self.results[name][key]
        while len(row["accuracies"]) < self.args.repeats:
            _, accuracy = hmn_replay.evaluate(
                make_source(),
                self.test,
                network=self.args.network,
                width=self.args.width,
                num_passes=self.args.passes,
                seed=len(row["accuracies"]),
                device=self.device,
            )
            row["accuracies"].append(accuracy)
            self.write()
        accuracy = 100 * statistics.fmean(row["accuracies"])
        print(f"{name:10s}{row['seconds']:10.1f} s{accuracy:8.2f} %", flush=True)

    def write(self) -> None:
        """Keep the results so far."""
        write_atomically(self.args.out, json.dumps(self.results, indent=1).encode())


def evaluated(rows: dict[str, Any]) -> dict[str, Any]:
    """Return the rows that have an accuracy."""
    return {key: row for key, row in rows.items() if row["accuracies"]}


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
            cells.append(
                [
                    label,
                    f"{row['seconds']:,.1f}",
                    f"{row['num_images']:,}",
                    f"{row['bytes']:,}",
                    percent(row["accuracies"]),
                    str(len(row["accuracies"])),
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
