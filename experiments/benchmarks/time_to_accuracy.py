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
from experiments.benchmarks.accuracy_curves import draw, make_table, speedup
from experiments.benchmarks.common import description, now, numbers, parse_options, positive
from experiments.reference import FACTOR, ReferenceLoop
from experiments.results import resumed
from hmn_replay.budget import Budget
from hmn_replay.condensation.config import EFFORTS
from hmn_replay.data.images import LabelledImages
from hmn_replay.data.sources import load_dataset
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
    "option": [
        "inner_steps=1",
        "real_batch=2",
        "decoded_batch=2",
        "network_width=2",
        "network_images=4",
        "network_batch=4",
        "over_budget=0",
    ],
}

# Until max_seconds are over, and no pruning, which max_seconds does not bound.
OPTIONS = ("warm_start_steps=1000000", "outer_steps=1000000", "over_budget=0")

# These may differ when a run goes on: they ask for more of the same rows.
GROWING = ("times", "seconds", "snapshots", "repeats", "data_root", "download")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="cifar10", help="a name, an .npz file or an image folder")
    parser.add_argument("--data-root", default="data", help="where torchvision's sets lie")
    parser.add_argument("--download", action="store_true", help="fetch a torchvision set if absent")
    parser.add_argument("--budget", default="122880", help="bytes of either memory")
    parser.add_argument(
        "--times",
        type=numbers,
        default=[15, 30, 60, 120, 240, 480],
        help="seconds of our runs (default: 15,30,60,120,240,480)",
    )
    parser.add_argument("--seconds", type=float, default=1800, help="of the reference")
    parser.add_argument("--snapshots", type=positive, default=6, help="of the reference")
    parser.add_argument("--effort", default="quick", choices=tuple(EFFORTS), help="ours")
    parser.add_argument(
        "--option",
        action="append",
        default=list(OPTIONS),
        metavar="NAME=VALUE",
        help=f"of condense(); several times (default: {' '.join(OPTIONS)})",
    )
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
    source = {"data_root": args.data_root, "download": args.download}
    train, test = (load_dataset(args.data, split, **source) for split in ("train", "test"))
    work = Work(args, results, train, test, resolve_device(args.device))
    work.measure_ours()
    work.measure_reference()
    results |= speedup(results["ours"], results["reference"])
    table = make_table(results)
    write_atomically(args.out.with_suffix(".md"), table.encode())
    title = f"{Path(args.data).stem}, memories of {Budget.parse(args.budget)}"
    draw(results, title, args.out.with_suffix(".png"))
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
            **parse_options(self.args.option),
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
