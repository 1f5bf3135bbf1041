"""JPEG replay: real images as JPEG under one shared header, the rival that papers leave out.

The whole file counts, header and labels among it, and is filled as well as whole images allow.
A scan once made stays as it is: images are never encoded a second time.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from avalanche.training.supervised import Naive

from hmn_replay.avalanche.losses import Loss
from hmn_replay.avalanche.memory_replay import MemoryReplay
from hmn_replay.baselines.fill import jpeg_images, pack_jpeg_images
from hmn_replay.baselines.jpeg import SUBSAMPLINGS, encode_jpeg_scans
from hmn_replay.baselines.real_images import RealImages, parse_real_images
from hmn_replay.budget import as_int
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.evaluation import evaluate
from hmn_replay.runtime import derive_seed
from hmn_replay.training.train import TrainingConfig
from strategies.settings import Settings, Strategy

__all__ = ["QUALITIES", "TRAINING", "JPEGReplay", "build", "choose_quality", "extend_jpeg"]

QUALITIES = (5, 10, 20, 35, 50, 75)
"""The qualities that are tried."""

TRAINING = TrainingConfig(width=32, num_passes=6000)
"""How a network is trained on each of them, where nobody says otherwise."""

_USUAL_QUALITY = 20
_USUAL_EXPERIENCES = 10
_HOLDOUT = 0.2


def build(settings: Settings) -> Strategy:
    """Build it.

    Options are ``loss``, as of :class:`hmn_replay.MemoryReplay`; ``quality``, 1 to 100, or None to
    choose it on the first experience (the default); and ``training``, the
    :class:`hmn_replay.TrainingConfig` of that choice.

    Raises:
        ConfigError: ``quality`` is none, or the option is unknown.
    """
    replay = JPEGReplay(
        settings.budget_bytes,
        batch_size_mem=settings.batch_size_mem,
        mode=settings.mode,
        expected_classes=settings.expected_classes,
        seed=settings.seed,
        device=settings.device,
        **settings.choose(loss="auto", quality=None, training=TRAINING),
    )
    return Naive(**settings.common(replay))


class JPEGReplay(MemoryReplay):
    """Replays real images from JPEG scans; :func:`build` says what the arguments are."""

    memory: RealImages | None

    def __init__(
        self,
        budget_bytes: int,
        *,
        batch_size_mem: int | None = None,
        mode: Literal["replay", "memory_only"] = "replay",
        expected_classes: int | None = None,
        seed: int = 0,
        device: str | torch.device = "auto",
        loss: Loss = "auto",
        quality: int | None = None,
        training: TrainingConfig = TRAINING,
    ) -> None:
        super().__init__(batch_size_mem=batch_size_mem, mode=mode, loss=loss, seed=seed)
        if quality is not None and not 1 <= (as_int(quality) or 0) <= 100:
            raise ConfigError(f"quality is None or a whole number from 1 to 100; got {quality!r}")
        self.budget_bytes, self.expected_classes = budget_bytes, expected_classes
        self.device, self.quality, self.training = device, quality, training

    def update(self, images: LabelledImages, *, index: int) -> tuple[RealImages, dict[str, Any]]:
        """Add an experience's images, after choosing the quality where it is the first."""
        report: dict[str, Any] = {}
        quality = self.quality
        if self.memory is not None:
            quality = self.report[0]["quality"]
        elif quality is None:
            quality, report["accuracies"] = choose_quality(
                images,
                self.budget_bytes,
                expected_classes=self.expected_classes,
                seed=self.seed,
                device=self.device,
                training=self.training,
            )
        seed = derive_seed(self.seed, "jpeg", index)
        memory = extend_jpeg(self.memory, images, self.budget_bytes, quality=quality, seed=seed)
        return memory, {"quality": quality, **report}

    def memory_from_bytes(self, data: bytes) -> RealImages:
        """Read the bytes of a memory's file."""
        return parse_real_images(data)


def extend_jpeg(
    memory: RealImages | None,
    images: LabelledImages,
    budget_bytes: int,
    *,
    quality: int,
    seed: int = 0,
) -> RealImages:
    """Add images to a memory of JPEG scans, as many of every class as fit the budget.

    The images of a class lie in random order, and those that have to go are its last ones: old
    classes drop scans at random. Those that stay are what they were, byte for byte. A class that
    comes again is drawn anew, from its new images alone.

    Args:
        memory: The old one, which is left as it is; None for none.
        images: The new images.
        budget_bytes: Bytes of the file, header and labels counted.
        quality: libjpeg's, 1 to 100; that of the old memory where there is one.
        seed: Of the draw.

    Raises:
        BudgetError: Not one image fits.
    """
    if memory is None:
        return jpeg_images(images, budget_bytes, quality=quality, seed=seed)
    header = memory.arrays["header"].tobytes()
    blank = torch.zeros(1, *memory.image_shape, dtype=torch.uint8)
    # The header tells which of the two subsamplings the first images were given.
    subsampling = next(
        name
        for name in SUBSAMPLINGS
        if encode_jpeg_scans(blank, quality, subsampling=name)[0] == header
    )
    new = jpeg_images(images, budget_bytes, quality=quality, subsampling=subsampling, seed=seed)
    return pack_jpeg_images(header, {**memory.scans, **new.scans}, budget_bytes)


def choose_quality(
    images: LabelledImages,
    budget_bytes: int,
    *,
    expected_classes: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    training: TrainingConfig = TRAINING,
) -> tuple[int, dict[str, float]]:
    """Choose the quality that a small network learns best from, on held-out real images.

    Each of :data:`QUALITIES` is given the bytes that these classes will have in the end. A network
    is trained on what fits, and scored on a fifth of the images, which are kept back.

    Args:
        images: Of the first experience.
        budget_bytes: Of the whole memory.
        expected_classes: How many classes will come in all. Default: 10 times those of ``images``.
        seed: Of the split, the draw and the training.
        device: Where to train.
        training: Of the network.

    Returns:
        The quality, the lower one of two as good, and the accuracy of each that fits, in [0, 1].
        Where there is nothing to choose by (one class alone, no image to hold out, no room), 20 and
        no accuracy.
    """
    counts = torch.bincount(images.class_indices)
    if images.num_classes < 2 or int(counts.min()) < 2:
        return _USUAL_QUALITY, {}
    train, held_out = images.split(_HOLDOUT, seed)
    num_classes = expected_classes or _USUAL_EXPERIENCES * images.num_classes
    share = budget_bytes * images.num_classes // max(num_classes, images.num_classes)
    accuracies: dict[int, float] = {}
    for quality in QUALITIES:
        try:
            memory = jpeg_images(train, max(share, 1), quality=quality, seed=seed)
        except BudgetError:
            break
        _, accuracies[quality] = evaluate(
            memory, held_out, seed=seed, device=device, config=training
        )
    best = max(accuracies, key=lambda quality: accuracies[quality], default=_USUAL_QUALITY)
    return best, {str(quality): accuracy for quality, accuracy in accuracies.items()}
