"""The arguments of the sub-commands, and what reads them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

import hmn_replay
from hmn_replay.baselines.fill import QUALITIES
from hmn_replay.condensation.config import make_config
from hmn_replay.errors import ConfigError, MissingExtraError, UnknownOptionError
from hmn_replay.memory.export import DD_RANKING
from hmn_replay.registry import suggest
from hmn_replay.runtime import PRECISIONS
from hmn_replay.settings import check_options

__all__ = [
    "HelpFormatter",
    "Parser",
    "add_baseline",
    "add_condense",
    "add_evaluate",
    "add_export",
    "add_gallery",
    "check_settings",
    "label_settings",
]


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds its default to the help of an option that has one, and does not say it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown, text = action.default, f"{action.help}"
        if isinstance(shown, (list, tuple)):
            shown = ",".join(map(str, shown))
        is_hidden = isinstance(shown, bool) or shown in (None, "", argparse.SUPPRESS)
        is_said = "(default:" in text or is_hidden or not action.option_strings
        return text if is_said else f"{text} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """A parser whose error is one line.

    Attributes:
        settings: Names that --set takes, where there is one.
    """

    settings: Collection[str] = ()

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is not known, before what is missing: that may be the same, misspelt."""
        words: list[str] = list(sys.argv[1:] if args is None else args)
        found, unknown = None, []
        if self._subparsers is None:
            options = takewhile(lambda word: word != "--", words)
            names = (word.partition("=")[0] for word in options if word.startswith("--"))
            unknown = [name for name in names if name not in self._option_string_actions]
        if not unknown:
            found, unknown = super().parse_known_args(words, namespace)
        if unknown:
            near = suggest(unknown[0], list(self._option_string_actions))
            setting = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
            if setting in self.settings:
                near = f"; it is a setting: give --set {setting}=VALUE"
            elif self._subparsers is not None and unknown[0] in self._options_of_commands():
                near = f"; write {unknown[0]} after COMMAND"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return found, unknown

    def _options_of_commands(self) -> set[str]:
        commands = self._subparsers._group_actions[0].choices if self._subparsers else {}
        parsers = commands.values() if isinstance(commands, dict) else ()
        return {option for parser in parsers for option in parser._option_string_actions}

    def error(self, message: str) -> NoReturn:
        """End the process with the one line, and 2."""
        see = " See" if message.endswith("?") else "; see"
        self.exit(2, f"{self.prog}: error: {message}{see} {self.prog} --help\n")


def add_evaluate(parser: Parser) -> None:
    """Add the arguments of ``evaluate``."""
    parser.add_argument("file", type=Path, help="a memory file of any kind")
    parser.add_argument(
        "--scores",
        action="store_true",
        help="compare with real images: all, as many, as many bytes, by hard labels",
    )
    parser.add_argument(
        "--labels",
        choices=hmn_replay.LABELS,
        help="what to learn from: classes, soft labels in the file, or a labeller in the file "
        "(default: the last of these that the file has)",
    )
    _add_data(parser)
    _add_training(parser)
    _add_common(parser)


def add_condense(parser: Parser) -> None:
    """Add the arguments of ``condense``."""
    add = parser.add_argument
    parser.settings = hmn_replay.CondenseConfig.model_fields
    _add_data(parser)
    add("--budget", required=True, help="bytes of the file, header and all: 122880, 120KiB, ...")
    add("--out", required=True, type=Path, help="the memory file to write")
    kinds = _kinds(hmn_replay.LearnedMemory)
    add("--kind", type=_condensed, choices=kinds, default="hmn", help="memory kind")
    add(
        "--effort",
        choices=tuple(hmn_replay.EFFORTS),
        default="quick",
        help="draft is made for streams, where training waits; quick takes minutes on a CPU, "
        "standard does seven times the matching, paper has the paper's settings and needs a GPU",
    )
    quick, paper = make_config("quick"), make_config("paper")
    add(
        "--objective",
        choices=tuple(hmn_replay.OBJECTIVES),
        help=f"what is matched (default: {quick.objective}; with --effort paper {paper.objective})",
    )
    add(
        "--number-format",
        choices=tuple(hmn_replay.NUMBER_FORMATS),
        help="how values are stored (default: entropy for hmn and fred, int8 for the rest)",
    )
    add(
        "--labels",
        choices=tuple(hmn_replay.LABELS),
        help="labels that networks learn with from the memory, in the same bytes: an image's "
        "class; what a teacher predicted of it; or what a small network in the file predicts of "
        f"it each time that it is augmented (default: {quick.labels})",
    )
    _add_set(
        parser,
        "any setting that hmn-replay options lists; may be given several times, such as --set "
        "outer_steps=40 --set beta_grid=0,0.5,1",
    )
    add("--restart", action="store_true", help="delete the checkpoint and begin anew")
    add(
        "--timeout",
        type=_positive,
        default=1800,
        metavar="SECONDS",
        help="of several processes: how long to wait for one that does not answer; one that has "
        "ended is noticed at once",
    )
    _add_common(parser)


def add_export(parser: Parser) -> None:
    """Add the arguments of ``export``."""
    add = parser.add_argument
    add("file", type=Path, help="a memory file of any kind")
    add("folder", metavar="DIR", type=Path, nargs="?", help="a folder that is new, or empty")
    add("--npz", type=Path, metavar="FILE", help="write x_train, uint8 (N, H, W, C), and y_train")
    add("--contact-sheet", type=Path, metavar="FILE", help="write the contact sheet to this PNG")
    add("--columns", type=_positive, default=10, metavar="N", help="its images of each class")
    add("--dd-ranking", type=Path, metavar="DIR", help="write what DD-Ranking's evaluator reads")
    add(
        "--dd-ranking-data",
        choices=DD_RANKING,
        metavar="NAME",
        help="the real images, by DD-Ranking's name, such as CIFAR10 (default: by the images' "
        "shape and the number of classes)",
    )
    add("--device", default="auto", help="where to decode: auto, cpu, cuda, ...")


def add_gallery(parser: Parser) -> None:
    """Add the arguments of ``gallery``."""
    add = parser.add_argument
    add("files", metavar="FILE", type=Path, nargs="+", help="a memory file of any kind")
    add("out", metavar="OUT", type=Path, help="the .html file to write")
    add("--title", default="What the memory holds", help="heading of the page")
    add(
        "--images-per-class",
        type=_positive,
        default=24,
        metavar="N",
        help="how many are shown of each class",
    )
    add("--device", default="auto", help="where to decode: auto, cpu, cuda, ...")
    _add_data(parser, default=None)


def add_baseline(parser: Parser) -> None:
    """Add the arguments of ``baseline``."""
    add = parser.add_argument
    parser.settings = label_settings()
    _add_data(parser)
    add("--kind", choices=_real_kinds(), required=True, help="how pixels are stored")
    add("--budget", required=True, help="bytes of the file, header and labels counted")
    add("--out", type=Path, help="write the memory of the first seed, and best quality, here")
    add(
        "--selection",
        choices=hmn_replay.SELECTIONS,
        default="random",
        help="which images are kept, as many of each class; all but random train a network on all "
        "images first, for one epoch at least",
    )
    add(
        "--labels",
        choices=hmn_replay.LABELS,
        default="hard",
        help="what is kept of images beside their classes, in the same bytes, and learned from: "
        "soft labels, or a labeller; of a network that is trained on all images first",
    )
    _add_set(
        parser,
        f"how labels are made: {', '.join(parser.settings)}, as hmn-replay options explains them; "
        "or a setting of a kind that was registered; may be given several times",
    )
    add(
        "--qualities",
        type=_qualities,
        metavar="Q,Q,...",
        help=f"JPEG qualities to try, 1 to 100 (default: {','.join(map(str, QUALITIES))}, and on "
        "past their edge while the best is there; of those at which all images fit, the highest)",
    )
    add(
        "--factor",
        type=_positive,
        help="of subsampled images: one pixel in so many is kept along each side (default: 2)",
    )
    _add_training(parser)
    _add_common(parser)


def _add_set(parser: Parser, help_text: str) -> None:
    parser.add_argument(
        "--set",
        type=_assignment,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=help_text,
    )


def _add_data(parser: Parser, default: str | None = "digits") -> None:
    add = parser.add_argument_group("data set").add_argument
    add(
        "--data",
        metavar="NAME|PATH",
        help=f"{', '.join(hmn_replay.DATASETS)} (which needs no file), an .npz file of x_train, "
        "y_train, x_test, y_test, or a folder of pictures"
        + (f" (default: {default})" if default else ""),
    )
    # Apart from the argument's, so that an error can say that it was not given.
    parser.set_defaults(default_data=default)
    add("--data-root", default="data", metavar="DIR", help="folder of torchvision's data sets")
    add("--download", action="store_true", help="fetch a data set of torchvision if it is absent")
    add(
        "--size",
        type=_positive,
        metavar="PIXELS",
        help="resize the shorter side to this, and crop the centre to a square (default: pictures "
        "of a folder that a memory is compared with have its size, all else is as it is)",
    )
    add(
        "--test-share",
        type=_share,
        metavar="SHARE",
        help="hold out this share of each class's training images, always the same ones, and test "
        "on them: for data without a test split. Give it to every command that reads the data",
    )


def _add_training(parser: Parser) -> None:
    config = hmn_replay.TrainingConfig()
    add = parser.add_argument_group("training").add_argument
    add(
        "--network",
        type=_network,
        default=config.network,
        metavar="NAME",
        help=f"architecture that is trained: {', '.join(hmn_replay.NETWORKS)}, or timm:NAME",
    )
    add(
        "--repeats",
        type=_positive,
        default=3,
        metavar="N",
        help="how many networks, of seeds SEED, SEED + 1, ...",
    )
    add(
        "--width",
        type=_positive,
        default=config.width,
        metavar="N",
        help="channels of ConvNet's blocks",
    )
    add(
        "--passes",
        type=_positive,
        default=config.num_passes,
        metavar="N",
        help="images that a network is shown in all",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        default=config.precision,
        help="of the training; auto is bfloat16 where the processor has it",
    )
    add(
        "--label-weight",
        type=float,
        metavar="SHARE",
        help="of soft labels or a labeller in the loss, 0 to 1; by default 0.5 for learned images "
        "and 0.9 for real ones",
    )


def _add_common(parser: Parser) -> None:
    add = parser.add_argument
    add("--seed", type=int, default=0, metavar="N", help="seed of everything that is drawn")
    add("--device", default="auto", help="where to compute: auto, cpu, cuda, ...")
    add("--quiet", action="store_true", help="show no progress on standard error")


def _kinds(base: type[Any]) -> list[str]:
    return [
        name
        for name, kind in hmn_replay.MEMORIES.items()
        if issubclass(kind, base) and not kind.holds_features
    ]


def _real_kinds() -> list[str]:
    """Return the kinds of real images that a budget alone fills; of JPEG, qualities are tried."""
    kinds = _kinds(hmn_replay.RealMemory)
    memories: Any = hmn_replay.MEMORIES
    return [name for name in kinds if name == "jpeg" or not memories[name].required_settings()]


def _condensed(kind: str) -> str:
    """Return the kind, unless it is one of real images."""
    if kind in _real_kinds():
        raise argparse.ArgumentTypeError(
            f"{kind!r} holds real images: hmn-replay baseline --kind {kind} --out FILE makes it"
        )
    return kind


def label_settings() -> list[str]:
    """Return the settings that say how labels are made."""
    return [name for name in hmn_replay.LabelConfig.model_fields if name != "labels"]


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and below 1, got {text!r}")
    return value


def _network(text: str) -> str:
    try:
        hmn_replay.NETWORKS[text]
    except (ConfigError, MissingExtraError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _qualities(text: str) -> list[int]:
    qualities = [_positive(word.strip()) for word in text.split(",")]
    if max(qualities) > 100:
        raise argparse.ArgumentTypeError(f"expected qualities from 1 to 100, got {text!r}")
    return list(dict.fromkeys(qualities))


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE, got {text!r}")
    return name.strip().replace("-", "_"), value


def check_settings(
    names: Iterable[str], args: argparse.Namespace, known: Collection[str], catalogue: str = ""
) -> None:
    """Raise an UnknownOptionError for a name of --set that is no setting, or a flag instead.

    Args:
        names: What --set was given.
        args: The arguments of the command, by the names of its flags.
        known: The settings that there are.
        catalogue: As in :func:`hmn_replay.settings.check_options`.
    """
    for name in names:
        if name not in known and name in vars(args):
            flag = name.replace("_", "-")
            raise UnknownOptionError(f"--set has no option {name!r}; pass --{flag} by itself")
    check_options("--set", names, known, catalogue=catalogue)
