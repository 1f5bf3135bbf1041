"""Which memory teaches a network most at equal bytes: HMN, raw images or JPEG?

    python experiments/equal_bytes.py --data cifar10 --data-root data --download
    python experiments/equal_bytes.py --data cifar10.npz --rows jpeg,quick,standard
    python experiments/equal_bytes.py --data cifar10.npz --budgets 30KiB,60KiB,120KiB --seconds 300

Every memory is of the same data and under a budget of bytes of a file, header and all. A fresh
network is trained on it and scored on the test set, for every seed, which also draws the memory;
the last epoch counts. Rows are

raw, jpeg, lossless, subsampled
                   real images; subsampled has one pixel for 2 x 2. JPEG is tried at all
                   --qualities, and shown at the one with the highest test accuracy, which favours
                   it
a number format    (float32, float16, int8, entropy) HMN, condensed for --seconds, half of them a
                   warm start
FORMAT-warm        HMN, the warm start alone, for --seconds
an effort          (draft, quick, standard, paper) HMN with all of the effort's settings, however
                   long it takes
KIND-EFFORT        (fred-quick, idc-draft, ...) another learned memory kind with these

--labels hard,soft,labeller makes a memory of each row and budget for each of these, in the same
bytes, and trains on it by these labels alone: a column each, never mixed. Beside a labeller stands
its own accuracy on the test set. Settings such as --set teacher_passes=50000 are those of all rows.

Written to OUT: results.json, after every memory and every training; table.md; a figure of accuracy
against bytes; memory files; and each seed's teachers. Stop it at any time: the same command goes
on. More rows, budgets and seeds may be added by later runs; other settings need another --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    # Python looks beside the script; what is run is this checkout, whatever is installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hmn_replay
from experiments.arguments import (
    add_data,
    add_settings,
    load,
    make_parser,
    parse_names,
    parse_numbers,
    parse_settings,
)
from experiments.figures import save
from experiments.results import deviation, markdown_table, percent
from experiments.tables.rows import accuracies
from experiments.tables.settings import UNBOUNDED
from experiments.tables.store import Store
from experiments.tables.study import KINDS
from hmn_replay.budget import Budget
from hmn_replay.condensation.config import EFFORTS, make_config
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import HMNReplayError
from hmn_replay.files import write_atomically
from hmn_replay.memory.base import Memory
from hmn_replay.memory.formats import NUMBER_FORMATS
from hmn_replay.memory.labels import LABELS
from hmn_replay.objectives.trajectories import delete_checkpoint
from hmn_replay.runtime import PRECISIONS, resolve_device
from hmn_replay.training.networks import Network
from hmn_replay.training.train import TrainingConfig, make_network

REAL, WARM = ("raw", "jpeg", "lossless", "subsampled"), "-warm"
OTHER_KINDS = [kind for kind in KINDS if kind != "hmn"]
ROWS = (
    *REAL,
    *NUMBER_FORMATS,
    *(f"{name}{WARM}" for name in NUMBER_FORMATS),
    *EFFORTS,
    *(f"{kind}-{effort}" for kind in OTHER_KINDS for effort in EFFORTS),
)


@dataclasses.dataclass(frozen=True)
class Study:
    """What all rows are made of and learned from by, and where what is found goes.

    Attributes:
        teachers: The teacher of each kind of labels and seed, and the seconds that it took.
    """

    train: LabelledImages
    test: LabelledImages
    args: argparse.Namespace
    store: Store
    teachers: dict[tuple[str, int], tuple[Network, float]] = dataclasses.field(default_factory=dict)


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
    add("--labels", default="hard", help=f"columns: some of {', '.join(LABELS)}")
    add("--label-weight", type=float, help="of soft labels or a labeller in the loss")
    add("--seeds", default="0", help="a memory and a training each")
    add("--network", default="convnet", help="what is trained on a memory")
    add("--width", type=int, default=64, help="channels of ConvNet's blocks")
    add("--passes", type=int, default=40_000, help="images that it is shown")
    add("--precision", choices=PRECISIONS, default="float32", help="of its training")
    add_settings(parser)
    add("--device", default="auto", help="cpu, cuda, ...; auto is CUDA where present")
    add("--out", type=Path, default=Path("equal_bytes"), help="folder to write to")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.device = str(resolve_device(args.device))
    rows = parse_names("--rows", args.rows, ROWS)
    for row in rows:
        if row not in REAL:
            make_config(**condensation(row, args))
    budgets = [Budget.parse(text).num_bytes for text in args.budgets.split(",")]
    seeds = parse_numbers("--seeds", args.seeds)
    columns = parse_names("--labels", args.labels, LABELS)
    parse_settings(args, {"labels": columns}, "--labels")
    qualities = parse_numbers("--qualities", args.qualities)
    for number in qualities:
        hmn_replay.JPEGMemory.check_settings(quality=number)
    TrainingConfig(
        network=args.network,
        width=args.width,
        num_passes=args.passes,
        label_weight=args.label_weight,
    )
    train, test = load(args, "train"), load(args, "test")
    names = ["data", "size", "seconds", "network", "width", "passes", "precision", "set", "device"]
    names.append("label_weight")
    configuration = {name: getattr(args, name) for name in names}
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads()}
    store = Store(args.out, configuration | machine)
    store.agree("images", [len(train), len(test)])
    study, stopped = Study(train, test, args, store), False
    try:
        for budget, row, labels, seed in itertools.product(budgets, rows, columns, seeds):
            for quality in qualities if row == "jpeg" else (None,):
                measure(study, row, labels, quality, budget, seed)
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
    effort = row.rpartition("-")[2]
    if effort in EFFORTS:
        return {"effort": effort, **parse_settings(args)}
    seconds: float = args.seconds
    row_sets = {"number_format": row.removesuffix(WARM), "warm_start_steps": UNBOUNDED}
    if row.endswith(WARM):
        row_sets |= {"warm_start_seconds": seconds, "outer_steps": 0, "over_budget": 0.0}
    else:
        row_sets |= {"warm_start_seconds": seconds / 2, "outer_steps": UNBOUNDED}
        row_sets["max_seconds"] = seconds
    return parse_settings(args, row_sets, f"the row {row!r}")


def measure(
    study: Study, row: str, labels: str, quality: int | None, budget: int, seed: int
) -> None:
    """Make the memory of a row and learn from it, as far as that was not done."""
    args = study.args
    identity = {
        "row": row,
        "labels": labels,
        "quality": quality,
        "budget": budget,
        "seed": seed,
    }
    label = row if quality is None else f"{row}{quality}"
    path = args.out / f"{label}-{labels}-{budget}-{seed}.hmn"

    def make() -> dict[str, Any]:
        config = label_config(labels, args)
        teacher, waited = (None, 0.0) if labels == "hard" else teacher_of(study, config, seed)
        started = time.monotonic()
        report: dict[str, Any] = {}
        memory: Memory
        if row in REAL:
            codec: dict[str, Any] = {} if quality is None else {"quality": quality}
            fill: Any = getattr(hmn_replay, f"{row}_images")  # such as hmn_replay.jpeg_images
            memory = fill(
                study.train,
                budget,
                labels=config,
                teacher=teacher,
                seed=seed,
                device=args.device,
                **codec,
            )
        else:
            memory = hmn_replay.condense(
                study.train,
                budget,
                seed=seed,
                device=args.device,
                checkpoint=path.with_suffix(".checkpoint"),
                progress=sys.stderr.isatty(),
                labels=labels,
                teacher=teacher,
                kind=kind if (kind := row.partition("-")[0]) in OTHER_KINDS else "hmn",
                **condensation(row, args),
            )
            report = memory.report
        memory.save(path)
        delete_checkpoint(path.with_suffix(".checkpoint"))
        return {
            "images": memory.num_images,
            "bytes": memory.file_bytes,
            # Of a memory that was stopped on the way, the seconds before count too. Each that
            # learns from a teacher has waited for it.
            "seconds": waited + report.get("seconds", time.monotonic() - started),
            "label_bytes": memory.summary()["label_bytes"],
            "report": report,
        }

    def score() -> dict[str, Any]:
        memory = hmn_replay.load(path)
        _, accuracy = hmn_replay.evaluate(
            memory,
            study.test,
            labels=labels,
            network=args.network,
            width=args.width,
            num_passes=args.passes,
            precision=args.precision,
            label_weight=args.label_weight,
            seed=seed,
            device=args.device,
        )
        if labels != "labeller":
            return {"accuracy": accuracy}
        own = hmn_replay.labeller_accuracy(memory, study.test)
        return {"accuracy": accuracy, "labeller_accuracy": own}

    if "error" not in study.store.once("memory", identity, make):
        study.store.once("training", identity, score)


def label_config(labels: str, args: argparse.Namespace) -> hmn_replay.LabelConfig:
    """Return how labels are made: by the settings of all rows."""
    settings = parse_settings(args)
    own = {name: settings[name] for name in hmn_replay.LabelConfig.model_fields if name in settings}
    return hmn_replay.LabelConfig(**{**own, "labels": labels})


def teacher_of(study: Study, config: hmn_replay.LabelConfig, seed: int) -> tuple[Network, float]:
    """Return the teacher of a seed and the seconds that it took: one for all memories and runs.

    A condensation goes on with the very network that it began with, so that one is kept in OUT.
    """
    args, data, key = study.args, study.train, (config.labels, seed)
    if key not in study.teachers:
        path = args.out / f"teacher-{config.labels}-{seed}.pt"
        if not path.exists():
            started = time.monotonic()
            made = hmn_replay.train_teacher(data, config, seed=seed, device=args.device)
            kept = {"network": made.state_dict(), "seconds": time.monotonic() - started}
            write_atomically(path, partial(torch.save, kept))
        kept = torch.load(path, map_location=args.device, weights_only=True)
        training = config.teacher_training(len(data), "auto", "auto")
        teacher = make_network(data.images, data.num_classes, training)
        teacher.load_state_dict(kept["network"])
        study.teachers[key] = teacher.to(args.device).eval(), kept["seconds"]
    return study.teachers[key]


def best_quality(store: Store, budget: int, labels: str = "hard") -> int | None:
    """Return the quality of JPEG with the best test accuracy so far; None where there is none.

    Of qualities with other seeds, those with most count: a mean of fewer may be best by chance.
    """
    scores = {
        quality: accuracies(store, row="jpeg", labels=labels, quality=quality, budget=budget)
        for row, quality in store.seen("training", "row", "quality")
        if row == "jpeg"
    }
    most = max([1, *map(len, scores.values())])
    means = {q: statistics.fmean(found) for q, found in scores.items() if len(found) == most}
    return max(means, key=means.__getitem__, default=None)


def make_rows(store: Store) -> list[dict[str, Any]]:
    """Return what was found of each memory and budget, by the mean over the seeds.

    Of JPEG there is the best quality alone.
    """
    found = []
    for row, labels, budget in store.seen("memory", "row", "labels", "budget"):
        identity: dict[str, Any] = {"row": row, "labels": labels, "budget": budget}
        if row == "jpeg":
            identity["quality"] = best_quality(store, budget, labels)
        made, scores = store.find("memory", **identity), accuracies(store, **identity)
        if made and scores:
            trained = store.find("training", **identity)
            own = [t["labeller_accuracy"] for t in trained if "labeller_accuracy" in t]
            psnr = [m["report"].get("warm_start_psnr") for m in made]
            found.append(
                {
                    **identity,
                    "images": statistics.fmean(m["images"] for m in made),
                    "bytes": statistics.fmean(m["bytes"] for m in made),
                    "seconds": statistics.fmean(m["seconds"] for m in made),
                    "psnr": statistics.fmean(psnr) if all(psnr) else None,
                    "label_bytes": statistics.fmean(m["label_bytes"] for m in made),
                    "accuracies": scores,
                    "labeller_accuracies": own,
                }
            )
    return found


def markdown(rows: list[dict[str, Any]], store: Store) -> str:
    """Return a table for each budget, a column for each kind of labels, the best memory first."""
    columns = [labels for labels in LABELS if any(row["labels"] == labels for row in rows)]
    parts = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        group = [row for row in rows if row["budget"] == budget]
        by_name: dict[str, dict[str, dict[str, Any]]] = {}
        for row in sorted(group, key=lambda row: -statistics.fmean(row["accuracies"])):
            by_name.setdefault(row["row"], {})[row["labels"]] = row
        head, lines = ["memory"], [[name] for name in by_name]
        for labels in columns:
            # Each column has its own memories: seeds and the quality of JPEG, too, are theirs.
            head += [f"{labels} labels: accuracy %", "images", "bytes", "seeds", "seconds to make"]
            head += ["labeller itself %"] * (labels == "labeller")
            for line, made in zip(lines, by_name.values(), strict=True):
                line += cells(made.get(labels), labels)
        parts += [f"## {budget:,} bytes", markdown_table([head, *lines])]
    found = [f"{label} {error}" for label, error in failures(store)]
    return "\n\n".join([*parts, *found]) + "\n"


def cells(row: dict[str, Any] | None, labels: str) -> list[str]:
    """Return what a table says of a memory in the column of its labels."""
    if row is None:
        return ["-"] * (6 if labels == "labeller" else 5)
    quality = f" (quality {row['quality']})" if row["row"] == "jpeg" else ""
    shown = [percent(row["accuracies"]) + quality, f"{row['images']:,.0f}", f"{row['bytes']:,.0f}"]
    shown += [str(len(row["accuracies"])), f"{row['seconds']:,.0f}"]
    return shown + [percent(row["labeller_accuracies"])] * (labels == "labeller")


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
    for name, labels in dict.fromkeys((row["row"], row["labels"]) for row in rows):
        group = [row for row in rows if (row["row"], row["labels"]) == (name, labels)]
        group.sort(key=lambda row: int(row["budget"]))
        scores = [[100 * share for share in row["accuracies"]] for row in group]
        axes.errorbar(
            [row["budget"] / 1024 for row in group],
            [statistics.fmean(values) for values in scores],
            yerr=[deviation(values) for values in scores],
            label=("JPEG, best quality" if name == "jpeg" else name)
            + ("" if labels == "hard" else f", {labels}"),
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
    except (HMNReplayError, OSError) as error:
        sys.exit(f"equal_bytes.py: error: {error}")
