"""What a replay plugin was asked for, and what a strategy and its experiences allow of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from avalanche.core import BasePlugin
from avalanche.training.supervised import JointTraining
from avalanche.training.templates.common_templates import SupervisedTemplate
from torch import nn

from hmn_replay.avalanche.losses import (
    LOSSES,
    RENEWALS,
    TUNED,
    Loss,
    Renewal,
    ReplayLoss,
    find_loss,
    plain,
)
from hmn_replay.avalanche.streams import Strategy, is_piece, normalises
from hmn_replay.budget import as_int, as_number
from hmn_replay.errors import ConfigError
from hmn_replay.memory.labels import check_takes_labels
from hmn_replay.registry import check_name

__all__ = [
    "MODES",
    "ReplayProtocol",
    "Settled",
    "check_asked",
    "check_labels",
    "check_tuning",
    "has_plain_criterion",
    "needs_all_classes",
    "owner_of_loss",
]

MODES = ("replay", "memory_only")


class Settled(NamedTuple):
    """How an experience is trained on: the loss, its name for reports, and the renewal."""

    loss: ReplayLoss
    loss_used: str
    renew_used: str


@dataclass(frozen=True)
class ReplayProtocol:
    """How images of a memory were asked to be trained on; see :class:`MemoryReplay`."""

    mode: Literal["replay", "memory_only"]
    loss: Loss
    renew: Renewal
    replay_weight: float | None

    def settle(
        self,
        strategy: Strategy,
        experiences: Sequence[Any],
        *,
        has_memory: bool,
        has_tasks: bool,
        warn: Callable[[str], None],
    ) -> Settled:
        """Settle loss and renewal for experiences, none of them before the first is known.

        What was asked for and cannot be had is refused, or warned of.

        Args:
            strategy: What trains.
            experiences: What it is going to be trained on.
            has_memory: Whether there is a memory yet.
            has_tasks: Whether the experiences or the memory have task labels above 0.
            warn: Told what cannot be had, and what is done in its place.

        Raises:
            ConfigError: What was asked for by name cannot be had.
        """
        name, loss = find_loss(self.loss)
        reason = self._why_plain(strategy, name, loss, has_tasks)
        is_joint = isinstance(strategy, JointTraining)
        renew = self.renew
        if self.mode == "memory_only":
            renew = "before" if has_memory else "after"
            name, loss = "plain", plain
        elif renew == "auto":
            is_wanted = self.loss != "auto" or not is_joint
            renew = "before" if needs_all_classes(loss) and is_wanted and not reason else "after"
        if renew == "before" and any(is_piece(strategy, each) for each in experiences):
            renew = "after"
            if self.renew == "before" or self.loss != "auto":
                warn(
                    "an online stream gives an experience in pieces, which cannot be made into the "
                    'memory before they are trained on: renew="after"'
                    + (', and so loss="balanced"' if needs_all_classes(loss) else "")
                )
        if renew == "after" and needs_all_classes(loss):
            name, loss = "balanced", LOSSES["balanced"]
        if reason:
            if self.loss != "plain":
                warn(f"replayed images are trained with the plain loss: {reason}")
            name, loss = "plain", plain
        if not has_plain_criterion(strategy):
            name = owner_of_loss(strategy)
        return Settled(loss, name, renew)

    def _why_plain(self, strategy: Strategy, name: str, loss: ReplayLoss, has_tasks: bool) -> str:
        """Return why a loss cannot be had, or nothing; raise where it was asked for by name."""
        changes_logits = getattr(loss, "changes_logits", False)
        if self.mode == "memory_only":
            return ""
        if not has_plain_criterion(strategy):
            reason = f"{owner_of_loss(strategy)} has a loss of its own"
            if self.replay_weight is not None or self.loss not in ("auto", "plain"):
                raise ConfigError(
                    f"{reason}, which replay_weight and loss cannot replace; leave them out, and "
                    "choose batch_size_mem instead"
                )
            return reason
        if changes_logits and not _is_cross_entropy(strategy._criterion):
            reason = (
                "the criterion is not nn.CrossEntropyLoss without label smoothing, but "
                f"{_describe(strategy._criterion)}"
            )
            if self.loss != "auto":
                raise ConfigError(f"loss={name!r} changes the logits of a softmax: {reason}")
            return reason
        if changes_logits and has_tasks:
            reason = "task labels above 0 tell classes apart"
            if self.loss != "auto":
                raise ConfigError(f"loss={name!r} balances all classes, but {reason}: leave it out")
            return reason
        return ""


def has_plain_criterion(strategy: Strategy) -> bool:
    """Return whether a strategy's loss is its criterion of output and labels."""
    kind = type(strategy)
    return (
        kind.training_epoch is SupervisedTemplate.training_epoch
        and kind.criterion is SupervisedTemplate.criterion
        and not isinstance(strategy._criterion, BasePlugin)
    )


def owner_of_loss(strategy: Strategy) -> str:
    """Return the name of what has a loss of its own: the strategy, or a plugin as its criterion."""
    criterion = strategy._criterion
    return type(criterion if isinstance(criterion, BasePlugin) else strategy).__name__


def needs_all_classes(loss: ReplayLoss) -> bool:
    """Return whether a loss learns the current classes from decoded images, too."""
    return getattr(loss, "needs_all_classes", False)


def _is_cross_entropy(criterion: object) -> bool:
    return isinstance(criterion, nn.CrossEntropyLoss) and not criterion.label_smoothing


def _describe(criterion: object) -> str:
    smoothing = getattr(criterion, "label_smoothing", 0)
    return f"{criterion}" + (f" with label_smoothing={smoothing}" if smoothing else "")


def check_asked(
    mode: str,
    batch_size_mem: int | None,
    replay_transform: object,
    replay_weight: float | None,
    loss: Loss,
    renew: str,
    distill: float | Literal["adaptive"] | None,
    recode_share: float,
) -> None:
    """Raise a ConfigError for settings of a plugin outside their ranges."""
    check_name("mode", mode, MODES)
    check_name("renew", renew, RENEWALS)
    if distill not in (None, "adaptive") and not _is_within(distill):
        raise ConfigError(f"distill must be None, 'adaptive', or 0 or more; got {distill!r}")
    if not _is_within(recode_share, 1):
        raise ConfigError(f"recode_share must be in [0, 1]; got {recode_share!r}")
    name, function = find_loss(loss)
    if renew == "after" and loss != "auto" and needs_all_classes(function):
        raise ConfigError(
            f"loss={name!r} learns the current classes from decoded images: it needs "
            'renew="before"; with renew="after" take loss="balanced"'
        )
    if batch_size_mem is not None and (as_int(batch_size_mem) or 0) < 1:
        raise ConfigError(
            f"batch_size_mem must be a whole number of 1 or more; got {batch_size_mem!r}"
        )
    if replay_transform is not None and not callable(replay_transform):
        raise ConfigError(
            "replay_transform is a function of a batch of images, such as "
            f'hmn_replay.RandomAugmentation("crop,flip"); got {replay_transform!r}'
        )
    if normalises(replay_transform):
        raise ConfigError(
            "replay_transform takes images in [0, 1], which are normalised afterwards as the "
            "benchmark does: leave Normalize out of it"
        )
    if replay_weight is not None and not _is_within(replay_weight, 1):
        raise ConfigError(f"replay_weight must be None, or in [0, 1]; got {replay_weight!r}")
    is_given = replay_weight is not None or loss not in ("auto", "plain") or renew != "auto"
    is_given = is_given or bool(distill) or bool(recode_share)
    if mode == "memory_only" and is_given:
        raise ConfigError(
            "replay_weight, loss, renew, distill and recode_share are for a memory beside raw "
            'images, which mode="memory_only" does not train on; leave them out'
        )


def check_labels(mode: str, labels: str, label_weight: float, *, holds_features: bool) -> None:
    """Raise a ConfigError for settings of the labels outside their ranges."""
    if labels != "hard":
        check_takes_labels(holds_features=holds_features)
    if labels not in ("hard", "soft") or not _is_within(label_weight):
        raise ConfigError(
            f"labels must be hard or soft, and label_weight 0 or more; got {labels!r} and "
            f"{label_weight!r}"
        )
    if mode == "memory_only" and labels != "hard":
        raise ConfigError('labels are for mode="replay"; leave them out')


def check_tuning(mode: str, tune: str, tune_steps: int, tune_rate: float) -> None:
    """Raise a ConfigError for settings of the tuning outside their ranges."""
    if tune not in TUNED or (as_int(tune_steps) or 0) < 1 or not (as_number(tune_rate) or 0) > 0:
        raise ConfigError(
            f"tune is one of {', '.join(TUNED)}, tune_steps a whole number of 1 or more and "
            f"tune_rate above 0; got {tune!r}, {tune_steps!r} and {tune_rate!r}"
        )
    if mode == "memory_only" and tune != "none":
        raise ConfigError('tune is for mode="replay"; leave it out')


def _is_within(value: object, most: float = math.inf) -> bool:
    """Return whether a value is a finite number in [0, most]."""
    number = as_number(value)
    return number is not None and 0 <= number <= most
