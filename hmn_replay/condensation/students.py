"""Students that follow experts: the steps of trajectory matching, for any container.

The comparison, and the recording of experts, are in :mod:`hmn_replay.objectives.trajectories`.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hmn_replay.condensation.checkpoint import Checkpoint, load_state
from hmn_replay.condensation.config import CondenseConfig
from hmn_replay.condensation.rate import RateControl
from hmn_replay.condensation.steppers import Stepper
from hmn_replay.condensation.steps import RealImages
from hmn_replay.data.augment import draw_augmentation
from hmn_replay.data.lookup import take_images
from hmn_replay.distributed import ALONE, Team
from hmn_replay.memory.learned import LearnedMemory
from hmn_replay.objectives import get_objective, trajectory_matching
from hmn_replay.objectives.trajectories import Experts, experts_beside
from hmn_replay.runtime import autocast, make_generator
from hmn_replay.training.train import draw_epoch

__all__ = ["TrajectoryStepper", "needs_experts", "open_experts", "trajectory_step"]

# Decoded at once: 512 images of 32 x 32, 10 of 224 x 224.
_PIXELS_PER_GROUP = 2**19


def needs_experts(config: CondenseConfig) -> bool:
    """Return whether there are steps to take in which whole trainings are compared."""
    return get_objective(config.objective).compares_trainings and config.num_steps > 0


@contextlib.contextmanager
def open_experts(
    memory: LearnedMemory,
    real: RealImages,
    config: CondenseConfig,
    seed: int,
    first_class: int = 0,
    checkpoint: Path | None = None,
) -> Iterator[Experts | None]:
    """Give the experts that a run follows, those there are and those to be recorded; or None.

    They are of the images of the classes from ``first_class`` on, and have logits for all of the
    memory's classes. A temporary folder is gone after the block.

    Args:
        memory: Its classes are read.
        real: The images that the experts learn from are among them.
        config: The objective, and the settings of experts; see
            :class:`~hmn_replay.condensation.config.CondenseConfig`.
        seed: Of the run.
        first_class: The classes before it are not condensed.
        checkpoint: Of the run; None for none.

    Raises:
        ExpertError: The folder has experts of other images or settings, or a damaged file.
    """
    if not needs_experts(config):
        yield None
        return
    with contextlib.ExitStack() as stack:
        if config.experts is not None:
            folder = Path(config.experts)
        elif checkpoint is not None:
            folder = experts_beside(checkpoint)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hmn-experts-")))
        images, class_indices = real.data.images, real.class_indices
        if first_class:
            chosen = (class_indices >= first_class).nonzero().flatten()
            images, class_indices = take_images(images, chosen), class_indices[chosen]
        yield Experts(
            folder,
            images,
            class_indices,
            memory.num_classes,
            num_experts=config.num_experts,
            num_epochs=config.max_start_epoch + config.expert_epochs,
            networks=config.network,
            config=config.expert_training,
            seed=seed,
        )


class TrajectoryStepper(Stepper):
    """Lets students follow experts (MTT): in each step one, from some epoch of some expert on.

    The learning rate of the students is learned too, or rather its logarithm, by Adam: so the rate
    stays above 0, and changes by a share of itself. MTT takes SGD on the rate, with a learning rate
    chosen for each data set.

    A student's steps follow each other, and are not shared: every process of a team takes them all.
    Process 0 alone reads the experts, which all record together.

    Args:
        memory: As in :class:`Stepper`.
        real: As in :class:`Stepper`.
        config: As in :class:`Stepper`.
        seed: As in :class:`Stepper`.
        first_class: As in :class:`Stepper`.
        team: As in :class:`Stepper`.
        rate_control: As in :class:`Stepper`.
        experts: Those to follow; any that are not there yet are recorded here.
    """

    def __init__(
        self,
        memory: LearnedMemory,
        real: RealImages,
        config: CondenseConfig,
        seed: int,
        first_class: int = 0,
        team: Team = ALONE,
        rate_control: RateControl | None = None,
        *,
        experts: Experts,
    ) -> None:
        super().__init__(memory, real, config, seed, first_class, team, rate_control)
        device = memory.class_index.device
        for number in team.agree(experts.missing):
            experts.record(number, device, team=team)
        self.experts = experts
        self.networks = [experts.network(k).to(device) for k in range(len(config.network))]
        logarithm = torch.tensor(math.log(config.student_learning_rate), device=device)
        self.rate = nn.ParameterDict({"logarithm": logarithm})
        self.learner = torch.optim.Adam(
            self.rate.parameters(), lr=config.student_rate_learning_rate
        )

    @property
    def images_per_step(self) -> int:
        """How many decoded images a step is over, about."""
        num_images = sum(self.memory.images_per_class[self.first_class :])
        return self.config.student_steps * min(self.config.student_batch, num_images)

    def step(self, optimizer: torch.optim.Optimizer, number: int) -> int:
        """Follow an expert from some epoch on; see :class:`Stepper`."""
        config, device = self.config, self.memory.class_index.device
        generator = make_generator(self.seed, "match", number)
        expert = int(torch.randint(self.experts.num_experts, (), generator=generator))
        epoch = int(torch.randint(config.max_start_epoch + 1, (), generator=generator))
        read = partial(self.experts.read, expert, epoch, epoch + config.expert_epochs)
        start, target = (
            {name: value.to(device) for name, value in parameters.items()}
            for parameters in self.team.agree(read)
        )
        logarithm = self.rate["logarithm"]
        rate = logarithm.detach().exp()
        num_decoded, of_rate = trajectory_step(
            self.memory,
            optimizer,
            self.networks[expert % len(self.networks)],
            start,
            target,
            rate,
            self.real,
            config,
            generator,
            self.first_class,
            self.rate_control,
        )
        logarithm.grad = rate * of_rate
        self.learner.step()
        return num_decoded

    def owners(self) -> dict[str, Any]:
        """Return the student's learning rate, and what it is learned by."""
        return {"rate": self.rate, "learner": self.learner}

    def resume(self, checkpoint: Checkpoint, number: int) -> None:
        """Take over the student's learning rate."""
        for name, owner in self.owners().items():
            load_state(owner, checkpoint.group(name))

    def results(self) -> dict[str, Any]:
        """Return the learning rate that students have in the end."""
        return {"student_rate": float(self.rate["logarithm"].detach().exp())}


def trajectory_step(
    memory: LearnedMemory,
    optimizer: torch.optim.Optimizer,
    network: nn.Module,
    start: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    learning_rate: Tensor,
    real: RealImages,
    config: CondenseConfig,
    generator: torch.Generator,
    first_class: int = 0,
    rate_control: RateControl | None = None,
) -> tuple[int, Tensor]:
    """Let a student follow an expert on decoded images, and move the memory once.

    Its batches go through the images that are condensed in a random order, then in another; each
    image is augmented by a draw of its own, anew for each batch, as an expert's are. Every image
    that they have is decoded twice, a bounded number at a time: to be shown, and, when its gradient
    is known, to send that on. So what is kept does not grow with the number of images.

    Args:
        memory: The memory.
        optimizer: Over its parameters.
        network: Of the expert's architecture, on the memory's device, with a logit for each of the
            memory's classes.
        start: The expert's parameters that the student begins with, by name.
        target: Those that it is to come to.
        learning_rate: The student's, a scalar.
        real: Its pixels' mean and deviation are read.
        config: ``student_steps``, ``student_batch``, ``augmentations`` and ``precision`` are read.
        generator: Of images and augmentations.
        first_class: The images of the classes before it are not shown, and their scales stay as
            they are.
        rate_control: What adds bits to the distance, where the memory is entropy-coded.

    Returns:
        How many decoded images the student saw, repeats counted; and the gradient of the loss with
        respect to its learning rate, a scalar.
    """
    device = memory.class_index.device
    first_image = sum(memory.images_per_class[:first_class])
    drawn: list[Tensor] = []
    while len(drawn) < config.student_steps:
        num_images = memory.num_images - first_image
        drawn.extend(draw_epoch(num_images, config.student_batch, generator))
    del drawn[config.student_steps :]
    sizes = [len(batch) for batch in drawn]
    augmentations = [
        draw_augmentation(
            config.augmentations,
            memory.image_shape[1:],
            generator,
            batch=size,
            fill=real.mean,
            std=real.std,
        )
        for size in sizes
    ]
    seen, positions = torch.cat(drawn).unique(return_inverse=True)
    seen = (first_image + seen).to(device)
    groups = seen.split(max(1, _PIXELS_PER_GROUP // math.prod(memory.image_shape[1:])))

    def decode(group: Tensor) -> Tensor:
        with autocast(device, config.precision):
            images: Tensor = memory(group).float()
        return images

    with torch.no_grad():
        images = torch.cat([decode(group) for group in groups])
    images.requires_grad_()
    rate = learning_rate.detach().requires_grad_()
    with autocast(device, config.precision):
        loss = trajectory_matching(
            network,
            start,
            target,
            images,
            memory.class_index[seen],
            positions.to(device).split(sizes),
            rate,
            augmentations,
        )
    gradient, of_rate = torch.autograd.grad(loss, [images, rate])
    optimizer.zero_grad()
    for group, of_group in zip(groups, gradient.split([len(g) for g in groups]), strict=True):
        torch.autograd.backward(decode(group), of_group)
    if rate_control is not None:
        rate_control.add_gradients(seen, loss.detach())
    optimizer.step()
    memory.update_scales(first_class)
    return sum(sizes), of_rate
