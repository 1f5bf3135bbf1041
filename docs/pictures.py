"""Draw what a memory holds in the bytes of one raw image, 3 KiB, and what JPEG holds in them.

    hmn-replay condense --data cifar10.npz --budget 120KiB --out cifar10.hmn
    python docs/pictures.py cifar10.hmn --data cifar10.npz --out docs/images/memory.png

Each memory has the same budget of bytes; shown is the same share of the images of each, its
header and decoder included in what an image takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import hmn_replay
from hmn_replay.cli import HelpFormatter

SHOWN_BYTES, COLUMNS, QUALITY = 3 * 1024, 16, 20
SCALE, TITLE_HEIGHT = 2, 40


def mosaic(images: Tensor) -> Tensor:
    """Tile images (N, C, H, W) in rows of COLUMNS on white: (H', W', C)."""
    rows = -(-len(images) // COLUMNS)
    channels, height, width = images.shape[1:]
    tiles = torch.ones(rows * COLUMNS, channels, height + 2, width + 2)
    tiles[: len(images), :, 1:-1, 1:-1] = images
    tiles = tiles.view(rows, COLUMNS, channels, height + 2, width + 2)
    return tiles.permute(0, 3, 1, 4, 2).reshape(rows * (height + 2), -1, channels)


def first_of_each_class(memory: hmn_replay.evaluation.Decodable, count: int) -> Tensor:
    """Decode a memory and return so many of its images, of every class in turn."""
    images, labels = memory.decode()
    turn = torch.empty_like(labels)
    for label in labels.unique():
        turn[labels == label] = torch.arange(int((labels == label).sum()))
    order = sorted(range(len(labels)), key=lambda i: (int(turn[i]), int(labels[i])))
    return images[order[:count]]


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("memory", type=Path, help="the memory file")
    parser.add_argument("--data", required=True, help="the data set that it was made from")
    parser.add_argument("--out", type=Path, default=Path("memory.png"), help="the figure to write")
    args = parser.parse_args()

    hmn = hmn_replay.load(args.memory)
    data = hmn_replay.load_dataset(args.data, "train")
    memories = {
        "raw pixels": hmn_replay.raw_images(data, hmn.budget_bytes),
        f"JPEG at quality {QUALITY}": hmn_replay.jpeg_images(
            data, hmn.budget_bytes, quality=QUALITY
        ),
        "a hierarchical memory": hmn,
    }
    share = SHOWN_BYTES / hmn.budget_bytes
    counts = {name: round(memory.num_images * share) for name, memory in memories.items()}
    mosaics = {
        name: mosaic(first_of_each_class(memory, counts[name])) for name, memory in memories.items()
    }
    parts = []
    for name, image in mosaics.items():
        # 64 steps of brightness: the eye sees no difference, and the file is a third smaller.
        image = image.mul(63).round().mul(255 / 63).round().to(torch.uint8)
        picture = Image.fromarray(image.numpy())
        picture = picture.resize((SCALE * picture.width, SCALE * picture.height), Image.NEAREST)
        plural = "s" if counts[name] > 1 else ""
        parts.append((f"3 KiB of {name}: {counts[name]} image{plural}", picture))
    height = sum(picture.height + TITLE_HEIGHT for _, picture in parts)
    figure = Image.new("RGB", (parts[0][1].width, height), "white")
    draw, top = ImageDraw.Draw(figure), 0
    for title, picture in parts:
        draw.text((2, top + 8), title, "black", ImageFont.load_default(size=22))
        figure.paste(picture, (0, top + TITLE_HEIGHT))
        top += picture.height + TITLE_HEIGHT
    figure.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
