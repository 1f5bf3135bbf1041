"""How like real images are those of a coded memory, JPEG and WebP at equal bytes an image?

    python experiments/reconstruction.py --data cifar10.npz --image-bytes 40,80,120 --steps 3000

For each number of bytes, about as many training images as fit --budget at that rate are put into

HMN    a memory with number_format="entropy", by a warm start of --steps steps alone. All of its
       file counts: decoder, other tiers, models, labels and header
JPEG   scans under one header, in a file that is counted likewise
WebP   lossy files, each less the 30 bytes of its headers; nothing else is counted

JPEG and WebP get the very images that the memory began with, at many qualities, JPEG with chroma in
full and at half the sides. Their PSNR at the memory's bytes an image is interpolated between the
two sizes next to it. PSNR is the mean over images of each image's own, in dB.

Written to OUT: results.json, after every measurement, table.md, a figure and memory files. The same
command goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import platform
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if __name__ == "__main__":
    # Python looks beside the script; what is run is this checkout, whatever is installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hmn_replay
from experiments.arguments import (
    add_data,
    add_settings,
    load,
    make_parser,
    parse_numbers,
    parse_settings,
)
from experiments.figures import save
from experiments.results import markdown_table
from experiments.tables.rows import number
from experiments.tables.store import Store
from hmn_replay.condensation.config import make_config
from hmn_replay.condensation.steps import RealImages, drawn_orders, warm_start_targets
from hmn_replay.data.images import LabelledImages, mean_psnr
from hmn_replay.errors import ConfigError, HMNReplayError
from hmn_replay.files import write_atomically
from hmn_replay.memory.hierarchical import HierarchicalMemory, HMNLayout
from hmn_replay.memory.jpeg import SUBSAMPLINGS
from hmn_replay.memory.learned import LearnedMemory
from hmn_replay.memory.real import JPEGMemory
from hmn_replay.runtime import resolve_device

# RIFF (12 bytes), VP8 chunk (8), frame header with size and key frame's start code (10).
WEBP_HEADERS = 30
_OF_JPEG = (1, 2, 3, 5, 7, 10, 12, 15, 20, 25, 30, 40, 50, 60, 75)
QUALITIES = {
    **{f"JPEG {subsampling}": _OF_JPEG for subsampling in SUBSAMPLINGS},
    "WebP": (0, 1, 5, 10, 15, 20, 30, 40, 50, 60, 75),
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_data(parser, "digits")
    add("--image-bytes", default="40,80,120", help="of a file, header and all, for each image")
    add("--budget", type=int, default=122_880, help="bytes of a file")
    add("--steps", type=int, default=3000, help="of the warm start")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add_settings(parser)
    add("--device", default="auto", help="cpu, cuda, ...; auto is CUDA where present")
    add("--out", type=Path, default=Path("reconstruction"), help="folder to write to")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    rates = parse_numbers("--image-bytes", args.image_bytes)
    if min(rates) < 1:
        raise ConfigError(f"--image-bytes are 1 or more; got {args.image_bytes}")
    args.device = str(resolve_device(args.device))
    make_config(**condensation(args))
    train = load(args, "train")
    names = ("data", "size", "budget", "steps", "seed", "set", "device")
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads()}
    store = Store(args.out, {name: getattr(args, name) for name in names} | machine)
    stopped = False
    try:
        for rate in rates:
            measure(train, rate, args, store)
    except KeyboardInterrupt:
        stopped = True
    store.report["rows"] = rows = make_rows(store)
    store.write()
    text = "\n".join([markdown(rows), *store.notes("codec", "rate", "quality")])
    write_atomically(args.out / "table.md", text.encode())
    draw(store, args.out / "reconstruction.png")
    print(f"\n{text}\nWritten to {args.out}")
    return store.exit_code(stopped=stopped)


def condensation(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of :func:`hmn_replay.condense`."""
    settled = {"warm_start_steps": args.steps, "outer_steps": 0, "over_budget": 0.0}
    settled |= {"number_format": "entropy", "selection": "random"}
    return parse_settings(args, settled, "a warm start of --steps")


def measure(train: LabelledImages, rate: int, args: argparse.Namespace, store: Store) -> None:
    """Make a memory of so many bytes an image, and code the images that it began with."""
    path = args.out / f"{rate}.hmn"

    def condense() -> dict[str, Any]:
        memory = hmn_replay.condense(
            train,
            args.budget,
            layout=layout_at(rate, args.budget, train),
            seed=args.seed,
            device=args.device,
            checkpoint=path.with_suffix(".checkpoint"),
            progress=sys.stderr.isatty(),
            **condensation(args),
        )
        memory.save(path)
        path.with_suffix(".checkpoint").unlink(missing_ok=True)
        decoded, _ = memory.decode(dtype=torch.uint8)
        return {
            "bytes": memory.file_bytes / memory.num_images,
            "psnr": psnr(decoded, wanted(memory)),
            "images": memory.num_images,
            "seconds": memory.report["seconds"],
        }

    def wanted(memory: LearnedMemory) -> Tensor:
        real = RealImages.of(train, memory.classes)
        return train.images[warm_start_targets(memory, drawn_orders(real, args.seed))]

    store.once("rate", {"rate": rate, "codec": "HMN", "quality": 0}, condense)
    if not store.find("rate", rate=rate, codec="HMN"):
        return
    memory = hmn_replay.load(path)
    assert isinstance(memory, LearnedMemory)
    images = wanted(memory)
    for codec, qualities in QUALITIES.items():
        for quality in qualities:
            compress = partial(webp if codec == "WebP" else partial(jpeg, codec), images, quality)
            store.once("rate", {"rate": rate, "codec": codec, "quality": quality}, compress)


def layout_at(rate: int, budget: int, train: LabelledImages) -> HMNLayout:
    """Return the coded layout with which a budget holds images of so many bytes, all counted."""
    choose, max_images = HierarchicalMemory.choose_layout, HierarchicalMemory.max_images
    layout: HMNLayout = choose(budget, train.image_shape, train.num_classes, "entropy")
    wanted = min(budget // rate, len(train))
    layouts = [dataclasses.replace(layout, image_bytes=n) for n in range(1, rate + 1)]
    return min(layouts, key=lambda one: abs(max_images(one, budget, train.num_classes) - wanted))


def jpeg(subsampling: str, images: Tensor, quality: int) -> dict[str, Any]:
    """Return the bytes of an image, and the PSNR, of scans under one header."""
    name = subsampling.removeprefix("JPEG ")
    memory = JPEGMemory(images.shape[1:], quality=quality, subsampling=name)
    memory.extend(LabelledImages(images, torch.zeros(len(images), dtype=torch.int64)))
    decoded, _ = memory.decode(dtype=torch.uint8)
    return {"bytes": memory.file_bytes / len(images), "psnr": psnr(decoded, images)}


def webp(images: Tensor, quality: int) -> dict[str, Any]:
    """Return the bytes of an image, and the PSNR, of WebP files without their headers."""
    size, decoded = 0, []
    for image in images.movedim(1, 3).numpy():
        file = io.BytesIO()
        Image.fromarray(image.repeat(3, axis=2) if image.shape[2] == 1 else image).save(
            file, "WEBP", quality=quality, method=6
        )
        size += len(file.getvalue()) - WEBP_HEADERS
        pixels = np.asarray(Image.open(file).convert("RGB"))
        decoded.append(torch.from_numpy(pixels[..., : image.shape[2]].copy()).movedim(2, 0))
    return {"bytes": size / len(images), "psnr": psnr(torch.stack(decoded), images)}


def psnr(decoded: Tensor, wanted: Tensor) -> float:
    """Return the mean PSNR of images, uint8 ``(N, C, H, W)``, in dB; 100 for one that is equal."""
    errors = ((decoded.cpu().float() - wanted.float()) / 255).square().mean(dim=(1, 2, 3))
    return mean_psnr(errors)


def make_rows(store: Store) -> list[dict[str, Any]]:
    """Return what a memory's bytes give, and what JPEG and WebP make of as many."""
    rows = []
    for found in store.find("rate", codec="HMN"):
        of_rate = store.find("rate", rate=found["rate"])
        curves = {codec: curve(of_rate, codec) for codec in QUALITIES}
        row = {name: found[name] for name in ("rate", "bytes", "images", "seconds")}
        at = {codec: interpolate(points, found["bytes"]) for codec, points in curves.items()}
        rows.append({**row, "HMN": found["psnr"], **at})
    return rows


def curve(cells: Sequence[dict[str, Any]], codec: str) -> list[tuple[float, float]]:
    """Return bytes and PSNR of a codec, in the order of bytes."""
    return sorted((cell["bytes"], cell["psnr"]) for cell in cells if cell["codec"] == codec)


def interpolate(points: Sequence[tuple[float, float]], size: float) -> float | None:
    """Return the PSNR at a size; None where it is out of the curve."""
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= size <= right:
            share = (size - left) / (right - left) if right > left else 1.0
            return low + share * (high - low)
    return None


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of the PSNR at each number of bytes."""
    head = [
        "bytes an image",
        "images",
        *(f"{codec} dB" for codec in ("HMN", *QUALITIES)),
        "seconds",
    ]
    lines = [
        [
            f"{row['bytes']:.1f}",
            f"{row['images']:,}",
            *(number(row[codec], ".2f") for codec in ("HMN", *QUALITIES)),
            f"{row['seconds']:,.0f}",
        ]
        for row in rows
    ]
    return markdown_table([head, *lines]) + "\n"


def draw(store: Store, path: Path) -> None:
    """Draw PSNR against bytes an image: the memories, and the other codecs on their images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    cells = store.find("rate")
    memories = curve(cells, "HMN")
    if memories:
        axes.plot(*zip(*memories, strict=True), marker="o", color="tab:red", label="HMN")
        # Images differ with the rate: the curves are those of the most images.
        fewest = min(cell["rate"] for cell in cells if cell["codec"] == "HMN")
        for codec in QUALITIES:
            points = curve([cell for cell in cells if cell["rate"] == fewest], codec)
            axes.plot(*zip(*points, strict=True), linestyle="--", label=codec)
        axes.set_xlim(0, 1.5 * max(size for size, _ in memories))
        axes.legend(frameon=False)
    axes.set_xlabel("bytes an image")
    axes.set_ylabel("PSNR (dB)")
    axes.grid(alpha=0.3)
    save(figure, path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (HMNReplayError, OSError) as error:
        sys.exit(f"reconstruction.py: error: {error}")
