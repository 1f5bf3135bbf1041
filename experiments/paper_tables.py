"""The paper's tables, beside its numbers: one row a system, at the same budgets.

    python experiments/paper_tables.py --table containers --download
    python experiments/paper_tables.py --table containers --scale standard --ipc 1,10 --rows all
    python experiments/paper_tables.py --table architectures --networks convnet,convnet+resnet18
    python experiments/paper_tables.py --table pruning --rows 0,20,40 --betas 0,0.5,1
    python experiments/paper_tables.py --table memory --objectives gradient,dm --ipc 1,10,50
    python experiments/paper_tables.py --table datasets --datasets cifar10,svhn,tiny-imagenet-200
    python experiments/paper_tables.py --table containers --scale paper --device cuda

containers     every memory kind under one loss (gradient matching), chosen real images at as many
               bytes, and on request (--rows all, or dc,dsa,dm,mtt,haba-mtt) rivals' own losses
architectures  condensed with ConvNet, or with several networks in turn (convnet+vgg16), and learned
               from by ConvNet, VGG-16, ResNet-18 and DenseNet-121
pruning        accuracy against the share of images pruned (--rows, in percent) and against beta
memory         peak memory of every memory kind and objective; needs no data
datasets       HMN against the best of the rivals' memory kinds, chosen by test accuracy

--scale quick and standard give every memory the same seconds of condensing on this machine (60 and
600; half of them at most go to its warm start), and every evaluation of a budget the same ConvNet
(width 32 and 64) and number of images shown: 20,000; for standard, as many as in IDC's 1,000 epochs
on its own images, 40,000 at 1 IPC of ten classes, and 120,000 at most. Pruning takes no part,
unless it is asked for with --set over_budget=0.1. paper is the published protocol, for a GPU: 2,000
networks of width 128 with 100 steps each, HMN 10 % over budget and pruned, 3 condensations with 10
trainings each, shown as many images as in IDC's 1,000 epochs. It has one schedule for every loss,
IDC's, and has not been run to its end by us.

A budget of k IPC is the bytes of k float32 images a class. In float32, the default, the paper's
rule holds: learned values alone are counted, and a file's header comes on top. In another
--number-format the whole file is within the budget. Values and bytes are both reported. Real images
take a byte a value.

Written to OUT: results.json, after every memory and every training; table.md; memory files; and a
figure for pruning and memory. Stop it at any time: the same command goes on, within a condensation
too. More rows, budgets, seeds and trainings may be added by later runs; other settings need another
--out. What failed is named in the table, and tried again by the next run; the exit code is then 1,
unless it was the budget or the device's memory that did not suffice.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    # Python looks beside the script; what is run is this checkout, whatever is installed.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.arguments import (
    add_data,
    add_settings,
    make_parser,
    parse_numbers,
    parse_settings,
)
from experiments.tables.settings import SCALES, Settings
from experiments.tables.store import Store
from hmn_replay.condensation.config import make_config
from hmn_replay.errors import ConfigError, HMNReplayError
from hmn_replay.files import write_atomically
from hmn_replay.memory.formats import NUMBER_FORMATS
from hmn_replay.runtime import resolve_device
from hmn_replay.training.train import TrainingConfig

TABLES = ("containers", "architectures", "pruning", "memory", "datasets")

# These say how much is run, not how: a later run may ask for more.
NOT_COMPARED = ("ipc", "seeds", "trainings")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--table", choices=TABLES, required=True, help="which table, as explained below")
    add("--scale", choices=tuple(SCALES), default="quick", help="how much is run, as below")
    add_data(parser, "cifar10")
    add("--rows", help="which rows of the table, or all")
    add("--ipc", help="budgets, as 1,10,50 (default: 1,10; paper: 1,10,50)")
    add("--seeds", help="a condensation each (default: 0; paper: 0,1,2)")
    add("--trainings", type=int, help="for each condensation (default: 2, 3 and 10)")
    add("--seconds", type=float, help="of condensing one memory (default: 60 and 600)")
    add("--width", type=int, help="channels of ConvNet's blocks in evaluation")
    add("--passes", type=int, help="images that an evaluated network is shown")
    add(
        "--number-format",
        choices=tuple(NUMBER_FORMATS),
        help="of learned values (default: float32)",
    )
    add("--networks", default="convnet",
        help="architectures: condensed with, as convnet,convnet+resnet18")  # fmt: skip
    add("--evaluate-on", default="all", help="architectures: some of them (default: all four)")
    add("--betas", default="0,0.25,0.5,0.75,1", help="pruning: shares of hard images")
    add("--objectives", default="all", help="memory: some of hmn_replay.OBJECTIVES")
    add("--datasets", default="cifar10", help="datasets: as --data, several")
    add_settings(parser)
    add("--device", default="auto", help="cpu, cuda, ... (default: the best present)")
    add("--out", type=Path, help="folder to write to (default: paper_tables/TABLE-SCALE)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    settings = make_settings(args)
    table: Any = importlib.import_module(f"experiments.tables.{args.table}")
    folder = args.out or Path("paper_tables") / f"{args.table}-{args.scale}"
    store = Store(folder, configure(args, settings))
    stopped = False
    try:
        table.run(args, settings, store)
    except KeyboardInterrupt:
        stopped = True

    rows = store.report["rows"] = table.make_rows(args, settings, store)
    store.write()
    text = "\n\n".join([headline(args, settings), table.markdown(rows)]) + "\n"
    write_atomically(folder / "table.md", text.encode())
    if hasattr(table, "draw"):
        table.draw(rows, folder)
    print(f"\n{text}\nWritten to {folder}")
    return store.exit_code(stopped=stopped)


def make_settings(args: argparse.Namespace) -> Settings:
    """Return the scale's settings, with those of the command line in their place."""
    options = parse_settings(args)
    if "number_format" in options:
        raise ConfigError("a number format is given as --number-format, not --set")
    given = {
        "seconds": args.seconds,
        "width": args.width,
        "passes": args.passes,
        "trainings": args.trainings,
        "number_format": args.number_format,
        "ipc": None if args.ipc is None else parse_numbers("--ipc", args.ipc),
        "seeds": None if args.seeds is None else parse_numbers("--seeds", args.seeds),
        "options": options,
        "device": str(resolve_device(args.device)),
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = dataclasses.replace(SCALES[args.scale], **chosen)
    if settings.trainings < 1:
        raise ConfigError(f"--trainings is 1 or more; got {settings.trainings}")
    make_config(**settings.condensation("hmn"))
    passes = 1 if settings.passes is None else settings.passes
    TrainingConfig(width=settings.width, num_passes=passes)
    return settings


def configure(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Return what all cells depend on, to tell this run from others by."""
    on_gpu = settings.device.startswith("cuda")
    compared = dataclasses.asdict(settings)
    return {
        "table": args.table,
        "scale": args.scale,
        **({} if args.table in ("memory", "datasets") else {"data": args.data}),
        "size": args.size,
        **{name: value for name, value in compared.items() if name not in NOT_COMPARED},
        "machine": torch.cuda.get_device_name(settings.device) if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def headline(args: argparse.Namespace, settings: Settings) -> str:
    """Return the title of a table, and what its numbers come from."""
    has_data = args.table not in ("memory", "datasets")
    title = f"# {args.table}, {args.scale}" + (f": {Path(args.data).name}" if has_data else "")
    if args.table == "memory":
        return title
    bound = "by the paper's schedule"
    if settings.seconds is not None:
        bound = f"for {settings.seconds:g} seconds"
    shown = "as many images as in IDC's evaluation"
    if settings.most_passes is not None:
        shown += f", {settings.most_passes:,} at most"
    if settings.passes is not None:
        shown = f"{settings.passes:,} images"
    return (
        f"{title}\n\nCondensed {bound} each, in {settings.number_format}; {settings.trainings} "
        f"trainings each, ConvNet of width {settings.width}, shown {shown}."
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (HMNReplayError, OSError) as error:
        sys.exit(f"paper_tables.py: error: {error}")
