"""What every strategy is built from, so that all are trained alike and hold equal bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from avalanche.core import SupervisedPlugin
from avalanche.logging import BaseLogger
from avalanche.training.plugins.evaluation import EvaluationPlugin
from avalanche.training.templates.common_templates import SupervisedTemplate
from torch import nn

from hmn_replay.avalanche.plugin import MemoryReplay
from hmn_replay.avalanche.protocol import MODES
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.runtime import resolve_device

__all__ = ["EqualPasses", "Settings", "Strategy"]

Strategy: TypeAlias = "SupervisedTemplate[Any, Any, Any]"

_EVAL_BATCH = 512


@dataclass(frozen=True, eq=False)
class Settings:
    """The arguments of :func:`strategies.build`, which says what each is.

    Raises:
        ConfigError: ``mode`` is none of the two, or a number of the training is below its range.
    """

    model: nn.Module
    budget_bytes: int
    num_classes: int
    image_shape: tuple[int, int, int]
    lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    batch_size_mem: int
    epochs: int
    seed: int
    device: str | torch.device
    mode: Literal["replay", "memory_only"]
    replay: Mapping[str, Any]
    effort: str
    expected_classes: int | None
    evaluator: EvaluationPlugin | None
    plugins: Sequence[SupervisedPlugin[Any]]
    progress: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(MODES)}; got {self.mode!r}")
        for name in ("batch_size", "batch_size_mem", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more; got {getattr(self, name)!r}")
        if not self.lr > 0:
            raise ConfigError(f"lr must be above 0; got {self.lr!r}")
        for name in ("momentum", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be 0 or more; got {getattr(self, name)!r}")

    def common(self, *plugins: SupervisedPlugin[Any]) -> dict[str, Any]:
        """Return what all of Avalanche's strategies take, the given plugins before the caller's."""
        optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        if self.mode == "memory_only" and any(isinstance(p, MemoryReplay) for p in plugins):
            plugins = (*plugins, EqualPasses(self))
        return {
            "model": self.model,
            "optimizer": optimizer,
            "criterion": nn.CrossEntropyLoss(),
            "train_mb_size": self.batch_size,
            "train_epochs": self.epochs,
            "eval_mb_size": _EVAL_BATCH,
            "device": resolve_device(self.device),
            "plugins": [*plugins, *self.plugins],
            # A logger that writes nothing: without any, Avalanche warns.
            "evaluator": self.evaluator or EvaluationPlugin(loggers=BaseLogger()),
        }

    def replay_options(self) -> dict[str, Any]:
        """Return what all replay plugins of :mod:`hmn_replay` take."""
        return {
            "batch_size_mem": self.batch_size_mem,
            "mode": self.mode,
            "seed": self.seed,
            "progress": self.progress,
            **self.replay,
        }

    def num_images(self, extra_bytes: int = 0) -> int:
        """Return how many images of uint8 pixels the budget holds.

        Args:
            extra_bytes: What each image takes beside its pixels.

        Raises:
            BudgetError: Not one.
        """
        image_bytes = math.prod(self.image_shape) + extra_bytes
        if self.budget_bytes < image_bytes:
            raise BudgetError(
                f"a budget of {self.budget_bytes:,} bytes does not hold one image, which takes "
                f"{image_bytes:,}"
            )
        return self.budget_bytes // image_bytes

    def refuse_memory_only(self) -> None:
        """Raise a ConfigError in that mode, for a strategy that needs current data beside it."""
        if self.mode == "memory_only":
            raise ConfigError('this strategy has no mode "memory_only"; leave mode="replay"')

    def choose(self, **defaults: Any) -> dict[str, Any]:
        """Return the options of a strategy: the caller's, else the defaults.

        Raises:
            ConfigError: The caller gave one that has no default here.
        """
        unknown = sorted(set(self.options) - set(defaults))
        if unknown:
            known = ", ".join(defaults) or "none"
            raise ConfigError(f"unknown option {unknown[0]!r}; this strategy's own are: {known}")
        return {**defaults, **self.options}


class EqualPasses(SupervisedPlugin[Any], supports_distributed=False):
    """Lets a strategy that trains on a memory alone see about as many images as a replaying rival.

    ``epochs`` over a small memory would be next to nothing. So it is trained on for as many epochs
    as make up ``epochs`` over the experience, and from the second experience on over as many
    replayed images beside them as ``batch_size_mem`` brings: as many as a rival sees whose memory
    has so many images. (One whose memory is renewed before training replays in the first
    experience, too; one with fewer images replays fewer.) It comes after the plugin that puts the
    memory in the place of the data.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.epochs = settings.epochs
        self.replayed = settings.batch_size_mem / settings.batch_size
        self.is_first = True

    def after_train_dataset_adaptation(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Set the strategy's epochs."""
        passes = self.epochs * len(strategy.experience.dataset)
        if not self.is_first:
            passes = round(passes * (1 + self.replayed))
        self.is_first = False
        strategy.train_epochs = max(1, round(passes / len(strategy.adapted_dataset)))
