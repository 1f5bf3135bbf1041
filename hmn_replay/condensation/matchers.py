"""Matchers, which take the steps of matching, and the networks that they match on.

A matcher takes one step at a time; :class:`BatchMatcher` asks :class:`Networks` for the network of
each, :class:`TrajectoryMatcher` follows experts.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from hmn_replay.condensation import steps
from hmn_replay.condensation.checkpoint import Checkpoint, load_state
from hmn_replay.distributed import Team
from hmn_replay.errors import ConfigError, TrainingError
from hmn_replay.objectives import ObjectiveFunction, get_objective
from hmn_replay.objectives.trajectories import Experts
from hmn_replay.registry import name_of
from hmn_replay.runtime import derive_seed, make_generator
from hmn_replay.training.networks import tensors_of

__all__ = [
    "BatchMatcher",
    "Matcher",
    "Networks",
    "NetworksBetween",
    "RandomNetworks",
    "Stateful",
    "TrajectoryMatcher",
    "check_given_networks",
    "given_networks",
    "make_matcher",
    "train_missing",
    "trained_networks",
]

_Owner: TypeAlias = "nn.Module | torch.optim.Optimizer"
Stateful: TypeAlias = "_Owner | Tensor"
"""What a checkpoint keeps: modules and optimizers by their state, tensors as they are."""

State: TypeAlias = Mapping[str, Tensor]
"""Tensors of a network by name."""

# Pairs of a trained network's states that are kept, to be drawn again without reading its file.
_NUM_PAIRS_KEPT = 16


def make_matcher(
    context: steps.StepContext,
    seed: int,
    *,
    networks: Sequence[nn.Module] = (),
    experts: Experts | None = None,
) -> Matcher:
    """Return what takes the steps of matching, as the context's objective does it.

    Args:
        context: What the steps share.
        seed: Seed of all draws.
        networks: States of a network to match on, if they were given.
        experts: Networks that were trained before, if there are any.
    """
    if networks:
        return BatchMatcher(context, given_networks(context, seed, networks), seed)
    if experts is None:
        return BatchMatcher(context, RandomNetworks(context, seed), seed)
    if context.objective.compares_trainings:
        return TrajectoryMatcher(context, seed, experts)
    return BatchMatcher(context, trained_networks(context, seed, experts), seed)


class Matcher(Protocol):
    """Takes the steps of matching, one after another.

    What a step draws comes from the seed and the step's number alone, so one that goes on from a
    checkpoint takes the same steps.
    """

    @property
    def images_per_step(self) -> int:
        """How many decoded images a step is over, about."""

    def step(self, number: int) -> int:
        """Take the step of that number, from 0; return how many decoded images it was over."""

    def kept(self) -> dict[str, Stateful]:
        """Return what a checkpoint must keep after a step, beside memory and optimizer."""

    def resume(self, checkpoint: Checkpoint, number: int) -> None:
        """Take over what a checkpoint kept, to go on with a step of that number, 1 or more."""

    def results(self) -> dict[str, Any]:
        """Return JSON values for the report, after the last step."""


class Networks(Protocol):
    """Gives the networks that batches are matched on."""

    network: nn.Module
    steps_per_network: int
    logits: Sequence[int] | None
    """The network's logit for each of the memory's classes. None where it has these in order."""

    def draw(self, number: int) -> None:
        """Make the network of that number, from 0, the current one."""

    def learn(self, number: int) -> None:
        """Let the current network learn, after the step of that number."""

    def kept(self) -> dict[str, _Owner]:
        """Return what a checkpoint must keep of the current network."""


class RandomNetworks:
    """Random networks one after another, which learn between the steps (DC, IDC).

    Args:
        context: What the steps share.
        seed: Seed of all draws.
    """

    network: nn.Module
    learner: torch.optim.SGD
    logits: Sequence[int] | None = None

    def __init__(self, context: steps.StepContext, seed: int) -> None:
        self.context, self.seed = context, seed
        fresh = context.objective.fresh_network
        self.steps_per_network = 1 if fresh else context.config.inner_steps

    def draw(self, number: int) -> None:
        """Draw a random network."""
        seed = derive_seed(self.seed, "network", number)
        self.network, self.learner = steps.fresh_network(self.context, seed, number)

    def learn(self, number: int) -> None:
        """Let the network learn from what the objective says."""
        if self.context.config.network_images:
            generator = make_generator(self.seed, "train", number)
            steps.train_step(self.context, self.network, self.learner, generator)

    def kept(self) -> dict[str, _Owner]:
        """Return the network and its optimizer."""
        return {"network": self.network, "learner": self.learner}


class NetworksBetween:
    """Networks that are points between two states of one, drawn anew each time; they learn nothing.

    Args:
        context: What the steps share.
        seed: Seed of all draws.
        draw_states: Returns a network and two states of it, tensors by name, from the number of the
            draw and its generator. The network's tensors of these names are then overwritten.
        logits: See :class:`Networks`.
    """

    network: nn.Module

    def __init__(
        self,
        context: steps.StepContext,
        seed: int,
        draw_states: Callable[[int, torch.Generator], tuple[nn.Module, State, State]],
        logits: Sequence[int] | None = None,
    ) -> None:
        self.seed, self.steps_per_network = seed, context.config.inner_steps
        self.draw_states, self.logits = draw_states, logits

    @torch.no_grad()
    def draw(self, number: int) -> None:
        """Draw two states, and a point between them."""
        generator = make_generator(self.seed, "network", number)
        self.network, start, end = self.draw_states(number, generator)
        share = float(torch.rand((), dtype=torch.float32, generator=generator))
        for name, value in tensors_of(self.network).items():
            if name in end:
                between = value.is_floating_point()
                value.copy_(torch.lerp(start[name], end[name], share) if between else end[name])

    def learn(self, number: int) -> None:
        """Leave the network as it is."""

    def kept(self) -> dict[str, _Owner]:
        """Return nothing: the network follows from its number."""
        return {}


def trained_networks(context: steps.StepContext, seed: int, experts: Experts) -> NetworksBetween:
    """Return networks between the initial and the trained weights of a few trained before.

    A network of few passes over the real images teaches a memory more than a random one, and a
    point drawn between both ends gives as many different networks as there are steps (Acc-DD, Zhang
    et al. 2023, arXiv 2212.06152; NCFM, Wang et al. 2025, arXiv 2502.20653). All processes of a
    team train together those that are missing.

    Args:
        context: What the steps share.
        seed: Seed of all draws.
        experts: The trained networks; any that are missing are trained here.
    """
    read = _reader(experts, context)

    def draw(number: int, generator: torch.Generator) -> tuple[nn.Module, State, State]:
        expert = experts.draw(number, generator)
        initial, trained = read(expert, 0, experts.num_epochs)
        return experts.lent_network(expert, context.device), initial, trained

    return NetworksBetween(context, seed, draw)


def given_networks(
    context: steps.StepContext, seed: int, networks: Sequence[nn.Module]
) -> NetworksBetween:
    """Return networks between states that one had while it learned, two in a row each time.

    It is copied, and runs in evaluation mode.

    Args:
        context: What the steps share.
        seed: Seed of all draws.
        networks: Its states, the earliest first: modules of one architecture, whose logits stand
            for the labels.
    """
    network = copy.deepcopy(networks[-1]).to(context.device).eval().requires_grad_(True)
    states = [{k: v.to(context.device) for k, v in tensors_of(each).items()} for each in networks]
    pairs = list(itertools.pairwise(states)) or [(states[0], states[0])]

    def draw(_: int, generator: torch.Generator) -> tuple[nn.Module, State, State]:
        return network, *pairs[int(torch.randint(len(pairs), (), generator=generator))]

    return NetworksBetween(context, seed, draw, context.memory.classes.tolist())


class BatchMatcher:
    """Matches real and decoded batches of each class, on one network after another.

    Args:
        context: What the steps share.
        networks: Gives the networks.
        seed: Seed of the draws of classes, images and augmentations.
    """

    def __init__(self, context: steps.StepContext, networks: Networks, seed: int) -> None:
        self.context, self.networks, self.seed = context, networks, seed

    @property
    def images_per_step(self) -> int:
        """How many decoded images a step is over, about."""
        context, config = self.context, self.context.config
        counts = context.memory.images_per_class[context.first_class :]
        num_classes = min(len(counts), config.classes_per_step or len(counts))
        return num_classes * min(config.decoded_batch, max(counts))

    def step(self, number: int) -> int:
        """Match a batch of some classes, then let the network learn."""
        drawn, position = divmod(number, self.networks.steps_per_network)
        if position == 0:
            self.networks.draw(drawn)
        generator = make_generator(self.seed, "match", number)
        networks = self.networks
        num_decoded = steps.match_step(self.context, networks.network, generator, networks.logits)
        self.networks.learn(number)
        return num_decoded

    def kept(self) -> dict[str, Stateful]:
        """Return what a checkpoint must keep of the current network."""
        return {**self.networks.kept()}

    def resume(self, checkpoint: Checkpoint, number: int) -> None:
        """Take over the network, where the step does not draw another one."""
        drawn, position = divmod(number, self.networks.steps_per_network)
        if position:
            self.networks.draw(drawn)
            for name, owner in self.networks.kept().items():
                load_state(owner, checkpoint.group(name))

    def results(self) -> dict[str, Any]:
        """Return nothing."""
        return {}


class TrajectoryMatcher:
    """Lets students follow experts (MTT): in each step one, from some epoch of some expert on.

    The learning rate of the students is learned too, or rather its logarithm, by Adam: so the rate
    stays above 0, and changes by a share of itself. MTT takes SGD on the rate, with a learning rate
    chosen for each data set. Process 0 alone reads the experts, which all record together.

    Args:
        context: What the steps share.
        seed: Seed of all draws.
        experts: The experts to follow; any that are missing are recorded here.
    """

    def __init__(self, context: steps.StepContext, seed: int, experts: Experts) -> None:
        self.context, self.seed, self.experts = context, seed, experts
        config, device = context.config, context.device
        self._read = _reader(experts, context)
        logarithm = torch.tensor(
            math.log(config.student_learning_rate), dtype=torch.float32, device=device
        )
        self.lr = nn.ParameterDict({"logarithm": logarithm})
        self.learner = torch.optim.Adam(self.lr.parameters(), lr=config.student_rate_learning_rate)

    @property
    def images_per_step(self) -> int:
        """How many decoded images a step is over, about."""
        context, config = self.context, self.context.config
        num_images = sum(context.memory.images_per_class[context.first_class :])
        return config.student_steps * min(config.student_batch, num_images)

    def step(self, number: int) -> int:
        """Follow an expert from some epoch on."""
        config, device = self.context.config, self.context.device
        generator = make_generator(self.seed, "match", number)
        expert = self.experts.draw(number, generator)
        epoch = int(torch.randint(config.max_start_epoch + 1, (), generator=generator))
        start, target = (
            {name: value.to(device) for name, value in parameters.items()}
            for parameters in self._read(expert, epoch, epoch + config.expert_epochs)
        )
        logarithm = self.lr["logarithm"]
        lr = logarithm.detach().exp()
        network = self.experts.lent_network(expert, device)
        num_decoded, of_lr = steps.trajectory_step(
            self.context, network, start, target, lr, generator
        )
        logarithm.grad = lr * of_lr
        self.learner.step()
        return num_decoded

    def kept(self) -> dict[str, Stateful]:
        """Return the student's learning rate and its optimizer."""
        return {"rate": self.lr, "learner": self.learner}

    def resume(self, checkpoint: Checkpoint, number: int) -> None:
        """Take over the student's learning rate."""
        load_state(self.lr, checkpoint.group("rate"))
        load_state(self.learner, checkpoint.group("learner"))

    def results(self) -> dict[str, Any]:
        """Return the learning rate that students have in the end."""
        return {"student_rate": float(self.lr["logarithm"].detach().exp())}


def check_given_networks(
    objective: str | ObjectiveFunction, networks: Iterable[nn.Module]
) -> tuple[nn.Module, ...]:
    """Return networks that an objective can match on.

    Raises:
        ConfigError: They are of no use to it.
        TrainingError: One has diverged.
    """
    if isinstance(networks, nn.Module) or not isinstance(networks, Iterable):
        raise ConfigError(f"networks is a list of modules; give [network], not {networks!r:.60}")
    networks = tuple(networks)
    entry = get_objective(objective)
    if networks and not entry.matches_trained:
        raise ConfigError(
            f"networks are for objectives that match on trained ones, such as distribution and "
            f"gradient; {name_of(objective)} does not"
        )
    for network in networks:
        if not isinstance(network, nn.Module):
            raise ConfigError(f"networks are modules; got {network!r:.60}")
        if entry.matches_features and not callable(getattr(network, "features", None)):
            raise ConfigError(
                f"objective {name_of(objective)!r} matches features, and {type(network).__name__} "
                "has no features(images) that returns those of its blocks; add that method, or "
                'take objective="gradient"'
            )
        shapes = [{k: v.shape for k, v in tensors_of(n).items()} for n in (networks[0], network)]
        if shapes[0] != shapes[1]:
            raise ConfigError("networks are states of one network; these differ in their tensors")
        if not all(bool(each.isfinite().all()) for each in network.parameters()):
            raise TrainingError(
                "a network that is to be matched on has weights that are not finite: its training "
                "diverged; lower the learning rate of its optimizer"
            )
    return networks


def train_missing(experts: Experts, device: torch.device, team: Team) -> None:
    """Train the experts that are not there, as where a run goes on without their folder."""
    for number in team.agree(experts.missing):
        experts.record(number, device, team=team)


def _reader(
    experts: Experts, context: steps.StepContext
) -> Callable[[int, int, int], Sequence[State]]:
    """Return what reads an expert's parameters at two epochs, in process 0 alone and for all."""
    train_missing(experts, context.device, context.team)

    # All processes draw the same ones, and so keep the same ones.
    @lru_cache(_NUM_PAIRS_KEPT)
    def read(number: int, first: int, second: int) -> Sequence[State]:
        return context.team.agree(partial(experts.read, number, first, second))

    return read
