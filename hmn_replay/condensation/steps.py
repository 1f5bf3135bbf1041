"""The steps that a condensation is made of, as functions of a memory, real images and a generator.

What a step draws comes from its generator alone, so a step taken again is the same step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hmn_replay.condensation.config import CondenseConfig
from hmn_replay.condensation.rate import RateControl
from hmn_replay.data.augment import Augmentation, draw_augmentation
from hmn_replay.data.images import LabelledImages, channel_stats
from hmn_replay.data.lookup import LabelledView, images_at_once
from hmn_replay.distributed import ALONE, GradientPart, Team
from hmn_replay.errors import ConfigError
from hmn_replay.memory.learned import LearnedMemory
from hmn_replay.objectives import get_objective
from hmn_replay.runtime import autocast, make_generator
from hmn_replay.training.networks import Network, build_network
from hmn_replay.training.train import add_gradients, draw_batch

__all__ = [
    "RealImages",
    "fresh_network",
    "make_optimizer",
    "match_step",
    "set_rate",
    "train_step",
    "warm_start_step",
    "warm_start_targets",
]

# Decoded at once while matching: 512 images of 32 x 32, 10 of 224 x 224, and one class at least.
_PIXELS_PER_GROUP = 2**19


@dataclass(frozen=True, eq=False)
class RealImages:
    """The real images that a memory learns from, class by class.

    Attributes:
        data: The images and their labels.
        class_indices: int64 ``(N,)``, the position of each image's class among the memory's.
        members: For each class, int64, the positions of its images.
        mean: ``(C,)`` of the pixels in [0, 1].
        std: ``(C,)`` of the pixels in [0, 1].
    """

    data: LabelledImages | LabelledView
    class_indices: Tensor
    members: list[Tensor]
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, data: LabelledImages | LabelledView, classes: Tensor | None = None) -> RealImages:
        """Sort images by class.

        Args:
            data: The images.
            classes: int64 ``(K,)``, the memory's classes in their order: all that ``data`` has, and
                maybe more. Default: the sorted labels of ``data``.
        """
        classes = data.labels.unique() if classes is None else classes.cpu()
        ascending, positions = classes.sort()
        indices = positions[torch.searchsorted(ascending, data.labels)]
        counts = indices.bincount(minlength=len(classes)).tolist()
        order = indices.argsort(stable=True)
        mean, std = channel_stats(data.images)
        return cls(data, indices, list(order.split(counts)), mean, std)


def make_optimizer(memory: LearnedMemory, betas: tuple[float, float]) -> torch.optim.Adam:
    """Return Adam over a memory: what many images share, then class and instance memories.

    Parameters that require no gradient are left out.
    """
    groups = memory.parameter_groups()
    return torch.optim.Adam(groups, betas=betas)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of what images share; class and instance memories learn faster, by a factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def warm_start_targets(
    memory: LearnedMemory, real: RealImages, seed: int, first_class: int = 0
) -> Tensor:
    """Return, for each image of the memory, the real image that it starts from: int64 ``(N,)``.

    Drawn at random within the class. A class with fewer real images than instance memories takes
    them in turn. Images of the classes before ``first_class`` are left out.
    """
    targets = []
    for index in range(first_class, memory.num_classes):
        members, count = real.members[index], memory.images_per_class[index]
        generator = make_generator(seed, "targets", index)
        chosen = members[torch.randperm(len(members), generator=generator)]
        targets.append(chosen[torch.arange(count) % len(chosen)])
    return torch.cat(targets)


def warm_start_step(
    memory: LearnedMemory,
    optimizer: torch.optim.Optimizer,
    indices: Tensor,
    wanted: Tensor,
    precision: str = "float32",
    first_class: int = 0,
    team: Team = ALONE,
    rate_control: RateControl | None = None,
) -> None:
    """Move the memory so that some of its images come nearer to real ones, by squared error.

    Images are decoded in parts, so that peak memory does not grow with their size.

    Args:
        memory: The memory.
        optimizer: Over its parameters.
        indices: int64 ``(B,)``, positions of images.
        wanted: float32 ``(B, C, H, W)`` in [0, 1].
        precision: As in :class:`~hmn_replay.condensation.config.CondenseConfig`.
        first_class: Scales of the classes before it stay as they are; see
            :meth:`LearnedMemory.update_scales`.
        team: The processes that share the images; all are given the same ones.
        rate_control: What adds bits to the error, where the memory is entropy-coded.
    """
    device, parts = memory.class_index.device, images_at_once(memory.image_shape)
    optimizer.zero_grad()
    error = torch.zeros((), device=device)
    own = zip(team.share(indices).split(parts), team.share(wanted).split(parts), strict=True)
    for some, targets in own:
        if not len(some):
            continue
        with autocast(device, precision):
            images = memory(some.to(device))
        loss = F.mse_loss(images.float(), targets.to(device, non_blocking=True))
        loss = loss * (len(some) / len(indices))
        torch.autograd.backward(loss)
        error += loss.detach()
    team.sum_gradients(_parts_of(memory, [indices]))
    if rate_control is not None:
        rate_control.add_gradients(indices, error, team)
    optimizer.step()
    memory.update_scales(first_class)


def match_step(
    memory: LearnedMemory,
    optimizer: torch.optim.Optimizer,
    network: Network,
    real: RealImages,
    config: CondenseConfig,
    generator: torch.Generator,
    first_class: int = 0,
    team: Team = ALONE,
    rate_control: RateControl | None = None,
) -> int:
    """Match a batch of some classes, each apart, and move the memory once.

    Classes are decoded in groups, so that peak memory grows with the batch of a group and not with
    the number of classes.

    Args:
        memory: The memory; classes without an image are passed over.
        optimizer: Over its parameters.
        network: Its logits are in the order of the memory's classes.
        real: Images of the memory's classes.
        config: ``objective``, ``classes_per_step``, ``real_batch``, ``decoded_batch``,
            ``augmentations`` and ``precision`` are read.
        generator: Of classes, images and augmentations.
        first_class: The classes before it are not matched, and their scales stay as they are.
        team: The processes that share the classes; all call this alike.
        rate_control: What adds bits to the distance, where the memory is entropy-coded.

    Returns:
        How many images were decoded, by all processes together.

    Raises:
        ConfigError: The objective compares trainings, not batches.
    """
    device = memory.class_index.device
    objective = get_objective(config.objective)
    if objective.compares_trainings:
        raise ConfigError(f"objective {config.objective!r} compares trainings, not batches")
    strategies = config.augmentations if objective.augments else ()
    counts = memory.images_per_class
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    num_classes = memory.num_classes - first_class
    drawn_classes = _draw(num_classes, config.classes_per_step, generator) + first_class
    present = [label for label in drawn_classes.tolist() if counts[label]]
    pixels = config.decoded_batch * math.prod(memory.image_shape[1:])
    group_size = max(1, _PIXELS_PER_GROUP // pixels)
    drawn: list[_Match] = []
    for first in range(0, len(present), group_size):
        group = present[first : first + group_size]
        indices = [
            starts[label] + _draw(counts[label], config.decoded_batch, generator) for label in group
        ]
        for label, own in zip(group, indices, strict=True):
            members = real.members[label]
            chosen = members[_draw(len(members), config.real_batch, generator)]
            augment = draw_augmentation(
                strategies,
                memory.image_shape[1:],
                generator,
                fill=real.mean,
                std=real.std,
            )
            drawn.append(_Match(label, own, chosen, augment))
    optimizer.zero_grad()
    distance = torch.zeros((), device=device)
    shared = team.share(drawn)
    for first in range(0, len(shared), group_size):
        matches = shared[first : first + group_size]
        with autocast(device, config.precision):
            images = memory(torch.cat([match.decoded for match in matches]).to(device)).float()
        gradients = []
        sizes = [len(match.decoded) for match in matches]
        for match, own in zip(matches, images.split(sizes), strict=True):
            label, augment = match.label, match.augment
            real_images = real.data.floats(match.real).to(device, non_blocking=True)
            decoded = own.detach().requires_grad_()
            real_images, augmented = _not_alone(augment(real_images)), _not_alone(augment(decoded))
            with autocast(device, config.precision):
                loss = objective(
                    network,
                    real_images,
                    torch.full((len(real_images),), label, device=device),
                    augmented,
                    torch.full((len(augmented),), label, device=device),
                )
            distance += loss.detach()
            gradients.extend(torch.autograd.grad(loss, decoded))
        torch.autograd.backward(images, torch.cat(gradients))
    team.sum_gradients(_parts_of(memory, [match.decoded for match in drawn]))
    if rate_control is not None:
        rate_control.add_gradients(torch.cat([match.decoded for match in drawn]), distance, team)
    optimizer.step()
    memory.update_scales(first_class)
    return sum(len(match.decoded) for match in drawn)


def fresh_network(
    memory: LearnedMemory, real: RealImages, config: CondenseConfig, seed: int, number: int = 0
) -> tuple[Network, torch.optim.SGD]:
    """Return a random network to match with, on the memory's device, and what it learns by.

    Args:
        memory: Its classes and image shape are read.
        real: Its pixels' mean and deviation are read.
        config: ``network``, ``network_width`` and ``network_learning_rate`` are read.
        seed: Of the network's values.
        number: How many networks came before it; those of ``config.network`` are taken in turn.
    """
    network = build_network(
        config.network[number % len(config.network)],
        memory.image_shape,
        memory.num_classes,
        width=config.network_width,
        mean=real.mean,
        std=real.std,
        seed=seed,
    ).to(memory.class_index.device)
    learner = torch.optim.SGD(
        network.parameters(), lr=config.network_learning_rate, momentum=0.9, weight_decay=5e-4
    )
    return network, learner


def train_step(
    network: Network,
    learner: torch.optim.Optimizer,
    real: RealImages,
    config: CondenseConfig,
    generator: torch.Generator,
    memory: LearnedMemory,
    team: Team = ALONE,
) -> None:
    """Let the network learn from ``network_images`` images, as IDC does after every step.

    The objective says from which images, and whether they are augmented and mixed; see
    :class:`hmn_replay.objectives.Objective`. The processes of a team share each batch, and all call
    this alike; see :func:`hmn_replay.training.train.add_gradients`.
    """
    device = network.mean.device
    objective = get_objective(config.objective)
    if objective.learns_from == "nothing":
        return
    from_real = objective.learns_from == "real"
    num_images = len(real.data) if from_real else memory.num_images
    chosen = torch.randint(num_images, (config.network_images,), generator=generator)
    for indices in map(_not_alone, chosen.split(config.network_batch)):
        if from_real:
            images = real.data.floats(indices).to(device, non_blocking=True)
            labels = real.class_indices[indices].to(device, non_blocking=True)
        else:
            with torch.no_grad(), autocast(device, config.precision):
                images = memory(indices.to(device)).float()
            labels = memory.class_index[indices.to(device)]
        batch, labels_a, labels_b, lam = draw_batch(
            images,
            labels,
            real.mean,
            real.std,
            generator,
            augmentations=config.augmentations if objective.network_augments else (),
            cutmix_probability=(
                config.network_cutmix_probability if objective.network_cutmix else 0.0
            ),
        )
        learner.zero_grad()
        add_gradients(
            network, batch, labels_a, labels_b, lam, precision=config.precision, team=team
        )
        learner.step()


class _Match(NamedTuple):
    """What was drawn of a class: positions of decoded and of real images, and the augmentation."""

    label: int
    decoded: Tensor
    real: Tensor
    augment: Augmentation


def _parts_of(memory: LearnedMemory, drawn: Sequence[Tensor]) -> Iterator[GradientPart]:
    """Yield what images are decoded from, parameter by parameter; nothing where none were drawn."""
    if not drawn:
        return
    for parameter, rows in memory.rows_of(torch.cat([*drawn])):
        yield parameter, ... if rows is None else rows


def _not_alone(batch: Tensor) -> Tensor:
    # Batch normalisation needs two values, so a lone image is shown twice.
    return torch.cat([batch, batch]) if len(batch) == 1 else batch


def _draw(count: int, most: int | None, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[:most]
