"""What a new experience costs, against the number of classes seen before it.

A memory of so many classes is extended by a few new ones, as HMNReplay does after every experience:
`condense(new, memory=old)`. Old and new classes have as many images each, whatever the number of
classes, so that the budget grows with them and nothing else does: what is left is what old classes
cost. The memories before are random, and all images are noise: speed depends on neither.

Pruning trains a network on all images of the memory: on as many in all, whatever the number of
classes, until one epoch is more than that (pruning_passes). The defaults condense shortly;
--effort and --set say how.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import hmn_replay
from experiments.arguments import parse_settings
from experiments.benchmarks.common import (
    add_condense_arguments,
    interleave,
    noise,
    numbers,
    positive,
)
from hmn_replay.condensation.config import make_config
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import ConfigError
from hmn_replay.memory.checks import MAX_CLASSES
from hmn_replay.memory.hierarchical import HierarchicalMemory
from hmn_replay.memory.learned import LearnedMemory
from hmn_replay.runtime import resolve_device

SMOKE = {
    "seen": [1, 3],
    "classes": 2,
    "images": 3,
    "real_images": 6,
    "side": 8,
    "rounds": 1,
    "set": [
        "warm_start_steps=2",
        "outer_steps=1",
        "inner_steps=1",
        "network_width=2",
        "trained_networks=0",
        "network_images=4",
        "pruning_passes=4",
        "pruning_width=2",
        "beta_grid=0.5",
    ],
}

SHORT = (
    *("warm_start_steps=200", "outer_steps=1", "inner_steps=5"),
    *("trained_networks=0", "network_images=128", "beta_grid=0.5"),
)

# The budget stands in a file's header: more digits than any of these files needs.
MANY_BYTES = 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seen",
        type=numbers,
        default=[2, 10, 100, 998],
        help="classes seen before: comma-separated numbers",
    )
    parser.add_argument("--classes", type=positive, default=2, help="new classes")
    parser.add_argument("--images", type=positive, default=10, help="of each class in the memory")
    parser.add_argument("--real-images", type=positive, default=100, help="of each new class")
    parser.add_argument("--side", type=positive, default=32, help="of an image, in pixels")
    parser.add_argument("--rounds", type=positive, default=3, help="how often each is timed")
    add_condense_arguments(parser, *SHORT)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = resolve_device(args.device)
    options = parse_settings(args)
    config = make_config(args.effort, **options)
    seen = [int(count) for count in args.seen]
    if seen[-1] + args.classes > MAX_CLASSES:
        raise ConfigError(f"--seen and --classes together are {MAX_CLASSES} classes at most")
    shape = (3, args.side, args.side)
    # What the layout is for, all experiences alike: CIFAR-10 at one float32 image a class.
    layout = HierarchicalMemory.choose_layout("120 KiB", shape, 10, config.number_format or "int8")
    reports: dict[int, list[Any]] = {count: [] for count in seen}

    def extend(old: LearnedMemory, new: LabelledImages) -> None:
        num_classes = old.num_classes + new.num_classes
        memory = hmn_replay.condense(
            new,
            HierarchicalMemory.file_bytes_of(
                layout, num_classes, args.images * num_classes, MANY_BYTES
            ),
            memory=old,
            effort=args.effort,
            device=device,
            **options,
        )
        reports[old.num_classes].append(memory.report)

    tasks = {}
    for count in seen:
        old = HierarchicalMemory(layout, range(count), args.images).to(device)
        new = noise(shape, args.classes, args.real_images, first_class=count)
        tasks[str(count)] = partial(extend, old, new)
    seconds = interleave(tasks, args.rounds, device)
    phases = tuple(reports[seen[0]][-1]["phases"])
    print(f"{'seen':>6s}{'seconds':>10s}" + "".join(f"{phase:>12s}" for phase in phases))
    rows = []
    for count in seen:
        row: dict[str, Any] = {"seen": count, "seconds": seconds[str(count)]}
        row["phase_seconds"] = {
            phase: statistics.median(
                report["phases"][phase]["seconds"] for report in reports[count][-args.rounds :]
            )
            for phase in phases
        }
        row["images_per_class"] = reports[count][-1]["images_per_class"][-1]
        rows.append(row)
        print(
            f"{count:6d}{row['seconds']:10.3f}"
            + "".join(f"{value:12.3f}" for value in row["phase_seconds"].values())
        )
    ratio = rows[-1]["seconds"] / rows[0]["seconds"]
    print(f"after {seen[-1]} classes over after {seen[0]}: {ratio:.3f}")
    return {"experiences": rows, "ratio": ratio}
