"""Saving and loading memory files of several sizes.

A file is written beside its place, flushed to the disk and moved there; loading checks its digest
and makes the memory. Disks differ more than processors: the file is in the system's cache when it
is read.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hmn_replay
from experiments.benchmarks.common import (
    add_memory_arguments,
    interleave,
    positive,
    random_memory,
    readable,
)
from hmn_replay.budget import Budget
from hmn_replay.runtime import resolve_device

SMOKE = {"sizes": "8 KiB,16 KiB", "classes": 2, "side": 8, "rounds": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", default="30 KiB,120 KiB,1 MiB,10 MiB", help="budgets of files")
    add_memory_arguments(parser)
    parser.add_argument("--rounds", type=positive, default=10, help="how often each file is timed")
    parser.add_argument("--folder", help="where to write (default: a temporary one)")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = resolve_device(args.device)
    budgets = [Budget.parse(size) for size in args.sizes.split(",")]
    tasks: dict[str, Callable[[], object]] = {}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for number, budget in enumerate(budgets):
            shape = (3, args.side, args.side)
            memory = random_memory(budget, shape, args.classes, args.number_format).to(device)
            path = Path(folder) / f"{number}.hmn"
            tasks[f"save {number}"] = partial(memory.save, path)
            tasks[f"load {number}"] = partial(hmn_replay.load, path, device=device)
            rows.append({"file_bytes": memory.file_bytes, "num_images": memory.num_images})
        seconds = interleave(tasks, args.rounds, device)
    print(f"{'file':>12s}{'images':>10s}{'save ms':>12s}{'load ms':>12s}")
    for number, row in enumerate(rows):
        row |= {f"{what}_seconds": seconds[f"{what} {number}"] for what in ("save", "load")}
        print(
            f"{readable(row['file_bytes']):>12s}{row['num_images']:10,d}"
            f"{1000 * row['save_seconds']:12.2f}{1000 * row['load_seconds']:12.2f}"
        )
    return {"files": rows}
