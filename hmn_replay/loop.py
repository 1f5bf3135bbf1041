"""The loop behind :func:`hmn_replay.condense`: three phases, progress, checkpoints.

Every draw depends on the seed and the step alone, so a run that goes on from a checkpoint takes the
very steps that it would have taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hmn_replay import steps
from hmn_replay.budget import Budget
from hmn_replay.checkpoint import (
    Checkpoint,
    flatten_state,
    load_state,
    read_checkpoint,
    write_checkpoint,
)
from hmn_replay.config import CondenseConfig
from hmn_replay.data import LabelledImages
from hmn_replay.errors import TrainingError
from hmn_replay.growth import make_room
from hmn_replay.layout import Layout
from hmn_replay.memory import HierarchicalMemory
from hmn_replay.networks import Network
from hmn_replay.pruning import aum, double_ended_prune, margins
from hmn_replay.runtime import derive_seed, make_generator, peak_memory_bytes, reset_peak_memory
from hmn_replay.storage import serialise
from hmn_replay.training import cosine_rate, score, train_network

__all__ = ["Condensation"]

_Stateful: TypeAlias = "nn.Module | torch.optim.Optimizer | Tensor"

log = logging.getLogger(__name__)

_PHASES = ("warm_start", "matching", "pruning")
_CHECKPOINT_SECONDS = 60.0
_MAIN_THREAD = threading.main_thread()


class Condensation:
    """One run: the images, the memory, and how far it is; arguments as for ``condense``."""

    def __init__(
        self,
        data: LabelledImages,
        budget: Budget,
        layout: Layout,
        config: CondenseConfig,
        *,
        old: HierarchicalMemory | None = None,
        seed: int,
        device: torch.device,
        progress: bool,
    ) -> None:
        self.config, self.seed, self.device, self.progress = config, seed, device, progress
        self.budget = budget
        self.growth = make_room(
            data, budget, config.over_budget, layout=layout, old=old, seed=seed, device=device
        )
        self.memory = self.growth.memory
        self.first_class = self.growth.first_class
        train = data
        self.held_out: LabelledImages | None = None
        # Real images are kept back for the choice of beta only where there is a choice to make.
        if len(config.beta_grid) > 1 and any(self.growth.drops) and len(data) > data.num_classes:
            train, self.held_out = data.split(config.holdout, derive_seed(seed, "holdout"))
        self.real = steps.RealImages.of(self.growth.pool(train), self.memory.classes)
        self.state: dict[str, Any] = {
            "phase": _PHASES[0],
            "step": 0,
            "phases": {
                name: {"seconds": 0.0, "images": 0, "peak_memory_bytes": 0} for name in _PHASES
            },
            "warm_start_psnr": None,
            "beta": None,
            "beta_accuracies": {},
            "drift_psnr": None,
        }
        self.resumed: Checkpoint | None = None
        self.checkpoint: Path | None = None
        self.interrupted = False
        self.fingerprint = _fingerprint(data, budget, layout, config, seed, old)
        self.saved_at = self.clock = time.monotonic()

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint where there is one, and write to it from now on."""
        self.checkpoint = checkpoint
        found = read_checkpoint(checkpoint, self.fingerprint)
        if found is None:
            self._save()
            return
        self.state, self.resumed = found.state, found
        load_state(self.memory, found.group("memory"))
        log.info("going on from %s at %s %d", checkpoint, self.state["phase"], self.state["step"])

    def finish(self) -> HierarchicalMemory:
        """Take all the steps that are left."""
        phases = zip(_PHASES, (self._warm_start, self._match, self._prune), strict=True)
        with self._interruptible():
            for phase, work in phases:
                if self.state["phase"] == phase:
                    self.clock = time.monotonic()
                    reset_peak_memory(self.device)
                    work()
        return self.memory

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let Ctrl-C wait for the end of a step, whose state can be kept; a second one does not."""
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.checkpoint is None or not usual or threading.current_thread() is not _MAIN_THREAD:
            yield
            return

        def handle(*_: object) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def report(self) -> dict[str, Any]:
        """Return what was measured."""
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

    def _warm_start(self) -> None:
        config, memory, num_old = self.config, self.memory, self.growth.num_old
        num_images = memory.num_images - num_old
        # As many epochs for a few new images as for a whole memory.
        num_steps = math.ceil(config.warm_start_steps * num_images / max(1, memory.num_images))
        batch_size = max(1, min(config.warm_start_batch, num_images))
        steps_per_epoch = math.ceil(num_images / batch_size)
        targets = steps.warm_start_targets(memory, self.real, self.seed, self.first_class)
        optimizer = self._optimizer((0.9, 0.99))
        order, order_epoch = torch.empty(0), -1
        with self._bar("warm start", num_steps, batch_size) as bar:
            while self.state["step"] < num_steps:
                epoch, position = divmod(self.state["step"], steps_per_epoch)
                if epoch != order_epoch:
                    generator = make_generator(self.seed, "warm start", epoch)
                    order, order_epoch = torch.randperm(num_images, generator=generator), epoch
                indices = order[position * batch_size : (position + 1) * batch_size]
                wanted = self.real.data.floats(targets[indices])
                wanted = wanted.to(self.device, non_blocking=True)
                rate = cosine_rate(self.state["step"], num_steps, config.warm_start_learning_rate)
                steps.set_rate(optimizer, rate)
                steps.warm_start_step(
                    memory, optimizer, num_old + indices, wanted, config.precision, self.first_class
                )
                bar.update(batch_size)
                self._stepped(len(indices), optimizer=optimizer)
        self.state["warm_start_psnr"] = self._psnr(targets) if num_steps else None
        self._next_phase()

    def _match(self) -> None:
        config, memory = self.config, self.memory
        num_steps = config.outer_steps * config.inner_steps
        counts = memory.images_per_class[self.first_class :]
        num_classes = min(len(counts), config.classes_per_step or len(counts))
        images_per_step = num_classes * min(config.decoded_batch, max(counts))
        optimizer = self._optimizer((0.5, 0.99))
        network: Network | None = None
        learner: torch.optim.SGD
        with self._bar("matching", num_steps, images_per_step) as bar:
            while self.state["step"] < num_steps:
                step: int = self.state["step"]
                if network is None or step % config.inner_steps == 0:
                    network, learner = self._fresh_network(step)
                steps.set_rate(optimizer, cosine_rate(step, num_steps, config.memory_learning_rate))
                generator = make_generator(self.seed, "match", step)
                num_decoded = steps.match_step(
                    memory, optimizer, network, self.real, config, generator, self.first_class
                )
                if config.network_images:
                    generator = make_generator(self.seed, "train", step)
                    steps.train_step(network, learner, self.real, config, generator)
                bar.update(images_per_step)
                self._stepped(num_decoded, optimizer=optimizer, network=network, learner=learner)
        self._next_phase()

    def _prune(self) -> None:
        self.state["drift_psnr"] = self._drift()
        if any(self.growth.drops):
            images, _ = self.memory.decode()
            scores = self.resumed.tensors.get("scores") if self.resumed else None
            if scores is None:
                scores = self._score_images(images)
                self._stepped(self.config.pruning_passes, save=True, scores=scores)
            self.memory.keep(self._choose(images, scores))
        self.memory.budget_bytes = self.budget.num_bytes
        self.memory.requires_grad_(True)
        self._end_phase()

    def _drift(self) -> float | None:
        """Return the PSNR in dB of the old images to what they were; None if no bit changed."""
        growth = self.growth
        stays = torch.isin(growth.old_labels, self.memory.classes[: self.first_class].cpu())
        before = growth.old_images[stays].double() / 255
        after = self.memory.decode(range(growth.num_old), dtype=torch.uint8)[0].cpu().double() / 255
        error = float((before - after).square().mean()) if growth.num_old else 0.0
        return -10 * math.log10(error) if error else None

    def _score_images(self, images: Tensor) -> Tensor:
        """Return the AUM of every decoded image, from one training on all of them."""
        class_index = self.memory.class_index
        recorded: list[Tensor] = []

        def record(_: int, network: Network) -> None:
            network.eval()
            with torch.no_grad():
                logits = torch.cat([network(chunk) for chunk in images.split(512)])
            recorded.append(margins(logits.float(), class_index))

        self._train_on(images, class_index, "AUM", on_epoch=record)
        return aum(recorded).cpu()

    def _choose(self, images: Tensor, scores: Tensor) -> Tensor:
        """Return the images that stay, for the beta that scores best on held-out real images."""
        accuracies: dict[str, float] = self.state["beta_accuracies"]
        class_index = self.memory.class_index
        grid = self.config.beta_grid
        kept = {
            beta: double_ended_prune(scores, class_index.cpu(), self.growth.drops, beta)
            for beta in grid
        }
        if self.held_out is not None:
            held_out = steps.RealImages.of(self.held_out, self.memory.classes)
            for beta in grid:
                if str(beta) in accuracies:
                    continue
                stays = kept[beta].to(self.device)
                network = self._train_on(images[stays], class_index[stays], f"beta {beta:g}")
                accuracies[str(beta)] = score(network, held_out.data.images, held_out.class_indices)
                self._stepped(self.config.pruning_passes, save=True, scores=scores)
        best = max(grid, key=lambda beta: accuracies.get(str(beta), 0.0))
        self.state["beta"] = best
        return kept[best]

    def _train_on(
        self,
        images: Tensor,
        class_index: Tensor,
        name: str,
        on_epoch: Callable[[int, Network], None] | None = None,
    ) -> Network:
        training = self.config.pruning_training

        def advance(num_seen: int, _: int) -> None:
            if self.interrupted:
                raise KeyboardInterrupt  # what came before this training has been kept
            bar.update(num_seen - bar.n)

        with self._bar(name, 1, training.num_passes) as bar:
            return train_network(
                images,
                class_index,
                self.memory.num_classes,
                config=training,
                seed=derive_seed(self.seed, "pruning"),
                device=self.device,
                progress=advance,
                on_epoch=on_epoch,
            )

    def _psnr(self, targets: Tensor) -> float:
        images, _ = self.memory.decode(range(self.growth.num_old, self.memory.num_images))
        errors = torch.cat(
            [
                (chunk.cpu() - self.real.data.floats(wanted)).square().mean(dim=(1, 2, 3))
                for chunk, wanted in zip(images.split(512), targets.split(512), strict=True)
            ]
        )
        return float(-10 * errors.clamp_min(1e-10).log10().mean())

    def _optimizer(self, betas: tuple[float, float]) -> torch.optim.Adam:
        optimizer = steps.make_optimizer(self.memory, betas)
        if self.resumed and self.state["step"]:
            load_state(optimizer, self.resumed.group("optimizer"))
        return optimizer

    def _fresh_network(self, step: int) -> tuple[Network, torch.optim.SGD]:
        number, done = divmod(step, self.config.inner_steps)
        network, learner = steps.fresh_network(
            self.memory, self.real, self.config, derive_seed(self.seed, "network", number)
        )
        if self.resumed and done:
            load_state(network, self.resumed.group("network"))
            load_state(learner, self.resumed.group("learner"))
        return network, learner

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

    def _stepped(self, num_images: int, *, save: bool = False, **owners: _Stateful) -> None:
        """Count one step, and write a checkpoint where it is time for one."""
        self.state["step"] += 1
        self.resumed = None
        self._count(num_images)
        overdue = time.monotonic() - self.saved_at >= _CHECKPOINT_SECONDS
        if save or overdue or self.interrupted:
            self._check()
            self._save(**owners)
        if self.interrupted:
            raise KeyboardInterrupt

    def _count(self, num_images: int) -> None:
        now = time.monotonic()
        numbers = self.state["phases"][self.state["phase"]]
        numbers["seconds"] += now - self.clock
        numbers["images"] += num_images
        self.clock = now

    def _next_phase(self) -> None:
        self._check()
        self._end_phase()
        self.state["phase"] = _PHASES[_PHASES.index(self.state["phase"]) + 1]
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
            serialise(self.memory)
        except TrainingError as error:
            raise TrainingError(
                f"the memory left the numbers that it can be stored in, in the "
                f"{self.state['phase']} phase; lower memory_learning_rate or "
                "warm_start_learning_rate"
            ) from error

    def _save(self, **owners: _Stateful) -> None:
        if self.checkpoint is None:
            return
        tensors = flatten_state("memory", self.memory)
        for name, owner in owners.items():
            tensors |= {name: owner} if isinstance(owner, Tensor) else flatten_state(name, owner)
        write_checkpoint(self.checkpoint, self.fingerprint, self.state, tensors)
        self.saved_at = time.monotonic()


def _fingerprint(
    data: LabelledImages,
    budget: Budget,
    layout: Layout,
    config: CondenseConfig,
    seed: int,
    old: HierarchicalMemory | None,
) -> str:
    digest = hashlib.blake2b(repr((budget, layout, config, seed)).encode(), digest_size=16)
    for tensor in (data.labels, data.images):
        digest.update(repr(tensor.shape).encode())
        digest.update(tensor.contiguous().numpy().data)
    if old is not None:
        digest.update(serialise(old))
    return digest.hexdigest()
