"""Arguments that several scripts take."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from hmn_replay.condensation.config import parse_option
from hmn_replay.errors import ConfigError


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is a module's docstring: its first line, and the rest as it is."""
    summary, _, details = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_data(parser: argparse.ArgumentParser, default: str) -> None:
    """Add where images come from."""
    parser.add_argument("--data", default=default, help="a name, an .npz file or an image folder")
    parser.add_argument("--data-root", default="data", help="where torchvision's sets lie")
    parser.add_argument("--download", action="store_true", help="fetch a torchvision set if absent")
    parser.add_argument("--size", type=int, help="side in pixels to resize a folder's images to")


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Read whole numbers apart by commas."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} is a number, or several as 0,1,2; got {text!r}") from None


def parse_names(option: str, text: str, known: Iterable[str]) -> tuple[str, ...]:
    """Read names apart by commas; ``all`` is all that there are."""
    names = tuple(known)
    chosen = names if text == "all" else tuple(text.split(","))
    if unknown := [name for name in chosen if name not in names]:
        raise ConfigError(f"{option} has no {unknown[0]!r}; choose from {', '.join(names)}")
    return chosen


def parse_options(assignments: Sequence[str]) -> dict[str, Any]:
    """Read settings of :class:`hmn_replay.CondenseConfig`, each as ``NAME=VALUE``."""
    pairs = [assignment.partition("=") for assignment in assignments]
    return {name: parse_option(name, value) for name, _, value in pairs}


def add_options(assignments: Sequence[str], settled: dict[str, Any], by: str) -> dict[str, Any]:
    """Return settings that a script settles, and those of ``--set`` beside them.

    Raises:
        ConfigError: ``--set`` has one that is settled.
    """
    options = parse_options(assignments)
    if both := sorted(settled.keys() & options.keys()):
        raise ConfigError(f"{by} sets {both[0]} itself: {both[0]} is not for --set")
    return options | settled
