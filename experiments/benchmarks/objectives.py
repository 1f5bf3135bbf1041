"""One call of each objective, in time and in peak memory.

Every objective gets the same ConvNet-3 and a batch of decoded images, and all but mtt as many real
ones; mtt takes --student-steps steps, each on the batch. `forward` is a forward pass of one batch
without gradients, `training` the gradient of its loss to the weights. Images are noise: costs do
not depend on them.

All take turns, and medians are compared. Peak memory is what a fresh process takes for one call
beyond what it has when network and images are there and a batch of two has loaded what torch loads
on first use. On a GPU, that of tensors alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hmn_replay
from experiments.benchmarks.common import in_fresh_process, interleave, positive
from experiments.results import reset_peak_memory
from hmn_replay.objectives import OBJECTIVES, get_objective
from hmn_replay.runtime import make_generator, peak_memory_bytes, resolve_device

SMOKE = {"width": 4, "batch": 2, "side": 8, "student_steps": 2, "rounds": 1}

NUM_CLASSES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=positive, default=128, help="channels of ConvNet's blocks")
    parser.add_argument("--batch", type=positive, default=64, help="images of a batch")
    parser.add_argument("--side", type=positive, default=32, help="of an image, in pixels")
    parser.add_argument("--student-steps", type=positive, default=10, help="of mtt")
    parser.add_argument("--rounds", type=positive, default=5, help="how often each is timed")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = resolve_device(args.device)
    sizes = (args.width, args.batch, args.side, args.student_steps)
    seconds = interleave(make_tasks(*sizes, device), args.rounds, device)
    results = {}
    print(f"{'':14s}{'forward passes':>16s}{'seconds':>10s}{'peak MB':>10s}")
    for name, taken in seconds.items():
        peak = in_fresh_process(peak_memory, name, *sizes, str(device), torch.get_num_threads())
        passes = taken / seconds["forward"]
        results[name] = {"seconds": taken, "forward_passes": passes, "peak_memory_bytes": peak}
        print(f"{name:14s}{passes:16.1f}{taken:10.3f}{peak / 1e6:10.0f}")
    return {"objectives": results}


def make_tasks(
    width: int, batch: int, side: int, student_steps: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Return what is measured, by name; each task makes one call."""
    network = hmn_replay.build_network("convnet", (3, side, side), NUM_CLASSES, width=width)
    network.to(device)
    generator = make_generator(0, "objectives")
    real, decoded = torch.rand(2, batch, 3, side, side, generator=generator).to(device)
    labels_on_cpu = torch.arange(batch) % NUM_CLASSES
    labels = labels_on_cpu.to(device)
    decoded.requires_grad_()
    rate = torch.tensor(0.01, device=device, requires_grad=True)
    start = {name: value.detach() for name, value in network.named_parameters()}
    target = {name: value + 0.01 for name, value in start.items()}
    batches = [torch.arange(batch, device=device)] * student_steps

    def forward() -> Tensor:
        with torch.no_grad():
            logits: Tensor = network(decoded)
        return logits

    def training() -> object:
        loss = F.cross_entropy(network(decoded.detach()), labels)
        return torch.autograd.grad(loss, list(network.parameters()))

    def objective(name: str) -> Callable[[], object]:
        function = get_objective(name)
        if function.compares_trainings:
            return lambda: torch.autograd.grad(
                hmn_replay.trajectory_matching(
                    network, start, target, decoded, labels, batches, rate
                ),
                [decoded, rate],
            )
        own = labels_on_cpu if function.several_classes else labels
        return lambda: torch.autograd.grad(function(network, real, own, decoded, own), decoded)

    named: dict[str, Callable[[], object]] = {name: objective(name) for name in OBJECTIVES}
    return {"forward": forward, "training": training, **named}


def peak_memory(
    name: str, width: int, batch: int, side: int, student_steps: int, device: str, threads: int
) -> int:
    """Return the bytes that a task takes at most, beyond what is there before it."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    make_tasks(width, 2, side, 1, where)[name]()
    task = make_tasks(width, batch, side, student_steps, where)[name]
    reset_peak_memory(where)
    before = peak_memory_bytes(where)
    task()
    return peak_memory_bytes(where) - before
