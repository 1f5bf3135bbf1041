"""Importing hmn_replay, against importing torch alone: seconds and resident memory.

Each import is made in a process of its own, in turn. The first round, which writes and reads the
compiled modules, does not count.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from typing import Any

from experiments.benchmarks.common import ROOT, positive, readable

SMOKE = {"rounds": 1, "warm_up": 0}

MODULES = ("torch", "hmn_replay")

CHILD = """
import sys, time
started = time.perf_counter()
__import__(sys.argv[1])
seconds = time.perf_counter() - started
import psutil
print(seconds, psutil.Process().memory_info().rss)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=positive, default=10, help="how often each is imported")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds that do not count")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in MODULES}
    for number in range(-args.warm_up, args.rounds):
        for name in MODULES:
            measured = import_alone(name)
            if number >= 0:
                taken[name].append(measured)
    medians = {
        name: (statistics.median(s for s, _ in pairs), statistics.median(b for _, b in pairs))
        for name, pairs in taken.items()
    }
    (torch_seconds, torch_bytes), (seconds, num_bytes) = (medians[name] for name in MODULES)
    rows = {f"import {name}": pair for name, pair in medians.items()}
    rows["beyond torch"] = (seconds - torch_seconds, num_bytes - torch_bytes)
    for label, (taken_seconds, taken_bytes) in rows.items():
        print(f"{label:20s}{taken_seconds:8.3f} s{readable(taken_bytes):>14s} resident")
    return {
        "seconds": seconds,
        "resident_bytes": num_bytes,
        "torch_seconds": torch_seconds,
        "torch_resident_bytes": torch_bytes,
        "ratio": seconds / torch_seconds,
    }


def import_alone(name: str) -> tuple[float, float]:
    """Return the seconds that an import takes in a fresh process, and the bytes it then has."""
    command = [sys.executable, "-c", CHILD, name]
    output = subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout
    seconds, num_bytes = map(float, output.split())
    return seconds, num_bytes
