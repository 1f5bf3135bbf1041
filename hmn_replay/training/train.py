"""Training of a network on images: by SGD, CutMix and differentiable augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field, field_serializer
from torch import Tensor, nn
from tqdm import tqdm

from hmn_replay.data.augment import STRATEGIES, cutmix, draw_augmentation
from hmn_replay.data.images import channel_stats
from hmn_replay.data.lookup import (
    Images,
    are_probabilities,
    as_floats,
    check_labelled,
    held_on,
    images_at_once,
)
from hmn_replay.distributed import ALONE, Team
from hmn_replay.errors import ConfigError, DataError, TrainingError
from hmn_replay.registry import name_of
from hmn_replay.runtime import (
    PRECISIONS,
    autocast,
    deterministic_cudnn,
    isolated_if,
    make_generator,
    resolve_device,
    resolve_precision,
)
from hmn_replay.settings import Settings, one_of
from hmn_replay.training._compiled import (
    Compile,
    CompiledFunction,
    can_compile,
    mixes_images,
    resolve_compile,
)
from hmn_replay.training.networks import (
    NETWORKS,
    Network,
    NetworkFactory,
    build_network,
    evaluating,
    is_built_in,
)

__all__ = [
    "MAX_LEARNING_RATE",
    "SCHEDULES",
    "Compile",
    "CompiledFunction",
    "CompiledLoss",
    "SoftTargets",
    "Targets",
    "TrainingConfig",
    "add_gradients",
    "checked_loss",
    "cosine_lr",
    "draw_batch",
    "draw_epoch",
    "make_network",
    "mixed_loss",
    "mixes_images",
    "names_of_batch",
    "resolve_compile",
    "train_network",
    "try_network",
    "wants_compiling",
]

SCHEDULES = ("cosine", "constant")

Targets: TypeAlias = "Tensor | Callable[[Tensor], Tensor]"
"""Soft labels: the classes' probabilities for each image, float ``(N, K)`` with rows that sum to
one; or a labeller, a function from float images ``(B, C, H, W)`` in [0, 1] to logits ``(B, K)``."""

MAX_LEARNING_RATE = 1e30
"""Far beyond what converges, and small enough for float32 to hold what is computed from it."""

LABEL_WEIGHT = 0.9
"""Weight of soft labels in the loss, where nothing is known of the images."""

# Images x width x pixels that a core trains on in about the seconds that compiling saves it: the
# first compilation, which torch keeps on disk, takes half a minute to a minute.
_WORTH_COMPILING = 2.5e9

# Steps from one look at the loss, which waits for a GPU, to the next, at most; at first there are
# fewer: most of what diverges does so early.
_STEPS_BETWEEN_CHECKS = 64

# Of these, IDC's code applies one a batch.
_MOVING = ("crop", "scale", "rotate")


class TrainingConfig(Settings):
    """How a network is trained; the defaults are IDC's evaluation (Kim et al. 2022).

    But for the learning rate, which IDC's code divides by 5 after 2/3 and 5/6 of the epochs.

    Raises:
        UnknownOptionError: A keyword that is no field.
        ConfigError: A value of another type, or outside its range.
    """

    hints: ClassVar[Mapping[str, str]] = {
        "epochs": "num_passes counts images: epochs times the images of the source"
    }

    network: Annotated[str | NetworkFactory, one_of("network", NETWORKS)] = "convnet"
    """Architecture: a registered name, or a function from image shape and number of classes to a
    module."""

    width: Annotated[int, Field(ge=1)] = 128
    """Channels of ConvNet's blocks."""

    depth: Annotated[int, Field(ge=1)] | None = None
    """Number of ConvNet's blocks; None for the field's choice by image size."""

    num_passes: Annotated[int, Field(ge=1)] = 40_000
    """Images that the network is shown in all, repeats counted: rounded to whole epochs, and one
    epoch at least."""

    epoch_images: Annotated[int, Field(ge=1)] | None = None
    """Images of an epoch, drawn anew for each; None for all there are."""

    batch_size: Annotated[int, Field(ge=2)] = 64
    """Images in a step, at most. Batches of an epoch are of equal size, to within one image, and
    never of one image, which batch normalisation cannot take: three images at 2 are one batch."""

    learning_rate: Annotated[float, Field(gt=0, le=MAX_LEARNING_RATE)] = 0.01
    """Learning rate of the first step."""

    schedule: Annotated[str, one_of("schedule", SCHEDULES)] = "cosine"
    """How the learning rate changes: cosine for a fall to 0 along half a cosine, or constant."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""

    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay of SGD, on every parameter."""

    cutmix_probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability that a batch is mixed by CutMix."""

    augmentations: tuple[Annotated[str, one_of("augmentation", STRATEGIES)], ...] = (
        "color",
        "crop",
        "flip",
        "scale",
        "rotate",
    )
    """Augmentations, drawn for every image. Of crop, scale and rotate, each batch gets one, as in
    IDC's code."""

    label_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    """Weight in [0, 1] of soft labels, or of a labeller, in the loss; hard ones have the rest. None
    for 0.9, and in :func:`hmn_replay.evaluate` for what suits the memory: 0.5 where its images are
    learned."""

    temperature: Annotated[float, Field(gt=0)] = 2.0
    """What the logits of the network, and those that soft labels stand for, are divided by where
    the two are compared."""

    precision: Annotated[str, one_of("precision", PRECISIONS)] = "float32"
    """Precision of the network's computations: float32; bfloat16 for autocast, which is less exact;
    or auto, for bfloat16 where the processor multiplies it natively."""

    compile: Compile = "auto"
    """Whether steps are compiled by torch.compile, which makes them faster, most so in bfloat16,
    after a minute of compiling, or seconds where torch has the result on disk from before: True,
    False, or auto for a ConvNet on a CPU with a C++ compiler, where the training is long enough to
    gain. Both ways agree but for rounding. Where compiling fails, there is a warning, and steps
    are not compiled."""

    @field_serializer("network")
    def _named(self, network: Any) -> str:
        """Return a function by its name, so that reports have JSON's types."""
        return name_of(network)


@torch.inference_mode(False)
def train_network(
    images: Images,
    class_indices: Tensor,
    num_classes: int,
    *,
    targets: Targets | None = None,
    config: TrainingConfig | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool | Callable[[int, int], None] = False,
    on_epoch: Callable[[int, Network], None] | None = None,
    team: Team = ALONE,
    stats: tuple[Tensor, Tensor] | None = None,
) -> Network:
    """Train a fresh network by SGD, CutMix and differentiable augmentation.

    The images are normalised by their own mean and standard deviation, and shuffled anew every
    epoch. A tensor of images is held on the device in its own dtype, so that uint8 takes a quarter
    of the memory of float32; of a lookup, only a batch is.

    Args:
        images: float in [0, 1] or uint8, ``(N, C, H, W)``, N 1 or more.
        class_indices: int64 ``(N,)`` in [0, num_classes).
        num_classes: Number of logits.
        targets: Soft labels to learn beside the hard ones, or a labeller, which is shown the
            augmented images; see :data:`Targets`. Default: None, hard labels alone.
        config: How to train. Default: ``TrainingConfig()``.
        seed: Seed of weights, order and augmentation; the global random state is left as it was.
        device: Where to train. Default: CUDA where present, else the CPU.
        progress: Whether to show a bar on standard error, or a function that is called after every
            step with the number of images seen so far and that of all to be seen.
        on_epoch: Called after every epoch with its number, from 0, and the network, which it may
            put into evaluation mode: to record margins, say.
        team: The processes that share each batch; all call this alike. See
            :func:`add_gradients`.
        stats: What :func:`hmn_replay.data.images.channel_stats` returns of the images, where it is
            known. Default: None, they are measured.

    Returns:
        The network of the last epoch, in evaluation mode, on the device.

    Raises:
        DataError: The images or class indices are not as said above.
        TrainingError: The training diverged: its loss, which is looked at now and then and after
            the last step, is NaN or infinite.
    """
    config = config or TrainingConfig()
    check_labelled(images, class_indices)
    if not 0 <= int(class_indices.min()) <= int(class_indices.max()) < num_classes:
        raise DataError(
            f"expected class indices in [0, {num_classes}), got {int(class_indices.min())} to "
            f"{int(class_indices.max())}; give positions among the sorted labels, not labels"
        )
    if isinstance(targets, Tensor):
        wanted = (len(images), num_classes)
        if targets.shape != wanted or not are_probabilities(targets):
            raise DataError(
                f"expected soft labels {wanted}, rows of finite probabilities of 0 or more that "
                f"are not all 0, got {tuple(targets.shape)} of other values or another shape"
            )
    device = resolve_device(device)
    network = make_network(images, num_classes, config, seed, stats).to(device)
    mean, std = network.mean.cpu(), network.std.cpu()
    images, class_indices = held_on(images, device), class_indices.to(device)
    on_device = isinstance(images, Tensor)  # a lookup takes positions on the CPU
    if isinstance(targets, Tensor):
        targets = (targets.to(device, torch.float32).log() / config.temperature).softmax(1)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    epoch_images = min(config.epoch_images or len(images), len(images))
    num_epochs = max(1, round(config.num_passes / epoch_images))
    num_seen, num_passes = 0, num_epochs * max(2, epoch_images)
    is_compiled = wants_compiling(config, images.shape[1:], num_passes, device)
    compiled = CompiledLoss(config.precision) if is_compiled else None
    # A sum stays NaN or infinite once it is.
    total_loss, next_check = torch.zeros((), dtype=torch.float32, device=device), 1
    draws_globally = not is_built_in(config.network)
    with (
        deterministic_cudnn(device),
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
            num_steps, steps_done = num_epochs * len(batches), (epoch + 1) * len(batches)
            for number, chosen in enumerate(batches):
                indices = chosen.to(device, non_blocking=True)
                if config.schedule == "cosine":
                    step = epoch * len(batches) + number
                    for group in optimizer.param_groups:
                        group["lr"] = cosine_lr(step, num_steps, config.learning_rate)
                batch, first, second, lam = draw_batch(
                    as_floats(images[indices if on_device else chosen].to(device)),
                    indices,
                    mean,
                    std,
                    generator,
                    augmentations=config.augmentations,
                    cutmix_probability=config.cutmix_probability,
                )
                optimizer.zero_grad()
                soft = _soft_targets(targets, batch, first, second, lam, num_classes, config)
                with isolated_if(draws_globally, device, seed, "training", epoch, number):
                    total_loss += add_gradients(
                        network,
                        batch,
                        class_indices[first],
                        class_indices[second],
                        lam,
                        soft=soft,
                        precision=config.precision,
                        team=team,
                        compiled=compiled,
                    )
                optimizer.step()
                num_seen += len(indices)
                bar.update(len(indices))
                if callable(progress):
                    progress(num_seen, num_passes)
            if steps_done >= min(next_check, num_steps):
                next_check = steps_done + min(steps_done, _STEPS_BETWEEN_CHECKS)
                # Each process of a team has seen its own part of the loss.
                if not math.isfinite(*team.sum(float(total_loss))):
                    raise TrainingError(
                        f"the training diverged at learning rate {config.learning_rate}: its loss "
                        f"is NaN or infinite by step {steps_done} of {num_steps}; lower the "
                        "learning rate, or check that the images are in [0, 1]"
                    )
            if on_epoch is not None:
                on_epoch(epoch, network)
    return network.eval()


def make_network(
    images: Images,
    num_classes: int,
    config: TrainingConfig,
    seed: int = 0,
    stats: tuple[Tensor, Tensor] | None = None,
) -> Network:
    """Return the network that :func:`train_network` begins with, on the CPU.

    Args:
        images: float in [0, 1] or uint8, ``(N, C, H, W)``; their shape, mean and standard deviation
            are read.
        num_classes: Number of logits.
        config: ``network``, ``width`` and ``depth`` are read.
        seed: Seed of the network's weights.
        stats: As in :func:`train_network`.

    Raises:
        ConfigError: A network from outside that does not give so many logits for such images.
    """
    mean, std = channel_stats(images) if stats is None else stats
    network = build_network(
        config.network,
        images.shape[1:],
        num_classes,
        width=config.width,
        depth=config.depth,
        mean=mean,
        std=std,
        seed=seed,
    ).cpu()
    if not is_built_in(config.network):
        try_network(network, as_floats(images[:2]).cpu(), num_classes)
    return network


def try_network(network: Network, images: Tensor, num_classes: int) -> Tensor:
    """Return the logits of a few images, and refuse a network that gives none for them.

    Args:
        network: It is in evaluation mode here, and as it was afterwards.
        images: float ``(N, C, H, W)`` in [0, 1], where the network is.
        num_classes: How many logits it is to give.

    Raises:
        ConfigError: It does not take such images, or gives something else.
    """
    name = type(network.body).__name__
    try:
        with torch.no_grad(), evaluating(network):
            logits: Tensor = network(images)
            shape = tuple(logits.shape)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ConfigError(f"{name} does not take images {tuple(images.shape)}: {error}") from error
    if shape != (len(images), num_classes):
        raise ConfigError(
            f"{name} gives {shape} for {len(images)} images of {num_classes} classes; expected "
            f"logits {(len(images), num_classes)}: make its last layer by the number of classes "
            "that the function is given"
        )
    return logits


def wants_compiling(
    config: TrainingConfig, image_shape: Sequence[int], num_images: int, device: torch.device
) -> bool:
    """Return whether passes through a training's networks are to be compiled.

    With ``"auto"``, those of a ConvNet on a CPU are where that saves the time that it takes.

    Args:
        config: ``compile``, ``network`` and ``width`` are read.
        image_shape: ``(C, H, W)``.
        num_images: Images that networks of this architecture are shown in all.
        device: Where they are trained.
    """
    if config.compile != "auto":
        return config.compile
    work = num_images * config.width * math.prod(image_shape[1:])
    return (
        config.network == "convnet"
        and device.type == "cpu"
        and work >= _WORTH_COMPILING * torch.get_num_threads()
        and can_compile(device)
    )


def draw_epoch(
    num_images: int, batch_size: int, generator: torch.Generator, epoch_images: int | None = None
) -> tuple[Tensor, ...]:
    """Draw the batches of one epoch, no image twice.

    Args:
        num_images: How many images there are, 1 or more.
        batch_size: Images of a batch at most, 2 or more; of fewer than twice as many images, one
            batch may have one more.
        generator: Generator of their order.
        epoch_images: How many images the epoch shows. Default: all.

    Returns:
        For each batch, the positions of its images, int64. Batches are of equal size to within one
        image, and never of a single one, which batch normalisation cannot take: a single
        image is repeated.
    """
    size = max(2, min(epoch_images or num_images, num_images))
    num_batches = max(1, min(math.ceil(size / batch_size), size // 2))
    order = torch.randperm(max(2, num_images), generator=generator)[:size] % num_images
    return order.tensor_split(num_batches)


def names_of_batch(augmentations: Collection[str], generator: torch.Generator) -> list[str]:
    """Return the augmentations of one training batch: of those that move images, one is drawn."""
    names = [name for name in augmentations if name not in _MOVING]
    moving = [name for name in augmentations if name in _MOVING]
    if moving:
        names.append(moving[int(torch.randint(len(moving), (), generator=generator))])
    return names


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
        mean: ``(C,)``, the value of pixels that padding and cutout fill.
        std: ``(C,)``, the unit of brightness.
        generator: Generator of all draws.
        augmentations: Some of :data:`hmn_replay.data.augment.STRATEGIES`, drawn for every image; of
            `crop`, `scale` and `rotate`, one for the whole batch.
        cutmix_probability: Probability that the batch is mixed by CutMix, in [0, 1].

    Returns:
        The images, two labels of each, int64 ``(N,)``, and the share of the loss that the first
        labels have; see :func:`hmn_replay.data.augment.cutmix`.
    """
    names = names_of_batch(augmentations, generator)
    height, width = images.shape[2:]
    augment = draw_augmentation(
        names, (height, width), generator, batch=len(images), fill=mean, std=std
    )
    return cutmix(augment(images), labels, generator, probability=cutmix_probability)


def cosine_lr(step: float, num_steps: float, peak: float) -> float:
    """Return the learning rate of one step, from ``peak`` at step 0 to 0 at ``num_steps``."""
    return 0.5 * peak * (1.0 + math.cos(math.pi * step / num_steps))


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """What the images of a batch are said to be, beside their labels (Hinton et al. 2015).

    The loss is ``(1 - weight)`` times that of the labels, and ``weight * temperature ** 2`` times
    the cross-entropy of the logits over the temperature with the targets.

    Attributes:
        targets: float ``(N, K)``, probabilities at the temperature; rows sum to one.
        weight: Share of the loss, in [0, 1].
        temperature: What logits are divided by, above 0.
    """

    targets: Tensor
    weight: float
    temperature: float

    def scaled(self, scale: float) -> Tensor:
        """Return the targets times their weight in the loss, times a number."""
        return self.targets * (scale * self.weight * self.temperature**2)


class CompiledLoss:
    """:func:`mixed_loss` of a network, compiled at the first batch, for :func:`add_gradients`.

    What is compiled takes a number of images of which there are four from one power of two to the
    next: smaller batches are padded by images of weight 0, and serve trainings of other batch
    sizes, too. With batch normalisation, it takes any number of images. A batch of half the largest
    or less is not compiled, and none is once compiling has failed.

    Args:
        precision: Precision of the network; see :func:`hmn_replay.runtime.autocast`.
        backend: What torch.compile compiles with.
    """

    def __init__(self, precision: str, backend: str | Callable[..., Any] = "inductor") -> None:
        self.precision = precision
        self._padded = CompiledFunction(_weighted_loss, None, backend)
        self._of_any_size = CompiledFunction(_weighted_loss, (0, 0, 1, 0), backend)
        self._largest = 0

    def __call__(
        self,
        network: nn.Module,
        images: Tensor,
        labels_a: Tensor,
        labels_b: Tensor,
        lam: float,
        share: float,
        soft: SoftTargets | None,
    ) -> Tensor | None:
        """Return ``share`` times :func:`mixed_loss`, with a graph; None if it is not compiled."""
        count = len(images)
        self._largest = max(self._largest, count)
        compiled, num_rows = self._padded, _round_up(self._largest)
        if mixes_images(network):
            compiled, num_rows = self._of_any_size, count
        if compiled.has_failed or 2 * count <= self._largest:
            return None
        scale = share / count
        weights = torch.tensor([[lam], [1.0 - lam]], dtype=torch.float32)
        weights = weights * (scale * (1.0 - soft.weight if soft else 1.0))
        weights = F.pad(weights.repeat(1, count), (0, num_rows - count))
        loss: Tensor | None = compiled.attempt(
            network,
            *(_repeat_first(rows, num_rows) for rows in (images, labels_a, labels_b)),
            weights.to(images.device, non_blocking=True),
            F.pad(soft.scaled(scale), (0, 0, 0, num_rows - count)) if soft else None,
            soft.temperature if soft else None,
            resolve_precision(self.precision, images.device),
        )
        return loss


def add_gradients(
    network: nn.Module,
    images: Tensor,
    labels_a: Tensor,
    labels_b: Tensor,
    lam: float,
    *,
    soft: SoftTargets | None = None,
    precision: str = "float32",
    team: Team = ALONE,
    part_size: int | None = None,
    compiled: CompiledLoss | None = None,
) -> Tensor:
    """Add the gradient of :func:`mixed_loss` over a whole batch to the network's parameters.

    A large batch goes through the network in parts, and each process of a team takes its share of
    the rows: the sum is the gradient of the mean over the batch. Batch normalisation depends on the
    whole batch: with it, there are neither parts nor shares, and every process computes all.

    Args:
        network: Maps images to logits ``(N, K)``. Its gradients before the call are those of an
            earlier part of the same batch, or None; every process of a team ends with the same.
        images: float ``(N, C, H, W)``, the same in every process, as are the labels.
        labels_a: int64 ``(N,)``, class indices.
        labels_b: int64 ``(N,)``, class indices.
        lam: Share of the loss that ``labels_a`` have, in [0, 1].
        soft: Soft targets beside the labels, the same in every process. Default: None.
        precision: Precision of the network; see :func:`hmn_replay.runtime.autocast`.
        team: The processes that share the batch.
        part_size: Images that go through the network at once, at most. Default: 512 of 32 x 32, and
            as many pixels of other sizes.
        compiled: What compiles the loss of the same precision, kept from step to step. Default: it
            is not compiled.

    Returns:
        The loss, a scalar without a graph: this process's part of the mean over the batch.
    """
    part_size = images_at_once(images.shape[1:]) if part_size is None else part_size
    if mixes_images(network):
        # All processes must get the same, and compiling may fail in one of them.
        compiled = compiled if team.size == 1 else None
        part_size, team = len(images), ALONE
    total = torch.zeros((), dtype=torch.float32, device=images.device)
    rows = (images, labels_a, labels_b, labels_a if soft is None else soft.targets)
    shares = (team.share(values).split(part_size) for values in rows)
    for own, own_a, own_b, own_targets in zip(*shares, strict=True):
        if not len(own):
            continue
        share, loss = len(own) / len(images), None
        own_soft = None if soft is None else replace(soft, targets=own_targets)
        if compiled is not None:
            loss = compiled(network, own, own_a, own_b, lam, share, own_soft)
        if loss is None:
            with autocast(own.device, precision):
                logits = network(own)
            loss = mixed_loss(logits.float(), own_a, own_b, lam, own_soft) * share
        torch.autograd.backward(loss)
        total += loss.detach()
    team.sum_gradients((p, ...) for p in network.parameters() if p.requires_grad)
    return total


def checked_loss(loss: Any, name: str, wanted: str, source: Tensor, what: str) -> Tensor:
    """Return what a function of the user's returned as a loss, if it is one.

    Args:
        loss: What it returned.
        name: Name of the function, for messages.
        wanted: What is expected, for a message, as ``"loss returns a scalar tensor"``.
        source: What the loss is to have a graph to, where that needs a gradient.
        what: What messages call it.

    Raises:
        ConfigError: It is no scalar tensor, or has no graph.
    """
    if not isinstance(loss, Tensor) or loss.ndim:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r}"
        raise ConfigError(f"{wanted}; {name} returned {got}")
    if source.requires_grad and torch.is_grad_enabled() and not loss.requires_grad:
        raise ConfigError(
            f"the loss that {name} returned does not depend on {what} by any graph; compute it "
            "with gradients enabled, without detach()"
        )
    return loss


def mixed_loss(
    logits: Tensor,
    labels_a: Tensor,
    labels_b: Tensor,
    lam: float,
    soft: SoftTargets | None = None,
) -> Tensor:
    """Return the mean cross-entropy of a batch that CutMix mixed, as a scalar.

    Args:
        logits: float ``(N, K)``.
        labels_a: int64 ``(N,)``, class indices.
        labels_b: int64 ``(N,)``, class indices.
        lam: Share of the loss that ``labels_a`` have, in [0, 1]; ``labels_b`` have the rest.
        soft: Soft targets, mixed as the images are, beside the labels. Default: None.
    """
    loss = F.cross_entropy(logits, labels_a)
    if lam != 1.0:
        loss = lam * loss + (1.0 - lam) * F.cross_entropy(logits, labels_b)
    if soft is None:
        return loss
    distance = -(soft.scaled(1 / len(logits)) * (logits / soft.temperature).log_softmax(1)).sum()
    return (1.0 - soft.weight) * loss + distance


def _weighted_loss(
    network: nn.Module,
    images: Tensor,
    labels_a: Tensor,
    labels_b: Tensor,
    weights: Tensor,
    targets: Tensor | None,
    temperature: float | None,
    precision: str,
) -> Tensor:
    """Return the weighted sum of the cross-entropies with two labels, and with soft targets.

    Weights are ``(2, N)``; targets ``(N, K)`` have theirs in them.
    """
    with autocast(images.device, precision):
        logits = network(images)
    logits = logits.float()
    losses = [F.cross_entropy(logits, labels, reduction="none") for labels in (labels_a, labels_b)]
    loss: Tensor = (weights * torch.stack(losses)).sum()
    if targets is None or temperature is None:
        return loss
    distance: Tensor = (targets * (logits / temperature).log_softmax(1)).sum()
    return loss - distance


def _round_up(count: int) -> int:
    """Return the next of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: a fourth more at most."""
    step = max(1, (1 << (count.bit_length() - 1)) // 4)
    return -(-count // step) * step


def _repeat_first(rows: Tensor, num_rows: int) -> Tensor:
    """Return rows, and the first of them again and again, as many in all as wanted."""
    missing = num_rows - len(rows)
    return torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) if missing else rows


def _soft_targets(
    targets: Targets | None,
    batch: Tensor,
    first: Tensor,
    second: Tensor,
    lam: float,
    num_classes: int,
    config: TrainingConfig,
) -> SoftTargets | None:
    """Return the soft targets of a mixed batch, from those at the temperature or a labeller.

    Args:
        targets: As in :func:`train_network`, probabilities at the temperature.
        batch: The augmented, mixed images.
        first: int64 ``(N,)``, the positions of the images.
        second: int64 ``(N,)``, the positions of those pasted into them.
        lam: The share that the first ones have.
        num_classes: How many logits the network has that learns.
        config: Weight and temperature are read.
    """
    if targets is None:
        return None
    if isinstance(targets, Tensor):
        rows = targets[first] if lam == 1.0 else targets[first].lerp(targets[second], 1.0 - lam)
    else:
        with torch.no_grad():
            logits = targets(batch)
        if logits.shape != (len(batch), num_classes):
            raise ConfigError(
                f"targets is a network that gives logits {(len(batch), num_classes)} for "
                f"{len(batch)} images of {num_classes} classes; it gives {tuple(logits.shape)}"
            )
        rows = (logits.float() / config.temperature).softmax(1)
    weight = LABEL_WEIGHT if config.label_weight is None else config.label_weight
    return SoftTargets(rows, weight, config.temperature)
