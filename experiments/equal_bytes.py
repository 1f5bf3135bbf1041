"""Which memory teaches a network most at equal bytes: HMN, raw images or JPEG?

    python experiments/equal_bytes.py --data cifar10 --data-root data --download
    python experiments/equal_bytes.py --data cifar10.npz --rows jpeg,quick,standard
    python experiments/equal_bytes.py --data cifar10.npz --budgets 30KiB,60KiB,120KiB --seconds 300

Every memory is of the same data and under a budget of bytes of a file, header and all. A fresh
network is trained on it and scored on the test set, for every seed, which also draws the memory;
the last epoch counts. Rows are

raw, jpeg, lossless  real images. JPEG is tried at all --qualities, and shown at the one with the
                   highest test accuracy, which favours it
a number format    (float32, float16, int8, entropy) HMN, condensed for --seconds, half of them a
                   warm start
FORMAT-warm        HMN, the warm start alone, for --seconds
an effort          (quick, standard, paper) HMN with all of the effort's settings, however long it
                   takes

Written to OUT: results.json, after every memory and every training; table.md; a figure of accuracy
against bytes; and memory files. Stop it at any time: the same command goes on. More rows, budgets
and seeds may be added by later runs; other settings need another --out.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

import hmn_replay
from experiments.arguments import (
    add_data,
    add_settings,
    load,
    make_parser,
    parse_numbers,
    parse_settings,
)
from experiments.figures import save
from experiments.results import deviation, markdown_table
from experiments.tables.rows import accuracies, percent
from experiments.tables.settings import UNBOUNDED
from experiments.tables.store import Store
from hmn_replay.budget import Budget
from hmn_replay.condensation.config import EFFORTS, make_config
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import ConfigError, HMNReplayError
from hmn_replay.files import write_atomically
from hmn_replay.memory.base import Memory
from hmn_replay.memory.formats import NUMBER_FORMATS
from hmn_replay.runtime import resolve_device
from hmn_replay.training.train import TrainingConfig

Data: TypeAlias = "tuple[LabelledImages, LabelledImages]"

REAL, WARM = ("raw", "jpeg", "lossless"), "-warm"
ROWS = (*REAL, *NUMBER_FORMATS, *(f"{name}{WARM}" for name in NUMBER_FORMATS), *EFFORTS)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_data(parser, "digits")
    add("--budgets", default="120KiB", help="of a file, as 30KiB,60KiB,120KiB")
    add(
        "--rows", default="raw,jpeg,float32,float16,int8,entropy", help=f"some of {', '.join(ROWS)}"
    )
    add("--seconds", type=float, default=300, help="of condensing a memory of a number format")
    add("--qualities", default="5,10,20,30", help="of JPEG")
    add("--seeds", default="0", help="a memory and a training each")
    add("--network", default="convnet", help="what is trained on a memory")
    add("--width", type=int, default=64, help="channels of ConvNet's blocks")
    add("--passes", type=int, default=40_000, help="images that it is shown")
    add_settings(parser)
    add("--device", default="auto")
    add("--out", type=Path, default=Path("equal_bytes"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.device = str(resolve_device(args.device))
    rows = args.rows.split(",")
    if unknown := [row for row in rows if row not in ROWS]:
        raise ConfigError(f"--rows has no {unknown[0]!r}; choose from {', '.join(ROWS)}")
    for row in rows:
        if row not in REAL:
            make_config(**condensation(row, args))
    budgets = [Budget.parse(text).num_bytes for text in args.budgets.split(",")]
    seeds = parse_numbers("--seeds", args.seeds)
    parse_numbers("--qualities", args.qualities)
    TrainingConfig(network=args.network, width=args.width, num_passes=args.passes)
    train, test = load(args, "train"), load(args, "test")
    names = ("data", "size", "seconds", "network", "width", "passes", "set", "device")
    configuration = {name: getattr(args, name) for name in names}
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads()}
    store = Store(args.out, configuration | machine)
    store.agree("images", [len(train), len(test)])
    stopped = False
    try:
        for budget in budgets:
            for row in rows:
                for seed in seeds:
                    measure(row, budget, seed, (train, test), args, store)
    except KeyboardInterrupt:
        stopped = True
    store.report["rows"] = found = make_rows(store)
    store.write()
    text = markdown(found, store)
    write_atomically(args.out / "table.md", text.encode())
    draw(found, args.out / "rate-accuracy.png")
    print(f"\n{text}\nWritten to {args.out}")
    return store.exit_code(stopped=stopped)


def condensation(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of :func:`hmn_replay.condense` for a row that is condensed."""
    if row in EFFORTS:
        return {"effort": row, **parse_settings(args.set)}
    seconds: float = args.seconds
    row_sets = {"number_format": row.removesuffix(WARM), "warm_start_steps": UNBOUNDED}
    if row.endswith(WARM):
        row_sets |= {"warm_start_seconds": seconds, "outer_steps": 0, "over_budget": 0.0}
    else:
        row_sets |= {"warm_start_seconds": seconds / 2, "outer_steps": UNBOUNDED}
        row_sets["max_seconds"] = seconds
    return parse_settings(args.set, row_sets, f"the row {row!r}")


def measure(
    row: str, budget: int, seed: int, data: Data, args: argparse.Namespace, store: Store
) -> None:
    """Make the memory of a row and learn from it, as far as that was not done."""
    qualities = parse_numbers("--qualities", args.qualities) if row == "jpeg" else (None,)
    for quality in qualities:
        measure_one(row, quality, budget, seed, data, args, store)


def measure_one(
    row: str,
    quality: int | None,
    budget: int,
    seed: int,
    data: Data,
    args: argparse.Namespace,
    store: Store,
) -> None:
    train, test = data
    identity = {"row": row, "quality": quality, "budget": budget, "seed": seed}
    label = row if quality is None else f"{row}{quality}"
    path = args.out / f"{label}-{budget}-{seed}.hmn"

    def make() -> dict[str, Any]:
        started = time.monotonic()
        report: dict[str, Any] = {}
        memory: Memory
        if row == "raw":
            memory = hmn_replay.raw_images(train, budget, seed=seed)
        elif row == "lossless":
            memory = hmn_replay.lossless_images(train, budget, seed=seed)
        elif quality is not None:
            memory = hmn_replay.jpeg_images(train, budget, quality=quality, seed=seed)
        else:
            memory = hmn_replay.condense(
                train,
                budget,
                seed=seed,
                device=args.device,
                checkpoint=path.with_suffix(".checkpoint"),
                progress=sys.stderr.isatty(),
                **condensation(row, args),
            )
            report = memory.report
        memory.save(path)
        path.with_suffix(".checkpoint").unlink(missing_ok=True)
        return {
            "images": memory.num_images,
            "bytes": memory.file_bytes,
            # Of a memory that was stopped on the way, the seconds before count too.
            "seconds": report.get("seconds", time.monotonic() - started),
            "report": report,
        }

    def score() -> dict[str, Any]:
        _, accuracy = hmn_replay.evaluate(
            hmn_replay.load(path),
            test,
            network=args.network,
            width=args.width,
            num_passes=args.passes,
            seed=seed,
            device=args.device,
        )
        return {"accuracy": accuracy}

    if "error" not in store.once("memory", identity, make):
        store.once("training", identity, score)


def best_quality(store: Store, budget: int) -> int | None:
    """Return the quality of JPEG with the best test accuracy so far; None where there is none."""
    scores = {
        quality: accuracies(store, row="jpeg", quality=quality, budget=budget)
        for row, quality in store.seen("training", "row", "quality")
        if row == "jpeg"
    }
    means = {quality: statistics.fmean(found) for quality, found in scores.items() if found}
    return max(means, key=means.__getitem__, default=None)


def make_rows(store: Store) -> list[dict[str, Any]]:
    """Return what was found of each memory and budget, by the mean over the seeds.

    Of JPEG there is the best quality alone.
    """
    found = []
    for row, budget in store.seen("memory", "row", "budget"):
        identity: dict[str, Any] = {"row": row, "budget": budget}
        if row == "jpeg":
            identity["quality"] = best_quality(store, budget)
        made, scores = store.find("memory", **identity), accuracies(store, **identity)
        if made and scores:
            psnr = [m["report"].get("warm_start_psnr") for m in made]
            found.append(
                {
                    **identity,
                    "images": statistics.fmean(m["images"] for m in made),
                    "bytes": statistics.fmean(m["bytes"] for m in made),
                    "seconds": statistics.fmean(m["seconds"] for m in made),
                    "psnr": statistics.fmean(psnr) if all(psnr) else None,
                    "accuracies": scores,
                }
            )
    return found


def markdown(rows: list[dict[str, Any]], store: Store) -> str:
    """Return a table for each budget, the best memory first."""
    head = ["memory", "images", "bytes", "accuracy %", "seeds", "seconds to make"]
    parts = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        group = [row for row in rows if row["budget"] == budget]
        group.sort(key=lambda row: -statistics.fmean(row["accuracies"]))
        lines = [
            [
                f"JPEG, quality {row['quality']}" if row["row"] == "jpeg" else row["row"],
                f"{row['images']:,.0f}",
                f"{row['bytes']:,.0f}",
                percent(row["accuracies"]),
                str(len(row["accuracies"])),
                f"{row['seconds']:,.0f}",
            ]
            for row in group
        ]
        parts += [f"## {budget:,} bytes", markdown_table([head, *lines])]
    found = [f"{label} {error}" for label, error in failures(store)]
    return "\n\n".join([*parts, *found]) + "\n"


def failures(store: Store) -> list[tuple[str, str]]:
    """Return what went wrong, and in which row."""
    return [
        (f"{row}, {budget:,} bytes:", error)
        for row, budget in store.seen("memory", "row", "budget")
        for error in store.errors(row=row, budget=budget)
    ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against bytes, a line for each memory, with bars of one deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    budgets = sorted({row["budget"] for row in rows})
    for name in dict.fromkeys(row["row"] for row in rows):
        group = sorted((r for r in rows if r["row"] == name), key=lambda r: int(r["budget"]))
        scores = [[100 * share for share in row["accuracies"]] for row in group]
        axes.errorbar(
            [row["budget"] / 1024 for row in group],
            [statistics.fmean(values) for values in scores],
            yerr=[deviation(values) for values in scores],
            label="JPEG, best quality" if name == "jpeg" else name,
            marker="o",
            markersize=4,
            linestyle="--" if name in REAL else "-",
            capsize=3,
        )
    axes.set_xscale("log", base=2)
    ticks = [budget / 1024 for budget in budgets]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("file (KiB)")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    if rows:
        axes.legend(frameon=False)
    save(figure, path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HMNReplayError as error:
        sys.exit(f"equal_bytes.py: error: {error}")
