"""Train a fresh network on images: by SGD, CutMix and differentiable augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from hmn_replay.condensation.options import convert_fields
from hmn_replay.data.augment import STRATEGIES, cutmix, draw_augmentation
from hmn_replay.data.images import channel_stats
from hmn_replay.data.lookup import Images, as_floats, check_labelled
from hmn_replay.distributed import ALONE, Team
from hmn_replay.errors import ConfigError, DataError, TrainingError
from hmn_replay.runtime import (
    PRECISIONS,
    deterministic_cudnn,
    make_generator,
    resolve_device,
)
from hmn_replay.training.gradients import add_gradients
from hmn_replay.training.networks import NETWORKS, Network, build_network

__all__ = [
    "SCHEDULES",
    "TrainingConfig",
    "cosine_rate",
    "draw_batch",
    "draw_epoch",
    "make_network",
    "train_network",
]

SCHEDULES = ("cosine", "constant")

# Of these, IDC's code applies one a batch.
_MOVING = ("crop", "scale", "rotate")


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained; the defaults are IDC's evaluation (Kim et al. 2022).

    Attributes:
        network: One of :data:`hmn_replay.training.networks.NETWORKS`.
        width: Channels of ConvNet's blocks, 1 or more.
        depth: Number of ConvNet's blocks; None for the field's choice by image size.
        num_passes: Images that the network is shown in all, 1 or more: rounded to whole epochs, and
            one epoch at least.
        epoch_images: Images of an epoch, 1 or more, drawn anew for each; None for all there are.
        batch_size: Images in a step, 2 or more. Batches of an epoch are of equal size, to within
            one image, and never of one image, which batch normalisation cannot take.
        learning_rate: Of the first step, above 0.
        schedule: ``"cosine"``: the rate falls to 0 along half of one; or ``"constant"``.
        momentum: Of SGD, in [0, 1).
        weight_decay: Of SGD, on every parameter, 0 or more.
        cutmix_probability: That a batch is mixed by CutMix, in [0, 1].
        augmentations: Some of :data:`hmn_replay.data.augment.STRATEGIES`, drawn for every image. Of
            `crop`, `scale` and `rotate`, each batch gets one, as in IDC's code.
        precision: ``"float32"``; ``"bfloat16"`` for autocast, which is less exact; ``"auto"`` for
            bfloat16 where the processor multiplies it natively.

    Raises:
        ConfigError: A value of another type, or outside what is said above.
    """

    network: str = "convnet"
    width: int = 128
    depth: int | None = None
    num_passes: int = 40_000
    epoch_images: int | None = None
    batch_size: int = 64
    learning_rate: float = 0.01
    schedule: str = "cosine"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    cutmix_probability: float = 0.5
    augmentations: tuple[str, ...] = ("color", "crop", "flip", "scale", "rotate")
    precision: str = "float32"

    def __post_init__(self) -> None:
        convert_fields(self)
        requirements = {
            "network": (self.network in NETWORKS, f"one of {NETWORKS}"),
            "width": (self.width >= 1, "1 or more"),
            "depth": (self.depth is None or self.depth >= 1, "None, or 1 or more"),
            "num_passes": (self.num_passes >= 1, "1 or more"),
            "epoch_images": (
                self.epoch_images is None or self.epoch_images >= 1,
                "None, or 1 or more",
            ),
            "batch_size": (self.batch_size >= 2, "2 or more"),
            "learning_rate": (0 < self.learning_rate < math.inf, "above 0 and finite"),
            "schedule": (self.schedule in SCHEDULES, f"one of {SCHEDULES}"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more and finite"),
            "cutmix_probability": (0 <= self.cutmix_probability <= 1, "in [0, 1]"),
            "augmentations": (set(self.augmentations) <= set(STRATEGIES), f"among {STRATEGIES}"),
            "precision": (self.precision in PRECISIONS, f"one of {PRECISIONS}"),
        }
        for name, (met, wanted) in requirements.items():
            if not met:
                raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)!r}")


@torch.inference_mode(False)
def train_network(
    images: Images,
    class_indices: Tensor,
    num_classes: int,
    *,
    config: TrainingConfig | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool | Callable[[int, int], None] = False,
    on_epoch: Callable[[int, Network], None] | None = None,
    team: Team = ALONE,
) -> Network:
    """Train a fresh network by SGD, CutMix and differentiable augmentation.

    The images are normalised by their own mean and deviation, and shuffled anew every epoch. A
    tensor of them is held on the device, as it came: a quarter of the memory for uint8; of a lookup
    no more than a batch.

    Args:
        images: float in [0, 1] or uint8, ``(N, C, H, W)``, N 1 or more.
        class_indices: int64 ``(N,)`` in [0, num_classes).
        num_classes: Number of logits.
        config: Default: ``TrainingConfig()``.
        seed: Of weights, order and augmentation; the global random state is not touched.
        device: Where to train. Default: the best device present.
        progress: Whether to show a bar on standard error, or a function that is called after every
            step with the images seen so far and those to see in all.
        on_epoch: Called after every epoch with its number, from 0, and the network, which it may
            put into evaluation mode: to record margins, say.
        team: The processes that share each batch; all call this alike. See
            :func:`hmn_replay.training.gradients.add_gradients`.

    Returns:
        The network of the last epoch, in evaluation mode, on the device.

    Raises:
        DataError: The images or class indices are not as said above.
        TrainingError: The loss left the real numbers.
    """
    config = config or TrainingConfig()
    check_labelled(images, class_indices)
    if not 0 <= int(class_indices.min()) <= int(class_indices.max()) < num_classes:
        raise DataError(
            f"expected class indices in [0, {num_classes}), got {int(class_indices.min())} to "
            f"{int(class_indices.max())}; give positions among the sorted labels, not labels"
        )
    device = resolve_device(device)
    network = make_network(images, num_classes, config, seed).to(device)
    mean, std = network.mean.cpu(), network.std.cpu()
    images, class_indices = images.to(device), class_indices.to(device)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    epoch_images = min(config.epoch_images or len(images), len(images))
    num_epochs = max(1, round(config.num_passes / epoch_images))
    num_seen, num_passes = 0, num_epochs * max(2, epoch_images)
    total_loss = torch.zeros((), device=device)
    with (
        deterministic_cudnn(),
        torch.enable_grad(),
        tqdm(
            total=num_passes,
            desc="train",
            unit="img",
            unit_scale=True,
            disable=progress is not True,
        ) as bar,
    ):
        for epoch in range(num_epochs):
            network.train()
            generator = make_generator(seed, "epoch", epoch)
            batches = draw_epoch(len(images), config.batch_size, generator, epoch_images)
            for number, chosen in enumerate(batches):
                indices = chosen.to(device, non_blocking=True)
                if config.schedule == "cosine":
                    step, num_steps = epoch * len(batches) + number, num_epochs * len(batches)
                    for group in optimizer.param_groups:
                        group["lr"] = cosine_rate(step, num_steps, config.learning_rate)
                batch, labels_a, labels_b, lam = draw_batch(
                    as_floats(images[indices].to(device)),
                    class_indices[indices],
                    mean,
                    std,
                    generator,
                    augmentations=config.augmentations,
                    cutmix_probability=config.cutmix_probability,
                )
                optimizer.zero_grad()
                total_loss += add_gradients(
                    network,
                    batch,
                    labels_a,
                    labels_b,
                    lam,
                    precision=config.precision,
                    team=team,
                )
                optimizer.step()
                num_seen += len(indices)
                bar.update(len(indices))
                if callable(progress):
                    progress(num_seen, num_passes)
            if on_epoch is not None:
                on_epoch(epoch, network)
    # Of a batch that several share, each has seen its own part of the loss.
    if not math.isfinite(*team.sum(float(total_loss))):
        raise TrainingError(
            f"the training loss left the real numbers at learning rate {config.learning_rate}; "
            "lower it, or check that the images are in [0, 1]"
        )
    return network.eval()


def make_network(
    images: Images, num_classes: int, config: TrainingConfig, seed: int = 0
) -> Network:
    """Return the network that :func:`train_network` begins with, on the CPU.

    Args:
        images: Their shape, mean and deviation are read; as in :func:`train_network`.
        num_classes: Number of logits.
        config: ``network``, ``width`` and ``depth`` are read.
        seed: Of its values.
    """
    mean, std = channel_stats(images)
    return build_network(
        config.network,
        images.shape[1:],
        num_classes,
        width=config.width,
        depth=config.depth,
        mean=mean,
        std=std,
        seed=seed,
    )


def draw_epoch(
    num_images: int, batch_size: int, generator: torch.Generator, epoch_images: int | None = None
) -> tuple[Tensor, ...]:
    """Draw the batches of one epoch, no image twice.

    Args:
        num_images: How many there are, 1 or more.
        batch_size: Images of a batch at most, 2 or more.
        generator: Of their order.
        epoch_images: How many of them the epoch shows. Default: all.

    Returns:
        Positions, int64, for each batch: of equal size to within one image, and never of one, which
        batch normalisation cannot take. An image that is alone comes twice.
    """
    size = max(2, min(epoch_images or num_images, num_images))
    num_batches = max(1, min(math.ceil(size / batch_size), size // 2))
    order = torch.randperm(max(2, num_images), generator=generator)[:size] % num_images
    return order.tensor_split(num_batches)


def draw_batch(
    images: Tensor,
    labels: Tensor,
    mean: Tensor,
    std: Tensor,
    generator: torch.Generator,
    *,
    augmentations: Collection[str],
    cutmix_probability: float,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Augment and mix one training batch.

    Args:
        images: float ``(N, C, H, W)`` in [0, 1].
        labels: int64 ``(N,)``.
        mean: ``(C,)``, what padding and cutout leave behind.
        std: ``(C,)``, the unit of brightness.
        generator: Of all draws.
        augmentations: Some of :data:`hmn_replay.data.augment.STRATEGIES`, drawn for every image; of
            `crop`, `scale` and `rotate`, one for the whole batch.
        cutmix_probability: That the batch is mixed by CutMix, in [0, 1].

    Returns:
        As :func:`hmn_replay.data.augment.cutmix`.
    """
    names = [name for name in augmentations if name not in _MOVING]
    moving = [name for name in augmentations if name in _MOVING]
    if moving:
        names.append(moving[int(torch.randint(len(moving), (), generator=generator))])
    height, width = images.shape[2:]
    augment = draw_augmentation(
        names, (height, width), generator, batch=len(images), fill=mean, std=std
    )
    return cutmix(augment(images), labels, generator, probability=cutmix_probability)


def cosine_rate(step: float, num_steps: float, peak: float) -> float:
    """Return the learning rate of one step, from ``peak`` at step 0 to 0 at ``num_steps``."""
    return 0.5 * peak * (1.0 + math.cos(math.pi * step / num_steps))
