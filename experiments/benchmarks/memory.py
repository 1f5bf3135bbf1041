"""The peak memory of a condensation of many classes of large images, the real ones included.

Images are noise, and the steps are few but of full size: peak memory does not depend on how many
there are. What it should grow with, besides the batches, is printed first: the real images as they
are held, of 8 bits, and the memory's values, of which an optimizer has three more copies. On a CPU
the peak is that of the whole process, Python and torch included.
"""

from __future__ import annotations

import argparse
from typing import Any

import hmn_replay
from experiments.arguments import parse_settings
from experiments.benchmarks.common import (
    add_condense_arguments,
    noise,
    positive,
    readable,
)
from hmn_replay.runtime import peak_memory_bytes, resolve_device

SMOKE = {
    "classes": 2,
    "real_images": 4,
    "side": 8,
    "budget": "4 KiB",
    "set": [
        *("warm_start_steps=1", "outer_steps=1", "inner_steps=1", "network_width=2"),
        *("trained_networks=0", "network_images=4"),
        *("pruning_passes=4", "pruning_width=2", "beta_grid=0.5"),
    ],
}

FEW = (
    *("warm_start_steps=2", "outer_steps=1", "inner_steps=2"),
    *("trained_networks=0", "pruning_passes=1", "beta_grid=0.5"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--classes", type=positive, default=1000, help="of the memory")
    parser.add_argument("--real-images", type=positive, default=12, help="of each class")
    parser.add_argument("--side", type=positive, default=224, help="of an image, in pixels")
    parser.add_argument("--budget", default="50 MB", help="bytes of the memory's file")
    add_condense_arguments(parser, *FEW)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = resolve_device(args.device)
    data = noise((3, args.side, args.side), args.classes, args.real_images)
    before = peak_memory_bytes(device)
    print(f"{len(data):,} real images: {readable(data.images.numel())}", flush=True)
    memory = hmn_replay.condense(
        data,
        args.budget,
        effort=args.effort,
        device=device,
        progress=not args.json,
        **parse_settings(args),
    )
    values_bytes = sum(p.numel() * p.element_size() for p in memory.parameters())
    print(f"{memory.num_images:,} images in the memory: values of {readable(values_bytes)}")
    print(f"{'':12s}{'seconds':>10s}{'peak memory':>14s}")
    print(f"{'before':12s}{'':10s}{readable(before):>14s}")
    report: Any = memory.report
    for name, phase in report["phases"].items():
        peak = readable(phase["peak_memory_bytes"])
        print(f"{name.replace('_', ' '):12s}{phase['seconds']:10.1f}{peak:>14s}")
    return {
        "num_images": memory.num_images,
        "real_bytes": data.images.numel(),
        "values_bytes": values_bytes,
        "peak_memory_before_bytes": before,
        "phases": report["phases"],
    }
