"""Peak memory of condensing, for every memory kind and objective, as the number of images grows.

Images are noise: what is measured does not depend on them. Each cell is a process of its own. After
a first condensation of next to nothing, which loads what torch loads on first use, its peak counts
from what is in use: on a GPU, of what CUDA allocates; else, on Linux, of the resident set.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import torch

import hmn_replay
from experiments.arguments import parse_names
from experiments.benchmarks.common import in_fresh_process, noise
from experiments.figures import save
from experiments.results import reset_peak_memory
from experiments.tables import published
from experiments.tables.containers import SYSTEMS
from experiments.tables.rows import NOTHING, Row, budgets, number, sections
from experiments.tables.settings import Settings
from experiments.tables.store import Store
from experiments.tables.study import KINDS, fit
from hmn_replay.objectives import OBJECTIVES
from hmn_replay.runtime import peak_memory_bytes

DEFAULT_ROWS = "all"
CLASSES, SHAPE = 10, (3, 32, 32)
REAL_IMAGES = 64  # of each class: as many as a step draws
CIFAR_IMAGES = 5000  # of each class: layouts are chosen for CIFAR-10
TINY = dict.fromkeys(("real_batch", "decoded_batch", "network_width", "network_batch"), 2)
STEPS = {"warm_start_steps": 2, "outer_steps": 1, "inner_steps": 2, "over_budget": 0.0}
STEPS |= {"trained_networks": 0}
STEPS |= {"num_experts": 1, "expert_epochs": 1, "max_start_epoch": 0}
COLOURS = ("red", "blue", "green", "orange", "purple", "brown")
MARKERS = "osD^vPX*"


def run(args: argparse.Namespace, settings: Settings, store: Store) -> None:
    """Measure every memory kind with every objective, each in a fresh process."""
    for ipc in settings.ipc:
        for name, objective in asked(args):
            identity = {"system": name, "objective": objective, "ipc": ipc}
            measure = functools.partial(measure_peak, settings, name, objective, ipc)
            store.once("memory", identity, functools.partial(in_fresh_process, measure))


def asked(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return every memory kind with every objective."""
    names = parse_names("--rows", args.rows or DEFAULT_ROWS, KINDS)
    objectives = parse_names("--objectives", args.objectives, OBJECTIVES)
    return [(name, objective) for name in names for objective in objectives]


def measure_peak(settings: Settings, system: str, objective: str, ipc: int) -> dict[str, Any]:
    """Take a few steps of a condensation, and return the most memory that they used."""
    device = torch.device(settings.device)
    by_steps = dataclasses.replace(settings, seconds=None)
    options = {**by_steps.condensation(system), **STEPS, "objective": objective, "device": device}
    layout, budget = fit(system, ipc, SHAPE, CLASSES, settings.number_format, CIFAR_IMAGES)
    hmn_replay.condense(noise((3, 8, 8), CLASSES, 2), 4096, kind="pixels", **{**options, **TINY})
    # A memory has no more images of a class than there are real ones.
    held = -(-KINDS[system].max_images(layout, budget, CLASSES) // CLASSES)
    images = noise(SHAPE, CLASSES, max(REAL_IMAGES, held))
    reset_peak_memory(device)
    before = peak_memory_bytes(device)
    memory = hmn_replay.condense(images, budget, kind=system, layout=layout, **options)
    return {
        # Linux counts resident pages in batches, and may be a few behind.
        "peak_bytes": max(0, peak_memory_bytes(device) - before),
        "images": memory.num_images,
        "bytes": memory.file_bytes,
        "values": memory.num_floats,
    }


def make_rows(args: argparse.Namespace, settings: Settings, store: Store) -> list[Row]:
    """Return a row for every IPC, memory kind and objective that a run has asked for."""
    ran = store.seen("memory", "system", "objective")
    rows = []
    for ipc in budgets(settings, store):
        for name, objective in dict.fromkeys([*asked(args), *ran]):
            identity = {"system": name, "objective": objective, "ipc": ipc}
            cell = next(iter(store.find("memory", **identity)), {})
            published_here = published.MEMORY if objective == "gradient" else {}
            rows.append(
                {
                    **identity,
                    "label": f"{SYSTEMS[name].label}, {objective}",
                    "paper": published_here.get(name, {}).get(ipc),
                    **{key: cell.get(key) for key in ("peak_bytes", "images", "bytes", "values")},
                    "errors": store.errors(**identity),
                }
            )
    return rows


def markdown(rows: list[Row]) -> str:
    """Return a table for each IPC."""

    def line(row: Row) -> list[str]:
        paper, peak = row["paper"], row["peak_bytes"]
        return [
            SYSTEMS[row["system"]].label,
            row["objective"],
            paper if isinstance(paper, str) else number(paper),
            NOTHING if peak is None else number(peak / 1e6),
            *(number(row[name]) for name in ("images", "bytes", "values")),
        ]

    head = ["memory", "objective", "paper MB", "ours MB", "images", "bytes", "values"]
    return sections(rows, head, line)


def draw(rows: list[Row], folder: Path) -> None:
    """Draw peak memory against the number of images, a line for a memory kind and an objective."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, colour in zip(KINDS, itertools.cycle(COLOURS), strict=False):
        for objective, marker in zip(OBJECTIVES, MARKERS, strict=False):
            points = [
                (row["images"], row["peak_bytes"] / 1e6)
                for row in rows
                if (row["system"], row["objective"]) == (name, objective) and row["peak_bytes"]
            ]
            if points:
                label = f"{SYSTEMS[name].label}, {objective}"
                axes.loglog(
                    *zip(*sorted(points), strict=True),
                    color=f"tab:{colour}",
                    marker=marker,
                    markersize=4,
                    label=label,
                )
    axes.set_xlabel("images held")
    axes.set_ylabel("peak memory of condensing (MB)")
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        figure.legend(loc="outside right upper", fontsize=7)
    save(figure, folder / "memory.png")
