"""The command ``hmn-replay``: each sub-command is a function from its arguments to a result.

A sub-command returns its result twice, as JSON values and as a text, or None where another process
prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, partial
from inspect import cleandoc
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeAlias, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from torch import Tensor

import hmn_replay
from hmn_replay.baselines.fill import QUALITIES, real_images, search_qualities
from hmn_replay.baselines.scores import mean_and_std
from hmn_replay.condensation.config import make_config
from hmn_replay.data.images import show_label
from hmn_replay.data.sources import Split, dataset_name
from hmn_replay.distributed import Team, launched
from hmn_replay.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DistributedError,
    HMNReplayError,
    MissingExtraError,
    UnknownOptionError,
)
from hmn_replay.files import check_target, clear_stale
from hmn_replay.memory.export import DD_RANKING, check_new_folder, check_sheet_name
from hmn_replay.memory.file import unpack
from hmn_replay.objectives.trajectories import delete_checkpoint, delete_experts, experts_beside
from hmn_replay.registry import suggest
from hmn_replay.runtime import PRECISIONS
from hmn_replay.settings import check_options

__all__ = ["HelpFormatter", "main", "make_parser", "refuse_flags"]

Result: TypeAlias = tuple[dict[str, Any], str]

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
        with warnings.catch_warnings():
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


def _default_data(args: argparse.Namespace, error: Exception) -> str:
    """Return what to say of data that do not fit, and that nobody named."""
    default: str | None = vars(args).get("default_data")
    if not isinstance(error, DataError) or default is None or args.data is not None:
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


# --- sub-commands


def condense(args: argparse.Namespace) -> Result | None:
    """Make a memory file from a data set.

    Condense the training images of a data set into a memory file within a budget of bytes.
    Every minute the state is saved to OUT.checkpoint, from which the same command resumes a
    stopped run. At the end the checkpoint is deleted, and recorded experts beside it.

    torchrun --nproc-per-node=N -m hmn_replay condense ... shares the work among N processes,
    each on a GPU of its own where there are any. Any number of them may resume.

    Example:
      hmn-replay condense --data cifar10.npz --budget 120KiB --out cifar10.hmn
    """
    with launched(args.timeout) as team:
        return _condense(args, team)


def _condense(args: argparse.Namespace, team: Team) -> Result | None:
    out: Path = args.out
    checkpoint = Path(f"{out}.checkpoint")
    config_type = hmn_replay.CondenseConfig
    settings = _settings(args, config_type.model_fields, config_type.catalogue)
    for name in ("objective", "number_format", "labels"):
        if (value := getattr(args, name)) is not None:
            if name in settings:
                flag = name.replace("_", "-")
                raise ConfigError(f"both --{flag} and --set {name}=... are given; leave one out")
            settings[name] = value
    hmn_replay.Budget.parse(args.budget)
    make_config(args.effort, **settings)
    if team.first:
        _check_out(args)
        _check_checkpoint(checkpoint)
    data = _load_together(args, team)
    if team.first:
        clear_stale(out)
        if args.restart:
            delete_checkpoint(checkpoint)
        elif checkpoint.exists():
            _note(args, f"resuming from {checkpoint}")
    try:
        memory = hmn_replay.condense(
            data,
            args.budget,
            effort=args.effort,
            kind=args.kind,
            seed=args.seed,
            device=args.device,
            checkpoint=checkpoint,
            progress=not args.quiet,
            team=team,
            **settings,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --restart deletes it") from error
    if not team.first:
        return None
    memory.save(out)
    checkpoint.unlink(missing_ok=True)
    if "experts" in memory.report["phases"]:
        delete_experts(experts_beside(checkpoint))
    report: dict[str, Any] = memory.report
    summary = memory.summary()
    result = {
        "file": str(out),
        "effort": args.effort,
        "seconds": report["seconds"],
        **summary,
        "report": report,
    }
    lines = _lines(out, summary)
    lines.append(("time", f"{report['seconds']:,.1f} s"))
    for name, phase in report["phases"].items():
        speed = f"{phase['seconds']:,.1f} s, {phase['images_per_second']:,.0f} images/s"
        lines.append((f"  {name.replace('_', ' ')}", speed))
    return result, _table(lines)


def evaluate(args: argparse.Namespace) -> Result:
    """Train fresh networks on a memory, and score them on the test images.

    The accuracy is that of the last epoch; its deviation is that of a sample. With --scores,
    networks are also trained on all real images, and on random ones: as many, and in as many
    bytes; JPEG's quality is chosen on training images that are kept back.

    Example:
      hmn-replay evaluate cifar10.hmn --data cifar10.npz --repeats 3
    """
    if args.scores and args.labels not in (None, "hard"):
        raise ConfigError(f"--scores are by hard labels; got --labels {args.labels}: leave one out")
    memory = hmn_replay.load(args.file, device=args.device)
    if args.scores:
        return _all_scores(args, memory)
    _check_label_weight(args, args.labels or memory.richest_labels)
    test = _load_data(args, "test")
    scores = _score(args, lambda seed: memory, test)
    result = {
        "file": str(args.file),
        "kind": memory.kind,
        "num_images": memory.num_images,
        "file_bytes": memory.file_bytes,
        "labels": args.labels or memory.richest_labels,
        **scores,
    }
    lines = [*_lines(args.file, memory.summary()), ("network", args.network)]
    lines.append(("learned from", f"{result['labels']} labels"))
    if memory.labeller is not None:
        result["labeller_accuracy"] = hmn_replay.labeller_accuracy(memory, test)
        lines.append(("labeller itself", f"{result['labeller_accuracy']:.2%}"))
    return result, _table([*lines, ("accuracy", _percent(result))])


def _all_scores(args: argparse.Namespace, memory: hmn_replay.Memory) -> Result:
    found = hmn_replay.scores(
        memory,
        _load_data(args, "train"),
        _load_data(args, "test"),
        repeats=args.repeats,
        config=_training(args),
        seed=args.seed,
        device=args.device,
        progress=partial(_note, args),
    )
    common = {name: vars(args)[name] for name in ("seed", "repeats", "network", "width", "passes")}
    result = {"file": str(args.file), "kind": memory.kind, **found, **common}

    def percent(values: Mapping[str, float], sign: str = "") -> str:
        return f"{100 * values['mean']:{sign}.2f}{_deviation(values['std'], args.repeats)}"

    rows = [("accuracy %", "")]
    for name, values in found["accuracies"].items():
        rows.append((name.replace("_", " "), percent(mean_and_std(values))))
    rows.append(("real less memory", percent(found["hard_label_recovery"], "+")))
    for name, values in found["improvement_over_random"].items():
        rows.append((f"memory less random, {name.replace('_', ' ')}", percent(values, "+")))
    for score in ("label_robust_score", "augmentation_robust_score"):
        for name, values in found[score].items():
            rows.append((f"{score.replace('_', ' ')}, {name}", percent(values)))
    lines = [*_lines(args.file, memory.summary()), ("network", args.network)]
    return result, f"{_table(lines)}\n\n{_table(rows, '<>')}"


def inspect(args: argparse.Namespace) -> Result:
    """Print what is in a memory file: shapes, images and bytes.

    No data set is needed.

    Example:
      hmn-replay inspect cifar10.hmn --json
    """
    memory = hmn_replay.load(args.file)
    tensors = unpack(memory.to_bytes()).tensors
    summary = memory.summary()
    stored: dict[str, dict[str, Any]] = {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "bytes": tensor.numel() * tensor.element_size(),
        }
        for name, tensor in tensors.items()
        if name not in ("labels", "counts", "names")
    }
    rest = summary["file_bytes"] - sum(tensor["bytes"] for tensor in stored.values())
    result = {"file": str(args.file), **summary, "stored": stored, "header_bytes": rest}
    rows: list[Sequence[str]] = [("stored", "shape", "type", "bytes")]
    for name, tensor in stored.items():
        rows.append((name, _by(tensor["shape"]), tensor["dtype"], f"{tensor['bytes']:,}"))
    rows.append(("header, labels and counts", "", "", f"{rest:,}"))
    shapes = {}
    if isinstance(memory, hmn_replay.LearnedMemory):
        num_groups = memory.num_images // memory.layout.group_size
        for learned in memory.table(memory.layout):
            shapes[learned.name] = learned.full_shape(memory.num_classes, num_groups)
    shares: list[Sequence[str]] = [("bits", "shape", "in all", "per class", "per image")]
    for name, bits in {**summary["bits"], "whole file": 8.0 * summary["file_bytes"]}.items():
        counts = (bits, bits / memory.num_classes, bits / max(1, memory.num_images))
        shares.append((name, _by(shapes.get(name, ())), *(f"{count:,.1f}" for count in counts)))
    lines = [*_lines(args.file, summary), ("by class", _by_class(summary))]
    tables = _table(lines), _table(rows, "<<<>"), _table(shares, "<<>>>")
    return result, "\n\n".join(tables)


def export(args: argparse.Namespace) -> Result:
    """Write the images of a memory as pictures or arrays.

    Pictures are DIR/CLASS/0000.png and so on, with a contact sheet DIR/contact_sheet.png.

    Example:
      hmn-replay export cifar10.hmn pictures --npz pictures.npz
    """
    folder, sheet = args.folder, args.contact_sheet
    if not (folder or sheet or args.npz or args.dd_ranking):
        raise ConfigError(
            "name a DIR, --npz FILE, --contact-sheet FILE or --dd-ranking DIR to write to"
        )
    if folder and folder.suffix.lower() in (".npz", ".zip", ".png"):
        raise ConfigError(
            f"DIR is a folder for pictures; got {str(folder)!r}: write a file by --npz FILE, or by "
            "--contact-sheet FILE"
        )
    _check_not_read("--npz", args.npz, args.file)
    _check_not_read("--contact-sheet", sheet, args.file)
    if sheet:
        check_sheet_name(sheet)
    if folder:
        check_new_folder(folder)
    if folder and args.dd_ranking:
        ranking: Path = args.dd_ranking.resolve()
        if folder.resolve() in (ranking, *ranking.parents):
            raise ConfigError(
                f"DIR must be empty when pictures are written; got {str(folder)!r} with "
                f"--dd-ranking {str(args.dd_ranking)!r} in it: name a folder beside it"
            )
    made: list[Path] = []
    for path in filter(None, (args.dd_ranking, folder, args.npz, sheet)):  # as they are written
        parent = path.absolute().parent
        if not parent.is_dir() and parent not in made:
            raise ConfigError(f"the folder of {str(path)!r} does not exist; make it first")
        if path in (args.dd_ranking, folder):
            made.append(path.absolute())
    memory = hmn_replay.load(args.file, device=args.device)
    written = {"file": str(args.file)}
    if args.dd_ranking:  # first, as it may not take such images
        hmn_replay.export_dd_ranking(memory, args.dd_ranking, dataset=args.dd_ranking_data)
        written["dd_ranking"] = str(args.dd_ranking)
    if folder:
        hmn_replay.export_images(memory, folder)
        written["folder"] = str(folder)
        sheet = sheet or folder / "contact_sheet.png"
    if args.npz:
        hmn_replay.export_npz(memory, args.npz)
        written["npz"] = str(args.npz)
    if sheet:
        hmn_replay.contact_sheet(memory, sheet, columns=args.columns)
        written["contact_sheet"] = str(sheet)
    lines = [(name.replace("_", " "), path) for name, path in written.items()]
    result = {**written, "num_images": memory.num_images}
    return result, _table([*lines, ("images", f"{memory.num_images:,}")])


def gallery(args: argparse.Namespace) -> Result:
    """Show what memories hold, as one HTML page.

    Images by class, bytes by tensor; with --data, beside the real images that they are nearest
    to. Several files are the stages of a stream. The page needs no other file, and no network.

    Example:
      hmn-replay gallery cifar10.hmn cifar10.html --data cifar10.npz
    """
    if args.out.suffix not in (".html", ".htm"):
        raise ConfigError(f"OUT must be an .html file; got {str(args.out)!r}")
    check_target(args.out)
    _check_not_read("OUT", args.out, *args.files, _data_path(args))
    sources = _load_data(args, "train") if args.data else None
    page = hmn_replay.Gallery(args.title, sources=sources, images_per_class=args.images_per_class)
    for file in args.files:
        page.add(hmn_replay.load(file, device=args.device), file.stem)
    page.save(args.out)
    result = {"files": list(map(str, args.files)), "out": str(args.out)}
    return result, _table([("file", str(file)) for file in args.files] + [("page", str(args.out))])


def baseline(args: argparse.Namespace) -> Result:
    """Score equal-bytes baselines: real images in as many bytes as a memory.

    As many real images as fit are trained on, as evaluate does; each seed chooses images and
    trains one network. Of JPEG, the quality with the best mean accuracy on the test images
    counts, which favours it.

    Example:
      hmn-replay baseline --kind jpeg --data cifar10.npz --budget 120KiB
    """
    budget = hmn_replay.Budget.parse(args.budget)
    if args.out:
        _check_out(args)
    kind: Any = hmn_replay.MEMORIES[args.kind]
    is_jpeg = args.kind == "jpeg"  # whose quality is searched for
    own = {} if is_jpeg else kind.setting_types
    settings = _settings(args, [*_label_settings(), *(name for name in own if name != "factor")])
    try:
        codec = {name: own[name](settings.pop(name)) for name in own if name in settings}
    except ValueError as error:
        raise ConfigError(f"--set of --kind {args.kind}: {error}") from error
    if settings and args.labels == "hard":
        raise ConfigError(
            "--set says how labels are made, and --labels hard makes none; choose others, or leave "
            "--set out"
        )
    _check_label_weight(args, args.labels)
    if args.qualities and args.kind != "jpeg":
        raise ConfigError(f"--qualities are of JPEG; got --kind {args.kind}: leave them out")
    if args.factor is not None and "factor" not in own:
        raise ConfigError(f"--factor is of subsampled images; got --kind {args.kind}: leave it out")
    if args.factor is not None:
        codec["factor"] = args.factor
    if codec:
        kind.check_settings(**codec)
    labels = hmn_replay.LabelConfig(**settings, labels=args.labels)
    train, test = _load_data(args, "train"), _load_data(args, "test")
    # Of compressed images, it is not known before how many fit.
    most = max(1, budget.num_bytes // train.images[0].numel()) if args.kind == "raw" else None

    @cache  # once for each seed, not for each quality: choosing may train a network
    def order(seed: int) -> Tensor:
        return hmn_replay.select_images(
            train,
            args.selection,
            num_images=most,
            config=_training(args),
            seed=seed,
            device=args.device,
            progress=not args.quiet,
        )

    @cache
    def teacher(seed: int) -> Any:
        if args.labels == "hard":
            return None
        return hmn_replay.train_teacher(
            train, labels, seed=seed, device=args.device, progress=not args.quiet
        )

    @cache
    def fill(seed: int, **codec: Any) -> hmn_replay.RealMemory:
        jpeg = hmn_replay.jpeg_images  # which chooses the subsampling, too
        make: Any = jpeg if is_jpeg else partial(real_images, kind)
        memory: hmn_replay.RealMemory = make(
            train,
            budget,
            selection=order(seed),
            labels=labels,
            teacher=teacher(seed),
            seed=seed,
            device=args.device,
            **codec,
        )
        return memory

    scored: list[dict[str, Any]] = []

    def scored_with(**codec: Any) -> float:
        memory = fill(args.seed, **codec)
        values = codec if is_jpeg else memory.setting_values()
        sizes = {"num_images": memory.num_images, "file_bytes": memory.file_bytes}
        name = "".join(f"{name} {value}, " for name, value in values.items())
        scored.append({**values, **sizes, **_score(args, partial(fill, **codec), test, name)})
        return float(scored[-1]["accuracy_mean"])

    if is_jpeg:
        for quality in args.qualities or QUALITIES[:1]:
            fill(args.seed, quality=quality)  # one that has no room is refused at once
        search_qualities(
            lambda quality: fill(args.seed, quality=quality),
            lambda quality, _: scored_with(quality=quality),
            num_images=None if args.qualities else len(train),
            qualities=args.qualities,
        )
    else:
        scored_with(**codec)
    scored.sort(key=lambda one: one.get("quality", 0))
    best = max(scored, key=lambda one: one["accuracy_mean"])
    common = {"kind": args.kind, "selection": args.selection, "budget_bytes": budget.num_bytes}
    result = {**common, "labels": args.labels, **best, "tried": scored}
    memory = fill(args.seed, **({"quality": best["quality"]} if is_jpeg else codec))
    result["num_classes"] = memory.num_classes
    if memory.labeller is not None:
        result["labeller_accuracy"] = hmn_replay.labeller_accuracy(memory, test)
    if args.out:
        memory.save(args.out)
        result["file"] = str(args.out)
    names = ["quality"] if is_jpeg else list(memory.setting_values())
    rows = [(*names, "images", "bytes", "accuracy", "")]
    for one in scored:
        shown = (*(one[name] for name in names), one["num_images"], one["file_bytes"])
        mark = "best" if one is best and len(scored) > 1 else ""
        rows.append((*map(_shown, shown), _percent(one), mark))
    lines = [("kind", args.kind), ("selection", args.selection), ("budget", str(budget))]
    lines += [("network", args.network), ("labels", args.labels)]
    if memory.num_classes < train.num_classes:
        missing = f"{memory.num_classes} of {train.num_classes}: no more fit"
        lines.append(("classes", missing))
    if "labeller_accuracy" in result:
        lines.append(("labeller itself", f"{result['labeller_accuracy']:.2%}"))
    return result, f"{_table(lines)}\n\n{_table(rows, '>' * len(rows[0][1:]) + '<')}"


def options(args: argparse.Namespace) -> Result:
    """List the settings of condense --set: default, values and meaning.

    Example:
      hmn-replay options --effort standard
    """
    config = hmn_replay.CondenseConfig(**hmn_replay.EFFORTS[args.effort])
    result, lines = {}, []
    for name, field in hmn_replay.CondenseConfig.model_fields.items():
        default, values = getattr(config, name), _values(field.annotation, field.metadata)
        result[name] = {"default": default, "values": values, "description": field.description}
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default).lower()
        lines.append(f"{name}={shown}    ({values})")
        text = " ".join(str(field.description).split())
        lines.append(textwrap.fill(text, 96, initial_indent="    ", subsequent_indent="    "))
    return result, "\n".join(lines)


def _values(kind: Any, constraints: Iterable[Any] = ()) -> str:
    """Return what a setting may be, from its annotation: type, names and range."""
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        return _values(arguments[0], kind.__metadata__)
    if get_origin(kind) in (Union, UnionType):
        words = " or ".join(filter(None, map(_values, arguments)))
    elif get_origin(kind) is tuple:
        words = f"list of {_values(arguments[0])}"
    elif get_origin(kind) is Literal:
        words = " or ".join(map(str, arguments))
    else:
        plain = {int: "whole number", float: "number", str: "text", bool: "true or false"}
        words = {**plain, NoneType: "none"}.get(kind, "")
    for constraint in constraints:
        if isinstance(constraint, FieldInfo):
            return _values(kind, constraint.metadata)
        if known := getattr(getattr(constraint, "func", None), "known", None):
            return "one of " + ", ".join(known)
        for name, sign in {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}.items():
            if hasattr(constraint, name):
                words += f" {sign} {getattr(constraint, name):g}"
    return words


# --- arguments


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds its default to the help of an option that has one, and does not say it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown, text = action.default, f"{action.help}"
        if isinstance(shown, (list, tuple)):
            shown = ",".join(map(str, shown))
        is_hidden = isinstance(shown, bool) or shown in (None, "", argparse.SUPPRESS)
        is_said = "(default:" in text or is_hidden or not action.option_strings
        return text if is_said else f"{text} (default: {shown})"


class _Parser(argparse.ArgumentParser):
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
        see = " See" if message.endswith("?") else "; see"
        self.exit(2, f"{self.prog}: error: {message}{see} {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command and its sub-commands."""
    parser = _Parser(
        prog="hmn-replay",
        description="Condense a labelled image set into a memory file of a few kilobytes.",
        epilog="hmn-replay COMMAND --help says more, with an example.\n\n"
        "Exit codes: 0 done, 1 error, 2 wrong usage or value, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {hmn_replay.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], Result | None]) -> _Parser:
        """Add the sub-command that a function runs; its docstring is the help."""
        summary, _, details = cleandoc(run.__doc__ or "").partition("\n\n")
        name, summary = run.__name__, summary.rstrip(".")
        added = commands.add_parser(name, help=summary, description=f"{summary}.\n\n{details}")
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print one JSON object")
        return added

    _add_condense(command(condense))
    _add_evaluate(command(evaluate))
    command(inspect).add_argument("file", type=Path, help="a memory file of any kind")
    _add_export(command(export))
    _add_gallery(command(gallery))
    _add_baseline(command(baseline))
    command(options).add_argument(
        "--effort", choices=tuple(hmn_replay.EFFORTS), default="quick", help="whose defaults"
    )
    return parser


def _add_condense(parser: _Parser) -> None:
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
        help="what networks that learn from the memory are told of an image, in the same bytes: "
        "its class; what a teacher said of it; or what a small network in the file says of it "
        f"each time that it is augmented (default: {quick.labels})",
    )
    add(
        "--set",
        type=_assignment,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any setting that hmn-replay options lists; may be given several times, such as --set "
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


def _add_evaluate(parser: _Parser) -> None:
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


def _add_export(parser: _Parser) -> None:
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


def _add_gallery(parser: _Parser) -> None:
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


def _add_baseline(parser: _Parser) -> None:
    add = parser.add_argument
    parser.settings = _label_settings()
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
    add(
        "--set",
        type=_assignment,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=f"how labels are made: {', '.join(parser.settings)}, as hmn-replay options "
        "explains them; or a setting of a kind that was registered; may be given several times",
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


def _add_data(parser: _Parser, default: str | None = "digits") -> None:
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
        help="resize the shorter side to this, and crop the centre to a square",
    )


def _add_training(parser: _Parser) -> None:
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


def _add_common(parser: _Parser) -> None:
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


def _label_settings() -> list[str]:
    return [name for name in hmn_replay.LabelConfig.model_fields if name != "labels"]


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


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


# --- what the sub-commands share


def _settings(
    args: argparse.Namespace, known: Collection[str], catalogue: str = ""
) -> dict[str, Any]:
    """Return what --set gives, checked to be settings, and no options of the sub-command."""
    settings = dict(args.set)
    refuse_flags(settings, args, known)
    check_options("--set", settings, known, catalogue=catalogue)
    return settings


def refuse_flags(names: Iterable[str], args: argparse.Namespace, known: Collection[str]) -> None:
    """Raise an UnknownOptionError for a name of --set that is a flag of the command instead."""
    for name in names:
        if name not in known and name in vars(args):
            flag = name.replace("_", "-")
            raise UnknownOptionError(f"--set has no option {name!r}; pass --{flag} by itself")


def _check_out(args: argparse.Namespace) -> None:
    """Refuse what could not be written, or what is read, before minutes are spent."""
    out: Path = args.out
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out: {str(out)!r} must be a file, in a folder that exists")
    check_target(out)
    _check_not_read("--out", out, _data_path(args))


def _check_not_read(option: str, output: Path | None, *read: Path | None) -> None:
    """Refuse to write a file over one that the sub-command reads."""
    if output and os.path.realpath(output) in {os.path.realpath(path) for path in read if path}:
        raise ConfigError(f"{option}: {str(output)!r} is read by this command; name another file")


def _data_path(args: argparse.Namespace) -> Path | None:
    """Return the file or folder that --data gives; None for the name of a data set, or nothing."""
    if not args.data or dataset_name(args.data):
        return None
    return Path(os.path.expanduser(args.data))


def _load_data(args: argparse.Namespace, split: Split) -> hmn_replay.LabelledImages:
    data = args.default_data if args.data is None else args.data
    return hmn_replay.load_dataset(
        data, split, data_root=args.data_root, download=args.download, size=args.size
    )


def _load_together(args: argparse.Namespace, team: Team) -> hmn_replay.LabelledImages:
    """Load the training images, after the first process of this machine has fetched the files."""
    fetches = os.environ.get("LOCAL_RANK", "0") == "0"
    if args.download and not fetches:
        team.wait()
    data = _load_data(args, "train")
    if args.download and fetches:
        team.wait()
    return data


def _check_checkpoint(checkpoint: Path) -> None:
    """Refuse what stands in the place of a checkpoint, and is none that --restart could delete."""
    if checkpoint.exists() and not checkpoint.is_file():
        what = "a folder" if checkpoint.is_dir() else "no file"
        raise ConfigError(
            f"{str(checkpoint)!r} is {what}, where the checkpoint is to be; move it away, or name "
            "another --out"
        )


def _training(args: argparse.Namespace) -> hmn_replay.TrainingConfig:
    return hmn_replay.TrainingConfig(
        network=args.network,
        width=args.width,
        num_passes=args.passes,
        precision=args.precision,
        label_weight=args.label_weight,
    )


def _check_label_weight(args: argparse.Namespace, labels: str) -> None:
    if args.label_weight is not None and labels == "hard":
        raise ConfigError(
            "--label-weight is of what soft labels or a labeller say, and hard labels alone are "
            "learned from: leave it out"
        )


def _score(
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
            config=_training(args),
            progress=not args.quiet,
        )
        accuracies.append(accuracy)
        _note(args, f"{name}seed {seed}: {accuracy:.2%}")
    found = mean_and_std(accuracies)
    return {
        "accuracy_mean": found["mean"],
        "accuracy_std": found["std"],
        "accuracies": accuracies,
        **{name: vars(args)[name] for name in ("seed", "repeats", "network", "width", "passes")},
    }


def _percent(scores: Mapping[str, Any]) -> str:
    repeats, seeds = scores["repeats"], "seeds" if scores["repeats"] > 1 else "seed"
    deviation = _deviation(scores["accuracy_std"], repeats)
    return f"{100 * scores['accuracy_mean']:.2f} %{deviation} ({repeats} {seeds})"


def _deviation(std: float, repeats: int) -> str:
    """Return what follows a mean in percent: nothing where one seed has no deviation."""
    return f" ± {100 * std:.2f}" if repeats > 1 else ""


def _lines(file: Path, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a memory is, from its summary: names and values."""
    budget, counts = summary["budget_bytes"], summary["images_per_class"]
    each = f"{min(counts):,}" + (f" to {max(counts):,}" if max(counts) > min(counts) else "")
    what = "features" if hmn_replay.MEMORIES[summary["kind"]].holds_features else "images"
    lines = [
        ("file", str(file)),
        ("size", f"{summary['file_bytes']:,} bytes" + (f" of {budget:,}" if budget else "")),
        ("kind", summary["kind"]),
        (what, f"{summary['num_images']:,} of {_by(summary['image_shape'])}"),
        ("classes", f"{summary['num_classes']:,}, {each} images each"),
    ]
    told = {"kind", "budget_bytes", "file_bytes", "num_images", "num_classes"}
    return lines + [
        (name.replace("_", " "), _shown(value))
        for name, value in summary.items()
        if name not in told and isinstance(value, (int, float, str))
    ]


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _by_class(summary: Mapping[str, Any]) -> str:
    """Return label, name and number of images of the classes, or of some where they are many."""
    columns = (summary[name] for name in ("classes", "class_names", "images_per_class"))
    shown = [
        f"{show_label(label)}{f' {name!r}' if name else ''} ({count:,})"
        for label, name, count in zip(*columns, strict=True)
    ]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:10], "...", shown[-1]])


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _table(rows: Sequence[Sequence[str]], align: str = "<<") -> str:
    """Join rows to lines, their cells aligned by ``<`` or ``>``, one for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{c:{a}{w}}" for c, a, w in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    )


def _note(args: argparse.Namespace, message: str) -> None:
    if not args.quiet:
        print(message, file=sys.stderr, flush=True)


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
