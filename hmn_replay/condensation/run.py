"""A run of several phases that can be stopped at any moment, and go on from its checkpoint."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hmn_replay.condensation.checkpoint import (
    Checkpoint,
    flatten_state,
    load_state,
    read_checkpoint,
    write_checkpoint,
)
from hmn_replay.distributed import ALONE, Team
from hmn_replay.errors import DistributedError, TrainingError
from hmn_replay.memory.learned import LearnedMemory
from hmn_replay.runtime import peak_memory_bytes

__all__ = ["Run"]

_Stateful: TypeAlias = "nn.Module | torch.optim.Optimizer | Tensor"

log = logging.getLogger(__name__)

_CHECKPOINT_SECONDS = 60.0
_MAIN_THREAD = threading.main_thread()


class Run:
    """Where a memory's training stands: phase, step, measurements, checkpoint.

    Args:
        memory: What is trained.
        fingerprint: What tells this run from every other one.
        phases: Their names, in their order.
        measured: JSON values that the phases write over, for :meth:`report`.
        device: Where it is trained.
        progress: Whether to show bars on standard error.
        team: The processes that train it together. The first one's clock counts for all; it alone
            shows bars, and reads and writes the checkpoint.
    """

    def __init__(
        self,
        memory: LearnedMemory,
        fingerprint: str,
        phases: Sequence[str],
        measured: Mapping[str, Any],
        device: torch.device,
        progress: bool,
        team: Team = ALONE,
    ) -> None:
        self.memory, self.fingerprint, self.team = memory, fingerprint, team
        self.phases, self.device, self.progress = tuple(phases), device, progress and team.first
        team.check_same(f"{fingerprint} on {device.type}", "data, budget, seed, settings or device")
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

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint where there is one, and write to it from now on."""
        self.checkpoint = checkpoint
        found = self.team.agree(lambda: read_checkpoint(checkpoint, self.fingerprint))
        if found is None:
            self._save()
            return
        self.state, self.resumed = found.state, found
        load_state(self.memory, found.group("memory"))
        log.info("going on from %s at %s %d", checkpoint, self.state["phase"], self.state["step"])

    def work(self, phases: Mapping[str, Callable[[], None]]) -> None:
        """Go through the phases that are left, in their order."""
        with self._interruptible(), self._telling_how_to_go_on():
            for phase in self.phases:
                if self.state["phase"] == phase:
                    self.clock = time.monotonic()
                    phases[phase]()

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

    @contextlib.contextmanager
    def _telling_how_to_go_on(self) -> Iterator[None]:
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

    def _stepped(self, num_images: int, *, save: bool = False, **owners: _Stateful) -> None:
        """Count one step, and write a checkpoint where it is time for one."""
        self.state["step"] += 1
        self.resumed = None
        overdue, interrupted = self._count(num_images)
        if save or overdue or interrupted:
            self._check()
            self._save(**owners)
        if interrupted:
            raise KeyboardInterrupt

    def _count(self, num_images: int) -> tuple[bool, bool]:
        """Count images and seconds; return if a checkpoint is due, and if any process is to end."""
        now, first = time.monotonic(), self.team.first
        overdue = now - self.saved_at >= _CHECKPOINT_SECONDS
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
            self.memory.to_bytes()
        except TrainingError as error:
            raise TrainingError(
                f"the memory left the numbers that it can be stored in, in the "
                f"{self.state['phase']} phase; lower warm_start_learning_rate, "
                "memory_learning_rate or, with mtt, student_learning_rate"
            ) from error

    def _save(self, **owners: _Stateful) -> None:
        if self.checkpoint is None or not self.team.first:
            return
        tensors = flatten_state("memory", self.memory)
        for name, owner in owners.items():
            tensors |= {name: owner} if isinstance(owner, Tensor) else flatten_state(name, owner)
        write_checkpoint(self.checkpoint, self.fingerprint, self.state, tensors)
        self.saved_at = time.monotonic()
