"""What takes the steps of matching: what all steppers do, and the one of batches.

A stepper moves the memory by the optimizer that it is given. What a step draws comes from the seed
and the step's number alone, so one that goes on from a checkpoint takes the same steps.
"""

from __future__ import annotations

import abc
from typing import Any

import torch

from hmn_replay.condensation import steps
from hmn_replay.condensation.checkpoint import Checkpoint, load_state
from hmn_replay.condensation.config import CondenseConfig
from hmn_replay.condensation.rate import RateControl
from hmn_replay.distributed import ALONE, Team
from hmn_replay.memory.learned import LearnedMemory
from hmn_replay.objectives import get_objective
from hmn_replay.runtime import derive_seed, make_generator
from hmn_replay.training.networks import Network

__all__ = ["BatchStepper", "Stepper"]


class Stepper(abc.ABC):
    """Takes one step of matching after another.

    Args:
        memory: What is condensed.
        real: Real images of its classes.
        config: The settings.
        seed: Of all draws.
        first_class: The classes before it are not condensed.
        team: The processes that take the steps together.
        rate_control: What adds bits to the distance, where the memory is entropy-coded.
    """

    def __init__(
        self,
        memory: LearnedMemory,
        real: steps.RealImages,
        config: CondenseConfig,
        seed: int,
        first_class: int = 0,
        team: Team = ALONE,
        rate_control: RateControl | None = None,
    ) -> None:
        self.memory, self.real, self.config = memory, real, config
        self.seed, self.first_class = seed, first_class
        self.team, self.rate_control = team, rate_control

    @property
    @abc.abstractmethod
    def images_per_step(self) -> int:
        """How many decoded images a step is over, about."""

    @abc.abstractmethod
    def step(self, optimizer: torch.optim.Optimizer, number: int) -> int:
        """Take a step, and return how many decoded images it was over.

        Args:
            optimizer: Of the memory.
            number: Of the step, from 0; they are taken in order.
        """

    @abc.abstractmethod
    def owners(self) -> dict[str, Any]:
        """Return what a checkpoint must keep after a step, beside memory and optimizer."""

    @abc.abstractmethod
    def resume(self, checkpoint: Checkpoint, number: int) -> None:
        """Take over what a checkpoint kept, to go on with a step of that number, 1 or more."""

    def results(self) -> dict[str, Any]:
        """Return JSON values for the report, after the last step."""
        return {}


class BatchStepper(Stepper):
    """Matches real and decoded batches of each class, on one random network after another."""

    network: Network
    learner: torch.optim.SGD

    @property
    def steps_per_network(self) -> int:
        """How many steps a network is for."""
        return 1 if get_objective(self.config.objective).fresh_network else self.config.inner_steps

    @property
    def images_per_step(self) -> int:
        """How many decoded images a step is over, about."""
        counts = self.memory.images_per_class[self.first_class :]
        num_classes = min(len(counts), self.config.classes_per_step or len(counts))
        return num_classes * min(self.config.decoded_batch, max(counts))

    def step(self, optimizer: torch.optim.Optimizer, number: int) -> int:
        """Match a batch of some classes, then let the network learn; see :class:`Stepper`."""
        memory, real, config = self.memory, self.real, self.config
        if number % self.steps_per_network == 0:
            self._draw_network(number // self.steps_per_network)
        generator = make_generator(self.seed, "match", number)
        num_decoded = steps.match_step(
            memory,
            optimizer,
            self.network,
            real,
            config,
            generator,
            self.first_class,
            self.team,
            self.rate_control,
        )
        if config.network_images:
            generator = make_generator(self.seed, "train", number)
            steps.train_step(self.network, self.learner, real, config, generator, memory, self.team)
        return num_decoded

    def owners(self) -> dict[str, Any]:
        """Return the network, and what it learns by."""
        return {"network": self.network, "learner": self.learner}

    def resume(self, checkpoint: Checkpoint, number: int) -> None:
        """Take over the network, where the step does not draw another one."""
        outer_step, done = divmod(number, self.steps_per_network)
        if done:
            self._draw_network(outer_step)
            for name, owner in self.owners().items():
                load_state(owner, checkpoint.group(name))

    def _draw_network(self, number: int) -> None:
        self.network, self.learner = steps.fresh_network(
            self.memory, self.real, self.config, derive_seed(self.seed, "network", number), number
        )
