"""The figures that `split_cifar100.py` makes of its results."""

from __future__ import annotations

import io
import statistics
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments.results import called_new, deviation, finished
from hmn_replay.data.lookup import first_in_turn
from hmn_replay.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Strategies keep their colours whichever of them are drawn.
COLOURS = {
    "hmn": "tab:red",
    "fred": "magenta",
    "jpeg": "tab:orange",
    "lossless": "tab:brown",
    "subsampled": "gold",
    "raw": "tab:blue",
    "herding": "tab:cyan",
    "gdumb": "tab:green",
    "derpp": "tab:purple",
    "er_ace": "tab:pink",
    "avalanche-replay": "tab:olive",
    "naive": "tab:gray",
    "joint": "black",
}
SAMPLES = 20


def draw_accuracy(report: dict[str, Any], path: Path) -> None:
    """Draw the accuracy over the classes seen so far, with a band of one deviation over seeds."""
    from matplotlib.figure import Figure

    seen = list(accumulate(report["configuration"]["classes_per_experience"]))
    experiences = len(seen)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, runs in finished(report["results"]).items():
        curves = [run["accuracy_seen"] for run in runs]
        if name == "joint":
            curves = [[curve[-1]] * experiences for curve in curves]
        columns = [[100 * curve[i] for curve in curves] for i in range(experiences)]
        means = [statistics.fmean(column) for column in columns]
        bands = [deviation(column) for column in columns]
        axes.plot(
            seen,
            means,
            label=f"{name} ({means[-1]:.1f} %)",
            color=COLOURS.get(name),
            linestyle="--" if name == "joint" else "-",
            marker="" if name == "joint" else "o",
            markersize=3,
        )
        axes.fill_between(
            seen,
            [mean - band for mean, band in zip(means, bands, strict=True)],
            [mean + band for mean, band in zip(means, bands, strict=True)],
            color=COLOURS.get(name),
            alpha=0.2,
            linewidth=0,
        )
    axes.set_xticks(seen)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("classes seen")
    axes.set_ylabel("test accuracy over the classes seen (%)")
    axes.set_title(
        f"{Path(report['configuration']['data']).name}, {experiences} experiences, memories of "
        f"{report['configuration']['budget']:,} bytes"
    )
    axes.grid(alpha=0.3)
    if axes.lines:
        figure.legend(loc="outside right upper", frameon=False, title="in the end")
    save(figure, path)


def save_samples(images: Tensor, labels: Tensor, path: Path) -> None:
    """Write a strip of images to a PNG file, no class twice before all are there once.

    Args:
        images: uint8 ``(N, C, H, W)``, N 1 or more.
        labels: int64 ``(N,)``.
        path: The file.
    """
    from PIL import Image

    # The first image of every class, then the second of every class, and so on.
    images, labels = images.cpu(), labels.cpu()
    chosen = first_in_turn(labels, torch.arange(len(labels)))[:SAMPLES]
    chosen = chosen[torch.argsort(labels[chosen], stable=True)]
    strip = torch.cat(list(images[chosen].movedim(1, -1)), dim=1).numpy()
    file = io.BytesIO()
    Image.fromarray(strip[..., 0] if strip.shape[-1] == 1 else strip).save(file, "PNG")
    write_atomically(path, file.getvalue())


def draw_memories(report: dict[str, Any], folder: Path, path: Path) -> None:
    """Draw the strip of each strategy that has one, of its first finished seed, one above another.

    Args:
        report: What results.json holds.
        folder: Where the strips of :func:`save_samples` are: ``memory-STRATEGY-seedSEED.png``.
        path: The file to write; none where there is no strip.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from PIL import Image

    strips = {}
    for name in finished(report["results"]):
        for seed, run in report["results"][name].items():
            file = folder / f"memory-{name}-seed{seed}.png"
            if "error" not in run and name not in strips and file.exists():
                with Image.open(file) as picture:
                    strips[name] = np.asarray(picture), run
    if not strips:
        return
    figure = Figure(figsize=(10, 0.9 * len(strips) + 0.2), dpi=150, layout="constrained")
    rows = figure.subplots(len(strips), squeeze=False)[:, 0]
    columns = max(strip.shape[1] / strip.shape[0] for strip, _ in strips.values())
    for axes, (name, (strip, run)) in zip(rows, strips.items(), strict=True):
        height, width = strip.shape[:2]
        axes.imshow(strip, interpolation="nearest", cmap="gray", vmin=0, vmax=255)
        axes.set_xlim(-0.5, columns * height - 0.5)
        # Hairlines between the images, which otherwise run into each other.
        axes.vlines(np.arange(height, width, height) - 0.5, -0.5, height - 0.5, "white", lw=1)
        axes.set_title(
            f"{name}: {run['memory_images']:,} images in {run['memory_bytes']:,} bytes",
            fontsize=9,
            loc="left",
        )
        axes.axis("off")
    save(figure, path)


def draw_shortcut(report: dict[str, Any], path: Path) -> None:
    """Draw how many images of old classes each strategy calls new: clean, coded and decoded ones.

    Nothing is written where no run has measured it.
    """
    from matplotlib.figure import Figure

    reports = {
        name: [run["shortcut"] for run in runs if run.get("shortcut")]
        for name, runs in finished(report["results"]).items()
    }
    reports = {name: found for name, found in reports.items() if found}
    if not reports:
        return
    kinds = {
        "clean": ("test images as they are", "tab:blue"),
        "codec": ("test images through the memory's codec", "tab:orange"),
        "decoded": ("the memory's own images", "tab:gray"),
    }
    figure = Figure(figsize=(8, 0.6 * len(reports) + 1.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for offset, (images, (label, colour)) in enumerate(kinds.items()):
        shares = [called_new(found, images) for found in reports.values()]
        rows = [row for row, share in enumerate(shares) if share is not None]
        axes.barh(
            [row + 0.27 * (offset - 1) for row in rows],
            [100 * share for share in shares if share is not None],
            height=0.25,
            label=label,
            color=colour,
        )
    balanced = next(iter(reports.values()))[0]["balanced_share"]
    axes.axvline(100 * balanced, color="black", linestyle="--", lw=1, label="balanced share")
    axes.set_yticks(range(len(reports)), list(reports))
    axes.invert_yaxis()
    axes.set_xlabel("images of old classes that are called one of the newest (%)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the file's suffix: ``.png``, ``.pdf``, ``.svg``."""
    file = io.BytesIO()
    figure.savefig(file, format=path.suffix[1:])
    write_atomically(path, file.getvalue())
