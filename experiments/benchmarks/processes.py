"""What a matching step would take on more processes, each as fast as this one.

What each of N processes does for itself is measured as it is: a step with 1/N of the classes, and
the network's training with batches of 1/N of the images. The bytes that they sum are counted from
the tensors. What sending takes is computed, for a tree of messages and a ring of bytes:

    seconds of a sum = 2 ceil(log2 N) latency + 2 (N - 1) / N bytes / bandwidth

Nothing is sent while something is computed, and so the two are added. Left out: that the parts of a
machine, such as its memory, may be shared; loading; checkpoints; and what every process draws and
augments of the others' images. Processes beyond the number of classes of a step match nothing:
--set classes_per_step=N draws more of them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from experiments.arguments import parse_settings
from experiments.benchmarks.common import (
    add_condense_arguments,
    interleave,
    noise,
    numbers,
    positive,
    random_memory,
)
from hmn_replay.condensation import steps
from hmn_replay.condensation.config import make_config
from hmn_replay.distributed import GradientPart, Team
from hmn_replay.runtime import make_generator, resolve_device

SMOKE = {
    "processes": [2, 5],
    "classes": 3,
    "real_images": 4,
    "side": 8,
    "budget": "8 KiB",
    "rounds": 1,
    "set": [
        *("real_batch=2", "decoded_batch=2", "network_width=2"),
        *("network_images=7", "network_batch=4"),
    ],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes",
        type=numbers,
        default=[2, 4, 8, 16, 32, 64],
        help="how many there are to be, comma-separated",
    )
    parser.add_argument("--classes", type=positive, default=10, help="of the memory")
    parser.add_argument("--real-images", type=positive, default=100, help="of each class")
    parser.add_argument("--side", type=positive, default=32, help="of an image, in pixels")
    parser.add_argument("--budget", default="120 KiB", help="bytes of the memory's file")
    add_condense_arguments(parser)
    parser.add_argument("--bandwidth", type=float, default=10.0, help="of a process, in GB/s")
    parser.add_argument("--latency", type=float, default=20.0, help="of a message, in microseconds")
    parser.add_argument("--rounds", type=positive, default=5, help="how often each is timed")


class Counter(Team):
    """One process that does a share of what was drawn, and counts the bytes that all would sum."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sums: list[int] = []

    def sum_gradients(self, parts: Iterable[GradientPart]) -> None:
        """Count the bytes of one sum."""
        self.sums.append(sum(p[rows].numel() * p.element_size() for p, rows in parts))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    sizes = [1, *map(int, args.processes)]
    work = make_work(args)
    move = work.pop("move")
    teams = {size: Counter(size) for size in sizes}
    parts = {
        f"{name} {size}": partial(task, team)
        for size, team in teams.items()
        for name, task in work.items()
    }
    tasks = {**parts, "move": partial(move, Team())}
    seconds = interleave(tasks, args.rounds, resolve_device(args.device))
    sums = teams[1].sums[: len(teams[1].sums) // (args.rounds + 1)]
    print(f"{sum(sums):,} bytes are summed in {len(sums)} messages, {sums[0]:,} in the first")
    print(f"{args.bandwidth:g} GB/s and {args.latency:g} microseconds between processes")
    print(f"every process moves the whole memory, in {seconds['move']:.4f} s of each match")
    names = ("match", "train", "send")
    print(f"{'N':>3s}{'step':>10s}" + "".join(f"{name:>10s}" for name in names) + "  speed-up")
    rows: list[dict[str, float]] = []
    for size in sizes:
        row: dict[str, float] = {name: seconds[f"{name} {size}"] for name in work}
        row["send"] = sum(seconds_of_sum(size, n, args.bandwidth, args.latency) for n in sums)
        row["step"] = sum(row.values())
        row["speedup"] = (rows[0]["step"] if rows else row["step"]) / row["step"]
        rows.append({"processes": size, **row})
        columns = [f"{row[name]:10.4f}" for name in ("step", *names)]
        print(f"{size:3d}{''.join(columns)}{row['speedup']:10.2f}")
    return {"rows": rows, "sums_bytes": sums, "move_seconds": seconds["move"]}


def make_work(args: argparse.Namespace) -> dict[str, Callable[[Team], object]]:
    """Return matching, the move of the memory that is part of it, and the network's training."""
    device = resolve_device(args.device)
    config = make_config(args.effort, **parse_settings(args))
    shape = (3, args.side, args.side)
    memory = random_memory(args.budget, shape, args.classes, config.number_format).to(device)
    real = steps.RealImages.of(noise(shape, args.classes, args.real_images))
    optimizer = steps.make_optimizer(memory, (0.5, 0.99))
    make_context = partial(
        steps.StepContext,
        memory,
        real,
        config,
        optimizer,
        compiling=steps.plan_compiling(memory, config),
    )
    network, learner = steps.fresh_network(make_context(), 0)

    def match(team: Team) -> None:
        steps.match_step(make_context(team=team), network, make_generator(0, "match"))

    def move(_: Team) -> None:
        optimizer.step()
        memory.update_scales()

    def train(team: Team) -> None:
        steps.train_step(make_context(team=team), network, learner, make_generator(0, "train"))

    return {"match": match, "move": move, "train": train}


def seconds_of_sum(size: int, num_bytes: int, bandwidth: float, latency: float) -> float:
    """Return the seconds in which so many processes sum so many bytes; GB/s and microseconds."""
    messages = 2 * math.ceil(math.log2(size))
    return messages * latency * 1e-6 + 2 * (size - 1) / size * num_bytes / (bandwidth * 1e9)
