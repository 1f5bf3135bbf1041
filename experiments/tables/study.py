"""How the memories of a table are made, kept and learned from: in one way for all of them.

What is made is known by an *identity*: names and values such as system, IPC and seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hmn_replay
from experiments.arguments import DIGITS, load
from experiments.tables.published import dataset_name
from experiments.tables.settings import Settings
from experiments.tables.store import Store
from hmn_replay.budget import Budget
from hmn_replay.data.images import LabelledImages
from hmn_replay.memory.base import MEMORIES, Memory
from hmn_replay.memory.layout import MemoryLayout
from hmn_replay.memory.learned import LearnedMemory
from hmn_replay.objectives.trajectories import delete_checkpoint
from hmn_replay.runtime import derive_seed
from hmn_replay.training.train import TrainingConfig

KINDS: dict[str, type[LearnedMemory]] = {
    name: kind
    for name, kind in MEMORIES.items()
    if issubclass(kind, LearnedMemory) and not kind.holds_features
}
# IDC trains on its own images for so many epochs; others are shown as many images as those.
IDC_EPOCHS = 1000
# What a file has beside its values at most: a header, and something for each class.
HEADER_BYTES, CLASS_BYTES = 1024, 12


@dataclass(frozen=True)
class Study:
    """A data set, the settings, and where what is found goes.

    Attributes:
        name: Of the data set, as papers have it.
    """

    name: str
    train: LabelledImages
    test: LabelledImages
    settings: Settings
    store: Store

    def budget(self, ipc: int) -> Budget:
        """Return the paper's budget, as bytes of float32."""
        return Budget.ipc(ipc, self.train.image_shape, self.train.num_classes)

    def fit(self, kind: str, ipc: int) -> tuple[MemoryLayout, Budget]:
        """Return a memory kind's layout, and the bytes of its file; see :func:`fit`."""
        shape, num_classes = self.train.image_shape, self.train.num_classes
        number_format, per_class = self.settings.number_format, len(self.train) // num_classes
        return fit(kind, ipc, shape, num_classes, number_format, per_class)

    def path(self, identity: dict[str, Any]) -> Path:
        """Return the file of a memory."""
        words = [v if isinstance(v, str) else f"{k}{v}" for k, v in identity.items()]
        return self.store.folder / f"{'-'.join(words)}.hmn"


def load_study(args: argparse.Namespace, data: str, settings: Settings, store: Store) -> Study:
    """Load a data set, found as the arguments say, without the names of its classes.

    The paper's budgets have no room for them.
    """
    parts = (load(args, split, data) for split in ("train", "test"))
    train, test = (dataclasses.replace(part, class_names={}) for part in parts)
    name = dataset_name(data)
    store.agree(f"images of {name}", [len(train), len(test)])
    return Study(name, train, test, settings, store)


def bytes_beside(number_format: str, num_classes: int) -> int:
    """Return the room for what a budget by the paper's rule does not count: header and labels."""
    return HEADER_BYTES + CLASS_BYTES * num_classes if number_format == "float32" else 0


def fit(
    kind: str,
    ipc: int,
    image_shape: Sequence[int],
    num_classes: int,
    number_format: str,
    real_images_per_class: int,
) -> tuple[MemoryLayout, Budget]:
    """Return a memory kind's layout for a budget of so many float32 images a class, and its bytes.

    In float32 the paper's rule holds: learned values alone are counted, and the file's header and
    labels come on top. In any other format the whole file takes no more than the budget's bytes.

    Raises:
        BudgetError: The budget does not hold one image a class.
    """
    budget = Budget.ipc(ipc, image_shape, num_classes)
    beside = bytes_beside(number_format, num_classes)
    memory_type = KINDS[kind]
    layout: MemoryLayout = memory_type.choose_layout(
        budget.num_bytes + beside, image_shape, num_classes, number_format, real_images_per_class
    )
    if not beside:
        return layout, budget
    without, with_one = (
        memory_type.num_floats_of(layout, num_classes, n) for n in (0, layout.group_size)
    )
    num_groups = max(0, budget.num_floats - without) // (with_one - without)
    return layout, file_budget(kind, layout, num_classes, layout.group_size * num_groups)


def file_budget(kind: str, layout: MemoryLayout, num_classes: int, num_images: int) -> Budget:
    """Return the smallest budget that holds so many images."""
    file_bytes = functools.partial(KINDS[kind].file_bytes_of, layout, num_classes, num_images)
    num_bytes = file_bytes(None)
    # The budget itself stands in the header, which may grow by that.
    while (needed := file_bytes(num_bytes)) > num_bytes:
        num_bytes = needed
    return Budget(num_bytes)


def condense(
    study: Study, kind: str, layout: MemoryLayout, budget: Budget, path: Path, **options: Any
) -> LearnedMemory:
    """Condense the training images into a file; what was stopped goes on from its checkpoint."""
    memory = hmn_replay.condense(
        study.train,
        budget,
        kind=kind,
        layout=layout,
        device=study.settings.device,
        checkpoint=path.with_suffix(".checkpoint"),
        progress=sys.stderr.isatty(),
        **{
            "pruning_augmentations": augmentations(study),
            **study.settings.condensation(kind),
            **options,
        },
    )
    memory.save(path)
    return memory


def condense_once(study: Study, kind: str, identity: dict[str, Any], **options: Any) -> Path | None:
    """Condense into a memory that has the budget ``identity["ipc"]``, unless that was done.

    Args:
        study: What is condensed, and how.
        kind: As for :func:`hmn_replay.condense`.
        identity: Of the memory, its ``ipc`` and ``seed`` among others.
        **options: Fields of :class:`hmn_replay.CondenseConfig` that replace those of the settings.

    Returns:
        The memory's file; None where there could be none.
    """
    path = study.path(identity)

    def compute() -> dict[str, Any]:
        layout, budget = study.fit(kind, identity["ipc"])
        return described(
            condense(study, kind, layout, budget, path, seed=identity["seed"], **options)
        )

    return finished(study, compute, path, identity)


def finished(
    study: Study, compute: Callable[[], dict[str, Any]], path: Path, identity: dict[str, Any]
) -> Path | None:
    """Make a memory, unless that was done; return its file, or None where there could be none."""
    cell = study.store.once("memory", identity, compute)
    if "error" in cell:
        return None
    delete_checkpoint(path.with_suffix(".checkpoint"))
    return path


def described(memory: LearnedMemory) -> dict[str, Any]:
    """Return what the table says of a memory, and how it was condensed."""
    return {
        "images": memory.num_images,
        "bytes": memory.file_bytes,
        "values": memory.num_floats,
        "seconds": memory.report["seconds"],
        "report": memory.report,
    }


def select_once(study: Study, method: str, identity: dict[str, Any]) -> Path | None:
    """Choose real images that take the budget's bytes, of a byte a value, unless that was done."""
    path = study.path(identity)

    def compute() -> dict[str, Any]:
        started = time.monotonic()
        train, budget = study.train, study.budget(identity["ipc"])
        # As for learned memories, a file's header comes on top by the paper's rule.
        beside = bytes_beside(study.settings.number_format, train.num_classes)
        values_per_image = math.prod(train.image_shape)
        passes = study.settings.selection_epochs * len(train)
        order = hmn_replay.select_images(
            train,
            method,
            num_images=max(1, budget.num_bytes // values_per_image),
            config=training(study, identity["ipc"]).replace(num_passes=passes),
            seed=identity["seed"],
            device=study.settings.device,
            progress=sys.stderr.isatty(),
        )
        images = hmn_replay.raw_images(train, budget.num_bytes + beside, selection=order)
        images.save(path)
        return {
            "images": images.num_images,
            "bytes": images.file_bytes,
            "values": images.num_images * values_per_image,
            "seconds": time.monotonic() - started,
        }

    return finished(study, compute, path, identity)


def train_once(
    study: Study,
    identity: dict[str, Any],
    path: Path | None,
    load: Callable[[Path], Memory] | None = None,
    network: str = "convnet",
) -> None:
    """Train fresh networks on a memory's images and score each, unless that was done.

    Args:
        study: How they are trained, and what they are scored on.
        identity: Of what they learn from, its ``ipc`` and ``seed`` among others.
        path: The memory's file; None for nothing to learn from.
        load: Reads it. Default: :func:`hmn_replay.load`.
        network: Their architecture.
    """
    if path is None:
        return
    memory = functools.cache(functools.partial(load or hmn_replay.load, path))

    def compute(number: int) -> dict[str, Any]:
        _, accuracy = hmn_replay.evaluate(
            memory(),
            study.test,
            config=training(study, identity["ipc"], network),
            seed=derive_seed(identity["seed"], "training", number),
            device=study.settings.device,
            progress=sys.stderr.isatty(),
        )
        return {"accuracy": accuracy}

    for number in range(study.settings.trainings):
        which = {**identity, "network": network, "training": number}
        study.store.once("training", which, functools.partial(compute, number))


def training(study: Study, ipc: int, network: str = "convnet") -> TrainingConfig:
    """Return how a network is trained on what a memory holds."""
    settings, passes = study.settings, study.settings.passes
    if passes is None:
        layout, _ = study.fit("idc", ipc)
        passes = IDC_EPOCHS * layout.group_size * ipc * study.train.num_classes
        passes = min(passes, settings.most_passes or passes)
    return TrainingConfig(
        network=network,
        width=settings.width,
        num_passes=passes,
        augmentations=augmentations(study),
    )


def augmentations(study: Study) -> tuple[str, ...]:
    """Return IDC's augmentations of a training: its code mirrors no digit either."""
    names = TrainingConfig().augmentations
    return tuple(name for name in names if name != "flip" or study.name not in DIGITS)
