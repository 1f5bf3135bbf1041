"""The steps that a condensation is made of, as functions of a context and a generator.

What a step draws comes from its generator alone, so a step taken again is the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn_replay.condensation.config import CondenseConfig
from hmn_replay.condensation.rate import RateControl
from hmn_replay.condensation.selection import choose_by_features
from hmn_replay.data.augment import Augmentation, draw_augmentation
from hmn_replay.data.images import LabelledImages, channel_stats
from hmn_replay.data.lookup import (
    Images,
    LabelledView,
    as_floats,
    held_on,
    images_at_once,
    without_repeats,
)
from hmn_replay.distributed import ALONE, GradientPart, Team
from hmn_replay.errors import ConfigError
from hmn_replay.memory.learned import LearnedMemory
from hmn_replay.objectives import OBJECTIVES, Objective, get_objective
from hmn_replay.objectives.trajectories import trajectory_matching
from hmn_replay.runtime import autocast, isolated_if, make_generator
from hmn_replay.training.networks import ConvBlock, Network, build_network
from hmn_replay.training.train import (
    CompiledLoss,
    add_gradients,
    draw_batch,
    draw_epoch,
    mixes_images,
    names_of_batch,
    wants_compiling,
)

__all__ = [
    "Compiling",
    "RealImages",
    "StepContext",
    "drawn_orders",
    "fresh_network",
    "make_optimizer",
    "match_step",
    "plan_compiling",
    "set_lr",
    "train_step",
    "trajectory_step",
    "warm_start_step",
    "warm_start_targets",
    "with_chosen_first",
]

# Decoded at once while matching: 256 images of 32 x 32, 5 of 224 x 224, and one class at least. A
# GPU takes eight times as many, and waits less between them.
_PIXELS_PER_GROUP, _PIXELS_PER_GPU_GROUP = 2**18, 2**21
# A real image is shown without a graph, which takes about so much of what a decoded one takes.
_REAL_SHARE = 0.25
# How far below 0 the distance of equal images may be.
_ROUNDING = 1e-4
# Of images that hardly differ from their sources, the mean squared error that counts.
_LEAST_ERROR = 1e-6


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
    _held: dict[torch.device, Images] = field(default_factory=dict)

    def images_on(self, device: torch.device) -> Images:
        """Return the images where a device can look at them, which is done once."""
        if device not in self._held:
            self._held[device] = held_on(self.data.images, device)
        return self._held[device]

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


class Compiling(NamedTuple):
    """Which passes through the networks are compiled: in their learning, and in matching."""

    learning: bool = False
    matching: bool = False


def plan_compiling(
    memory: LearnedMemory,
    config: CondenseConfig,
    first_class: int = 0,
    networks: Sequence[nn.Module] = (),
    expected_classes: int = 0,
) -> Compiling:
    """Return which passes of a matching are worth being compiled, or are as the settings say.

    Args:
        memory: The memory that is condensed.
        config: The settings.
        first_class: Classes before this position are not condensed.
        networks: Networks that were given to match on; none where they are made. Of these, those of
            our ConvNet's blocks are compiled by themselves.
        expected_classes: How many classes there will be in all. When classes are added, the others
            will be as well, by what is compiled for these; the first ones may be matched on other
            networks.
    """
    training, device = config.network_training, memory.class_index.device
    if networks:
        blocks = [each for each in networks[-1].modules() if isinstance(each, ConvBlock)]
        if blocks:
            width = max(each.convolution.out_channels for each in blocks)
            training = training.replace(network="convnet", width=width)
        else:
            training = training.replace(compile=training.compile is True)
    new_classes = memory.num_classes - first_class
    runs = max(1.0, expected_classes / max(1, new_classes)) if first_class else 1.0

    def pays(images_per_step: float) -> bool:
        num_images = round(runs * config.num_steps * images_per_step)
        return wants_compiling(training, memory.image_shape, num_images, device)

    # Passes forward, and backward to the images, at least, in those of training steps, which have
    # three.
    num_passes = config.real_batch + 2 * config.decoded_batch
    num_classes = min(new_classes, config.classes_per_step or new_classes)
    return Compiling(pays(config.network_images), pays(num_classes * num_passes / 3))


@dataclass(frozen=True, eq=False)
class StepContext:
    """What all steps of a phase share.

    Attributes:
        memory: The memory that is condensed.
        real: Real images of its classes.
        config: The settings.
        optimizer: The optimizer of the memory; see :func:`make_optimizer`.
        first_class: Classes before this position are not condensed, and what their images are
            decoded from stays as it is.
        rate_control: What adds bits to the loss, where the memory is entropy-coded.
        team: The processes that take each step together; all call the step functions alike.
        least_images: How many of a class's first images are matched at least, in batches of a
            random number of first images. None for batches of any of them.
        sources: int64 ``(M,)``, for each of the memory's last M images, which are condensed, the
            real image that ``config.fidelity`` keeps it near; see :func:`warm_start_targets`. None
            where it keeps none.
        compiling: Which passes are compiled; see :func:`plan_compiling`. Default: none.
    """

    memory: LearnedMemory
    real: RealImages
    config: CondenseConfig
    optimizer: torch.optim.Optimizer
    first_class: int = 0
    rate_control: RateControl | None = None
    team: Team = ALONE
    least_images: int | None = None
    sources: Tensor | None = None
    compiling: Compiling = field(default_factory=Compiling)

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        return self.memory.class_index.device

    @cached_property
    def objective(self) -> Objective:
        """What is matched, compiled where it is to be."""
        objective = get_objective(self.config.objective)
        compiled = objective.compiled if self.compiling.matching else None
        return objective if compiled is None else replace(objective, loss=compiled())

    @cached_property
    def compiled(self) -> CompiledLoss | None:
        """What compiles the steps of a network that learns, if they are to be."""
        return CompiledLoss(self.config.precision) if self.compiling.learning else None

    def decode(self, indices: Tensor) -> Tensor:
        """Return images with a graph, float32, decoded in the precision of the settings."""
        with autocast(self.device, self.config.precision):
            images: Tensor = self.memory(indices.to(self.device, non_blocking=True))
        return images.float()

    def real_images(self, indices: Tensor) -> Tensor:
        """Return real images, float32 in [0, 1], or features, on the memory's device.

        Args:
            indices: int64 ``(B,)``, on the CPU.
        """
        images = self.real.images_on(self.device)
        if isinstance(images, Tensor):
            indices = indices.to(images.device, non_blocking=True)
        return as_floats(images[indices])

    def offsets(self, indices: Tensor, images: Tensor) -> Tensor:
        """Return how far decoded images are from their sources, float32 ``(B, C, H, W)``.

        Args:
            indices: int64 ``(B,)``, positions of images that are condensed, on the CPU.
            images: What they decode to; no graph leads back to them.
        """
        assert self.sources is not None, "a context with sources"
        own = self.sources[indices - self.memory.num_images + len(self.sources)]
        return images.detach() - self.real_images(own)

    def draw_augmentation(
        self, generator: torch.Generator, batch: int | None = None
    ) -> Augmentation:
        """Return an augmentation: a draw for all images, or one for each of a training's batch."""
        names: Sequence[str] = self.config.augmentations if self.objective.augments else ()
        if batch is not None:
            names = names_of_batch(names, generator)
        size = self.memory.image_shape[1:]
        mean, std = self.real.mean, self.real.std
        return draw_augmentation(names, size, generator, batch=batch, fill=mean, std=std)

    def update(self, indices: Tensor, loss: Tensor, *, shared: bool = True) -> None:
        """Update the memory once, when the gradients of a loss have been added up.

        Args:
            indices: int64 ``(B,)``, positions of the images in the loss, the same in every process.
            loss: A scalar without a graph: that of this process's share.
            shared: Whether each process has the gradients of its share only, which are then summed;
                else every process has all of them.
        """
        team = self.team if shared else ALONE
        team.sum_gradients(self._parts_of(indices))
        if self.rate_control is not None:
            self.rate_control.add_gradients(indices, loss, team)
        self.optimizer.step()
        self.memory.update_scales(self.first_class)

    def _parts_of(self, indices: Tensor) -> Iterator[GradientPart]:
        """Yield what images are decoded from, parameter by parameter."""
        for parameter, rows in self.memory.rows_of(indices):
            yield parameter, ... if rows is None else rows


def make_optimizer(memory: LearnedMemory, betas: tuple[float, float]) -> torch.optim.Adam:
    """Return Adam over a memory, in groups with a factor of the learning rate each.

    Parameters that require no gradient are left out.
    """
    return torch.optim.Adam(memory.parameter_groups(), betas=betas)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of what images share; other tensors learn faster, by their factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def drawn_orders(real: RealImages, seed: int, first_class: int = 0) -> list[Tensor]:
    """Return the real images of each class from ``first_class`` on, in an order that is drawn.

    An image that is repeated, so that it is drawn more often than others, stands where it was drawn
    first.
    """
    orders = []
    for index, members in enumerate(real.members[first_class:], first_class):
        generator = make_generator(seed, "targets", index)
        drawn = members[torch.randperm(len(members), generator=generator)]
        orders.append(without_repeats(real.data.images, drawn))
    return orders


def with_chosen_first(
    order: Tensor, images: Images, count: int, method: str, embed: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return a class's images with those first that are chosen by features, the others after them.

    Args:
        order: int64 ``(M,)``, the positions of the class's images; of the others it is kept.
        images: Those of all classes.
        count: How many to choose.
        method: See :func:`~hmn_replay.condensation.selection.choose_by_features`.
        embed: Likewise.
    """
    chosen = choose_by_features(images, order.sort().values, count, method, embed)
    return torch.cat([chosen, order[torch.isin(order, chosen, invert=True)]])


def warm_start_targets(
    memory: LearnedMemory, orders: Sequence[Tensor], first_class: int = 0
) -> Tensor:
    """Return, for each image of the memory, the real image that it starts from: int64 ``(N,)``.

    Args:
        memory: The memory; images of the classes before ``first_class`` are left out.
        orders: For each class from there on, its real images in their order. A class with fewer of
            these than memory images takes them in turn.
        first_class: Position of a class.
    """
    targets = []
    for order, count in zip(orders, memory.images_per_class[first_class:], strict=True):
        targets.append(order[torch.arange(count) % len(order)])
    return torch.cat(targets)


def warm_start_step(context: StepContext, indices: Tensor, wanted: Tensor) -> None:
    """Update the memory so that some of its images come nearer to real ones, by squared error.

    Images are decoded in parts, so that peak memory does not grow with their number.

    Args:
        context: What the phase's steps share.
        indices: int64 ``(B,)``, positions of images.
        wanted: float32 ``(B, C, H, W)`` in [0, 1], or features.
    """
    device, parts = context.device, images_at_once(context.memory.image_shape)
    context.optimizer.zero_grad()
    error = torch.zeros((), dtype=torch.float32, device=device)
    team = context.team
    own = zip(team.share(indices).split(parts), team.share(wanted).split(parts), strict=True)
    for some, targets in own:
        if not len(some):
            continue
        loss = F.mse_loss(context.decode(some), targets.to(device, non_blocking=True))
        loss = loss * (len(some) / len(indices) / context.memory.unit**2)
        torch.autograd.backward(loss)
        error += loss.detach()
    context.update(indices, error)


def match_step(
    context: StepContext,
    network: nn.Module,
    generator: torch.Generator,
    logits: Sequence[int] | None = None,
) -> int:
    """Match batches of some classes, and update the memory once.

    Classes are decoded in groups, so that peak memory grows with the batch of a group and not with
    the number of classes. A group is matched at once where the objective takes several classes and
    the network does not normalise by the batch, else class by class. A step that draws no class
    with images changes nothing. Where the context has sources, images are kept near to them, by
    ``config.fidelity``; they are then decoded twice, and two values of each of their pixels are
    held for all classes of the step.

    Args:
        context: What the phase's steps share.
        network: The network to match on, with a logit for each of the memory's classes.
        generator: Generator of the draws of classes, images and augmentations.
        logits: Which logit of the network each of the memory's classes has. Default: None, they
            stand in the classes' order.

    Returns:
        How many images were decoded, by all processes together.

    Raises:
        ConfigError: The objective compares trainings, not batches.
    """
    memory, config, objective = context.memory, context.config, context.objective
    if objective.compares_trainings:
        raise ConfigError(f"objective {config.objective!r} compares trainings, not batches")
    device = context.device
    drawn = _draw_matches(context, generator)
    if not drawn:
        return 0
    context.optimizer.zero_grad()
    distance = torch.zeros((), dtype=torch.float32, device=device)
    shared = context.team.share(drawn)
    # What a network that normalises by the batch gives is not to depend on how classes are grouped.
    together = objective.several_classes and not (network.training and mixes_images(network))
    num_images = config.decoded_batch
    if together:  # the real images of a group are shown at once, too
        num_images = max(num_images, math.ceil(_REAL_SHARE * config.real_batch))
    pixels = num_images * math.prod(memory.image_shape[1:])
    group_size = max(1, _pixels_per_group(device) // pixels)
    waiting: list[tuple[Tensor, Tensor]] = []
    offsets: list[Tensor] = []
    for first in range(0, len(shared), group_size):
        group = shared[first : first + group_size]
        indices = torch.cat([match.decoded for match in group])
        with torch.set_grad_enabled(context.sources is None):
            images = context.decode(indices)
        gradients = []
        parts = [group] if together else [[match] for match in group]
        sizes = [sum(len(match.decoded) for match in part) for part in parts]
        for part, own in zip(parts, images.split(sizes), strict=True):
            decoded = own.detach().requires_grad_()
            loss = _objective_of(context, network, part, decoded, logits)
            distance += loss.detach()
            gradients.extend(torch.autograd.grad(loss, decoded))
        gradient = torch.cat(gradients)
        if context.sources is None:
            torch.autograd.backward(images, gradient)
        else:
            waiting.append((indices, gradient))
            offsets.append(context.offsets(indices, images))
    if context.sources is not None:
        _add_fidelity([of_group for _, of_group in waiting], offsets, context, distance)
        for group_indices, gradient in waiting:
            torch.autograd.backward(context.decode(group_indices), gradient)
    indices = torch.cat([match.decoded for match in drawn])
    context.update(indices, distance)
    return len(indices)


def _add_fidelity(
    gradients: Sequence[Tensor],
    offsets: Sequence[Tensor],
    context: StepContext,
    distance: Tensor,
    *,
    shared: bool = True,
) -> None:
    """Make gradients of a distance d those of ``log d + fidelity log e``, times d, in place.

    Args:
        gradients: Of d with respect to decoded images, a group of images each. The squared error e
            is that of all groups, and so known when all have been decoded.
        offsets: How far these images are from their sources; see :meth:`StepContext.offsets`.
        context: What the step's parts share.
        distance: d, a scalar without a graph: that of this process's share.
        shared: Whether each process has its share only, as in :meth:`StepContext.update`.
    """
    error = torch.zeros((), dtype=torch.float32, device=context.device)
    for of_group in offsets:
        error += of_group.square().sum()
    num_values = torch.full_like(error, float(sum(map(torch.numel, offsets))))
    totals = torch.stack([distance, error, num_values])
    if shared:
        context.team.add_up(totals)
    whole, error, num_values = totals.unbind()
    # Images that are their sources but for rounding are taken to be a little off.
    error = error.maximum(_LEAST_ERROR * num_values * context.memory.unit**2)
    scale = 2 * (context.config.fidelity or 0.0) * whole.clamp_min(0) / error
    for gradient, of_group in zip(gradients, offsets, strict=True):
        gradient += scale * of_group


def try_matching(
    context: StepContext, network: nn.Module, logits: Sequence[int] | None = None
) -> None:
    """Match two real images with themselves, to find out before hours of work if that can be done.

    In evaluation mode, in which networks draw nothing and keep their running statistics. An
    objective of the user's is called once, too.

    Args:
        context: What the phase's steps share; the memory is not changed.
        network: A network to match on; it is left in evaluation mode.
        logits: As in :func:`match_step`.

    Raises:
        ConfigError: The network cannot take such images, or has not a logit for each class, or the
            objective cannot be had of it.
    """
    config, device, name = context.config, context.device, type(network).__name__
    objective = get_objective(config.objective)
    images = _not_alone(context.real_images(context.real.members[context.first_class][:2]))
    network.eval()
    # A network that is given is asked for no logit where features are matched.
    wants_logits = logits is None or not objective.matches_features
    run: Any = network if wants_logits else network.features
    try:
        with torch.no_grad(), autocast(device, config.precision):
            found = run(images)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{name} cannot be matched on: it does not take images {tuple(images.shape)} ({error})"
        ) from error
    if wants_logits and logits is not None and min(logits) < 0:
        raise ConfigError(
            f"a network that is given has a logit for each label, and label {min(logits)} can have "
            "none: number the classes from 0, or match features"
        )
    shape: tuple[int, ...] = tuple(getattr(found, "shape", ()))
    wanted = 1 + (context.memory.num_classes - 1 if logits is None else max(logits))
    has_logits = len(shape) == 2 and shape[0] == len(images) and shape[1] >= wanted
    if wants_logits and not has_logits:
        raise ConfigError(
            f"a network to match on returns logits (B, K), K of {wanted} or more here; {name} "
            f"returns {shape or type(found).__name__} for {len(images)} images"
        )
    if objective.compares_trainings:
        return
    augment = context.draw_augmentation(make_generator(0, "trial"))
    decoded = images.clone().requires_grad_()
    label = context.first_class if logits is None else logits[context.first_class]
    labels = torch.full((len(images),), label)
    if not objective.several_classes:
        labels = labels.to(device)
    with (
        isolated_if(config.draws_globally, device, 0, "trial"),
        autocast(device, config.precision),
    ):
        loss = objective(network, augment(images), labels, augment(decoded), labels)
    (gradient,) = torch.autograd.grad(loss, decoded, allow_unused=True)
    if gradient is None:
        raise ConfigError(
            f"the loss of objective {objective.name} does not depend on decoded_images"
        )
    value = float(loss.detach())
    if not (-_ROUNDING < value < math.inf or OBJECTIVES.is_built_in(config.objective)):
        raise ConfigError(
            f"the loss of objective {objective.name} is {value} for real images that are matched "
            "with themselves; return a distance: finite, and 0 or more"
        )


def trajectory_step(
    context: StepContext,
    network: nn.Module,
    start: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    lr: Tensor,
    generator: torch.Generator,
) -> tuple[int, Tensor]:
    """Let a student follow an expert on decoded images, and update the memory once.

    Its batches go through the images that are condensed in a random order, then in another; each
    image is augmented by a draw of its own, anew for each batch, as an expert's are; of crop, scale
    and rotate, a batch has one. Every image that they have is decoded twice, a bounded number at a
    time: to be shown, and, when its gradient is known, to send that on. So what is kept does not
    grow with the number of images.

    A student's steps follow each other, and are not shared: every process of a team takes them all.

    Args:
        context: What the phase's steps share.
        network: A network of the expert's architecture, on the memory's device, with a logit for
            each of the memory's classes.
        start: The expert's parameters that the student begins with, by name.
        target: The expert's parameters that the student is to reach.
        lr: Learning rate of the student's SGD, a scalar.
        generator: Generator of the draws of images and augmentations.

    Returns:
        How many decoded images the student saw, repeats counted; and the gradient of the loss with
        respect to its learning rate, a scalar.
    """
    memory, config, device = context.memory, context.config, context.device
    first_image = sum(memory.images_per_class[: context.first_class])
    drawn: list[Tensor] = []
    while len(drawn) < config.student_steps:
        num_images = memory.num_images - first_image
        drawn.extend(draw_epoch(num_images, config.student_batch, generator))
    del drawn[config.student_steps :]
    sizes = [len(batch) for batch in drawn]
    augmentations = [context.draw_augmentation(generator, batch=size) for size in sizes]
    seen, positions = torch.cat(drawn).unique(return_inverse=True)
    seen += first_image
    groups = seen.split(max(1, _pixels_per_group(device) // math.prod(memory.image_shape[1:])))
    with torch.no_grad():
        images = torch.cat([context.decode(group) for group in groups])
    images.requires_grad_()
    lr = lr.detach().requires_grad_()
    with autocast(device, config.precision):
        loss = trajectory_matching(
            network,
            start,
            target,
            images,
            memory.class_index[seen.to(device, non_blocking=True)],
            positions.to(device, non_blocking=True).split(sizes),
            lr,
            augmentations,
            draws_globally=config.draws_globally,
        )
    gradient, of_lr = torch.autograd.grad(loss, [images, lr])
    context.optimizer.zero_grad()
    if context.sources is not None:
        _add_fidelity(
            [gradient], [context.offsets(seen, images)], context, loss.detach(), shared=False
        )
    for group, of_group in zip(groups, gradient.split([len(g) for g in groups]), strict=True):
        torch.autograd.backward(context.decode(group), of_group)
    context.update(seen, loss.detach(), shared=False)
    return sum(sizes), of_lr


def fresh_network(
    context: StepContext, seed: int, number: int = 0
) -> tuple[Network, torch.optim.SGD]:
    """Return a random network to match with, on the memory's device, and its optimizer.

    Args:
        context: What the phase's steps share.
        seed: Seed of the network's initial values.
        number: How many networks were drawn before it: those of ``config.network`` take turns.
    """
    config, real = context.config, context.real
    network = build_network(
        config.network[number % len(config.network)],
        context.memory.image_shape,
        context.memory.num_classes,
        width=config.network_width,
        mean=real.mean,
        std=real.std,
        seed=seed,
    ).to(context.device)
    learner = torch.optim.SGD(
        network.parameters(), lr=config.network_learning_rate, momentum=0.9, weight_decay=5e-4
    )
    return network, learner


def train_step(
    context: StepContext,
    network: nn.Module,
    learner: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    """Let the network learn from ``network_images`` images, as IDC does after every step.

    The objective says from which images, and whether they are augmented and mixed; see
    :class:`hmn_replay.objectives.Objective`. The processes of a team share each batch; see
    :func:`hmn_replay.training.train.add_gradients`.

    Args:
        context: What the phase's steps share; the memory is not changed.
        network: The network that learns.
        learner: The network's optimizer.
        generator: Generator of the draws of images, augmentations and CutMix.
    """
    memory, real, config = context.memory, context.real, context.config
    device, objective = context.device, context.objective
    learns_from = objective.learns_from
    num_images = len(real.data) if learns_from == "real" else memory.num_images
    if learns_from == "nothing" or not num_images:
        return
    chosen = torch.randint(num_images, (config.network_images,), generator=generator)
    for indices in map(_not_alone, chosen.split(config.network_batch)):
        if learns_from == "real":
            images = context.real_images(indices)
            labels = real.class_indices[indices].to(device, non_blocking=True)
        else:
            with torch.no_grad():
                images = context.decode(indices)
            labels = memory.class_index[indices.to(device, non_blocking=True)]
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
            network,
            batch,
            labels_a,
            labels_b,
            lam,
            precision=config.precision,
            team=context.team,
            compiled=context.compiled,
        )
        learner.step()


class _Match(NamedTuple):
    """What was drawn of a class: positions of decoded and of real images, and the augmentation."""

    label: int
    decoded: Tensor
    real: Tensor
    augment: Augmentation


def _draw_matches(context: StepContext, generator: torch.Generator) -> list[_Match]:
    """Draw classes, and for each that has images a batch of these and of real ones."""
    memory, real, config = context.memory, context.real, context.config
    counts = memory.images_per_class
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    num_classes = memory.num_classes - context.first_class
    classes = _draw(num_classes, config.classes_per_step, generator) + context.first_class
    drawn: list[_Match] = []
    for label in classes.tolist():
        if counts[label]:
            most, least = counts[label], context.least_images
            num_first = most if least is None else _draw_number(least, most, generator)
            decoded = starts[label] + _draw(num_first, config.decoded_batch, generator)
            members = real.members[label]
            chosen = members[_draw(len(members), config.real_batch, generator)]
            drawn.append(_Match(label, decoded, chosen, context.draw_augmentation(generator)))
    return drawn


def _draw_number(least: int, most: int, generator: torch.Generator) -> int:
    """Draw a number up to ``most``, from ``least`` where that is below, its logarithm uniformly."""
    share = float(torch.rand((), dtype=torch.float32, generator=generator))
    return most if least >= most else round(least * (most / least) ** share)


def _objective_of(
    context: StepContext,
    network: nn.Module,
    matches: Sequence[_Match],
    decoded: Tensor,
    logits: Sequence[int] | None,
) -> Tensor:
    """Return the objective of what was drawn of one class, or of several: a scalar with a graph.

    Args:
        context: What the step's parts share.
        network: The network to match on.
        matches: What was drawn; of several classes where the objective takes them.
        decoded: The decoded images, class by class, float32 ``(B, C, H, W)``.
        logits: As in :func:`match_step`.
    """
    objective, device = context.objective, context.device
    real = context.real_images(torch.cat([match.real for match in matches]))
    own = torch.tensor(
        [match.label if logits is None else logits[match.label] for match in matches]
    )
    batches = []
    for images, sizes in (
        (real, [len(match.real) for match in matches]),
        (decoded, [len(match.decoded) for match in matches]),
    ):
        augment = Augmentation.join([match.augment for match in matches], sizes)
        labels = _not_alone(own.repeat_interleave(torch.tensor(sizes)))
        if not objective.several_classes:
            labels = labels.to(device, non_blocking=True)
        batches += [_not_alone(augment(images)), labels]
    with autocast(device, context.config.precision):
        return objective(network, *batches)


def _pixels_per_group(device: torch.device) -> int:
    return _PIXELS_PER_GROUP if device.type == "cpu" else _PIXELS_PER_GPU_GROUP


def _not_alone(batch: Tensor) -> Tensor:
    # Batch normalisation needs two values, so a lone image is shown twice.
    return torch.cat([batch, batch]) if len(batch) == 1 else batch


def _draw(count: int, most: int | None, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[:most]
