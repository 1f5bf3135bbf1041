"""``hmn-replay baseline``: real images in as many bytes as a memory, trained on and scored."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import Tensor

import hmn_replay
from hmn_replay.baselines.fill import (
    QUALITIES,
    add_real_labels,
    real_images,
    search_qualities,
)
from hmn_replay.cli.arguments import label_settings
from hmn_replay.cli.shared import (
    Result,
    check_label_weight,
    check_out,
    load_both,
    score,
    settings_of,
    training_of,
)
from hmn_replay.cli.tables import show_accuracy, show_value, table
from hmn_replay.errors import ConfigError

__all__ = ["baseline"]


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
        check_out(args)
    labels, codec = _settings(args)
    train, test = load_both(args)
    is_jpeg = args.kind == "jpeg"  # whose quality is searched for
    fill = _filling(args, train, budget, labels)
    scored: list[dict[str, Any]] = []

    def scored_with(**codec: Any) -> float:
        memory = fill(args.seed, **codec)
        values = codec if is_jpeg else memory.setting_values()
        sizes = {"num_images": memory.num_images, "file_bytes": memory.file_bytes}
        name = "".join(f"{name} {value}, " for name, value in values.items())
        scored.append({**values, **sizes, **score(args, partial(fill, **codec), test, name)})
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
        rows.append((*map(show_value, shown), show_accuracy(one), mark))
    lines = [("kind", args.kind), ("selection", args.selection), ("budget", str(budget))]
    lines += [("network", args.network), ("labels", args.labels)]
    if memory.num_classes < train.num_classes:
        missing = f"{memory.num_classes} of {train.num_classes}: no more fit"
        lines.append(("classes", missing))
    if "labeller_accuracy" in result:
        lines.append(("labeller itself", f"{result['labeller_accuracy']:.2%}"))
    return result, f"{table(lines)}\n\n{table(rows, '>' * len(rows[0][1:]) + '<')}"


def _settings(args: argparse.Namespace) -> tuple[hmn_replay.LabelConfig, dict[str, Any]]:
    """Return how labels are made, and the settings of the kind; what does not go is refused."""
    kind: Any = hmn_replay.MEMORIES[args.kind]
    own = {} if args.kind == "jpeg" else kind.setting_types
    settings = settings_of(args, [*label_settings(), *(name for name in own if name != "factor")])
    try:
        codec = {name: own[name](settings.pop(name)) for name in own if name in settings}
    except ValueError as error:
        raise ConfigError(f"--set of --kind {args.kind}: {error}") from error
    if settings and args.labels == "hard":
        raise ConfigError(
            "--set says how labels are made, and --labels hard makes none; choose others, or leave "
            "--set out"
        )
    check_label_weight(args, args.labels)
    if args.qualities and args.kind != "jpeg":
        raise ConfigError(f"--qualities are of JPEG; got --kind {args.kind}: leave them out")
    if args.factor is not None and "factor" not in own:
        raise ConfigError(f"--factor is of subsampled images; got --kind {args.kind}: leave it out")
    if args.factor is not None:
        codec["factor"] = args.factor
    if codec:
        kind.check_settings(**codec)
    return hmn_replay.LabelConfig(**settings, labels=args.labels), codec


def _filling(
    args: argparse.Namespace,
    train: hmn_replay.LabelledImages,
    budget: hmn_replay.Budget,
    labels: hmn_replay.LabelConfig,
) -> Callable[..., hmn_replay.RealMemory]:
    """Return what fills a memory by a seed and settings of the kind, once for each of them."""
    kind: Any = hmn_replay.MEMORIES[args.kind]
    jpeg = hmn_replay.jpeg_images  # which chooses the subsampling, too
    make: Any = jpeg if args.kind == "jpeg" else partial(real_images, kind)
    # Of compressed images, it is not known before how many fit.
    most = max(1, budget.num_bytes // train.images[0].numel()) if args.kind == "raw" else None

    @cache  # once for each seed, not for each quality: choosing may train a network
    def order(seed: int) -> Tensor:
        return hmn_replay.select_images(
            train,
            args.selection,
            num_images=most,
            config=training_of(args),
            seed=seed,
            device=args.device,
            progress=not args.quiet,
        )

    @cache
    def teacher(seed: int) -> Any:
        return hmn_replay.train_teacher(
            train, labels, seed=seed, device=args.device, progress=not args.quiet
        )

    @cache
    def fill(seed: int, **codec: Any) -> hmn_replay.RealMemory:
        options = {"selection": order(seed), "seed": seed, "device": args.device, **codec}
        memory: hmn_replay.RealMemory = make(train, budget, **options)
        return add_real_labels(memory, train, order(seed), labels, partial(teacher, seed), seed)

    return fill
