"""A training step of Avalanche with HMNReplay, with Avalanche's own ReplayPlugin, and with none.

Both plugins replay as many images beside as many current ones; without one, a step has the current
ones alone. The previous network is not distilled, which takes another forward pass. All three train
on the same data and take turns, an experience at a time; loading and replay are counted, what comes
between experiences is not: see `extend`. Images are noise, and the memory is condensed once,
shortly (--set): a step's speed depends on neither.
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.core import SupervisedPlugin
from avalanche.logging import BaseLogger
from avalanche.training.plugins.evaluation import EvaluationPlugin
from avalanche.training.plugins.replay import ReplayPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import TensorDataset

import hmn_replay
from experiments.arguments import add_settings, parse_settings
from experiments.benchmarks.common import now, positive
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import ConfigError
from hmn_replay.memory import LearnedMemory, Memory
from hmn_replay.runtime import make_generator, resolve_device

SMOKE = {
    "classes": 2,
    "images": 12,
    "side": 8,
    "budget": "6000",
    "batch_size": 8,
    "batch_size_mem": 4,
    "rounds": 1,
    "width": 4,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--classes", type=positive, default=10, help="of each experience")
    parser.add_argument("--images", type=positive, default=60, help="of each class")
    parser.add_argument("--side", type=positive, default=32, help="of an image, in pixels")
    parser.add_argument("--budget", default="300 KiB", help="bytes of the memory")
    parser.add_argument(
        "--model", default="convnet", choices=("linear", *hmn_replay.NETWORKS), help="trained"
    )
    parser.add_argument("--width", type=positive, default=32, help="channels of ConvNet's blocks")
    parser.add_argument("--batch-size", type=positive, default=64, help="current images in a step")
    parser.add_argument(
        "--batch-size-mem", type=positive, default=64, help="replayed images in a step"
    )
    parser.add_argument("--rounds", type=positive, default=10, help="experiences timed of each")
    add_settings(parser, "warm_start_steps=10", "outer_steps=0", "over_budget=0")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = resolve_device(args.device)
    stream = make_stream(args)
    keeper = CondenseOnce(args.budget, **parse_settings(args))
    plugin = hmn_replay.MemoryReplay(
        keeper, batch_size_mem=args.batch_size_mem, distill=0.0, device=device
    )
    rivals: dict[str, list[Any]] = {
        "HMNReplay": [plugin],
        "ReplayPlugin": [
            ReplayPlugin(
                mem_size=args.classes * args.images,
                batch_size=args.batch_size,
                batch_size_mem=args.batch_size_mem,
            )
        ],
        "none": [],
    }
    watches = {name: Stopwatch(device) for name in rivals}
    strategies = {
        name: make_strategy(args, [*plugins, watches[name]], device)
        for name, plugins in rivals.items()
    }
    for strategy in strategies.values():
        strategy.train(stream[0])
    assert plugin.memory is not None
    if plugin.memory.num_images < args.batch_size_mem:
        raise ConfigError(
            f"the memory has {plugin.memory.num_images} images: lower --batch-size-mem"
        )
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(args.rounds + 1):
        for name, strategy in strategies.items():
            steps = watches[name].steps
            steps.clear()
            strategy.train(stream[1])
            wanted = args.batch_size + (args.batch_size_mem if rivals[name] else 0)
            full = [taken for taken, num_images in steps if num_images == wanted]
            # The first round, and an experience's first step, warm up.
            seconds[name] += full[1:] if number else []
    if not all(seconds.values()):
        raise ConfigError(
            f"an experience of {args.classes} x {args.images} images has less than two steps of "
            f"{args.batch_size}: lower --batch-size, or raise --images"
        )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:14s}{1000 * median:9.3f} ms a step (median of {len(seconds[name])})")
    ratios = {
        "ratio": medians["HMNReplay"] / medians["ReplayPlugin"],
        "ratio_none": medians["HMNReplay"] / medians["none"],
    }
    print("HMNReplay takes {ratio:.3f} times ReplayPlugin, {ratio_none:.3f} none".format(**ratios))
    return {"median_seconds": medians, **ratios}


class Quiet(BaseLogger):
    """Logs nothing; without a logger, Avalanche warns."""


class CondenseOnce(hmn_replay.LearnedKeeper):
    """Keeps its first memory: to condense in every round would take long, and is not timed."""

    def renew(
        self, images: LabelledImages, *, memory: Memory | None, **context: Any
    ) -> tuple[LearnedMemory, dict[str, Any]]:
        """Condense the first images alone."""
        if isinstance(memory, LearnedMemory):
            return memory, {}
        return super().renew(images, memory=memory, **context)


class Stopwatch(SupervisedPlugin[Any]):
    """Times each training step, data loading and replay with it, up to the device's last work.

    Attributes:
        steps: Seconds and images of each.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.steps: list[tuple[float, int]] = []
        self.started = 0.0

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start with the loading of the first mini-batch."""
        self.started = now(self.device)

    def after_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Note a step's seconds and images."""
        ended = now(self.device)
        self.steps.append((ended - self.started, len(strategy.mb_x)))
        self.started = ended


def make_stream(args: argparse.Namespace) -> Any:
    """Return two experiences of noise."""
    labels = torch.arange(2 * args.classes).repeat(args.images)
    shape = (len(labels), 3, args.side, args.side)
    images = torch.rand(shape, generator=make_generator(0, "images"))
    dataset: Any = TensorDataset(images, labels)
    dataset.targets = labels.tolist()
    return nc_benchmark(
        dataset, dataset, n_experiences=2, task_labels=False, shuffle=False
    ).train_stream


def make_strategy(args: argparse.Namespace, plugins: list[Any], device: torch.device) -> Any:
    shape, num_classes = (3, args.side, args.side), 2 * args.classes
    model: nn.Module
    if args.model == "linear":
        model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), num_classes))
    else:
        model = hmn_replay.build_network(args.model, shape, num_classes, width=args.width)
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_mb_size=args.batch_size,
        device=device,
        plugins=plugins,
        evaluator=EvaluationPlugin(loggers=[Quiet()]),  # type: ignore[no-untyped-call]
    )
