"""The sub-commands that read or write a memory file.

Each is a function from its arguments to a result, or None where another process prints it. Its
docstring is its help.
"""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

import hmn_replay
from hmn_replay.baselines.scores import mean_and_std
from hmn_replay.cli.shared import (
    Result,
    check_label_weight,
    check_not_read,
    check_out,
    data_path,
    load_both,
    load_data,
    note,
    score,
    settings_of,
    training_of,
)
from hmn_replay.cli.tables import (
    describe_memory,
    show_accuracy,
    show_classes,
    show_deviation,
    show_shape,
    table,
)
from hmn_replay.condensation.config import make_config
from hmn_replay.distributed import Team, launched
from hmn_replay.errors import CheckpointError, ConfigError
from hmn_replay.files import check_target, clear_stale
from hmn_replay.memory.export import check_new_folder, check_sheet_name
from hmn_replay.memory.file import unpack
from hmn_replay.objectives.trajectories import delete_checkpoint, delete_experts, experts_beside

__all__ = ["condense", "evaluate", "export", "gallery", "inspect", "options"]


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
    settings = settings_of(args, config_type.model_fields, config_type.catalogue)
    for name in ("objective", "number_format", "labels"):
        if (value := getattr(args, name)) is not None:
            if name in settings:
                flag = name.replace("_", "-")
                raise ConfigError(f"both --{flag} and --set {name}=... are given; leave one out")
            settings[name] = value
    hmn_replay.Budget.parse(args.budget)
    make_config(args.effort, **settings)
    if team.first:
        check_out(args)
        _check_checkpoint(checkpoint)
    data = _load_together(args, team)
    if team.first:
        clear_stale(out)
        if args.restart:
            delete_checkpoint(checkpoint)
        elif checkpoint.exists():
            note(args, f"resuming from {checkpoint}")
        if out.exists():
            note(args, f"{out} is there, and will be replaced in the end")
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
    if "experts" in memory.report["phases"]:  # otherwise they are not this run's
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
    lines = describe_memory(out, summary)
    if reason := report.get("unused_reason"):
        lines.append(("not full", reason))
    lines.append(("time", f"{report['seconds']:,.1f} s"))
    for name, phase in report["phases"].items():
        speed = f", {phase['images_per_second']:,.0f} images/s" if phase["images"] else ""
        lines.append((f"  {name.replace('_', ' ')}", f"{phase['seconds']:,.1f} s{speed}"))
    return result, table(lines)


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
    if args.scores:
        check_label_weight(args, "hard")
    memory = hmn_replay.load(args.file, device=args.device)
    if args.scores:
        return _all_scores(args, memory)
    check_label_weight(args, args.labels or memory.richest_labels)
    test = load_data(args, "test", memory)
    scores = score(args, lambda seed: memory, test)
    result = {
        "file": str(args.file),
        "kind": memory.kind,
        "num_images": memory.num_images,
        "file_bytes": memory.file_bytes,
        "labels": args.labels or memory.richest_labels,
        **scores,
    }
    lines = [*describe_memory(args.file, memory.summary()), ("network", args.network)]
    lines.append(("learned from", f"{result['labels']} labels"))
    if memory.labeller is not None:
        result["labeller_accuracy"] = hmn_replay.labeller_accuracy(memory, test)
        lines.append(("labeller itself", f"{result['labeller_accuracy']:.2%}"))
    return result, table([*lines, ("accuracy", show_accuracy(result))])


def _all_scores(args: argparse.Namespace, memory: hmn_replay.Memory) -> Result:
    found = hmn_replay.scores(
        memory,
        *load_both(args, memory),
        repeats=args.repeats,
        config=training_of(args),
        seed=args.seed,
        device=args.device,
        progress=partial(note, args),
    )
    common = {name: vars(args)[name] for name in ("seed", "repeats", "network", "width", "passes")}
    result = {"file": str(args.file), "kind": memory.kind, **found, **common}

    def percent(values: Mapping[str, float], sign: str = "") -> str:
        return f"{100 * values['mean']:{sign}.2f}{show_deviation(values['std'], args.repeats)}"

    rows = [("accuracy %", "")]
    for name, values in found["accuracies"].items():
        rows.append((name.replace("_", " "), percent(mean_and_std(values))))
    rows.append(("real less memory", percent(found["hard_label_recovery"], "+")))
    for name, values in found["improvement_over_random"].items():
        rows.append((f"memory less random, {name.replace('_', ' ')}", percent(values, "+")))
    for kind in ("label_robust_score", "augmentation_robust_score"):
        for name, values in found[kind].items():
            rows.append((f"{kind.replace('_', ' ')}, {name}", percent(values)))
    lines = [*describe_memory(args.file, memory.summary()), ("network", args.network)]
    return result, f"{table(lines)}\n\n{table(rows, '<>')}"


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
        rows.append((name, show_shape(tensor["shape"]), tensor["dtype"], f"{tensor['bytes']:,}"))
    rows.append(("header, labels, counts and names", "", "", f"{rest:,}"))
    shapes = {}
    if isinstance(memory, hmn_replay.LearnedMemory):
        num_groups = memory.num_images // memory.layout.group_size
        for learned in memory.table(memory.layout):
            shapes[learned.name] = learned.full_shape(memory.num_classes, num_groups)
    shares: list[Sequence[str]] = [("bits", "shape", "in all", "per class", "per image")]
    for name, bits in {**summary["bits"], "whole file": 8.0 * summary["file_bytes"]}.items():
        counts = (bits, bits / memory.num_classes, bits / max(1, memory.num_images))
        shares.append(
            (name, show_shape(shapes.get(name, ())), *(f"{count:,.1f}" for count in counts))
        )
    lines = [*describe_memory(args.file, summary), ("by class", show_classes(summary))]
    tables = table(lines), table(rows, "<<<>"), table(shares, "<<>>>")
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
    check_not_read("--npz", args.npz, args.file)
    check_not_read("--contact-sheet", sheet, args.file)
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
    return result, table([*lines, ("images", f"{memory.num_images:,}")])


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
    check_not_read("OUT", args.out, *args.files, data_path(args))
    memories = [hmn_replay.load(file, device=args.device) for file in args.files]
    sources = load_data(args, "train", memories[0]) if args.data else None
    page = hmn_replay.Gallery(args.title, sources=sources, images_per_class=args.images_per_class)
    for file, memory in zip(args.files, memories, strict=True):
        page.add(memory, file.stem)
    page.save(args.out)
    result = {"files": list(map(str, args.files)), "out": str(args.out)}
    return result, table([("file", str(file)) for file in args.files] + [("page", str(args.out))])


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


def _load_together(args: argparse.Namespace, team: Team) -> hmn_replay.LabelledImages:
    """Load the training images, after the first process of this machine has fetched the files."""
    fetches = os.environ.get("LOCAL_RANK", "0") == "0"
    if args.download and not fetches:
        team.wait()
    data = load_data(args, "train")
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
