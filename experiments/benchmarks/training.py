"""A training step of a ConvNet: compiled, against the plain eager step of the same precision.

A step draws, augments and mixes a batch, takes the gradient of its loss and updates the network, as
hmn_replay.train_network does; both ways differ in the gradient alone. Rounds of a few steps take
turns, and medians are compared: ratio is eager seconds over compiled ones.

first_compile_seconds is what the first compiled step takes where nothing is on disk, and
cached_compile_seconds what it takes in a new process that finds there what torch.compile keeps. The
folder is deleted afterwards.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import hmn_replay
from experiments.benchmarks.common import in_fresh_process, interleave, now, positive
from hmn_replay.runtime import PRECISIONS, make_generator, resolve_device, resolve_precision
from hmn_replay.training.train import CompiledLoss, TrainingConfig, add_gradients, draw_batch

SMOKE = {"width": 4, "batch": 4, "side": 8, "rounds": 1, "steps": 1, "backend": "aot_eager"}

NUM_CLASSES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=positive, default=64, help="channels of ConvNet's blocks")
    parser.add_argument("--batch", type=positive, default=64, help="images of a step")
    parser.add_argument("--side", type=positive, default=32, help="of an image, in pixels")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS, help="of both ways")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--rounds", type=positive, default=15, help="how often each is timed")
    parser.add_argument("--steps", type=positive, default=5, help="of a round")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = resolve_device(args.device)
    precision = resolve_precision(args.precision, device)
    step = (args.width, args.batch, args.side, precision, str(device), args.backend)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        first, _ = in_fresh_process(compile_and_time, folder, threads, 0, 1, *step)
        cached, seconds = in_fresh_process(
            compile_and_time, folder, threads, args.rounds, args.steps, *step
        )
    results = {
        "precision": precision,
        "eager_seconds": seconds["eager"],
        "compiled_seconds": seconds["compiled"],
        "ratio": seconds["eager"] / seconds["compiled"],
        "eager_images_per_second": args.batch / seconds["eager"],
        "compiled_images_per_second": args.batch / seconds["compiled"],
        "first_compile_seconds": first,
        "cached_compile_seconds": cached,
    }
    print(
        f"ConvNet of width {args.width}, {args.batch} images of 3 x {args.side} x {args.side} in "
        f"{precision}; medians of {args.rounds} rounds of {args.steps} steps"
    )
    for name in seconds:
        print(
            f"{name:10s}{1000 * seconds[name]:10.2f} ms a step"
            f"{results[f'{name}_images_per_second']:12,.0f} images/s"
        )
    print(
        f"compiled, {results['ratio']:.2f} times as fast; compiling took "
        f"{first:.1f} s, and {cached:.1f} s from disk"
    )
    return results


def compile_and_time(
    folder: str, threads: int, rounds: int, steps: int, *step: Any
) -> tuple[float, dict[str, float]]:
    """Time the first compiled step and later ones, in a process of its own.

    Args:
        folder: Where torch.compile keeps what it makes.
        threads: Threads of torch.
        rounds: How often both ways are timed; 0 for not at all.
        steps: Steps of a round.
        *step: Arguments of :func:`make_step` but for ``is_compiled``.

    Returns:
        The seconds of the first compiled step; and by name, those of a later one of either way.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    torch.set_num_threads(threads)
    device = torch.device(step[4])
    tasks = {
        name: make_step(*step, is_compiled=name == "compiled") for name in ("eager", "compiled")
    }
    started = now(device)
    tasks["compiled"]()
    first = now(device) - started
    if not rounds:
        return first, {}

    def repeat(task: Callable[[], None]) -> None:
        for _ in range(steps):
            task()

    repeated = {name: partial(repeat, task) for name, task in tasks.items()}
    medians = interleave(repeated, rounds, device)
    return first, {name: median / steps for name, median in medians.items()}


def make_step(
    width: int,
    batch: int,
    side: int,
    precision: str,
    device: str,
    backend: str,
    *,
    is_compiled: bool,
) -> Callable[[], None]:
    """Return a function that takes one training step, on random images."""
    config = TrainingConfig()
    shape = (3, side, side)
    network = hmn_replay.build_network("convnet", shape, NUM_CLASSES, width=width).to(device)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    generator = make_generator(0, "batch")
    images = torch.rand(batch, *shape, generator=generator).to(device)
    labels = torch.randint(NUM_CLASSES, (batch,), generator=generator).to(device)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    compiled = CompiledLoss(precision, backend) if is_compiled else None

    def step() -> None:
        drawn = draw_batch(
            images,
            labels,
            mean,
            std,
            generator,
            augmentations=config.augmentations,
            cutmix_probability=config.cutmix_probability,
        )
        optimizer.zero_grad()
        add_gradients(network, *drawn, precision=precision, compiled=compiled)
        optimizer.step()

    return step
