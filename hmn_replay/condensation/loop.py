"""The loop behind :func:`hmn_replay.condense`: warm start, matching, pruning.

Every draw depends on the seed and the step alone, so a run that goes on from a checkpoint takes the
very steps that it would have taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hmn_replay.budget import Budget
from hmn_replay.condensation import steps
from hmn_replay.condensation.checkpoint import load_state
from hmn_replay.condensation.config import CondenseConfig
from hmn_replay.condensation.fidelity import drift_psnr, reconstruction_psnr
from hmn_replay.condensation.growth import make_room
from hmn_replay.condensation.pruning import aum, double_ended_prune, margins
from hmn_replay.condensation.rate import RateControl, fit_code, most_that_fit
from hmn_replay.condensation.run import Run
from hmn_replay.condensation.steppers import BatchStepper, Stepper
from hmn_replay.condensation.students import TrajectoryStepper, needs_experts, open_experts
from hmn_replay.data.images import LabelledImages
from hmn_replay.data.lookup import Images, LabelledView, images_at_once, join_images, take_images
from hmn_replay.distributed import ALONE, Team
from hmn_replay.evaluation import score
from hmn_replay.files import digest_tensors
from hmn_replay.memory.learned import LearnedMemory, MemoryLayout
from hmn_replay.objectives.trajectories import Experts
from hmn_replay.runtime import derive_seed, make_generator
from hmn_replay.training.networks import Network
from hmn_replay.training.train import cosine_rate, train_network

__all__ = ["Condensation"]


class Condensation(Run):
    """One run: the images, the memory, and how far it is; arguments as for ``condense``."""

    def __init__(
        self,
        data: LabelledImages,
        budget: Budget,
        layout: MemoryLayout,
        config: CondenseConfig,
        *,
        memory_type: type[LearnedMemory],
        old: LearnedMemory | None = None,
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
            seed=seed,
            device=device,
        )
        self.first_class = self.growth.first_class
        learned: Tensor | None = None
        self.held_out: LabelledView | None = None
        # Real images are kept back for the choice of beta only where there is a choice to make.
        if len(config.beta_grid) > 1 and any(self.growth.drops()) and len(data) > data.num_classes:
            learned, kept_back = data.split_positions(config.holdout, derive_seed(seed, "holdout"))
            held_out = join_images([data.images]).take(kept_back)
            self.held_out = LabelledView(held_out, data.labels[kept_back])
        pool = self.growth.pool(data, learned)
        self.real = steps.RealImages.of(pool, self.growth.memory.classes)
        measured: dict[str, Any] = {
            "warm_start_psnr": None,
            "beta": None,
            "beta_accuracies": {},
            "drift_psnr": None,
            "student_rate": None,
        }
        self.experts: Experts | None = None
        phases = ["warm_start", "matching", "pruning"]
        if needs_experts(config):
            phases.insert(1, "experts")
        fingerprint = _fingerprint(data, budget, layout, config, seed, old)
        super().__init__(self.growth.memory, fingerprint, phases, measured, device, progress, team)

    def finish(self) -> LearnedMemory:
        """Take all the steps that are left."""
        arguments = (self.memory, self.real, self.config, self.seed, self.first_class)
        with open_experts(*arguments, self.checkpoint) as self.experts:
            self.work(
                {
                    "warm_start": self._warm_start,
                    "experts": self._record_experts,
                    "matching": self._match,
                    "pruning": self._prune,
                }
            )
        return self.memory

    def _warm_start(self) -> None:
        config, memory, num_old = self.config, self.memory, self.growth.num_old
        num_images = memory.num_images - num_old
        # As many epochs for a few new images as for a whole memory.
        num_steps = math.ceil(config.warm_start_steps * num_images / max(1, memory.num_images))
        batch_size = max(1, min(config.warm_start_batch, num_images))
        steps_per_epoch = math.ceil(num_images / batch_size)
        rate = config.warm_start_learning_rate * (memory.added_rate if self.first_class else 1.0)
        targets = steps.warm_start_targets(memory, self.real, self.seed, self.first_class)
        warm = num_steps > 0

        def wanted_images(positions: Tensor) -> Tensor:
            return self.real.data.floats(targets[positions - num_old])

        if warm and self.state["step"] == 0 and memory.fit(num_old, wanted_images):
            num_steps = 0
        memory.update_scales(self.first_class)
        optimizer, rate_control = self._optimizer((0.9, 0.99)), self._rate_control()
        order, order_epoch = torch.empty(0), -1
        with self._bar("warm start", num_steps, batch_size) as bar:
            while (done := self._share_done(num_steps, config.warm_start_seconds)) < 1:
                epoch, position = divmod(self.state["step"], steps_per_epoch)
                if epoch != order_epoch:
                    generator = make_generator(self.seed, "warm start", epoch)
                    order, order_epoch = torch.randperm(num_images, generator=generator), epoch
                indices = order[position * batch_size : (position + 1) * batch_size]
                wanted = wanted_images(num_old + indices)
                steps.set_rate(optimizer, cosine_rate(done, 1, rate))
                steps.warm_start_step(
                    memory,
                    optimizer,
                    num_old + indices,
                    wanted,
                    config.precision,
                    self.first_class,
                    self.team,
                    rate_control,
                )
                bar.update(batch_size)
                self._stepped(len(indices), optimizer=optimizer, **_kept(rate_control))
        if warm:
            new = torch.arange(num_old, memory.num_images)
            self.state["warm_start_psnr"] = reconstruction_psnr(memory, new, wanted_images)
        self._next_phase()

    def _record_experts(self) -> None:
        experts = self.experts
        assert experts is not None, "a phase of runs that follow experts"
        missing, size = self.team.agree(experts.missing), experts.num_images
        with self._bar("experts", self.state["step"] + len(missing), size) as bar:
            for number in missing:
                experts.record(number, self.device, self._follow(bar), self.team)
                self._stepped(size, save=True)
        self._next_phase()

    def _match(self) -> None:
        config, num_steps = self.config, self.config.num_steps
        optimizer, rate_control = self._optimizer((0.5, 0.99)), self._rate_control()
        stepper = self._stepper(rate_control)
        if self.resumed and self.state["step"]:
            stepper.resume(self.resumed, self.state["step"])
        with self._bar("matching", num_steps, stepper.images_per_step) as bar:
            while (done := self._share_done(num_steps, config.max_seconds)) < 1:
                steps.set_rate(optimizer, cosine_rate(done, 1, config.memory_learning_rate))
                num_decoded = stepper.step(optimizer, self.state["step"])
                bar.update(stepper.images_per_step)
                owners = {**stepper.owners(), **_kept(rate_control)}
                self._stepped(num_decoded, optimizer=optimizer, **owners)
        self.state |= stepper.results()
        self._next_phase()

    def _stepper(self, rate_control: RateControl | None) -> Stepper:
        arguments = (self.memory, self.real, self.config, self.seed, self.first_class, self.team)
        if self.experts is None:
            return BatchStepper(*arguments, rate_control)
        return TrajectoryStepper(*arguments, rate_control, experts=self.experts)

    def _rate_control(self) -> RateControl | None:
        """Return what keeps the bits of an entropy-coded memory near the budget; else None."""
        memory, growth = self.memory, self.growth
        if not _is_coded(memory):
            return None
        budget_bytes = self.budget.num_bytes
        file_bytes = memory.file_bytes_with(memory.num_images, 0, budget_bytes)
        rate_control = RateControl(
            memory,
            budget_bytes - file_bytes,
            memory.num_images - sum(growth.drops()),
            growth.num_old,
            growth.num_old - growth.old_drops,
        )
        if self.resumed and self.state["step"]:
            rate_control.state = self.resumed.tensors["rate_control"].to(self.device)
        return rate_control

    def _share_done(self, num_steps: int, most_seconds: float | None) -> float:
        """Return how much of a phase is done: 1 where steps or seconds, of all so far, are out."""
        done: float = self.state["step"] / num_steps if num_steps else 1.0
        if most_seconds is None:
            return done
        seconds: float = sum(numbers["seconds"] for numbers in self.state["phases"].values())
        return min(1.0, max(done, seconds / most_seconds))

    def _prune(self) -> None:
        self.team.copy_first(self.memory.state_dict().values())
        self.state["drift_psnr"] = self._drift()
        if any(self.growth.drops()):
            images = self.memory.decoded()
            scores = self.resumed.tensors.get("scores") if self.resumed else None
            if scores is None:
                scores = self._score_images(images)
                self.team.copy_first([scores])
                self._stepped(self.config.pruning_passes, save=True, scores=scores)
            self.memory.keep(self._choose(images, scores))
        if _is_coded(self.memory):
            num_old = sum(self.memory.images_per_class[: self.first_class])
            fit_code(self.memory, self.budget.num_bytes, num_old)
        self.memory.budget_bytes = self.budget.num_bytes
        self.memory.requires_grad_(True)
        self._end_phase()

    def _drift(self) -> float | None:
        """Return the PSNR in dB of the old images to what they were; None if no bit changed."""
        growth = self.growth
        stays = torch.isin(growth.old_labels, self.memory.classes[: self.first_class].cpu())
        return drift_psnr(self.memory, take_images(growth.old_images, stays.nonzero().flatten()))

    def _score_images(self, images: Images) -> Tensor:
        """Return the AUM of every decoded image, from one training on all of them."""
        class_index = self.memory.class_index
        recorded: list[Tensor] = []

        def record(_: int, network: Network) -> None:
            network.eval()
            margin = torch.zeros(len(images), dtype=torch.float32, device=self.device)
            positions = torch.arange(len(images), device=self.device)
            parts = positions.split(images_at_once(self.memory.image_shape))
            with torch.no_grad():
                for part in self.team.share(parts):
                    margin[part] = margins(network(images[part]).float(), class_index[part])
            self.team.add_up(margin)
            recorded.append(margin)

        self._train_on(images, class_index, "AUM", on_epoch=record)
        return aum(recorded).cpu()

    def _choose(self, images: Images, scores: Tensor) -> Tensor:
        """Return the images that stay, for the beta that scores best on held-out real images."""
        accuracies: dict[str, float] = self.state["beta_accuracies"]
        class_index = self.memory.class_index
        grid = self.config.beta_grid
        kept = {beta: self._stays(scores, beta) for beta in grid}
        if self.held_out is not None:
            held_out = steps.RealImages.of(self.held_out, self.memory.classes)
            for beta in grid:
                if str(beta) in accuracies:
                    continue
                stays = kept[beta].to(self.device)
                network = self._train_on(
                    take_images(images, stays), class_index[stays], f"beta {beta:g}"
                )
                accuracies[str(beta)] = self.team.agree(
                    partial(score, network, held_out.data.images, held_out.class_indices)
                )
                self._stepped(self.config.pruning_passes, save=True, scores=scores)
        best = max(grid, key=lambda beta: accuracies.get(str(beta), 0.0))
        self.state["beta"] = best
        return kept[best]

    def _stays(self, scores: Tensor, beta: float) -> Tensor:
        """Return the images that stay with a beta: as planned, or as many as fit if coded."""
        memory, growth = self.memory, self.growth
        # Images that share stored values stand and fall together, by their mean.
        size = memory.layout.group_size
        group_scores = scores.view(-1, size).mean(dim=1)
        group_class = memory.class_index.cpu()[::size]

        def stays(num_images: int) -> Tensor:
            drops = [drop // size for drop in growth.drops(num_images)]
            groups = double_ended_prune(group_scores, group_class, drops, beta)
            return (groups.view(-1, 1) * size + torch.arange(size)).flatten()

        if _is_coded(memory):
            numbers = growth.num_planned, growth.num_most
            return most_that_fit(memory, self.budget.num_bytes, stays, *numbers)
        return stays(growth.num_planned)

    def _train_on(
        self,
        images: Images,
        class_index: Tensor,
        name: str,
        on_epoch: Callable[[int, Network], None] | None = None,
    ) -> Network:
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

    def _follow(self, bar: Any) -> Callable[[int, int], None]:
        """Return what moves a bar along a training that begins now, and stops it at Ctrl-C."""
        start = bar.n

        def advance(num_seen: int, _: int) -> None:
            if any(self.team.sum(self.interrupted)):
                raise KeyboardInterrupt  # what came before this training has been kept
            bar.update(start + num_seen - bar.n)

        return advance

    def _optimizer(self, betas: tuple[float, float]) -> torch.optim.Adam:
        # Processes may differ in last bits; from here on, all move the same memory.
        self.team.copy_first(self.memory.state_dict().values())
        optimizer = steps.make_optimizer(self.memory, betas)
        if self.resumed and self.state["step"]:
            load_state(optimizer, self.resumed.group("optimizer"))
        return optimizer


def _is_coded(memory: LearnedMemory) -> bool:
    return bool(memory.layout.is_coded)


def _kept(rate_control: RateControl | None) -> dict[str, Any]:
    """Return what a checkpoint keeps of it."""
    return {} if rate_control is None else {"rate_control": rate_control.state}


def _fingerprint(
    data: LabelledImages,
    budget: Budget,
    layout: MemoryLayout,
    config: CondenseConfig,
    seed: int,
    old: LearnedMemory | None,
) -> str:
    tensors = {"images": data.images, "labels": data.labels}
    if old is not None:
        tensors["old"] = torch.frombuffer(bytearray(old.to_bytes()), dtype=torch.uint8)
    return digest_tensors(repr((budget, layout, config, seed)), tensors)
