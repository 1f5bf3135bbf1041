"""The command ``hmn-replay``: its arguments, its sub-commands, and how it ends."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import Any

import hmn_replay
from hmn_replay.cli.arguments import (
    HelpFormatter,
    Parser,
    add_baseline,
    add_condense,
    add_evaluate,
    add_export,
    add_gallery,
    check_settings,
)
from hmn_replay.cli.baselines import baseline
from hmn_replay.cli.commands import condense, evaluate, export, gallery, inspect, options
from hmn_replay.cli.shared import Result
from hmn_replay.errors import (
    ConfigError,
    DataError,
    DistributedError,
    HMNReplayError,
    HMNReplayWarning,
    UnknownOptionError,
)

__all__ = ["HelpFormatter", "check_settings", "main", "make_parser"]

# The words of torch's out-of-memory errors on CUDA and on the CPU, and how large it was.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
_TRIED_TO_ALLOCATE = re.compile(r"(?:tried to allocate|unable to allocate) ([0-9.]+ ?\w+)", re.I)
_LOWER = {
    "condense": "--budget, --set real_batch, decoded_batch, warm_start_batch or network_width, or "
    "--size",
    "evaluate": "--width, or choose another --network",
    "baseline": "--budget or --width, or choose another --network",
    "export": "the number of images: decode fewer at once by decode(indices) in Python",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments after the command's name. Default: those of the process.

    Returns:
        The exit code: 0 for success, 1 for an error that is printed on standard error, 2 for an
        option with a value that it cannot have, 130 after Ctrl-C. An argument that cannot be read
        ends the process with 2.
    """
    args = make_parser().parse_args(argv)
    try:
        with warnings.catch_warnings(), _warnings_in_a_line():
            # Whether a large picture is too large is said in the one line of the error.
            warnings.filterwarnings("ignore", "Image size .* exceeds limit")
            return _run(args, argv)
    except MemoryError as error:
        _complain(f"error: {_out_of_memory(args, error)}")
        return 1
    except RuntimeError as error:
        # Torch has a class of its own for it from 2.5 on, on CUDA alone.
        if not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        _complain(f"error: {_out_of_memory(args, error)}")
        return 1


def _run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run a sub-command, and return the exit code; an error of memory is not caught here."""
    try:
        result = args.run(args)
        if result is not None:
            print(json.dumps(result[0], indent=2) if args.json else result[1], flush=True)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            _complain("interrupted" + _advice(args))
        return 130
    except BrokenPipeError:
        # The reader has closed the pipe; Python would complain once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except DistributedError as error:
        words = sys.argv[1:] if argv is None else list(argv)
        _complain(f"error: {_describe(error)}; start again: {_launch(words)}")
        return 1
    except (HMNReplayError, OSError) as error:
        _complain(f"error: {_describe(error)}{_default_data(args, error)}")
        wrong_value = (hmn_replay.BudgetError, ConfigError, UnknownOptionError)
        return 2 if isinstance(error, wrong_value) else 1
    return 0


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print warnings of this package as the command's other messages, without a line of code."""
    usual = warnings.formatwarning

    def in_a_line(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        if issubclass(category, HMNReplayWarning):
            return f"hmn-replay: warning: {message}\n"
        return usual(message, category, *where, **line)

    warnings.formatwarning = in_a_line
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _default_data(args: argparse.Namespace, error: Exception) -> str:
    """Return what to say of data that do not fit, and that nobody named."""
    default: str | None = vars(args).get("default_data")
    if not isinstance(error, DataError) or default is None:
        return ""
    if args.data is not None or args.size is not None:  # a size that may not fit
        return ""
    return f"; --data was not given, so the data set is {default}: name yours"


def _out_of_memory(args: argparse.Namespace, error: Exception) -> str:
    """Return what could not be allocated, and what to lower."""
    found = _TRIED_TO_ALLOCATE.search(str(error))
    size = found[1] if found else "the memory that was needed"
    if size.endswith(" bytes"):
        size = f"{int(size.removesuffix(' bytes')):,} bytes"
    where = " on the GPU" if "CUDA" in str(error) else ""
    lower = _LOWER.get(args.command, "the size of the file")
    advice = f"; lower {lower}" + ("; or pass --device cpu" if where else "")
    return f"out of memory: {size} could not be allocated{where}{advice}"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command and its sub-commands."""
    parser = Parser(
        prog="hmn-replay",
        description="Condense a labelled image set into a memory file of a few kilobytes.",
        epilog="hmn-replay COMMAND --help says more, with an example.\n\n"
        "Exit codes: 0 done, 1 error, 2 wrong usage or value, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {hmn_replay.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], Result | None]) -> Parser:
        """Add the sub-command that a function runs; its docstring is the help."""
        summary, _, details = cleandoc(run.__doc__ or "").partition("\n\n")
        name, summary = run.__name__, summary.rstrip(".")
        added = commands.add_parser(name, help=summary, description=f"{summary}.\n\n{details}")
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print one JSON object")
        return added

    add_condense(command(condense))
    add_evaluate(command(evaluate))
    command(inspect).add_argument("file", type=Path, help="a memory file of any kind")
    add_export(command(export))
    add_gallery(command(gallery))
    add_baseline(command(baseline))
    command(options).add_argument(
        "--effort", choices=tuple(hmn_replay.EFFORTS), default="quick", help="whose defaults"
    )
    return parser


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
    return f"; the work so far is in {checkpoint}: {which} resumes it"


def _launch(words: Sequence[str]) -> str:
    """Return the line that starts as many processes with these words, to resume."""
    number = os.environ.get("LOCAL_WORLD_SIZE", "N")
    again = shlex.join(word for word in words if word != "--restart")
    return f"torchrun --nproc-per-node={number} -m hmn_replay {again}"


def _complain(message: str) -> None:
    print(f"hmn-replay: {message}", file=sys.stderr, flush=True)
