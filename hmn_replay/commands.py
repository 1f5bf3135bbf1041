"""What the sub-commands of ``hmn-replay`` do.

Each takes the parsed arguments, and returns its result as JSON values and as a text for people.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from hmn_replay.baselines.fill import jpeg_images, raw_images
from hmn_replay.baselines.real_images import RealImages
from hmn_replay.baselines.selection import select_images
from hmn_replay.budget import Budget
from hmn_replay.condensation.condense import condense
from hmn_replay.condensation.config import parse_option
from hmn_replay.data.images import LabelledImages
from hmn_replay.data.sources import DATASETS, Split, load_dataset
from hmn_replay.distributed import Team, launched
from hmn_replay.errors import CheckpointError, ConfigError
from hmn_replay.evaluation import Decodable, evaluate
from hmn_replay.files import check_target
from hmn_replay.memory.export import contact_sheet, export_images, export_npz
from hmn_replay.memory.file import load
from hmn_replay.objectives.trajectories import experts_beside
from hmn_replay.registry import name_of
from hmn_replay.training.train import TrainingConfig

__all__ = [
    "COMMANDS",
    "run_baseline",
    "run_condense",
    "run_evaluate",
    "run_export",
    "run_inspect",
]

Result: TypeAlias = tuple[dict[str, Any], str]


def run_condense(args: argparse.Namespace) -> Result | None:
    """Make a memory file; see ``hmn-replay condense --help``.

    Of several processes that torchrun started, the first one alone writes, and returns a result.
    """
    with launched(args.timeout) as team:
        return _condense(args, team)


def _condense(args: argparse.Namespace, team: Team) -> Result | None:
    out: Path = args.out
    if team.first:
        _check_out(args)
    options = {name: parse_option(name, text) for name, text in args.set}
    chosen = {"number_format": args.number_format, "objective": args.objective}
    options |= {name: value for name, value in chosen.items() if value is not None}
    budget = Budget.parse(args.budget)
    checkpoint = Path(f"{out}.checkpoint")
    if team.first and args.restart:
        _delete_checkpoint(checkpoint)
    elif team.first and checkpoint.exists():
        _note(args, f"going on from {checkpoint}")
    try:
        memory = condense(
            _load_together(args, team),
            budget,
            effort=args.effort,
            container=args.container,
            seed=args.seed,
            device=args.device,
            checkpoint=checkpoint,
            progress=not args.quiet,
            team=team,
            **options,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --restart throws it away") from error
    if not team.first:
        return None
    memory.save(out)
    _delete_checkpoint(checkpoint)
    report: dict[str, Any] = memory.report
    result = {
        "file": str(out),
        "file_bytes": memory.file_bytes,
        "budget_bytes": budget.num_bytes,
        "num_images": memory.num_images,
        "num_classes": memory.num_classes,
        "seconds": report["seconds"],
        "effort": args.effort,
        "container": memory.layout.container,
        "number_format": memory.layout.number_format,
        "num_floats": memory.num_floats,
        "report": report,
    }
    lines = [
        ("file", str(out)),
        ("size", f"{memory.file_bytes:,} of {budget}"),
        ("images", f"{memory.num_images:,} of {memory.num_classes:,} classes"),
        ("container", memory.layout.container),
        ("number format", memory.layout.number_format),
        ("time", f"{report['seconds']:,.1f} s"),
    ]
    for name, phase in report["phases"].items():
        speed = f"{phase['seconds']:,.1f} s, {phase['images_per_second']:,.0f} images/s"
        lines.append((f"  {name.replace('_', ' ')}", speed))
    return result, _table(lines)


def run_evaluate(args: argparse.Namespace) -> Result:
    """Train on a memory and score; see ``hmn-replay evaluate --help``."""
    config = _training(args)
    memory = load(args.file, device=args.device)
    test = _load_data(args, "test")
    accuracies = []
    for seed in _seeds(args):
        accuracies.append(_accuracy(args, config, memory, test, seed))
        _note(args, f"seed {seed}: {accuracies[-1]:.2%}")
    result = {
        **_summary(accuracies),
        "num_images": memory.num_images,
        "file_bytes": memory.file_bytes,
        **_settings(config),
        "file": str(args.file),
        "seed": args.seed,
    }
    lines = [
        ("file", f"{args.file}, {memory.file_bytes:,} bytes"),
        ("images", f"{memory.num_images:,} of {memory.num_classes:,} classes"),
        ("network", name_of(config.network)),
        ("accuracy", _percent(result)),
    ]
    return result, _table(lines)


def run_inspect(args: argparse.Namespace) -> Result:
    """Tell what is in a memory file; see ``hmn-replay inspect --help``."""
    memory = load(args.file)
    layout = memory.layout
    specs = layout.file_tensors(memory.num_classes, memory.num_images, memory.code_bytes)
    tiers = {
        name: {"shape": list(spec.shape), "bytes": spec.num_bytes, "dtype": spec.dtype}
        for name, spec in specs.items()
    }
    header_bytes = memory.file_bytes - sum(spec.num_bytes for spec in specs.values())
    bits_per_class = 8 * memory.file_bytes / memory.num_classes
    bits = memory.bits()
    bits_per_image = bits[layout.per_image] / max(1, memory.num_images)
    result = {
        "file": str(args.file),
        "file_bytes": memory.file_bytes,
        "budget_bytes": memory.budget_bytes,
        "container": layout.container,
        "number_format": layout.number_format,
        "image_shape": list(memory.image_shape),
        "num_images": memory.num_images,
        "num_classes": memory.num_classes,
        "images_per_class": memory.images_per_class,
        "classes": memory.classes.tolist(),
        "bits_per_class": bits_per_class,
        "bits_per_image": bits_per_image,
        "bits": bits,
        "num_floats": memory.num_floats,
        "tiers": tiers,
        "header_bytes": header_bytes,
    }
    budget = "no budget" if memory.budget_bytes is None else f"{memory.budget_bytes:,} bytes"
    counts = memory.images_per_class
    per_class = f"{min(counts):,}" + (f" to {max(counts):,}" if max(counts) > min(counts) else "")
    lines = [
        ("file", str(args.file)),
        ("size", f"{memory.file_bytes:,} of {budget}"),
        ("images", f"{memory.num_images:,} of {_by(memory.image_shape)}"),
        ("classes", f"{memory.num_classes:,}, {per_class} images each"),
        ("container", layout.container),
        ("number format", layout.number_format),
        ("bits per class", f"{bits_per_class:,.0f}, header and all"),
        ("bits per image", f"{bits_per_image:,.1f}, and what images share"),
        ("learned values", f"{memory.num_floats:,} (the paper's rule counts these)"),
    ]
    rows = [("tensor", "shape", "type", "bytes")]
    rows += [(n, _by(s.shape), s.dtype, f"{s.num_bytes:,}") for n, s in specs.items()]
    rows.append(("header", "", "", f"{header_bytes:,}"))
    shares = [("learned", "bits", "a class", "an image")]
    for name, count in bits.items():
        a_class, an_image = count / memory.num_classes, count / max(1, memory.num_images)
        shares.append((name, f"{count:,.0f}", f"{a_class:,.1f}", f"{an_image:,.1f}"))
    tables = _table(lines), _table(rows, "<<<>"), _table(shares, "<>>>")
    return result, "\n\n".join(tables)


def run_export(args: argparse.Namespace) -> Result:
    """Write pictures, arrays or a contact sheet; see ``hmn-replay export --help``."""
    folder, sheet = args.folder, args.contact_sheet
    memory = load(args.file, device=args.device)
    written: dict[str, str] = {}
    if folder:
        export_images(memory, folder)
        written["folder"] = str(folder)
        sheet = sheet or folder / "contact_sheet.png"
    if args.npz:
        export_npz(memory, args.npz)
        written["npz"] = str(args.npz)
    if sheet:
        contact_sheet(memory, sheet, columns=args.columns)
        written["contact_sheet"] = str(sheet)
    result = {"file": str(args.file), "num_images": memory.num_images, **written}
    lines = [("images", f"{memory.num_images:,}")]
    lines += [(name.replace("_", " "), path) for name, path in written.items()]
    return result, _table(lines)


def run_baseline(args: argparse.Namespace) -> Result:
    """Score real images at equal bytes; see ``hmn-replay baseline --help``."""
    config = _training(args)
    budget = Budget.parse(args.budget)
    train, test = _load_data(args, "train"), _load_data(args, "test")
    common = {
        "kind": args.kind,
        "selection": args.selection,
        "budget_bytes": budget.num_bytes,
        "seed": args.seed,
    }
    lines = [("kind", args.kind), ("selection", args.selection)]
    lines += [("budget", str(budget)), ("network", config.network)]
    # Of JPEG images, it is not known before how many fit.
    most = max(1, budget.num_bytes // train.images[0].numel()) if args.kind == "raw" else None
    # Once a seed, not once a quality: choosing may train a network.
    choose = cache(
        partial(
            select_images,
            train,
            args.selection,
            num_images=most,
            config=config,
            device=args.device,
            progress=not args.quiet,
        )
    )
    if args.kind == "raw":
        draw = partial(raw_images, train, budget)
        best = _score_draws(args, config, choose, draw, test, "raw")
        result = {**best, **_settings(config), **common}
        lines += [("images", f"{best['num_images']:,}"), ("size", f"{best['file_bytes']:,} bytes")]
        return result, _table([*lines, ("accuracy", _percent(best))])
    scored = []
    for quality in args.qualities:
        draw = partial(jpeg_images, train, budget, quality=quality)
        result = _score_draws(args, config, choose, draw, test, f"quality {quality}")
        scored.append({"quality": quality, **result})
    best = max(scored, key=lambda result: result["accuracy_mean"])
    rows = [("quality", "images", "bytes", "accuracy", "")]
    for row in scored:
        numbers = (str(row["quality"]), f"{row['num_images']:,}", f"{row['file_bytes']:,}")
        rows.append((*numbers, _percent(row), "best" if row is best else ""))
    result = {**best, **_settings(config), **common, "qualities": scored}
    return result, f"{_table(lines)}\n\n{_table(rows, '>>>><')}"


COMMANDS: dict[str, Callable[[argparse.Namespace], Result | None]] = {
    "condense": run_condense,
    "evaluate": run_evaluate,
    "inspect": run_inspect,
    "export": run_export,
    "baseline": run_baseline,
}
"""The sub-commands by name."""


def _check_out(args: argparse.Namespace) -> None:
    """Refuse what could not be written, or what is read, before minutes are spent."""
    out: Path = args.out
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out: {str(out)!r} must be a file, in a folder that exists")
    target = check_target(out)
    is_name = args.data.lower().replace("-", "_") in DATASETS
    if not is_name and target == Path(os.path.realpath(os.path.expanduser(args.data))):
        raise ConfigError(f"--out: {str(out)!r} is the data set itself; name another file")


def _load_data(args: argparse.Namespace, split: Split) -> LabelledImages:
    return load_dataset(
        args.data, split, data_root=args.data_root, download=args.download, size=args.size
    )


def _load_together(args: argparse.Namespace, team: Team) -> LabelledImages:
    """Load the training images, after the first process of this machine has fetched the files."""
    fetches = os.environ.get("LOCAL_RANK", "0") == "0"
    if args.download and not fetches:
        team.wait()
    data = _load_data(args, "train")
    if args.download and fetches:
        team.wait()
    return data


def _training(args: argparse.Namespace) -> TrainingConfig:
    options = {"width": args.width, "num_passes": args.passes}
    given = {name: value for name, value in options.items() if value is not None}
    return TrainingConfig(network=args.network, **given)


def _settings(config: TrainingConfig) -> dict[str, Any]:
    return {"network": name_of(config.network), "width": config.width, "passes": config.num_passes}


def _seeds(args: argparse.Namespace) -> range:
    return range(args.seed, args.seed + args.repeats)


def _accuracy(
    args: argparse.Namespace,
    config: TrainingConfig,
    source: Decodable,
    test: LabelledImages,
    seed: int,
) -> float:
    _, accuracy = evaluate(
        source, test, seed=seed, device=args.device, config=config, progress=not args.quiet
    )
    return accuracy


def _score_draws(
    args: argparse.Namespace,
    config: TrainingConfig,
    choose: Callable[..., Tensor],
    draw: Callable[..., RealImages],
    test: LabelledImages,
    name: str,
) -> dict[str, Any]:
    """Choose images anew and train on them for every seed; sizes are those of the first draw."""
    draws = []
    for seed in _seeds(args):
        images = draw(selection=choose(seed=seed))
        accuracy = _accuracy(args, config, images, test, seed)
        _note(args, f"{name}, seed {seed}: {images.num_images:,} images, {accuracy:.2%}")
        numbers = {"num_images": images.num_images, "file_bytes": images.file_bytes}
        draws.append({"seed": seed, **numbers, "accuracy": accuracy})
    return {
        **_summary([one["accuracy"] for one in draws]),
        "num_images": draws[0]["num_images"],
        "file_bytes": draws[0]["file_bytes"],
        "draws": draws,
    }


def _delete_checkpoint(checkpoint: Path) -> None:
    checkpoint.unlink(missing_ok=True)
    shutil.rmtree(experts_beside(checkpoint), ignore_errors=True)


def _summary(accuracies: Sequence[float]) -> dict[str, Any]:
    return {
        "accuracy_mean": statistics.fmean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "accuracies": list(accuracies),
        "repeats": len(accuracies),
    }


def _percent(summary: dict[str, Any]) -> str:
    mean, std = (100 * summary[key] for key in ("accuracy_mean", "accuracy_std"))
    repeats = summary["repeats"]
    return f"{mean:.2f} % ± {std:.2f} ({repeats} seed{'s' if repeats > 1 else ''})"


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _table(rows: Sequence[Sequence[str]], align: str = "<<") -> str:
    """Join rows to lines, their cells aligned by ``<`` or ``>``, one a column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{c:{a}{w}}" for c, a, w in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    )


def _note(args: argparse.Namespace, message: str) -> None:
    if not args.quiet:
        print(message, file=sys.stderr, flush=True)
