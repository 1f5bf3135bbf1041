"""What hmn_replay costs, measured beside what it is compared with.

commands:
  matching          a step of gradient matching, against the published one
  training          a training step, compiled, against the plain one
  objectives        a call of each objective, in time and in memory
  decode            decoding a memory, and training through its decoder
  replay            a training step with HMNReplay, with Avalanche's ReplayPlugin, with none
  extend            an experience, against the number of classes seen before it
  processes         what a step of matching would take on more processes
  memory            the peak memory of a condensation of many large images
  time-to-accuracy  accuracy against seconds of condensation, for ours and for IDC's loop

COMMAND --help tells what each of them measures and takes. Times are those of a clock on the wall:
leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from experiments.arguments import make_parser
from experiments.benchmarks.common import add_common_arguments, description
from hmn_replay.errors import HMNReplayError
from hmn_replay.files import check_target, write_atomically

# Modules are imported when they are asked for: Avalanche, which one of them needs, takes seconds.
MODULES = {
    "matching": "matching",
    "training": "training",
    "objectives": "objectives",
    "decode": "decode",
    "replay": "replay",
    "extend": "extend",
    "processes": "processes",
    "memory": "memory",
    "time-to-accuracy": "time_to_accuracy",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; print what it measured, or with --json one JSON object."""
    outer = make_parser(__doc__, "benchmark.py")
    outer.add_argument("command", choices=tuple(MODULES), metavar="COMMAND")
    outer.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    chosen = outer.parse_args(argv)
    # What Avalanche's own code warns of, no user of this script can mend.
    warnings.filterwarnings("ignore", module=r"avalanche|deprecated|qpsolvers")
    module = importlib.import_module(f"experiments.benchmarks.{MODULES[chosen.command]}")
    parser = make_parser(module.__doc__, f"benchmark.py {chosen.command}")
    module.add_arguments(parser)
    add_common_arguments(parser)
    if parser.parse_args(chosen.arguments).smoke:
        parser.set_defaults(**module.SMOKE)
    args = parser.parse_args(chosen.arguments)
    args.command = chosen.command
    try:
        results = run(module, args)
    except (HMNReplayError, OSError) as error:
        print(f"benchmark.py {chosen.command}: error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(results))
    return 0


def run(module: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Measure, with as many threads as wanted, and write the results where they are wanted."""
    if args.out is not None:
        # Found out now, not after an hour.
        args.out.parent.mkdir(parents=True, exist_ok=True)
        check_target(args.out)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(args.threads or threads)
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            results = {**description(args), **module.measure(args)}
    finally:
        torch.set_num_threads(threads)
    if args.out is not None:
        write_atomically(args.out, (json.dumps(results, indent=1) + "\n").encode())
    return results
