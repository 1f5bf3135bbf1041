"""What the benchmarks share: their arguments, clocks that wait for the device, fresh processes."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

import hmn_replay
from experiments.arguments import add_settings
from hmn_replay.budget import Budget
from hmn_replay.condensation.config import EFFORTS
from hmn_replay.data.images import LabelledImages
from hmn_replay.memory.formats import NUMBER_FORMATS
from hmn_replay.memory.hierarchical import HierarchicalMemory
from hmn_replay.runtime import make_generator, resolve_device

# These say what is done with the results, not what is measured.
NOT_SETTINGS = ("command", "json", "out", "smoke", "device", "threads")

_Result = TypeVar("_Result")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that every sub-command has."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto is the best present")
    parser.add_argument("--threads", type=positive, help="how many (default: torch's own choice)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; all else to standard error"
    )
    parser.add_argument("--out", type=Path, help="a file for that object")
    parser.add_argument(
        "--smoke", action="store_true", help="everything tiny, to see in seconds that it works"
    )


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what images a memory of :func:`random_memory` holds."""
    parser.add_argument("--classes", type=positive, default=10, help="of the memory")
    parser.add_argument("--side", type=positive, default=32, help="of an image, in pixels")
    parser.add_argument(
        "--number-format", default="int8", choices=tuple(NUMBER_FORMATS), help="of learned values"
    )


def add_condense_arguments(parser: argparse.ArgumentParser, *settings: str) -> None:
    """Add the arguments that say how :func:`hmn_replay.condense` is to work."""
    parser.add_argument(
        "--effort", default="quick", choices=tuple(EFFORTS), help="of the condensation"
    )
    add_settings(parser, *settings)


def positive(text: str) -> int:
    """Read an argument that is a whole number of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def numbers(text: str) -> list[float]:
    """Read an argument such as ``15,30,60``: numbers above 0, sorted."""
    values = sorted(float(part) for part in text.split(","))
    if values[0] <= 0:
        raise argparse.ArgumentTypeError(f"expected numbers above 0, got {text!r}")
    return values


def description(args: argparse.Namespace) -> dict[str, Any]:
    """Return what every JSON object begins with: command, settings and machine."""
    device = resolve_device(args.device)
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "hmn_replay": hmn_replay.__version__,
    }
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    begin = {"command": args.command, "settings": settings, "machine": machine}
    as_read_again: dict[str, Any] = json.loads(json.dumps(begin))
    return as_read_again


def now(device: torch.device) -> float:
    """Return the time in seconds at which the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleave(
    tasks: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    warm_up: int = 1,
) -> dict[str, float]:
    """Time tasks in turn, A B A B ..., so that what else the machine does falls on all of them.

    Args:
        tasks: By name.
        rounds: How often each is timed, 1 or more.
        device: What they run on.
        warm_up: Rounds before these, which do not count.

    Returns:
        The median seconds of each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(-warm_up, rounds):
        for name, task in tasks.items():
            started = now(device)
            task()
            taken = now(device) - started
            if number >= 0:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_fresh_process(function: Callable[..., _Result], *arguments: object) -> _Result:
    """Call a module's function in a process that has done nothing else, and return its result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def random_memory(
    budget: Budget | int | str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    number_format: str | None = None,
) -> HierarchicalMemory:
    """Return a memory of initial values that fills a budget: speed does not depend on them.

    Its number format is int8 where none is named: the size of coded values depends on them.
    """
    layout = HierarchicalMemory.choose_layout(
        budget, image_shape, num_classes, number_format or "int8"
    )
    num_images = HierarchicalMemory.max_images(layout, budget, num_classes)
    each, extra = divmod(num_images, num_classes)
    counts = [each + (position < extra) for position in range(num_classes)]
    return HierarchicalMemory(layout, range(num_classes), counts, budget=budget)


def noise(
    image_shape: tuple[int, int, int], num_classes: int, num_images: int, first_class: int = 0
) -> LabelledImages:
    """Return as many images of each class, whose labels follow each other: speed is the same."""
    labels = torch.arange(first_class, first_class + num_classes).repeat_interleave(num_images)
    images = torch.empty((len(labels), *image_shape), dtype=torch.uint8)
    images.random_(0, 256, generator=make_generator(0, "images"))
    return LabelledImages(images, labels)


def readable(num_bytes: float) -> str:
    """Return a number of bytes as a person reads it."""
    return (
        f"{num_bytes / 2**20:,.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:,.1f} KiB"
    )
