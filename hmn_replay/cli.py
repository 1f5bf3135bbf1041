"""The command ``hmn-replay``: what it takes, what it prints, and how it ends.

What the sub-commands do is in :mod:`hmn_replay.commands`, imported only when one is to run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

from hmn_replay.errors import DistributedError, HMNReplayError

__all__ = ["main", "make_parser"]

# What torch says on CUDA, and on the CPU.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
_NETWORKS = ("convnet", "vgg16", "resnet18", "densenet121")
_CONTAINERS = ("hmn", "raw", "idc", "haba", "linba")
_SELECTIONS = ("random", "herding", "k-centre", "ccs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments after the command's name. Default: those of the process.

    Returns:
        The exit code: 0 for success, 1 for an error that was told on standard error, 130 after
        Ctrl-C. An argument that cannot be read ends the process with 2, as argparse does.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command == "export" and not (args.folder or args.npz or args.contact_sheet):
        parser.error("export: name a DIR, --npz FILE or --contact-sheet FILE to write to")
    try:
        from hmn_replay.commands import COMMANDS

        told = COMMANDS[args.command](args)
        if told is not None:
            result, text = told
            print(json.dumps(result, indent=2) if args.json else text, flush=True)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            _complain("interrupted" + _advice(args))
        return 130
    except BrokenPipeError:
        # The reader has had enough; Python would complain of it once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except DistributedError as error:
        words = sys.argv[1:] if argv is None else list(argv)
        _complain(f"error: {_describe(error)}; start again: {_launch(words)}")
        return 1
    except (HMNReplayError, OSError, MemoryError) as error:
        _complain(f"error: {_describe(error)}")
        return 1
    except RuntimeError as error:
        # Torch's own class for it came with torch 2.5.
        if not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        _complain(f"error: {_describe(error)}; pass --device cpu, or smaller batches")
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command and its sub-commands."""
    parser = argparse.ArgumentParser(
        prog="hmn-replay",
        description="Condense a labelled image set into a memory file of a few kilobytes.",
        epilog="hmn-replay COMMAND --help tells more, with an example.\n\n"
        "Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_condense(commands)
    _add_evaluate(commands)
    _add_inspect(commands)
    _add_export(commands)
    _add_baseline(commands)
    return parser


_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _add_condense(commands: _Commands) -> None:
    parser = _add(
        commands,
        "condense",
        "make a memory file from a data set",
        "Condense the training images of a data set into a memory file within a budget of bytes.\n"
        "Every minute the work is kept in OUT.checkpoint; when it was stopped, the same command\n"
        "goes on from there. In the end the checkpoint is deleted, with experts beside it.\n\n"
        "torchrun --nproc-per-node=N -m hmn_replay condense ... shares the work among N\n"
        "processes, each on a GPU of its own where there are any. Any number of them goes on from\n"
        "a checkpoint.",
        "hmn-replay condense --data cifar10.npz --budget 120KiB --out cifar10.hmn",
    )
    _add_data(parser)
    parser.add_argument(
        "--budget",
        required=True,
        help="bytes that the file may take, header and all: 122880, 120KiB, 1.5MB, ...",
    )
    parser.add_argument("--out", required=True, type=Path, help="the memory file to write")
    parser.add_argument(
        "--effort",
        choices=("quick", "standard", "paper"),
        default="quick",
        help="quick takes about 3 minutes for CIFAR-10 at 120KiB on 2 cores with native bfloat16, "
        "standard does twelve times the matching, paper has the paper's settings and needs a GPU "
        "(default: quick)",
    )
    parser.add_argument(
        "--number-format",
        choices=("float32", "float16", "int8", "entropy"),
        help="how values are stored; entropy codes integers by how rare they are, and weighs bits "
        "in training (default: that of the effort)",
    )
    parser.add_argument(
        "--container",
        choices=_CONTAINERS,
        default="hmn",
        help="what holds the images: the hierarchical memory, or one that it is compared with "
        "(default: hmn)",
    )
    parser.add_argument(
        "--objective",
        choices=("gradient", "distribution", "dc", "dsa", "dm", "mtt"),
        help="what is matched; mtt trains networks on the data first, in OUT.checkpoint.experts or "
        "where --set experts=DIR says, which other runs can use (default: that of the effort)",
    )
    parser.add_argument(
        "--set",
        type=_assignment,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other setting of hmn_replay.condensation.config.CondenseConfig; may be given several times, "
        "such as --set outer_steps=40 --set beta_grid=0,0.5,1",
    )
    parser.add_argument(
        "--restart", action="store_true", help="throw the checkpoint away and begin anew"
    )
    parser.add_argument(
        "--timeout",
        type=_positive,
        default=1800,
        metavar="SECONDS",
        help="of several processes: how long to wait for one that does not answer; one that has "
        "ended is noticed at once (default: 1800)",
    )


def _add_evaluate(commands: _Commands) -> None:
    parser = _add(
        commands,
        "evaluate",
        "train fresh networks on a memory, and score them on the test images",
        "Train fresh networks on the images of a memory, and score them on the test images of a\n"
        "data set. The accuracy is that of the last epoch; its deviation is the sample's.",
        "hmn-replay evaluate cifar10.hmn --data cifar10.npz --repeats 3",
    )
    parser.add_argument("file", type=Path, help="the memory file")
    _add_data(parser)
    _add_training(parser, "SEED, SEED + 1, ... train one network each")


def _add_inspect(commands: _Commands) -> None:
    parser = _add(
        commands,
        "inspect",
        "tell what is in a memory file",
        "Tell what is in a memory file: shapes, images and bytes. No data set is needed.",
        "hmn-replay inspect cifar10.hmn --json",
    )
    parser.add_argument("file", type=Path, help="the memory file")


def _add_export(commands: _Commands) -> None:
    parser = _add(
        commands,
        "export",
        "write the images of a memory as pictures or arrays",
        "Write the images of a memory: as DIR/LABEL/0000.png and so on with a contact sheet,\n"
        "DIR/contact_sheet.png, or as arrays, or both.",
        "hmn-replay export cifar10.hmn pictures --npz pictures.npz",
    )
    parser.add_argument("file", type=Path, help="the memory file")
    parser.add_argument(
        "folder", metavar="DIR", type=Path, nargs="?", help="a folder that is new, or empty"
    )
    parser.add_argument(
        "--npz", type=Path, metavar="FILE", help="write x_train, uint8 (N, H, W, C), and y_train"
    )
    parser.add_argument(
        "--contact-sheet", type=Path, metavar="FILE", help="write the contact sheet to this PNG"
    )
    parser.add_argument(
        "--columns",
        type=_positive,
        default=10,
        metavar="N",
        help="images of each class on the contact sheet (default: 10)",
    )


def _add_baseline(commands: _Commands) -> None:
    parser = _add(
        commands,
        "baseline",
        "score real images in as many bytes as a memory",
        "Score the honest rivals of a memory: as many real images as fit the same bytes of a\n"
        "file, as uint8 pixels or as JPEG under one header. Training is that of evaluate. Of\n"
        "JPEG the quality with the best mean accuracy on the test images counts, which favours it.",
        "hmn-replay baseline --kind jpeg --data cifar10.npz --budget 120KiB",
    )
    parser.add_argument(
        "--kind", choices=("raw", "jpeg"), required=True, help="how pixels are kept"
    )
    _add_data(parser)
    parser.add_argument(
        "--budget", required=True, help="bytes that the file may take, header and labels counted"
    )
    parser.add_argument(
        "--selection",
        choices=_SELECTIONS,
        default="random",
        help="which images are kept, as many of each class; all but random train a network on all "
        "images first, as those that are scored, for one epoch at least (default: random)",
    )
    parser.add_argument(
        "--qualities",
        type=_qualities,
        default=[5, 10, 20, 30],
        metavar="Q,Q,...",
        help="JPEG qualities to try, 1 to 100 (default: 5,10,20,30)",
    )
    _add_training(parser, "SEED, SEED + 1, ... choose the images and train one network each")


def _add(
    commands: _Commands, name: str, summary: str, description: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of all that is drawn (default: 0)"
    )
    parser.add_argument(
        "--device", default="auto", help="where to compute: auto, cpu, cuda, ... (default: auto)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object to standard output"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="show no progress on standard error, only errors"
    )
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data set")
    group.add_argument(
        "--data",
        default="digits",
        metavar="NAME|PATH",
        help="cifar10, cifar100, svhn, mnist, fashion_mnist, digits (needs no file), an .npz file "
        "of x_train, y_train, x_test, y_test, or a folder of pictures (default: digits)",
    )
    group.add_argument(
        "--data-root",
        default="data",
        metavar="DIR",
        help="where the files of torchvision's data sets lie (default: data)",
    )
    group.add_argument(
        "--download", action="store_true", help="fetch a data set of torchvision if it is absent"
    )
    group.add_argument(
        "--size",
        type=_positive,
        metavar="PIXELS",
        help="resize the shorter side to this, and crop the centre to a square",
    )


def _add_training(parser: argparse.ArgumentParser, seeds: str) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--network", choices=_NETWORKS, default="convnet", help="what is trained (default: convnet)"
    )
    group.add_argument(
        "--repeats",
        type=_positive,
        default=3,
        metavar="N",
        help=f"how often: {seeds} (default: 3)",
    )
    group.add_argument(
        "--width", type=_positive, metavar="N", help="channels of ConvNet's blocks (default: 128)"
    )
    group.add_argument(
        "--passes",
        type=_positive,
        metavar="N",
        help="images that a network is shown in all (default: 40000)",
    )


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def _qualities(text: str) -> list[int]:
    qualities = [_positive(word.strip()) for word in text.split(",")]
    if max(qualities) > 100:
        raise argparse.ArgumentTypeError(f"expected qualities from 1 to 100, got {text!r}")
    return qualities


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE, got {text!r}")
    return name.strip().replace("-", "_"), value


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {str(error.filename)!r}" if error.filename is not None else ""
        return error.strerror + where
    return " ".join(str(error).split()) or type(error).__name__


def _advice(args: argparse.Namespace) -> str:
    checkpoint = Path(f"{args.out}.checkpoint") if args.command == "condense" else None
    if checkpoint is None or not checkpoint.exists():
        return ""
    which = "the same command without --restart" if args.restart else "the same command"
    return f"; the work so far is in {checkpoint}: run {which} to go on from there"


def _launch(words: Sequence[str]) -> str:
    """Return the line that starts as many processes with these words, to go on."""
    number = os.environ.get("LOCAL_WORLD_SIZE", "N")
    again = shlex.join(word for word in words if word != "--restart")
    return f"torchrun --nproc-per-node={number} -m hmn_replay {again}"


def _complain(message: str) -> None:
    print(f"hmn-replay: {message}", file=sys.stderr, flush=True)


def _version() -> str:
    try:
        return metadata.version("hmn-replay")
    except metadata.PackageNotFoundError:
        return "(not installed)"
