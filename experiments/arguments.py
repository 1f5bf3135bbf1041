"""Arguments that several scripts take."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import hmn_replay
from experiments.tables.published import dataset_name
from hmn_replay.cli import HelpFormatter, check_settings
from hmn_replay.data.images import LabelledImages
from hmn_replay.data.sources import Split
from hmn_replay.errors import ConfigError

# Data sets whose images must not be mirrored.
DIGITS = ("digits", "mnist", "svhn")


def make_parser(doc: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser whose help is a module's docstring: its first line, and the rest as it is."""
    summary, _, details = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog, description=summary, epilog=details, formatter_class=HelpFormatter
    )


def add_data(parser: argparse.ArgumentParser, default: str) -> None:
    """Add where images come from."""
    add = parser.add_argument
    add("--data", default=default, help="a data set by name, an .npz file or a folder of pictures")
    add("--data-root", default="data", help="folder of torchvision's data sets")
    add("--download", action="store_true", help="fetch a data set of torchvision if it is absent")
    add("--size", type=int, help="pixels to resize the shorter side to, and to crop to a square")


def load(args: argparse.Namespace, split: Split, data: str | None = None) -> LabelledImages:
    """Load a split of the data set that :func:`add_data`'s arguments name, or of another one."""
    return hmn_replay.load_dataset(
        data or args.data,
        split,
        data_root=args.data_root,
        download=args.download,
        size=args.size,
    )


def is_digits(data: str) -> bool:
    """Return whether data are of digits, which must not be mirrored, by name or file."""
    return dataset_name(data) in DIGITS


def add_settings(parser: argparse.ArgumentParser, *default: str) -> None:
    """Add settings of a condensation."""
    parser.add_argument(
        "--set",
        action="append",
        default=list(default),
        metavar="FIELD=VALUE",
        help="any setting that hmn-replay options lists; several times"
        + (f" (default: {' '.join(default)})" if default else ""),
    )


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Read whole comma-separated numbers."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} is a number, or several as 0,1,2; got {text!r}") from None


def parse_names(option: str, text: str, known: Iterable[str]) -> tuple[str, ...]:
    """Read comma-separated names; ``all`` is all that there are."""
    names = tuple(known)
    chosen = names if text == "all" else tuple(text.split(","))
    # A registry may know names that it does not list.
    found = known if isinstance(known, Mapping) else names
    if unknown := [name for name in chosen if name not in found]:
        raise ConfigError(f"{option} has no {unknown[0]!r}; choose from {', '.join(names)}")
    return chosen


def parse_settings(
    args: argparse.Namespace,
    settled: Mapping[str, Any] | None = None,
    by: str = "",
    unknown: Collection[str] = (),
) -> dict[str, Any]:
    """Read the settings of ``--set``; the last of a name counts.

    Args:
        args: With what was given as ``args.set``: each ``FIELD=VALUE``, of
            :class:`hmn_replay.CondenseConfig`.
        settled: Settings that a script settles itself, returned with the others.
        by: What settles them, for the message.
        unknown: Fields that are no settings of the script.

    Raises:
        ConfigError: A value that a setting cannot have, or a setting that is settled.
        UnknownOptionError: There is no such setting.
    """
    pairs = [assignment.partition("=") for assignment in args.set]
    texts: dict[str, Any] = {name.strip().replace("-", "_"): value for name, _, value in pairs}
    config_type = hmn_replay.CondenseConfig
    known = [name for name in config_type.model_fields if name not in unknown]
    check_settings(texts, args, known, config_type.catalogue)
    config = config_type(**texts)
    settled = settled or {}
    if both := sorted(settled.keys() & texts.keys()):
        raise ConfigError(f"{by} sets {both[0]} itself: {both[0]} is not for --set")
    return {**{name: getattr(config, name) for name in texts}, **settled}
