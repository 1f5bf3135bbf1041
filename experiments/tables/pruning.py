"""Double-ended pruning: accuracy against the share of images pruned, and against beta.

A memory is condensed once for each rate, into a budget of just so many more images, and its images
are scored once; it is then pruned to one and the same budget by every beta.
"""

from __future__ import annotations

import argparse
import functools
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import hmn_replay
from experiments.arguments import parse_numbers
from experiments.figures import save
from experiments.results import deviation, percent
from experiments.tables.rows import (
    Row,
    accuracies,
    budgets,
    memories,
    number,
    sections,
)
from experiments.tables.settings import Settings
from experiments.tables.store import Store
from experiments.tables.study import (
    Study,
    condense,
    described,
    file_budget,
    finished,
    load_study,
    train_once,
    training,
)
from hmn_replay.condensation.pruning import MarginRecorder, double_ended_prune
from hmn_replay.errors import ConfigError
from hmn_replay.files import write_atomically
from hmn_replay.memory.base import Memory
from hmn_replay.memory.hierarchical import HierarchicalMemory
from hmn_replay.memory.learned import LearnedMemory
from hmn_replay.runtime import derive_seed
from hmn_replay.training.train import train_network

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEFAULT_ROWS = "0,10,20,30,40,50"


def run(args: argparse.Namespace, settings: Settings, store: Store) -> None:
    """Condense for every rate, prune by every beta, and learn from what stays."""
    rates, betas = parse_numbers("--rows", args.rows or DEFAULT_ROWS), parse_betas(args.betas)
    if not all(0 <= rate <= 90 for rate in rates):
        raise ConfigError(f"rates are percents of the images, 0 to 90; got {args.rows}")
    study = load_study(args, args.data, settings, store)
    for ipc in settings.ipc:
        for rate in rates:
            for seed in settings.seeds:
                identity = {"rate": rate, "ipc": ipc, "seed": seed}
                path = condense_over_budget(study, identity)
                for beta in betas if rate else (None,):
                    load = functools.partial(pruned, beta=beta)
                    train_once(study, {**identity, "beta": beta}, path, load)


def parse_betas(text: str) -> tuple[float, ...]:
    """Read shares of the hardest images among the pruned."""
    try:
        betas = tuple(float(beta) for beta in text.split(","))
    except ValueError:
        raise ConfigError(f"--betas are numbers, as 0,0.5,1; got {text!r}") from None
    if not all(0 <= beta <= 1 for beta in betas):
        raise ConfigError(f"--betas are in [0, 1]; got {text}")
    return betas


def condense_over_budget(study: Study, identity: dict[str, Any]) -> Path | None:
    """Condense with more images than fit, and score them by AUM, unless that was done.

    Returns:
        The memory's file, beside which an ``.npz`` file has the scores, and how many images each
        class has to drop; None where there could be none.
    """
    path, ipc, seed = study.path(identity), identity["ipc"], identity["seed"]

    def compute() -> dict[str, Any]:
        layout, budget = study.fit("hmn", ipc)
        num_classes = study.train.num_classes
        num_kept = HierarchicalMemory.max_images(layout, budget, num_classes)
        share = identity["rate"] / 100
        num_drop = math.ceil(share / (1 - share) * num_kept / num_classes)
        larger = file_budget("hmn", layout, num_classes, num_kept + num_drop * num_classes)
        memory = condense(study, "hmn", layout, larger, path, seed=seed, over_budget=0.0)
        scores = score_images(study, memory, ipc, seed) if num_drop else torch.zeros(num_kept)
        file = io.BytesIO()
        np.savez(file, scores=scores.numpy(), num_drop=num_drop)
        write_atomically(path.with_suffix(".npz"), file.getvalue())
        return described(memory) | {"kept": num_kept}

    return finished(study, compute, path, identity)


def score_images(study: Study, memory: LearnedMemory, ipc: int, seed: int) -> Tensor:
    """Return the AUM of every image, from one training on all of them."""
    images, _ = memory.decode()
    recorder = MarginRecorder(images, memory.class_index)
    train_network(
        images,
        memory.class_index,
        memory.num_classes,
        config=training(study, ipc),
        seed=derive_seed(seed, "AUM"),
        device=study.settings.device,
        on_epoch=recorder,
    )
    return recorder.aum()


def pruned(path: Path, beta: float | None) -> Memory:
    """Return a memory without the images that a beta drops; with all of them for None."""
    memory = hmn_replay.load(path)
    if beta is not None:
        with np.load(path.with_suffix(".npz")) as file:
            scores, num_drop = torch.from_numpy(file["scores"]), int(file["num_drop"])
        memory.keep(double_ended_prune(scores, memory.class_index, num_drop, beta))
    return memory


def make_rows(args: argparse.Namespace, settings: Settings, store: Store) -> list[Row]:
    """Return a row for every IPC and rate, run or not, with accuracies for every beta."""
    asked = parse_numbers("--rows", args.rows or DEFAULT_ROWS)
    rates = sorted({*asked, *(rate for (rate,) in store.seen("memory", "rate"))})
    ran = {beta for (beta,) in store.seen("training", "beta") if beta is not None}
    betas = sorted({*parse_betas(args.betas), *ran})
    rows = []
    for ipc in budgets(settings, store):
        for rate in rates:
            row = memories(store, rate=rate, ipc=ipc)
            row["label"] = f"{rate} %"
            row["kept"] = next((c["kept"] for c in store.find("memory", rate=rate, ipc=ipc)), None)
            # Where nothing is pruned, one beta is as good as another.
            row["betas"] = {
                str(beta): accuracies(store, rate=rate, ipc=ipc, beta=beta if rate else None)
                for beta in betas
            }
            rows.append(row)
    return rows


def markdown(rows: list[Row]) -> str:
    """Return a table for each IPC."""

    def line(row: Row) -> list[str]:
        counts = [number(row[name]) for name in ("images", "kept", "seconds")]
        return [row["label"], *counts, *map(percent, row["betas"].values())]

    head = ["pruned", "images", "of which stay", "seconds"]
    head += [f"beta {float(beta):g}, %" for beta in rows[0]["betas"]]
    return sections(rows, head, line)


def draw(rows: list[Row], folder: Path) -> None:
    """Draw accuracy against rate, a line a beta, and against beta, a line a rate, for each IPC."""
    from matplotlib.figure import Figure

    for ipc in dict.fromkeys(row["ipc"] for row in rows):
        group = [row for row in rows if row["ipc"] == ipc]
        figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for beta in group[0]["betas"]:
            plot(left, [(row["rate"], row["betas"][beta]) for row in group], f"beta {beta}")
        for row in group:
            plot(right, [(float(b), found) for b, found in row["betas"].items()], row["label"])
        left.set_xlabel("images pruned (%)")
        left.set_ylabel("test accuracy (%)")
        right.set_xlabel("beta: share of hard images among the pruned")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(fontsize=8)
        figure.suptitle(f"{ipc} IPC")
        save(figure, folder / f"pruning-ipc{ipc}.png")


def plot(axes: Axes, points: Sequence[tuple[float, list[float]]], label: str) -> None:
    """Draw a line through the mean accuracies, with a band of one deviation; none for no points."""
    points = [(x, [100 * share for share in shares]) for x, shares in points if shares]
    if not points:
        return
    xs = [x for x, _ in points]
    means = [statistics.fmean(values) for _, values in points]
    bands = [deviation(values) for _, values in points]
    (line,) = axes.plot(xs, means, marker="o", markersize=3, label=label)
    axes.fill_between(
        xs,
        [mean - band for mean, band in zip(means, bands, strict=True)],
        [mean + band for mean, band in zip(means, bands, strict=True)],
        color=line.get_color(),
        alpha=0.15,
        linewidth=0,
    )
