"""Replay inside Avalanche: a plugin that keeps a condensed memory of what was learned.

    replay = HMNReplay(budget="300 KiB")
    strategy = Naive(model=model, optimizer=optimizer, criterion=criterion, plugins=[replay])
    for experience in benchmark.train_stream:
        strategy.train(experience)
    replay.memory.save("seen.hmn")

Of this package, only this module and those that it is made of import Avalanche.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hmn_replay.avalanche.losses import Loss
from hmn_replay.avalanche.memory_replay import MemoryReplay, Strategy
from hmn_replay.budget import Budget
from hmn_replay.condensation.condense import condense
from hmn_replay.condensation.config import make_config
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import BudgetError
from hmn_replay.memory import HierarchicalMemory, LearnedMemory, loads
from hmn_replay.memory.base import MAX_CLASSES
from hmn_replay.runtime import derive_seed, resolve_device

__all__ = ["HMNReplay", "MemoryReplay", "reattach_optim_modules"]


class HMNReplay(MemoryReplay):
    """Replays a hierarchical memory, condensed by gradient matching, under a budget of bytes.

    After each experience the memory is extended by :func:`hmn_replay.condense` with
    ``memory=``: new classes get memories of their own, old ones give up instance memories, classes
    that come back are renewed, and the saved file stays within the budget.

    Args:
        budget: Bytes that the memory's file may take at any time, as :class:`Budget` reads them.
        batch_size_mem: As in :class:`MemoryReplay`, and so are the next seven.
        mode: See there.
        replay_transform: See there.
        replay_weight: See there.
        loss: See there; but the default is ``"auto"``.
        normalization: See there.
        max_raw_images: See there.
        seed: See there.
        expected_classes: How many classes the stream will have in all, if that is known: the
            memory's tiers are shaped for so many. Default: None, ten times those of the first
            experience, or as many of them as the budget can be shaped for.
        effort: ``"quick"``, ``"standard"`` or ``"paper"``.
        device: Where to condense: ``"auto"`` for the best device present, None for the strategy's.
        progress: Whether to show bars on standard error.
        **options: Fields of :class:`~hmn_replay.condensation.config.CondenseConfig`.

    Raises:
        BudgetError: The budget cannot be read.
        ConfigError: An unknown option, or a value outside its range.
    """

    memory: LearnedMemory | None

    def __init__(
        self,
        budget: Budget | int | str,
        *,
        batch_size_mem: int | None = None,
        mode: Literal["replay", "memory_only"] = "replay",
        replay_transform: Callable[[Tensor], Tensor] | None = None,
        replay_weight: float | None = None,
        loss: Loss = "auto",
        normalization: tuple[Sequence[float], Sequence[float]] | None = None,
        max_raw_images: int = 10_000,
        seed: int = 0,
        expected_classes: int | None = None,
        effort: str = "quick",
        device: str | torch.device | None = "auto",
        progress: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            batch_size_mem=batch_size_mem,
            mode=mode,
            replay_transform=replay_transform,
            replay_weight=replay_weight,
            loss=loss,
            normalization=normalization,
            max_raw_images=max_raw_images,
            seed=seed,
        )
        make_config(effort, **options)
        if device is not None:
            resolve_device(device)
        self.budget = Budget.parse(budget)
        self.expected_classes, self.effort, self.options = expected_classes, effort, options
        self.device, self.progress = device, progress

    def before_training(self, strategy: Strategy, *args: Any, **kwargs: Any) -> None:
        """Bring the memory to where it is condensed."""
        super().before_training(strategy, *args, **kwargs)
        if self.memory is not None:
            self.memory.to(self._compute_device())

    def update(self, images: LabelledImages, *, index: int) -> tuple[LearnedMemory, dict[str, Any]]:
        """Condense an experience's images into the memory."""
        device = self._compute_device()
        # From the file's values, so that a run that goes on from a file takes the same steps.
        old = None if self.memory is None else loads(self.memory.to_bytes(), device=device)
        memory = condense(
            images,
            self.budget,
            memory=old,
            expected_classes=self._expected(images),
            effort=self.effort,
            seed=derive_seed(self.seed, "update", index),
            device=device,
            progress=self.progress,
            **self.options,
        )
        return memory, memory.report

    def _expected(self, images: LabelledImages) -> int | None:
        if self.expected_classes is not None:
            return self.expected_classes
        number_format = make_config(self.effort, **self.options).number_format
        for factor in (10, 5, 2):
            expected = min(factor * images.num_classes, MAX_CLASSES)
            with contextlib.suppress(BudgetError):
                HierarchicalMemory.choose_layout(
                    self.budget, images.image_shape, expected, number_format
                )
                return expected
        return None

    def memory_to_bytes(self, memory: LearnedMemory) -> bytes:
        """Return the bytes of the memory's file."""
        return memory.to_bytes()

    def memory_from_bytes(self, data: bytes) -> LearnedMemory:
        """Read the bytes of a memory's file.

        Raises:
            MemoryFileError: They are damaged.
        """
        return loads(data, device=self._compute_device())

    def _compute_device(self) -> torch.device:
        return self._device if self.device is None else resolve_device(self.device)


def reattach_optim_modules() -> None:
    """Let Avalanche's ``save_checkpoint`` pickle optimizers; call it once, before saving.

    Torch deletes the names of its modules such as ``torch.optim.sgd``, where dill, which Avalanche
    saves with, looks for a class; it then fails with a PicklingError, with or without a plugin.
    This puts the names back. ``maybe_load_checkpoint`` replaces the strategy's plugins: read
    :class:`HMNReplay` from ``strategy.plugins`` again after it.
    """
    for name, module in list(sys.modules.items()):
        parent, _, child = name.rpartition(".")
        if parent == "torch.optim":
            setattr(torch.optim, child, module)
