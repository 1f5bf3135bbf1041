"""Making labels: a teacher trained on real images, and what it says of a memory's images.

Soft labels are the teacher's probabilities, as a mean over augmentations, of an image as the memory
gives it back and, where that is known, of the real image that it comes from. A labeller is a
narrower teacher, which goes into the file itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from hmn_replay.budget import as_int
from hmn_replay.data.augment import STRATEGIES, draw_augmentation
from hmn_replay.data.images import (
    ImageSource,
    as_labelled_images,
    channel_stats,
    show_label,
)
from hmn_replay.data.lookup import Images, as_floats, images_at_once
from hmn_replay.distributed import ALONE, Team
from hmn_replay.errors import ConfigError, DataError, TrainingError
from hmn_replay.memory.base import Memory
from hmn_replay.memory.labels import LABELS, NO_LABELS, LabelBytes, Labeller, expected_bytes
from hmn_replay.runtime import derive_seed, make_generator, resolve_device, without_autocast
from hmn_replay.settings import Settings, one_of
from hmn_replay.training.networks import (
    Network,
    default_depth,
    device_of,
    evaluating,
    tensors_of,
)
from hmn_replay.training.train import Compile, TrainingConfig, train_network, try_network

__all__ = [
    "LABEL_AUGMENTATIONS",
    "LabelConfig",
    "add_labels",
    "as_label_config",
    "check_teacher",
    "label_images",
    "train_teacher",
]

LABEL_AUGMENTATIONS = ("flip", "crop")
"""Those of the images that soft labels are made of, by default."""

# To plan with: bits of a labeller's weight, and bytes of a tensor's name and place in the header.
_WEIGHT_BITS, _HEADER_BYTES = 4.2, 80
_TEACHER_PASSES, _LABELLER_PASSES = 160_000, 1_000_000
# A teacher is not shown a few images more often than that: it knows them by heart.
_MOST_TEACHER_EPOCHS = 200


class LabelConfig(Settings):
    """What is kept of images beside their classes, and how it is made.

    Raises:
        UnknownOptionError: A keyword that is no field.
        ConfigError: A value of another type, or outside its range.
    """

    labels: Annotated[str, one_of("labels", LABELS)] = "hard"
    """Which labels networks that learn from the memory are trained with, in the same bytes: hard,
    an image's class; soft, what a teacher predicted of it; labeller, what a small network in the
    file predicts of it each time that it is augmented."""

    teacher_width: Annotated[int, Field(ge=1)] = 64
    """Channels of the blocks of the ConvNet that makes soft labels."""

    teacher_passes: Annotated[int, Field(ge=1)] | None = None
    """Real images that the teacher or the labeller is shown in all, each 200 times at most; None
    for 160,000 for a teacher and 1,000,000 for a labeller, which gains by them and takes no byte
    more."""

    labeller_width: Annotated[int, Field(ge=1, le=512)] = 16
    """Channels of the blocks of the ConvNet in the file."""

    label_views: Annotated[int, Field(ge=1)] = 8
    """How many augmentations of an image its soft label is a mean over; half of them, rounded down
    but one at least, are of its real source where that is known, and as many of the decoded one."""

    label_augmentations: tuple[Annotated[str, one_of("augmentation", STRATEGIES)], ...] = (
        LABEL_AUGMENTATIONS
    )
    """Augmentations of these: without flip where a mirrored image is of no class, as digits are."""

    @property
    def makes_soft(self) -> bool:
        """Whether soft labels are made."""
        return self.labels == "soft"

    def teacher_training(self, num_images: int, precision: str, compile: Compile) -> TrainingConfig:
        """Return the training of the teacher, or of the labeller.

        Args:
            num_images: How many real images there are.
            precision: As in :class:`TrainingConfig`.
            compile: As in :class:`TrainingConfig`.
        """
        most = _LABELLER_PASSES if self.labels == "labeller" else _TEACHER_PASSES
        num_passes = min(self.teacher_passes or most, _MOST_TEACHER_EPOCHS * num_images)
        return TrainingConfig(
            width=self.labeller_width if self.labels == "labeller" else self.teacher_width,
            num_passes=num_passes,
            epoch_images=num_passes,
            precision=precision,
            compile=compile,
        )

    def planned_bytes(self, image_shape: Sequence[int], num_classes: int) -> LabelBytes:
        """Return about how many bytes labels take.

        Args:
            image_shape: ``(C, H, W)``.
            num_classes: Of the memory.
        """
        if self.makes_soft:
            return LabelBytes(_HEADER_BYTES, expected_bytes(num_classes))
        if self.labels == "hard":
            return NO_LABELS
        channels, height, wide = image_shape
        depth, width = default_depth(height, wide), self.labeller_width
        weights = width * (9 * (channels + (depth - 1) * width))
        weights += num_classes * width * (height >> depth) * (wide >> depth)
        plain = 2 * (depth * width + channels + depth + 2) + num_classes
        return LabelBytes(2 * (_HEADER_BYTES + plain) + math.ceil(weights * _WEIGHT_BITS / 8))


def as_label_config(labels: LabelConfig | str) -> LabelConfig:
    """Return settings of labels, or those that a word stands for."""
    return labels if isinstance(labels, LabelConfig) else LabelConfig(labels=labels)


def train_teacher(
    source: ImageSource,
    labels: LabelConfig | str = "soft",
    *,
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: str = "auto",
    progress: bool = False,
) -> Network:
    """Train the network that makes soft labels, or that becomes a labeller.

    Args:
        source: Real images; see :func:`hmn_replay.as_labelled_images`.
        labels: ``"soft"`` or ``"labeller"``, or their settings.
        seed: Seed of weights, order and augmentation.
        device: Where to train.
        precision: As in :class:`TrainingConfig`.
        progress: Whether to show a bar on standard error.

    Returns:
        The network, whose buffer ``classes`` holds the label of each logit.

    Raises:
        ConfigError: ``labels`` is "hard", which needs no teacher, or a value out of range.
        TrainingError: The training diverged.
    """
    config, data = as_label_config(labels), as_labelled_images(source)
    _check_wanted(config)
    network = train_network(
        data.images,
        data.class_indices,
        data.num_classes,
        config=config.teacher_training(len(data), precision, "auto"),
        seed=derive_seed(seed, "teacher"),
        device=device,
        progress=progress,
    )
    network.classes.copy_(data.classes)
    return network


def check_teacher(
    teacher: Network, labels: LabelConfig, classes: Tensor, image_shape: Sequence[int]
) -> None:
    """Refuse a network that labels cannot be made from, before any work.

    Args:
        teacher: What is given.
        labels: Which labels are to be made.
        classes: int64 ``(K,)``, those of the memory.
        image_shape: ``(C, H, W)`` of its images.

    Raises:
        ConfigError: Labels are hard; or the network has other classes, does not take such images,
            or is no labeller of that width.
        TrainingError: It has diverged.
    """
    _check_wanted(labels)
    if not isinstance(teacher, Network):
        raise ConfigError(
            "teacher is a network such as train_teacher() or evaluate() returns; "
            f"got {teacher!r:.60}"
        )
    own, wanted = {*teacher.classes.tolist()}, {*classes.tolist()}
    if own != wanted:
        differing = ", ".join(map(show_label, sorted(own ^ wanted)[:6]))
        raise ConfigError(
            f"the teacher has {len(own)} classes and the memory {len(wanted)}, and these are not "
            f"in both: {differing}; train it on images of all classes that the memory will have"
        )
    device = device_of(teacher)
    generator = make_generator(0, "teacher")
    images = torch.rand((2, *image_shape), generator=generator, dtype=torch.float32).to(device)
    with without_autocast(device):
        logits = try_network(teacher, images, len(classes))
    if not bool(logits.isfinite().all()):
        raise TrainingError("the teacher's logits are not finite: its training diverged")
    if labels.labels == "labeller":
        width = Labeller.of(teacher, image_shape).width
        if width != labels.labeller_width:
            raise ConfigError(
                f"the teacher, which is to be the labeller, has {width} channels, and room is "
                f"planned for {labels.labeller_width}: set labeller_width={width}"
            )


def _check_wanted(labels: LabelConfig) -> None:
    if labels.labels == "hard":
        raise ConfigError("hard labels need no teacher; pass labels='soft' or 'labeller'")


@torch.no_grad()
def label_images(
    network: Callable[[Tensor], Tensor],
    parts: Sequence[Images],
    *,
    views: int = 8,
    augmentations: Sequence[str] = LABEL_AUGMENTATIONS,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Tensor:
    """Return what a network says of images: the mean of its probabilities over augmentations.

    Args:
        network: From float images ``(B, C, H, W)`` in [0, 1] to logits ``(B, K)``, used as it is: a
            module is best in evaluation mode.
        parts: Images, float in [0, 1] or uint8, ``(N, C, H, W)`` each: several ones of every image,
            such as it is decoded and as it was, whose labels are averaged.
        views: How many augmentations, which the parts share among them; one each at least.
        augmentations: Their names; see :func:`hmn_replay.data.augment.draw_augmentation`.
        seed: Seed of the augmentations.
        device: Where the network is. Default: that of its parameters, or that of the images.

    Returns:
        float32 ``(N, K)`` on the CPU, rows that sum to one.

    Raises:
        DataError: There are no parts, or they are not as many images of one shape each.
        ConfigError: ``views`` is below 1.
    """
    shapes = [tuple(part.shape) for part in parts]
    if not shapes or len(shapes[0]) != 4 or len(set(shapes)) > 1:
        raise DataError(
            "expected a list of images (N, C, H, W), all of the same shape: several ones of every "
            f"image, or [images]; got {shapes[:4]}"
        )
    if (as_int(views) or 0) < 1:
        raise ConfigError(f"views must be a whole number of 1 or more; got {views!r}")
    first = parts[0]
    shape, size = first.shape[1:], images_at_once(first.shape[1:])
    mean, std = channel_stats(first)
    target = None if device is None else resolve_device(device)
    if target is None and isinstance(network, nn.Module):
        target = device_of(network)
    rows = []
    for chunk in torch.arange(len(first)).split(size):
        total = torch.zeros((), dtype=torch.float32)
        each = max(1, views // len(parts))
        for images in parts:
            floats = as_floats(images[chunk])
            floats = floats if target is None else floats.to(target)
            for view in range(each):
                augment = draw_augmentation(
                    augmentations,
                    (shape[1], shape[2]),
                    make_generator(seed, "label views", view, int(chunk[0])),
                    batch=len(chunk),
                    fill=mean,
                    std=std,
                )
                total = total + network(augment(floats)).float().softmax(dim=1)
        rows.append((total / (each * len(parts))).cpu())
    return torch.cat(rows) if rows else torch.empty((0, 0), dtype=torch.float32)


def add_labels(
    memory: Memory,
    network: Network,
    config: LabelConfig,
    *,
    sources: Images | None = None,
    indices: Tensor | None = None,
    seed: int = 0,
    team: Team = ALONE,
) -> None:
    """Give a memory soft labels, or a labeller, made from a trained network.

    Its file may then be over the budget; see :meth:`Memory.shrink`.

    Args:
        memory: The memory.
        network: The teacher, whose buffer ``classes`` says which of the memory's classes each
            logit stands for; shown in evaluation mode, and without the caller's autocast.
        config: What to make.
        sources: uint8 ``(B, C, H, W)``: the real images that the memory's come from, where that is
            known.
        indices: int64 ``(B,)``, positions of the images that get labels. Default: all.
        seed: Seed of augmentations.
        team: The processes that make the memory together.
    """
    # Processes may differ in last bits.
    team.copy_first(tensors_of(network).values())
    classes = memory.classes.cpu()
    order = (network.classes.cpu() == classes[:, None]).int().argmax(dim=1)
    if config.labels == "labeller":
        memory.set_labeller(Labeller.of(network, memory.image_shape).of_classes(order))
    elif config.makes_soft:
        positions = torch.arange(memory.num_images) if indices is None else indices
        decoded = memory.decoded(torch.uint8)
        own = decoded[positions] if isinstance(decoded, Tensor) else decoded.take(positions)
        parts = [own] if sources is None else [own, sources]
        with evaluating(network), without_autocast(device_of(network)):
            rows = label_images(
                network,
                parts,
                views=config.label_views,
                augmentations=config.label_augmentations,
                seed=seed,
            )[:, order]
        team.copy_first([rows])
        memory.set_soft_labels(rows, positions)
