"""What replay costs: a training step, and an update late in a stream against an early one.

    python experiments/benchmark_replay.py step
    python experiments/benchmark_replay.py step --model convnet --rounds 20
    python experiments/benchmark_replay.py grow --effort quick

`step` times a training step of Avalanche's Naive with HMNReplay, and with Avalanche's own
ReplayPlugin, at the same batch sizes and on the same data. The two take turns, an experience at a
time, so that whatever else the machine does falls on both; the medians' ratio is printed.

`grow` gives HMNReplay a stream of experiences with as many classes and images each, and prints the
seconds of every update, and of the 10th over the 2nd. Images are noise: speed does not depend on
them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.core import SupervisedPlugin
from avalanche.logging import BaseLogger
from avalanche.training.plugins.evaluation import EvaluationPlugin
from avalanche.training.plugins.replay import ReplayPlugin
from avalanche.training.supervised import Naive
from torch.utils.data import TensorDataset

import hmn_replay
from hmn_replay.config import EFFORTS, parse_option
from hmn_replay.container import Container
from hmn_replay.data import LabelledImages
from hmn_replay.runtime import resolve_device


def parse_arguments() -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("step", "grow"))
    parser.add_argument("--classes", type=int, default=10, help="of each experience")
    parser.add_argument("--images", type=int, default=100, help="of each class")
    parser.add_argument("--side", type=int, default=32, help="of an image, in pixels")
    parser.add_argument("--experiences", type=int, default=10, help="grow: how many")
    parser.add_argument("--budget", default="300 KiB")
    parser.add_argument("--model", default="linear", choices=("linear", "convnet", "resnet18"))
    parser.add_argument("--width", type=int, default=32, help="channels of ConvNet's blocks")
    parser.add_argument("--batch", type=int, default=64, help="step: current images")
    parser.add_argument("--batch-mem", type=int, default=64, help="step: replayed images")
    parser.add_argument("--rounds", type=int, default=10, help="step: experiences timed of each")
    parser.add_argument("--effort", default="quick", choices=tuple(EFFORTS))
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of condense()"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--out", type=Path, help="a JSON file to write the figures to")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    results = measure_steps(args) if args.part == "step" else measure_growth(args)
    results |= {
        "part": args.part,
        "device": str(resolve_device(args.device)),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=2) + "\n")


class Quiet(BaseLogger):
    """Logs nothing; without a logger, Avalanche warns."""


class CondenseOnce(hmn_replay.HMNReplay):
    """Keeps its first memory: to condense in every round would take long, and is not timed."""

    def update(self, images: LabelledImages, *, index: int) -> tuple[Container, dict[str, Any]]:
        """Condense the first experience alone."""
        if self.memory is not None:
            return self.memory, {}
        return super().update(images, index=index)


class Stopwatch(SupervisedPlugin[Any]):
    """Times each training step, data loading and replay with it, up to the device's last work."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.seconds: list[float] = []
        self.images: list[int] = []
        self.started = 0.0

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Start with the loading of the first mini-batch."""
        self.started = self.now()

    def after_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Note a step's seconds and images."""
        now = self.now()
        self.seconds.append(now - self.started)
        self.images.append(len(strategy.mb_x))
        self.started = now

    def now(self) -> float:
        """Return the time at which the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def make_stream(args: argparse.Namespace, num_experiences: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    num_classes = num_experiences * args.classes
    labels = torch.arange(num_classes).repeat(args.images)
    images = torch.rand(len(labels), 3, args.side, args.side, generator=generator)
    dataset: Any = TensorDataset(images, labels)
    dataset.targets = labels.tolist()
    return nc_benchmark(
        dataset, dataset, n_experiences=num_experiences, task_labels=False, shuffle=False
    ).train_stream


def make_strategy(args: argparse.Namespace, num_classes: int, plugins: list[Any]) -> Any:
    shape = (3, args.side, args.side)
    model: torch.nn.Module
    if args.model == "linear":
        model = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(torch.Size(shape).numel(), num_classes)
        )
    else:
        model = hmn_replay.build_network(args.model, shape, num_classes, width=args.width)
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_mb_size=args.batch,
        device=resolve_device(args.device),
        plugins=plugins,
        evaluator=EvaluationPlugin(loggers=[Quiet()]),  # type: ignore[no-untyped-call]
    )


def measure_steps(args: argparse.Namespace) -> dict[str, Any]:
    device = resolve_device(args.device)
    stream = make_stream(args, 2)
    options = parse_options(args.option)
    plugin = CondenseOnce(
        args.budget, batch_size_mem=args.batch_mem, effort=args.effort, device=device, **options
    )
    rivals = {
        "HMNReplay": plugin,
        "ReplayPlugin": ReplayPlugin(
            mem_size=args.classes * args.images,
            batch_size=args.batch,
            batch_size_mem=args.batch_mem,
        ),
    }
    watches = {name: Stopwatch(device) for name in rivals}
    strategies = {
        name: make_strategy(args, 2 * args.classes, [rival, watches[name]])
        for name, rival in rivals.items()
    }
    for strategy in strategies.values():
        strategy.train(stream[0])
    assert plugin.memory is not None
    if plugin.memory.num_images < args.batch_mem:
        raise SystemExit(f"the memory holds {plugin.memory.num_images} images: lower --batch-mem")
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    wanted = args.batch + args.batch_mem
    for number in range(args.rounds + 1):
        for name, strategy in strategies.items():
            watch = watches[name]
            watch.seconds.clear()
            watch.images.clear()
            strategy.train(stream[1])
            full = [s for s, n in zip(watch.seconds, watch.images, strict=True) if n == wanted]
            # The first round, and an experience's first step, warm up.
            seconds[name] += full[1:] if number else []
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:14s}{1000 * median:9.3f} ms a step (median of {len(seconds[name])})")
    ratio = medians["HMNReplay"] / medians["ReplayPlugin"]
    print(f"{'ratio':14s}{ratio:9.3f}")
    return {"median_seconds": medians, "ratio": ratio, "batch": [args.batch, args.batch_mem]}


def measure_growth(args: argparse.Namespace) -> dict[str, Any]:
    stream = make_stream(args, args.experiences)
    plugin = hmn_replay.HMNReplay(
        args.budget,
        effort=args.effort,
        device=resolve_device(args.device),
        **parse_options(args.option),
    )
    strategy = make_strategy(args, args.experiences * args.classes, [plugin])
    for number, experience in enumerate(stream, 1):
        strategy.train(experience)
        entry = plugin.report[-1]
        drift = entry["drift_psnr"]
        print(
            f"experience {number:2d}{entry['seconds']:9.2f} s{entry['num_images']:7d} images"
            f"{entry['file_bytes']:9,d} bytes   drift "
            + ("none" if drift is None else f"{drift:.1f} dB"),
            flush=True,
        )
    seconds = [entry["seconds"] for entry in plugin.report]
    late = min(10, len(seconds))
    ratio = seconds[late - 1] / seconds[min(1, late - 1)]
    print(f"experience {late} over experience 2: {ratio:.3f}")
    return {"seconds": seconds, "ratio": ratio, "report": plugin.report}


def parse_options(texts: list[str]) -> dict[str, Any]:
    pairs = [text.partition("=") for text in texts]
    return {name: parse_option(name, value) for name, _, value in pairs}


if __name__ == "__main__":
    main()
