"""Scores of a memory beside real images: what is recovered, and what is gained over random ones.

HLR, IOR, LRS and ARS are those of DD-Ranking (Li et al. 2025), under another protocol: the accuracy
is that of the last epoch, nothing is chosen by the test set, and random images are counted both by
their number and by their bytes.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hmn_replay.baselines.fill import choose_quality, jpeg_images, raw_images
from hmn_replay.budget import as_int
from hmn_replay.condensation.selection import select_images
from hmn_replay.data.images import (
    ImageSource,
    LabelledImages,
    as_labelled_images,
    check_same_names,
)
from hmn_replay.errors import BudgetError, ConfigError, DataError
from hmn_replay.evaluation import evaluate
from hmn_replay.memory.base import Memory
from hmn_replay.training.train import TrainingConfig

__all__ = ["ddranking_score", "mean_and_std", "scores"]


def scores(
    memory: Memory,
    train_set: ImageSource,
    test_set: ImageSource,
    *,
    repeats: int = 3,
    weight: float = 0.5,
    config: TrainingConfig | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool | Callable[[str], None] = False,
) -> dict[str, Any]:
    """Score a memory beside the real images that it was made from.

    For each seed, networks are trained in as many passes each, from the memory, from all real
    images, and from random real images: as many as the memory has, and as many as fit its bytes, as
    uint8 pixels and as JPEG. The quality of JPEG is chosen on a fifth of the training images, which
    is kept back. Those from the memory and from as many real images are trained once more without
    augmentation.

    Args:
        memory: A memory of images, of any kind.
        train_set: The real images that it was made from.
        test_set: What accuracies are measured on.
        repeats: How many seeds, 1 or more: ``seed``, ``seed + 1``, ...
        weight: DD-Ranking's weight of its first term in its scores, in [0, 1].
        config: The training, with its augmentation. Default: ``TrainingConfig()``.
        seed: The first seed, of draws and trainings.
        device: Where to train.
        progress: Whether to print a line on standard error after each training, or a function that
            is called with it.

    Returns:
        A dict of JSON types. ``accuracies``: for ``memory``, ``real``, ``random_count``,
        ``random_bytes_raw``, ``random_bytes_jpeg``, and ``memory`` and ``random_count``
        ``_unaugmented``, the accuracy in [0, 1] of each seed; JPEG and raw may be absent, where not
        one image of each class fits for every seed. Then, as ``{"mean": ..., "std": ...}`` over the
        seeds, in accuracy, not per cent:

        * ``hard_label_recovery``: real less memory, DD-Ranking's HLR; the smaller, the better;
        * ``improvement_over_random``: memory less random, by ``count`` (DD-Ranking's IOR), by
          ``bytes_raw`` and by ``bytes_jpeg``;
        * ``label_robust_score`` and ``augmentation_robust_score``, DD-Ranking's LRS and ARS by
          :func:`ddranking_score`, by ``count``; the first also by ``bytes``, against the better of
          raw and JPEG.

        ``num_images``, ``file_bytes`` and ``jpeg_quality`` say what was compared.

    Raises:
        ConfigError: A value outside its range, or a memory of features.
        DataError: Images that cannot be used, of another size or of other labels, or a memory that
            has none.
    """
    if (as_int(repeats) or 0) < 1:
        raise ConfigError(f"repeats must be a whole number of 1 or more; got {repeats!r}")
    if not 0 <= weight <= 1:
        raise ConfigError(f"weight must be in [0, 1]; got {weight!r}")
    if not memory.num_images:
        raise DataError("expected a memory of one image or more; it has none")
    if memory.holds_features:
        raise ConfigError(
            "scores are of images, which networks are trained on with augmentation; a memory of "
            "features is scored by evaluate()"
        )
    train, test = as_labelled_images(train_set), as_labelled_images(test_set)
    _check_comparable(memory, train, test)
    config = config or TrainingConfig()
    plain = config.replace(augmentations=(), cutmix_probability=0.0)
    num_bytes = memory.file_bytes
    quality, _ = choose_quality(
        train,
        num_bytes,
        expected_classes=train.num_classes,
        seed=seed,
        device=device,
        training=config.replace(
            width=min(config.width, 32), num_passes=min(config.num_passes, 6000)
        ),
    )
    seeds = range(seed, seed + repeats)
    fills: dict[str, Callable[[int], Memory]] = {
        "random_bytes_raw": lambda own: raw_images(train, num_bytes, seed=own),
        "random_bytes_jpeg": lambda own: jpeg_images(train, num_bytes, quality=quality, seed=own),
    }
    by_bytes: dict[str, list[Memory]] = {}
    for name, fill in fills.items():
        with contextlib.suppress(BudgetError):
            filled = [fill(own) for own in seeds]
            if all(each.num_classes == train.num_classes for each in filled):
                by_bytes[name] = filled
    accuracies: dict[str, list[float]] = {}

    def score(name: str, source: Any, own: int, training: TrainingConfig) -> None:
        _, accuracy = evaluate(
            source, test, labels="hard", seed=own, device=device, config=training
        )
        accuracies.setdefault(name, []).append(accuracy)
        line = f"seed {own}, {name.replace('_', ' ')}: {accuracy:.2%}"
        if callable(progress):
            progress(line)
        elif progress:
            print(f"hmn_replay, {line}", file=sys.stderr, flush=True)

    for place, own in enumerate(seeds):
        order = select_images(train, num_images=min(memory.num_images, len(train)), seed=own)
        as_many = train.take(order)
        score("memory", memory, own, config)
        score("real", train, own, config)
        score("random_count", as_many, own, config)
        for name, filled in by_bytes.items():
            score(name, filled[place], own, config)
        score("memory_unaugmented", memory, own, plain)
        score("random_count_unaugmented", as_many, own, plain)

    def differences(one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(accuracies[one], accuracies[other], strict=True)]

    hlr = differences("real", "memory")
    ior = {
        name: differences("memory", f"random_{name}")
        for name in ("count", "bytes_raw", "bytes_jpeg")
        if f"random_{name}" in accuracies
    }
    bare = differences("memory_unaugmented", "random_count_unaugmented")
    gains = {"count": ior["count"]}
    if by_bytes:
        others = [values for name, values in ior.items() if name != "count"]
        gains["bytes"] = [min(values) for values in zip(*others, strict=True)]
    lrs = {
        name: [ddranking_score(gain, -loss, weight) for gain, loss in zip(values, hlr, strict=True)]
        for name, values in gains.items()
    }
    ars = [ddranking_score(a, b, weight) for a, b in zip(ior["count"], bare, strict=True)]
    return {
        "num_images": memory.num_images,
        "file_bytes": num_bytes,
        "jpeg_quality": quality if "random_bytes_jpeg" in accuracies else None,
        "accuracies": accuracies,
        "hard_label_recovery": mean_and_std(hlr),
        "improvement_over_random": {name: mean_and_std(values) for name, values in ior.items()},
        "label_robust_score": {name: mean_and_std(values) for name, values in lrs.items()},
        "augmentation_robust_score": {"count": mean_and_std(ars)},
    }


def _check_comparable(memory: Memory, train: LabelledImages, test: LabelledImages) -> None:
    """Raise a DataError where a memory, its real images and test images do not belong together."""
    known = {*memory.classes.tolist()}
    for name, data in (("train_set", train), ("test_set", test)):
        if data.image_shape != memory.image_shape:
            raise DataError(
                f"{name} has images of {data.image_shape}; expected {memory.image_shape}, as the "
                "memory has"
            )
        check_same_names(memory.class_names, data.class_names, "the memory", name)
        if known.isdisjoint(data.classes.tolist()):
            raise DataError(
                f"{name} has none of the memory's labels: {sorted(known)[:5]} and "
                f"{data.classes.tolist()[:5]}; number the classes of both alike"
            )


def ddranking_score(first: float, second: float, weight: float = 0.5) -> float:
    """Return DD-Ranking's score of two differences of accuracies, in [0, 1].

    With ``a = weight * first + (1 - weight) * second`` it is ``(e^a - e^-1) / (e - e^-1)``. LRS is
    that of IOR and -HLR; ARS is that of the improvement over random with and without augmentation.

    Args:
        first: A difference in [-1, 1].
        second: The same.
        weight: In [0, 1].
    """
    mixed = weight * first + (1 - weight) * second
    return (math.exp(mixed) - math.exp(-1)) / (math.e - math.exp(-1))


def mean_and_std(values: Sequence[float]) -> dict[str, float]:
    """Return the ``mean`` and the sample standard deviation, ``std``, which is 0 of one value."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std}
