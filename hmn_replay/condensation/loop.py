"""The loop behind :func:`hmn_replay.condense`: warm start, matching, pruning.

Every draw depends on the seed and the step alone, so a run that goes on from a checkpoint takes the
very steps that it would have taken. :class:`Run` knows phases, clock, bars, Ctrl-C and checkpoint;
:class:`Condensation` is a run whose phases condense a memory.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import logging
import math
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from hmn_replay.budget import Budget
from hmn_replay.condensation import steps
from hmn_replay.condensation.checkpoint import (
    Checkpoint,
    check_json,
    check_like,
    flatten_state,
    load_state,
    read_checkpoint,
    write_checkpoint,
)
from hmn_replay.condensation.config import CondenseConfig
from hmn_replay.condensation.growth import fill, make_room
from hmn_replay.condensation.labelling import add_labels, check_teacher
from hmn_replay.condensation.matchers import Stateful, make_matcher, train_missing
from hmn_replay.condensation.pruning import MarginRecorder, double_ended_prune, score_by
from hmn_replay.condensation.rate import RateControl, fit_code, most_that_fit
from hmn_replay.condensation.selection import embedding
from hmn_replay.data.images import LabelledImages, mean_psnr
from hmn_replay.data.lookup import (
    Images,
    LabelledView,
    as_floats,
    images_at_once,
    join_images,
    take_images,
)
from hmn_replay.distributed import ALONE, Team
from hmn_replay.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DistributedError,
    HMNReplayWarning,
    MemoryFileError,
    TrainingError,
)
from hmn_replay.evaluation import score
from hmn_replay.files import clear_stale, digest_tensors
from hmn_replay.memory.file import as_bytes, specs_of
from hmn_replay.memory.layout import MemoryLayout
from hmn_replay.memory.learned import LearnedMemory
from hmn_replay.objectives import OBJECTIVES, get_objective
from hmn_replay.objectives.trajectories import Experts, experts_beside
from hmn_replay.registry import fingerprint
from hmn_replay.runtime import (
    derive_seed,
    isolated,
    isolated_if,
    make_generator,
    peak_memory_bytes,
)
from hmn_replay.training.networks import NETWORKS, Network, find_head, keeping_modes, tensors_of
from hmn_replay.training.train import TrainingConfig, cosine_lr, train_network

__all__ = ["Condensation", "Run"]

log = logging.getLogger(__name__)

# Processes ask each other for Ctrl-C, which waits for all, once in so many steps of a training.
_STEPS_BETWEEN_QUESTIONS = 16
# Of a few images, networks would be trained for long on what they know by heart already.
_MOST_POOL_EPOCHS = 10


class Run:
    """Where a memory's training stands: phase, step, measurements, checkpoint.

    Args:
        memory: What is trained.
        identify: Returns what tells this run from every other one, by name; see
            :func:`~hmn_replay.condensation.checkpoint.read_checkpoint`. Called once at most, and
            only for a checkpoint or several processes: it reads all images.
        phases: Names of the phases, in their order.
        measured: JSON values by name, which the phases overwrite, for :meth:`report`.
        device: The device of the memory.
        progress: Whether to show bars on standard error.
        team: The processes that train it together. The first one's clock counts for all; it alone
            shows bars, and reads and writes the checkpoint.
        checkpoint_seconds: Seconds between checkpoints.
    """

    def __init__(
        self,
        memory: LearnedMemory,
        identify: Callable[[], Mapping[str, str]],
        phases: Sequence[str],
        measured: Mapping[str, Any],
        device: torch.device,
        progress: bool,
        team: Team = ALONE,
        checkpoint_seconds: float = 60.0,
    ) -> None:
        self.memory, self._identify, self.team = memory, identify, team
        self.phases, self.device, self.progress = tuple(phases), device, progress and team.first
        self.checkpoint_seconds = checkpoint_seconds
        if team.size > 1:
            # A function may know in which process it is.
            shared = {name: text for name, text in self.identity.items() if name != "functions"}
            team.check_same(json.dumps({**shared, "device": device.type}))
        self.state: dict[str, Any] = {
            "phase": self.phases[0],
            "step": 0,
            "phases": {
                name: {"seconds": 0.0, "images": 0, "peak_memory_bytes": 0} for name in self.phases
            },
            **measured,
        }
        self.resumed: Checkpoint | None = None
        self.checkpoint: Path | None = None
        self.interrupted = False
        self.saved_at = self.clock = time.monotonic()

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What tells this run from every other one, by name."""
        return dict(self._identify())

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint where there is one, and write to it from now on."""
        self.checkpoint = checkpoint
        if self.team.first:
            clear_stale(checkpoint)
        found = self.team.agree(lambda: read_checkpoint(checkpoint, self.identity))
        if found is None:
            return
        check_json(found.state, self.state)
        if found.state["phase"] not in self.phases:
            raise CheckpointError(f"the checkpoint is in an unknown phase: {found.state['phase']}")
        tensors = found.group("memory")
        check_like(tensors, self.memory.state_dict())
        for name, value in self.memory.state_dict().items():
            # Classes, and which images they have: what a run keeps as it is until it ends.
            if not value.is_floating_point() and not tensors[name].equal(value.cpu()):
                raise CheckpointError(f"the checkpoint is of a memory with other {name}")
        self.state, self.resumed = found.state, found
        load_state(self.memory, tensors)
        labels = found.group("labels")
        try:
            num_bytes = sum(spec.num_bytes for spec in specs_of(found.tensors).values())
            self.memory.restore_labels(labels, num_bytes)
        except (MemoryFileError, ConfigError) as error:
            raise CheckpointError(f"the checkpoint's labels cannot be read: {error}") from error
        log.info("going on from %s at %s %d", checkpoint, self.state["phase"], self.state["step"])

    def work(self, phases: Mapping[str, Callable[[], None]]) -> None:
        """Go through the phases that are left, in their order."""
        if self.resumed is None:
            self._save()  # whether that can be done is known before any work
        with self._interruptible(), self._advising_after_lost_process():
            for phase in self.phases:
                if self.state["phase"] == phase:
                    self.clock = time.monotonic()
                    phases[phase]()

    def report(self) -> dict[str, Any]:
        """Return what was measured, as JSON values."""
        phases = {
            name: {
                **numbers,
                "images_per_second": numbers["images"] / max(numbers["seconds"], 1e-9),
            }
            for name, numbers in self.state["phases"].items()
        }
        measured = {k: v for k, v in self.state.items() if k not in ("phase", "step", "phases")}
        seconds = sum(numbers["seconds"] for numbers in phases.values())
        return {
            "seconds": seconds,
            "phases": phases,
            **measured,
            "images_per_class": self.memory.images_per_class,
            "file_bytes": self.memory.file_bytes,
        }

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let Ctrl-C wait for the end of a step, whose state can be kept; a second one does not."""
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        in_main = threading.current_thread() is threading.main_thread()
        if self.checkpoint is None or not usual or not in_main:
            yield
            return

        def handle(*_: object) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        signal.signal(signal.SIGINT, handle)
        try:
            yield
            if self.interrupted:  # after the last step
                raise KeyboardInterrupt
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextlib.contextmanager
    def _advising_after_lost_process(self) -> Iterator[None]:
        try:
            yield
        except DistributedError as error:
            advice = "without a checkpoint, its work is lost: give it one"
            if self.checkpoint is not None:
                advice = (
                    f"the work so far is in {self.checkpoint}, from where any number of processes "
                    "goes on"
                )
            raise DistributedError(f"{error}; {advice}") from error

    @contextlib.contextmanager
    def _bar(self, name: str, num_steps: int, images_per_step: int) -> Iterator[Any]:
        with tqdm(
            total=num_steps * images_per_step,
            initial=min(self.state["step"], num_steps) * images_per_step if num_steps > 1 else 0,
            desc=name,
            unit="img",
            unit_scale=True,
            disable=not self.progress,
        ) as bar:
            yield bar

    def _follow(self, bar: Any) -> Callable[[int, int], None]:
        """Return what moves a bar along a training that begins now, and stops it at Ctrl-C."""
        start, numbers = bar.n, itertools.count(1)

        def advance(num_seen: int, num_passes: int) -> None:
            due = next(numbers) % _STEPS_BETWEEN_QUESTIONS == 0 or num_seen == num_passes
            if (due or self.team.size == 1) and any(self.team.sum(self.interrupted)):
                raise KeyboardInterrupt  # what came before this training has been kept
            bar.update(start + num_seen - bar.n)

        return advance

    def _share_done(
        self, num_steps: int, most_seconds: float | None, phases: Sequence[str]
    ) -> float:
        """Return how much of a phase is done: 1 where its steps are, or the seconds of phases."""
        done: float = self.state["step"] / num_steps if num_steps else 1.0
        if most_seconds is None:
            return done
        seconds: float = sum(self.state["phases"][name]["seconds"] for name in phases)
        return min(1.0, max(done, seconds / most_seconds))

    def _stepped(
        self, num_images: int, owners: Mapping[str, Stateful], *, save: bool = False
    ) -> None:
        """Count one step, and write a checkpoint, with what else is needed, where it is due."""
        self.state["step"] += 1
        self.resumed = None
        overdue, interrupted = self._count(num_images)
        if save or overdue or interrupted:
            self._check()
            self._save(owners)
        if interrupted:
            raise KeyboardInterrupt

    def _count(self, num_images: int) -> tuple[bool, bool]:
        """Count images and seconds; return if a checkpoint is due, and if any process is to end."""
        now, first = time.monotonic(), self.team.first
        overdue = now - self.saved_at >= self.checkpoint_seconds
        seconds, num_overdue, num_interrupted = self.team.sum(
            (now - self.clock) * first, overdue * first, self.interrupted
        )
        numbers = self.state["phases"][self.state["phase"]]
        numbers["seconds"] += seconds
        numbers["images"] += num_images
        self.clock = now
        return num_overdue > 0, num_interrupted > 0

    def _next_phase(self) -> None:
        self._check()
        self._end_phase()
        self.state["phase"] = self.phases[self.phases.index(self.state["phase"]) + 1]
        self.state["step"] = 0
        self._save()

    def _end_phase(self) -> None:
        self._count(0)
        numbers = self.state["phases"][self.state["phase"]]
        # A run that went on from a checkpoint may have used more before.
        peak = max(numbers["peak_memory_bytes"], peak_memory_bytes(self.device))
        numbers["peak_memory_bytes"] = peak

    def _check(self) -> None:
        try:
            self.memory.check_values()
        except TrainingError as error:
            raise TrainingError(
                f"the memory diverged in the {self.state['phase']} phase: it has values that "
                "cannot be stored; lower warm_start_learning_rate, memory_learning_rate or, with "
                "mtt, student_learning_rate"
            ) from error

    def _save(self, owners: Mapping[str, Stateful] | None = None) -> None:
        if self.checkpoint is None or not self.team.first:
            return
        tensors = flatten_state("memory", self.memory)
        tensors |= {f"labels/{k}": part for k, part in self.memory.stored_labels().items()}
        for name, owner in (owners or {}).items():
            tensors |= {name: owner} if isinstance(owner, Tensor) else flatten_state(name, owner)
        write_checkpoint(self.checkpoint, self.identity, self.state, tensors)
        self.saved_at = time.monotonic()


class Condensation(Run):
    """One condensation: the images, the memory, and how far it is.

    Arguments as for :func:`hmn_replay.condense`.
    """

    def __init__(
        self,
        data: LabelledImages,
        budget: Budget,
        layout: MemoryLayout,
        config: CondenseConfig,
        *,
        memory_type: type[LearnedMemory],
        old: LearnedMemory | None = None,
        expected_classes: int | None = None,
        networks: Sequence[nn.Module] = (),
        teacher: Network | None = None,
        seed: int,
        device: torch.device,
        progress: bool,
        team: Team = ALONE,
    ) -> None:
        self.config, self.seed, self.budget = config, seed, budget
        self.growth = make_room(
            data,
            budget,
            config.over_budget,
            memory_type=memory_type,
            layout=layout,
            old=old,
            labels=config,
            seed=seed,
            device=device,
        )
        if teacher is not None:
            own = self.growth.memory
            check_teacher(teacher, config, own.classes, own.image_shape)
            teacher = copy.deepcopy(teacher).to(device)
            team.copy_first(tensors_of(teacher).values())  # they may differ in last bits
        self.teacher = teacher
        self.first_class = self.growth.first_class
        self.num_begun = self.growth.memory.images_per_class
        self.by_order = config.pruning == "order"
        self.expected_classes = expected_classes
        self.least_images = self._least_images() if self.by_order else None
        self.betas = config.beta_grid or (config.beta,)
        learned: Tensor | None = None
        self.held_out: LabelledView | None = None
        # Real images are kept back for the choice of beta only where there is a choice to make.
        if len(self.betas) > 1 and any(self.growth.drops()) and len(data) > data.num_classes:
            learned, kept_back = data.split_positions(config.holdout, derive_seed(seed, "holdout"))
            held_out = join_images([data.images]).take(kept_back)
            self.held_out = LabelledView(held_out, data.labels[kept_back])
        pool = self.growth.pool(data, learned)
        self.real = steps.RealImages.of(pool, self.growth.memory.classes)
        measured: dict[str, Any] = {
            "warm_start_psnr": None,
            "beta": None,
            "beta_accuracies": {},
            "student_rate": None,
        }
        self.experts: Experts | None = None
        self.networks = networks
        selects = config.selection != "random"
        by_network = selects and not memory_type.holds_features
        self.trained_before = _trained_before(config, are_given=bool(networks), selects=by_network)
        phases = {
            "experts": self.trained_before is not None,
            "selection": selects,
            "warm_start": True,
            "matching": True,
            "labels": config.labels != "hard",
            "pruning": True,
        }
        super().__init__(
            self.growth.memory,
            functools.partial(
                _identity,
                data,
                budget,
                memory_type,
                layout,
                config,
                seed,
                old,
                networks,
                teacher,
                expected_classes,
            ),
            [name for name, is_there in phases.items() if is_there],
            measured,
            device,
            progress,
            team,
            config.checkpoint_seconds,
        )
        drawn = steps.drawn_orders(self.real, seed, self.first_class)
        self.order, self._class_sizes = torch.cat(drawn), list(map(len, drawn))
        self._try_networks()  # before there is a checkpoint
        if callable(config.pruning) and any(self.growth.drops()):
            self._score_images(self.memory.decoded())

    @property
    def expects_more(self) -> bool:
        """Whether more classes are to come than the memory has."""
        return (self.expected_classes or 0) > self.growth.memory.num_classes

    def _num_images_of(self, num_classes: int) -> int:
        """Return how many images the budget is planned for with so many classes; 0 for none."""
        memory = self.growth.memory
        sizes = memory.names_bytes, self.growth.label_bytes
        with contextlib.suppress(BudgetError):
            return memory.max_images(memory.layout, self.budget, num_classes, *sizes)
        return 0

    def _least_images(self) -> int:
        """Return how many images a class will have when all expected classes have come."""
        num_classes = max(self.growth.memory.num_classes, self.expected_classes or 0)
        return max(1, self._num_images_of(num_classes) // num_classes)

    def finish(self) -> LearnedMemory:
        """Take all the steps that are left."""
        with self._open_experts() as self.experts:
            self.work(
                {
                    "experts": self._record_experts,
                    "selection": self._select,
                    "warm_start": self._warm_start,
                    "matching": self._match,
                    "labels": self._label,
                    "pruning": self._prune,
                }
            )
        return self.memory

    def _try_networks(self) -> None:
        """Refuse networks, and an objective, that cannot be worked with, before any work."""
        if self.memory.holds_features:
            return
        context = self._context((0.5, 0.99))
        if self.config.num_steps and self.networks:
            given = copy.deepcopy(self.networks[-1]).to(self.device).requires_grad_(True)
            steps.try_matching(context, given, self.memory.classes.tolist())
        elif self.config.num_steps:
            for number in range(len(self.config.network)):
                network, _ = steps.fresh_network(context, self.seed, number)
                steps.try_matching(context, network)
        if "selection" in self.phases:
            network, _ = steps.fresh_network(context, self.seed, 0)
            with isolated_if(self.config.draws_globally, self.device, self.seed, "head"):
                find_head(network, context.real_images(self.order[[0, -1]]))

    # Which real images the memory begins as.

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint; see :class:`Run`."""
        super().resume(checkpoint)
        if self.resumed is None or "selection" not in self.phases:
            return
        self._check_kept("order", self.order)
        order = self.resumed.tensors["order"]
        if not order.sort().values.equal(self.order.sort().values):
            raise CheckpointError(
                f"the order of real images in {str(checkpoint)!r} has not each of them once; "
                "delete it to start anew"
            )
        self.order = order

    def _save(self, owners: Mapping[str, Stateful] | None = None) -> None:
        order = {"order": self.order} if "selection" in self.phases else {}
        super()._save({**(owners or {}), **order})

    @property
    def orders(self) -> list[Tensor]:
        """For each class that is condensed, its real images, from the first to be taken on."""
        return list(self.order.split(self._class_sizes))

    @property
    def targets(self) -> Tensor:
        """For each image that is condensed, the real image that it starts from."""
        return steps.warm_start_targets(self.memory, self.orders, self.first_class)

    def _select(self) -> None:
        if self.experts is not None:
            train_missing(self.experts, self.device, self.team)
        with isolated_if(self.config.draws_globally, self.device, self.seed, "selection"):
            self.order = self.team.agree(self._chosen_order)
        self._count(len(self.order))
        self._next_phase()

    def _chosen_order(self) -> Tensor:
        images, method, chosen = self.real.images_on(self.device), self.config.selection, []
        embed = embedding(images, self._selection_network())
        with self._bar("selection", 1, len(self.order)) as bar:
            for order, begun in zip(self.orders, self.num_begun[self.first_class :], strict=True):
                # Beyond what the memory begins as, it is filled up with a few at most.
                chosen.append(steps.with_chosen_first(order, images, 2 * begun, method, embed))
                bar.update(len(order))
        return torch.cat(chosen)

    def _selection_network(self) -> nn.Module | None:
        """Return the network whose features images are chosen by; None for features."""
        if self.experts is None:
            return None
        network = self.experts.network(0).to(self.device)
        (trained,) = self.experts.read(0, self.experts.num_epochs)
        network.load_state_dict({**network.state_dict(), **trained})
        # Files of experts have no statistics of batch normalisation: they are found anew.
        shuffled = torch.randperm(len(self.order), generator=make_generator(self.seed, "judge"))
        parts = shuffled.chunk(math.ceil(len(shuffled) / images_at_once(self.memory.image_shape)))
        images = self.real.images_on(self.device)
        with keeping_modes(network):
            update_bn((as_floats(images[self.order[part]]) for part in parts), network)
        return network

    # The warm start.

    def _warm_start(self) -> None:
        config, memory, num_old = self.config, self.memory, self.growth.num_old
        num_images = memory.num_images - num_old
        # As many epochs for a few new images as for a whole memory.
        num_steps = math.ceil(config.warm_start_steps * num_images / max(1, memory.num_images))
        batch_size = max(1, min(config.warm_start_batch, num_images))
        steps_per_epoch = math.ceil(num_images / batch_size)
        peak_lr = config.warm_start_learning_rate
        targets, warm = self.targets, num_steps > 0

        def wanted_images(positions: Tensor) -> Tensor:
            return self.real.data.floats(targets[positions - num_old])

        if warm and self.state["step"] == 0 and memory.fit(num_old, wanted_images):
            num_steps = 0
        memory.update_scales(self.first_class)
        context = self._context((0.9, 0.99))
        order, order_epoch = torch.empty(0), -1
        with self._bar("warm start", num_steps, batch_size) as bar:
            most_seconds, own = config.warm_start_seconds, ["warm_start"]
            while (done := self._share_done(num_steps, most_seconds, own)) < 1:
                epoch, position = divmod(self.state["step"], steps_per_epoch)
                if epoch != order_epoch:
                    generator = make_generator(self.seed, "warm start", epoch)
                    order, order_epoch = torch.randperm(num_images, generator=generator), epoch
                indices = order[position * batch_size : (position + 1) * batch_size] + num_old
                steps.set_lr(context.optimizer, cosine_lr(done, 1, peak_lr))
                steps.warm_start_step(
                    context, indices, context.real_images(targets[indices - num_old])
                )
                bar.update(batch_size)
                self._stepped(len(indices), _kept(context))
        if warm:
            new = torch.arange(num_old, memory.num_images)
            self.state["warm_start_psnr"] = _reconstruction_psnr(memory, new, wanted_images)
        self._next_phase()

    # Matching.

    def _match(self) -> None:
        config, num_steps = self.config, self.config.num_steps
        sources = None
        if config.fidelity:
            sources = self.targets
        context = self._context((0.5, 0.99), sources)
        trained = self.trained_before
        experts = self.experts if trained is not None and trained.are_matched else None
        matcher = make_matcher(context, self.seed, networks=self.networks, experts=experts)
        if self.resumed and self.state["step"]:
            matcher.resume(self.resumed, self.state["step"])
        with self._bar("matching", num_steps, matcher.images_per_step) as bar:
            while (done := self._share_done(num_steps, config.max_seconds, self.phases)) < 1:
                lr = cosine_lr(done, 1, config.memory_learning_rate)
                steps.set_lr(context.optimizer, lr)
                step = self.state["step"]
                with isolated_if(config.draws_globally, self.device, self.seed, "step", step):
                    num_decoded = matcher.step(step)
                bar.update(matcher.images_per_step)
                self._stepped(num_decoded, {**matcher.kept(), **_kept(context)})
        self.state |= matcher.results()
        self._next_phase()

    def _context(
        self, betas: tuple[float, float], sources: Tensor | None = None
    ) -> steps.StepContext:
        """Return what the steps of a phase share, as its checkpoint has it if it goes on from one.

        Args:
            betas: Adam's coefficients of the running means of gradients and their squares.
            sources: The real images that those of the memory are kept near to, if any are.
        """
        # Processes may differ in last bits; from here on, all move the same memory.
        self.team.copy_first(self.memory.state_dict().values())
        optimizer, rate_control = steps.make_optimizer(self.memory, betas), self._rate_control()
        if self.resumed and self.state["step"]:
            load_state(optimizer, self.resumed.group("optimizer"))
            if rate_control is not None:
                self._check_kept("rate_control", rate_control.state)
                rate_control.state = self.resumed.tensors["rate_control"].to(self.device)
        expected_classes = self.expected_classes or 0
        return steps.StepContext(
            self.memory,
            self.real,
            self.config,
            optimizer,
            self.first_class,
            rate_control,
            self.team,
            self.least_images,
            sources,
            steps.plan_compiling(
                self.memory, self.config, self.first_class, self.networks, expected_classes
            ),
        )

    def _rate_control(self) -> RateControl | None:
        """Return what keeps the bits of an entropy-coded memory near the budget; else None."""
        memory, growth = self.memory, self.growth
        if not memory.layout.is_coded:
            return None
        budget_bytes = self.budget.num_bytes
        kept_images = memory.num_images - sum(growth.drops())
        labels = growth.planned_labels(kept_images)
        file_bytes = memory.file_bytes_with(memory.num_images, 0, budget_bytes, labels)
        return RateControl(
            memory,
            budget_bytes - file_bytes,
            kept_images,
            growth.num_old,
            growth.num_old - growth.old_drops,
            self._most_image_bytes(),
        )

    def _most_image_bytes(self) -> float:
        """Return what an image may take, so that one of each expected class can be kept."""
        memory, expected = self.memory, self.expected_classes or 0
        if expected <= memory.num_classes:
            return math.inf
        num_images = self._num_images_of(expected)
        return num_images * memory.planned_image_bytes(memory.layout) / expected or math.inf

    # Networks that are trained before matching.

    @contextlib.contextmanager
    def _open_experts(self) -> Iterator[Experts | None]:
        """Give the networks to match with, those there are and those to be trained; or None.

        They are of the images of the classes that are condensed, and have logits for all of the
        memory's classes. A temporary folder is gone after the block.
        """
        config, trained = self.config, self.trained_before
        if trained is None:
            yield None
            return
        with contextlib.ExitStack() as stack:
            if config.experts is not None:
                folder = Path(config.experts)
            elif self.checkpoint is not None:
                folder = experts_beside(self.checkpoint)
            else:
                temporary = tempfile.TemporaryDirectory(prefix="hmn-experts-")
                folder = Path(stack.enter_context(temporary))
            images, class_indices = self.real.data.images, self.real.class_indices
            if self.first_class:
                chosen = (class_indices >= self.first_class).nonzero().flatten()
                images, class_indices = take_images(images, chosen), class_indices[chosen]
            experts = Experts(
                folder,
                images,
                class_indices,
                self.memory.num_classes,
                num_experts=trained.count,
                num_epochs=trained.epochs_of(len(images)),
                networks=config.network,
                config=trained.training,
                seed=self.seed,
                team=self.team,
                every_epoch=trained.num_epochs is not None,
            )
            if self.state["phase"] == "experts":
                self.team.agree(experts.make_folder)
            yield experts

    def _record_experts(self) -> None:
        experts = self.experts
        assert experts is not None, "a phase of runs with networks that are trained before"
        missing, size = self.team.agree(experts.missing), experts.num_images
        with self._bar("experts", self.state["step"] + len(missing), size) as bar:
            for number in missing:
                experts.record(number, self.device, self._follow(bar), self.team)
                self._stepped(size, {}, save=True)
        self._next_phase()

    # Labels.

    def _label(self) -> None:
        memory = self.memory
        self.team.copy_first(memory.state_dict().values())
        new = torch.arange(self.growth.num_old, memory.num_images)
        sources = self.targets if self.config.warm_start_steps else None
        self._add_labels(memory, new, sources, seed=derive_seed(self.seed, "labels"))
        self._next_phase()

    def _add_labels(
        self, memory: LearnedMemory, indices: Tensor, sources: Tensor | None, *, seed: int
    ) -> None:
        """Give images of a memory the teacher's labels, by the real ones that they come from."""
        if self.teacher is None:  # neither given, nor trained since the run began or was resumed
            self.teacher = self._train_teacher()
        add_labels(
            memory,
            self.teacher,
            self.config,
            sources=None if sources is None else self.real.data.images.take(sources),
            indices=indices,
            seed=seed,
            team=self.team,
        )

    def _train_teacher(self) -> Network:
        config, num_images = self.config, len(self.real.data)
        training = config.teacher_training(num_images, config.precision, config.compile)
        with self._bar("teacher", 1, training.num_passes) as bar:
            teacher = train_network(
                self.real.images_on(self.device),
                self.real.class_indices,
                self.memory.num_classes,
                config=training,
                seed=derive_seed(self.seed, "teacher"),
                device=self.device,
                progress=self._follow(bar),
                stats=(self.real.mean, self.real.std),
                team=self.team,
            )
        teacher.classes.copy_(self.memory.classes)
        self._count(training.num_passes)
        return teacher

    # Pruning.

    def _prune(self) -> None:
        self.team.copy_first(self.memory.state_dict().values())
        if any(self.growth.drops()):
            images = self.memory.decoded()
            scores = self.resumed.tensors.get("scores") if self.resumed else None
            if scores is not None:
                self._check_kept("scores", torch.empty(self.memory.num_images, dtype=torch.float32))
            else:
                scores = self._score_images(images)
                self.team.copy_first([scores])
                num_shown = self.config.pruning_passes if self.config.pruning == "aum" else 0
                self._stepped(num_shown, {"scores": scores}, save=True)
            self.memory.keep(self._choose(images, scores))
        self.memory.budget_bytes = self.budget.num_bytes
        if self.memory.layout.is_coded:
            num_old = sum(self.memory.images_per_class[: self.first_class])
            try:
                fit_code(self.memory, self.budget.num_bytes, num_old)
            except BudgetError:  # old images, and what all share, take more than was planned
                self._shrink()
            self._fill()
        else:
            self._shrink()
        self.memory.requires_grad_(True)
        self._end_phase()

    def _shrink(self) -> None:
        """Drop images until the file fits; labels go where it does not hold one of each class."""
        labels = self.memory.richest_labels
        try:
            self.memory.shrink()
        except BudgetError as error:
            if labels == "hard":
                raise
            self.memory.set_soft_labels(None)
            self.memory.set_labeller(None)
            self.memory.shrink()
            warnings.warn(
                f"the memory has hard labels alone, not labels={labels!r}: {error}",
                HMNReplayWarning,
                stacklevel=7,
            )

    def _fill(self) -> None:
        """Add images for the bytes that are left, of real ones that the memory has not begun with.

        There are some where images have come to take less than was planned, and none was pruned.
        """
        begun = self.num_begun[self.first_class :]
        more = [order[count:] for order, count in zip(self.orders, begun, strict=True)]
        planned, label = None, None
        if self.memory.has_soft_labels:
            if self.config.makes_soft:
                seed = derive_seed(self.seed, "labels", "added")
                label = functools.partial(self._add_labels, seed=seed)
            else:  # which are made later
                planned = self.growth.planned_labels
        self.memory = fill(
            self.memory,
            self.budget.num_bytes,
            self.first_class,
            more,
            self.real.data.floats,
            planned_labels=planned,
            label=label,
        )

    def _check_kept(self, name: str, like: Tensor) -> None:
        """Check that a tensor of the checkpoint that the run goes on from is like another."""
        assert self.resumed is not None, "a run that goes on"
        found = {key: own for key, own in self.resumed.tensors.items() if key == name}
        check_like(found, {name: like})

    def _score_images(self, images: Images) -> Tensor:
        """Return every decoded image's AUM, by one training on all of them; or another score."""
        class_index = self.memory.class_index
        if self.by_order:
            return torch.arange(len(images), dtype=torch.float32)
        if callable(self.config.pruning):
            with isolated(self.device, self.seed, "scores"):
                return score_by(self.config.pruning, images[:], class_index)
        recorder = MarginRecorder(images, class_index, self.team)
        self._train_on(images, class_index, "AUM", on_epoch=recorder)
        return recorder.aum()

    def _choose(self, images: Images, scores: Tensor) -> Tensor:
        """Return the images that stay: the first, or those of the best beta on held-out images."""
        if self.by_order:
            return self._stays(scores, beta=0.0)
        accuracies: dict[str, float] = self.state["beta_accuracies"]
        class_index = self.memory.class_index
        kept = {beta: self._stays(scores, beta) for beta in self.betas}
        if self.held_out is not None:
            held_out = steps.RealImages.of(self.held_out, self.memory.classes)
            for beta in self.betas:
                if str(beta) in accuracies:
                    continue
                stays = kept[beta].to(self.device)
                network = self._train_on(
                    take_images(images, stays), class_index[stays], f"beta {beta:g}"
                )
                accuracies[str(beta)] = self.team.agree(
                    functools.partial(score, network, held_out.data.images, held_out.class_indices)
                )
                self._stepped(self.config.pruning_passes, {"scores": scores}, save=True)
        best = max(self.betas, key=lambda beta: accuracies.get(str(beta), 0.0))
        self.state["beta"] = best
        return kept[best]

    def _stays(self, scores: Tensor, beta: float) -> Tensor:
        """Return the images that stay with a beta: as planned, or as many as fit if coded."""
        memory, growth = self.memory, self.growth
        # Images that share stored values are kept or dropped together, by their mean.
        size = memory.layout.group_size
        group_scores = scores.view(-1, size).mean(dim=1)
        group_class = memory.class_index.cpu()[::size]

        def stays(num_images: int) -> Tensor:
            drops = [drop // size for drop in growth.drops(num_images)]
            groups = double_ended_prune(group_scores, group_class, drops, beta)
            positions: Tensor = groups.view(-1, 1) * size + torch.arange(size)
            return positions.view(-1)

        if memory.layout.is_coded or memory.has_soft_labels:
            numbers = growth.num_planned, growth.num_most
            return most_that_fit(memory, self.budget.num_bytes, stays, *numbers)
        return stays(growth.num_planned)

    def _train_on(
        self,
        images: Images,
        class_index: Tensor,
        name: str,
        on_epoch: Callable[[int, Any], None] | None = None,
    ) -> nn.Module:
        training = self.config.pruning_training
        with self._bar(name, 1, training.num_passes) as bar:
            return train_network(
                images,
                class_index,
                self.memory.num_classes,
                config=training,
                seed=derive_seed(self.seed, "pruning"),
                device=self.device,
                progress=self._follow(bar),
                on_epoch=on_epoch,
                team=self.team,
            )


def _reconstruction_psnr(
    memory: LearnedMemory, positions: Tensor, wanted_images: Callable[[Tensor], Tensor]
) -> float:
    """Return the mean PSNR in dB of some images of a memory to wanted ones, decoded in parts.

    Of features, it is the ratio of their variance to the error.
    """
    # Preallocated: small tensors kept between large temporaries fragment the heap, and the process
    # would grow.
    errors = torch.empty(len(positions), dtype=torch.float32)
    parts = images_at_once(memory.image_shape)
    for own, part in zip(errors.split(parts), positions.split(parts), strict=True):
        own[:] = (memory.decode(part)[0].cpu() - wanted_images(part)).square().mean(dim=(1, 2, 3))
    return mean_psnr(errors / float(memory.unit) ** 2)


def _kept(context: steps.StepContext) -> dict[str, Stateful]:
    """Return what a checkpoint keeps of a phase's steps, beside the memory."""
    kept: dict[str, Stateful] = {"optimizer": context.optimizer}
    if context.rate_control is not None:
        kept["rate_control"] = context.rate_control.state
    return kept


@dataclass(frozen=True)
class _TrainedBefore:
    """The networks that are trained on the real images before the memory is begun.

    Attributes:
        count: How many.
        training: How, but for their architectures and number of epochs.
        num_epochs: Epochs of each, all of which are kept; None where the passes of ``training``
            say how many there are, and the initial and the last weights are kept.
        are_matched: Whether the memory is matched on them, or only its real images are chosen by
            the first.
    """

    count: int
    training: TrainingConfig
    num_epochs: int | None = None
    are_matched: bool = True

    def epochs_of(self, num_images: int) -> int:
        """Return how many epochs of so many images each is trained for."""
        if self.num_epochs is not None:
            return self.num_epochs
        num_epochs = round((self.training.epoch_images or 0) / num_images)
        return max(1, min(num_epochs, _MOST_POOL_EPOCHS))


def _trained_before(
    config: CondenseConfig, *, are_given: bool, selects: bool
) -> _TrainedBefore | None:
    """Return which networks are trained before; None for none.

    Args:
        config: The settings.
        are_given: Whether networks to match on are there already.
        selects: Whether real images are chosen by a network.

    Raises:
        ConfigError: Some architecture would have no trained network of its own.
    """
    objective, matches = get_objective(config.objective), config.num_steps > 0
    if matches and objective.compares_trainings:
        num_epochs = config.max_start_epoch + config.expert_epochs
        option = "num_experts"
        found = _TrainedBefore(config.num_experts, config.expert_training, num_epochs)
    elif matches and objective.matches_trained and config.trained_networks and not are_given:
        option = "trained_networks"
        found = _TrainedBefore(config.trained_networks, config.pool_training)
    elif selects:
        return _TrainedBefore(1, config.pool_training, are_matched=False)
    else:
        return None
    num_architectures = len(config.network)
    if found.count < num_architectures:
        raise ConfigError(
            f"{num_architectures} architectures take turns, of {option}={found.count} trained "
            f"networks in all: set {option} to {num_architectures} or more, or name fewer"
        )
    return found


def _identity(
    data: LabelledImages,
    budget: Budget,
    memory_type: type[LearnedMemory],
    layout: MemoryLayout,
    config: CondenseConfig,
    seed: int,
    old: LearnedMemory | None,
    networks: Sequence[nn.Module],
    teacher: Network | None,
    expected_classes: int | None,
) -> dict[str, str]:
    """Return what tells a run from every other one, by names that an error message can show."""
    settings = config.model_dump(exclude={"checkpoint_seconds"})
    old_tensors = {}
    if old is not None:
        old_tensors["file"] = as_bytes(old.to_bytes())
    functions = [
        OBJECTIVES.fingerprint(config.objective),
        *map(NETWORKS.fingerprint, config.network),
        fingerprint(config.pruning) if callable(config.pruning) else "",
    ]
    return {
        "data": digest_tensors("", {"images": data.images, "labels": data.labels}),
        "memory": digest_tensors("", old_tensors),
        "networks": " ".join(digest_tensors("", tensors_of(each)) for each in networks),
        "teacher": "" if teacher is None else digest_tensors("", tensors_of(teacher)),
        "kind": memory_type.kind,
        "layout": repr(layout),
        "expected_classes": repr(max(data.num_classes, expected_classes or 0)),
        "budget": str(budget),
        "seed": repr(seed),
        **{name: repr(value) for name, value in settings.items()},
        "functions": " ".join(filter(None, functions)),
        "torch": str(torch.__version__),
    }
