"""What several sub-commands do with their arguments: check, read data, train and score."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeAlias

import hmn_replay
from hmn_replay.baselines.scores import mean_and_std
from hmn_replay.cli.arguments import check_settings
from hmn_replay.data.sources import Split, dataset_name
from hmn_replay.errors import ConfigError
from hmn_replay.files import check_target

__all__ = [
    "Result",
    "check_label_weight",
    "check_not_read",
    "check_out",
    "data_path",
    "load_both",
    "load_data",
    "note",
    "score",
    "settings_of",
    "training_of",
]

Result: TypeAlias = tuple[dict[str, Any], str]
"""What a sub-command returns: JSON values, and a text."""


def settings_of(
    args: argparse.Namespace, known: Collection[str], catalogue: str = ""
) -> dict[str, Any]:
    """Return what --set gives, checked to be settings, and no options of the sub-command."""
    settings = dict(args.set)
    check_settings(settings, args, known, catalogue)
    return settings


def check_out(args: argparse.Namespace) -> None:
    """Refuse what could not be written, or what is read, before minutes are spent."""
    out: Path = args.out
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out: {str(out)!r} must be a file, in a folder that exists")
    check_target(out)
    check_not_read("--out", out, data_path(args))


def check_not_read(option: str, output: Path | None, *read: Path | None) -> None:
    """Refuse to write a file over one that the sub-command reads."""
    if output and os.path.realpath(output) in {os.path.realpath(path) for path in read if path}:
        raise ConfigError(f"{option}: {str(output)!r} is read by this command; name another file")


def data_path(args: argparse.Namespace) -> Path | None:
    """Return the file or folder that --data gives; None for the name of a data set, or nothing."""
    if not args.data or dataset_name(args.data):
        return None
    return Path(os.path.expanduser(args.data))


def load_data(
    args: argparse.Namespace, split: Split, memory: hmn_replay.Memory | None = None
) -> hmn_replay.LabelledImages:
    """Return the images that --data names, or the default ones.

    Args:
        args: The sub-command's arguments.
        split: Which of them.
        memory: What they are compared with: pictures of a folder are brought to its size.
    """
    if args.test_share is not None:
        return _held_out(args, memory)[split == "test"]
    return _load(args, split, memory)


def load_both(
    args: argparse.Namespace, memory: hmn_replay.Memory | None = None
) -> tuple[hmn_replay.LabelledImages, hmn_replay.LabelledImages]:
    """Return the training and the test images; arguments as for :func:`load_data`."""
    if args.test_share is not None:
        return _held_out(args, memory)
    test = _load(args, "test", memory)  # a split that is not there is told before the rest is read
    return _load(args, "train", memory), test


def _held_out(
    args: argparse.Namespace, memory: hmn_replay.Memory | None
) -> tuple[hmn_replay.LabelledImages, hmn_replay.LabelledImages]:
    return _load(args, "train", memory).split(args.test_share)


def _load(
    args: argparse.Namespace, split: Split, memory: hmn_replay.Memory | None
) -> hmn_replay.LabelledImages:
    data, size = args.default_data if args.data is None else args.data, args.size
    path = data_path(args)
    has_pictures = path is not None and path.is_dir()
    if size is None and has_pictures and memory is not None and not memory.holds_features:
        _, height, width = memory.image_shape
        size = height if height == width else None
    return hmn_replay.load_dataset(
        data, split, data_root=args.data_root, download=args.download, size=size
    )


def training_of(args: argparse.Namespace) -> hmn_replay.TrainingConfig:
    """Return how networks are trained, as the arguments say."""
    return hmn_replay.TrainingConfig(
        network=args.network,
        width=args.width,
        num_passes=args.passes,
        precision=args.precision,
        label_weight=args.label_weight,
    )


def check_label_weight(args: argparse.Namespace, labels: str) -> None:
    """Refuse --label-weight where hard labels alone are learned from."""
    if args.label_weight is not None and labels == "hard":
        raise ConfigError(
            "--label-weight is of what soft labels or a labeller say, and hard labels alone are "
            "learned from: leave it out"
        )


def score(
    args: argparse.Namespace,
    source: Callable[[int], hmn_replay.Memory],
    test: hmn_replay.LabelledImages,
    name: str = "",
) -> dict[str, Any]:
    """Train a network for each seed on what ``source`` returns for it, and score it."""
    accuracies = []
    for seed in range(args.seed, args.seed + args.repeats):
        _, accuracy = hmn_replay.evaluate(
            source(seed),
            test,
            labels=args.labels,
            seed=seed,
            device=args.device,
            config=training_of(args),
            progress=not args.quiet,
        )
        accuracies.append(accuracy)
        note(args, f"{name}seed {seed}: {accuracy:.2%}")
    found = mean_and_std(accuracies)
    return {
        "accuracy_mean": found["mean"],
        "accuracy_std": found["std"],
        "accuracies": accuracies,
        **{name: vars(args)[name] for name in ("seed", "repeats", "network", "width", "passes")},
    }


def note(args: argparse.Namespace, message: str) -> None:
    """Print a line on standard error, unless --quiet was given."""
    if not args.quiet:
        print(message, file=sys.stderr, flush=True)
