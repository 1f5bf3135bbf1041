"""Decoding a memory, and training through its decoder: images a second.

`decode` gives all images of a memory as float32 pixels; `train` decodes a batch with its graph and
takes the gradient of every learned value, which is what the warm start does at every step.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from experiments.benchmarks.common import (
    add_memory_arguments,
    interleave,
    positive,
    random_memory,
    readable,
)
from hmn_replay.runtime import PRECISIONS, autocast, make_generator, resolve_device

SMOKE = {"budget": "8 KiB", "classes": 2, "side": 8, "batch": 4, "rounds": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", default="120 KiB", help="bytes of the memory's file")
    add_memory_arguments(parser)
    parser.add_argument("--batch", type=positive, default=256, help="images of a training step")
    parser.add_argument(
        "--precision", default="float32", choices=PRECISIONS, help="of the training step"
    )
    parser.add_argument("--rounds", type=positive, default=20, help="how often each is timed")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = resolve_device(args.device)
    shape = (3, args.side, args.side)
    memory = random_memory(args.budget, shape, args.classes, args.number_format).to(device)
    order = torch.randperm(memory.num_images, generator=make_generator(0, "batch"))
    indices = order[: args.batch].to(device)

    def train() -> None:
        with autocast(device, args.precision):
            images = memory(indices)
        memory.zero_grad()
        torch.autograd.backward(images.float().square().mean())

    seconds = interleave({"decode": memory.decode, "train": train}, args.rounds, device)
    results = {
        "num_images": memory.num_images,
        "file_bytes": memory.file_bytes,
        "decode_seconds": seconds["decode"],
        "decode_images_per_second": memory.num_images / seconds["decode"],
        "train_images": len(indices),
        "train_seconds": seconds["train"],
        "train_images_per_second": len(indices) / seconds["train"],
    }
    print(
        f"{memory.num_images} images of 3 x {args.side} x {args.side} in "
        f"{readable(memory.file_bytes)}, {args.number_format}; medians of {args.rounds}"
    )
    for name, count in (("decode", memory.num_images), ("train", len(indices))):
        print(
            f"{name:8s}{results[f'{name}_images_per_second']:12,.0f} images/s"
            f"{1000 * seconds[name]:12.2f} ms for {count}"
        )
    return results
