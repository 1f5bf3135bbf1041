"""Replay losses: what a training step minimises on current and replayed images.

A loss is a function of a :class:`ReplayStep`, and returns a scalar. It replaces the criterion's
part of the strategy's loss in each step that replays; what other plugins add stays. Pass one by
name or as a callable (``loss=`` of every replay plugin), or register it for all:

    @LOSSES.register("old-images-twice")
    def old_images_twice(step: ReplayStep) -> Tensor:
        current, replayed = step.logits.split([step.num_current, step.num_replayed])
        return step.criterion(current, step.labels[: step.num_current]) + 2 * step.criterion(
            replayed, step.labels[step.num_current :]
        )
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn_replay.errors import ConfigError
from hmn_replay.registry import Registry, check_name, check_takes

__all__ = [
    "LOSSES",
    "RENEWALS",
    "TUNED",
    "Loss",
    "Renewal",
    "ReplayLoss",
    "ReplayStep",
    "asymmetric",
    "balanced",
    "distillation",
    "find_loss",
    "grouped",
    "label_distillation",
    "plain",
    "separated",
]


_TEMPERATURE = 2.0


@dataclass(frozen=True, eq=False)
class ReplayStep:
    """A training step after its forward pass; current images come first, replayed ones last.

    Attributes:
        logits: float ``(N, K)``, the network's outputs, with a graph.
        labels: int64 ``(N,)``.
        num_replayed: R, how many of the N are replayed: 1 or more.
        criterion: The strategy's criterion of logits and labels, such as a cross-entropy.
        replay_weight: The plugin's option: the replayed images' share of the loss, in [0, 1], or
            None for the one that they have by their number.
        current_counts: float32 ``(K,)``, images of each class of the experience: those that it has
            shown so far, repeats counted and this step's among them; where the memory was renewed
            before training, all that the experience has as well.
        memory_counts: float32 ``(K,)``, images of each class in the memory; where there are task
            labels, of task 0 alone.
        strategy: The Avalanche strategy, for losses that need its network, images (``mb_x``) or
            task labels.
        head_logits: float ``(N, K)``, what the network's head, the ``nn.Linear`` of its logits,
            makes of the features without their graph, so that it alone learns; given to losses with
            ``needs_head``, else None.
    """

    logits: Tensor
    labels: Tensor
    num_replayed: int
    criterion: Callable[[Tensor, Tensor], Tensor]
    replay_weight: float | None
    current_counts: Tensor
    memory_counts: Tensor
    strategy: Any
    head_logits: Tensor | None = None

    @property
    def num_current(self) -> int:
        """How many of the N images are the experience's own: N - R."""
        return len(self.labels) - self.num_replayed

    @property
    def is_current(self) -> Tensor:
        """Which images are the experience's own: bool ``(N, 1)``, True for the first ones."""
        positions = torch.arange(len(self.labels), device=self.labels.device)
        return (positions < self.num_current)[:, None]

    @property
    def replayed_share(self) -> float:
        """The replayed images' share of the loss, in [0, 1]."""
        if self.replay_weight is not None:
            return self.replay_weight
        return self.num_replayed / len(self.labels)

    def loss_of(self, logits: Tensor) -> Tensor:
        """Return the criterion of logits ``(N, K)`` and this step's labels.

        Without a ``replay_weight`` it is that of the whole mini-batch, so that class weights and
        the reduction of the criterion act as they do without replay. With a weight w it is ``(1 -
        w) * criterion(current) + w * criterion(replayed)``; a criterion that sums is scaled so that
        w = R / N gives the sum.
        """
        weight, fraction = self.replay_weight, self.num_replayed / len(self.labels)
        if weight is None or fraction == 1:
            return self.criterion(logits, self.labels)
        sizes = [self.num_current, self.num_replayed]
        (current, replayed), (own, old) = logits.split(sizes), self.labels.split(sizes)
        shares = 1 - weight, weight
        if getattr(self.criterion, "reduction", "mean") == "sum":
            shares = shares[0] / (1 - fraction), shares[1] / fraction
        return shares[0] * self.criterion(current, own) + shares[1] * self.criterion(replayed, old)


ReplayLoss: TypeAlias = Callable[[ReplayStep], Tensor]
"""A replay loss. Three attributes of it may be true: ``changes_logits`` of one that needs a
cross-entropy as criterion (a strategy with another criterion is refused before training),
``needs_all_classes`` of one that learns the current classes from replayed images too (the memory is
renewed before training, and the previous network is distilled by default), and ``needs_head`` of
one that takes ``head_logits``."""

Loss: TypeAlias = "str | ReplayLoss"
"""What ``loss=`` of the plugins takes: a name in :data:`LOSSES`, ``"auto"``, or a callable."""

Renewal: TypeAlias = Literal["auto", "before", "after"]

RENEWALS: tuple[Renewal, ...] = get_args(Renewal)
"""When an experience is taken into the memory: what ``renew=`` of the plugins takes."""

TUNED = ("none", "head", "all")
"""What of a network is tuned on the memory after an experience: what ``tune=`` of the plugins
takes."""

LOSSES: Registry[ReplayLoss] = Registry("loss")
"""The replay losses by name; users may add theirs."""


@LOSSES.register("plain")
def plain(step: ReplayStep) -> Tensor:
    """Return the strategy's criterion, as it is."""
    return step.loss_of(step.logits)


@LOSSES.register("balanced")
def balanced(step: ReplayStep) -> Tensor:
    """Return the logit-adjusted loss (Menon et al. 2021, equation 10).

    The many images of a few new classes push old classes down, and the few images of each of these
    cannot make up for it. So the logarithm of each class's share of the images is added to its
    logit while training; what the network learns is then free of how often a class is shown. Class
    weights of the criterion act as they would on classes that are shown alike.
    """
    share, current, memory = step.replayed_share, step.current_counts, step.memory_counts
    shares = current * ((1 - share) / current.sum()) + memory * (share / memory.sum())
    return step.loss_of(step.logits + _log_shares(shares))


@LOSSES.register("separated")
def separated(step: ReplayStep) -> Tensor:
    """Return a loss of current images over their own classes, and of replayed images over all.

    A network that sees clean images of new classes beside decoded images of old ones learns to tell
    new from old by the artefacts of the memory. So current images have the experience's classes
    alone in their softmax, and only decoded images, which the memory must have of the current
    classes too, tell these from the others. Each of the two parts is balanced by its own images, as
    :func:`balanced` is.
    """
    own = step.labels[: step.num_current]
    # Another plugin may have put images of other classes among the current ones.
    is_own = (step.current_counts > 0).index_fill(0, own, True)
    current = step.logits + _log_shares(step.current_counts)
    # The lowest number rather than -inf, which a criterion may multiply by zero.
    current = current.masked_fill(~is_own, torch.finfo(current.dtype).min)
    replayed = step.logits + _log_shares(step.memory_counts)
    return step.loss_of(torch.where(step.is_current, current, replayed))


@LOSSES.register("grouped")
def grouped(step: ReplayStep) -> Tensor:
    """Return a loss that lets the head alone tell old classes from current ones.

    As :func:`separated`, but decoded images have the old classes in their softmax, or the current
    ones, whichever they are of. A second cross-entropy of theirs over all classes, added to it,
    reaches the head and not the features (Smith et al. 2021, Always Be Dreaming, Section 4.2).
    """
    assert step.head_logits is not None, "for a loss with needs_head"
    own = step.labels[: step.num_current]
    is_own = (step.current_counts > 0).index_fill(0, own, True)
    lowest = torch.finfo(step.logits.dtype).min  # as in separated()
    is_other = is_own[None] != is_own[step.labels][:, None]
    current = step.logits + _log_shares(step.current_counts)
    memory_shares = _log_shares(step.memory_counts)
    logits = torch.where(step.is_current, current, step.logits + memory_shares)
    within = step.loss_of(logits.masked_fill(is_other, lowest))
    replayed, labels = step.head_logits[step.num_current :], step.labels[step.num_current :]
    share = step.replayed_share
    if getattr(step.criterion, "reduction", "mean") == "sum":
        share *= len(step.labels) / step.num_replayed
    return within + share * step.criterion(replayed + memory_shares, labels)


@LOSSES.register("asymmetric")
def asymmetric(step: ReplayStep) -> Tensor:
    """Return the loss of ER-ACE (Caccia et al. 2022, equation 2).

    Classes of the memory that no current image of the step has are left out of the softmax of the
    current images, so that new classes do not push old ones down; replayed images keep all classes.
    """
    own = step.labels[: step.num_current]
    left_out = (step.memory_counts > 0).index_fill(0, own, False)
    lowest = torch.finfo(step.logits.dtype).min  # as in separated()
    return step.loss_of(step.logits.masked_fill(step.is_current & left_out, lowest))


for _loss in (balanced, separated, grouped, asymmetric):
    _loss.changes_logits = True  # type: ignore[attr-defined]
for _loss in (separated, grouped):
    _loss.needs_all_classes = True  # type: ignore[attr-defined]
grouped.needs_head = True  # type: ignore[attr-defined]


def distillation(logits: Tensor, teacher: Tensor, old_classes: Tensor) -> Tensor:
    """Return how far a network is from the previous one on the old classes (Hinton et al. 2015).

    Args:
        logits: float ``(N, K)``, with a graph.
        teacher: ``(N, K')``, K' at most K: those of the previous network for the same images.
        old_classes: int64 ``(M,)``, below K': the classes that it has learned.

    Returns:
        The mean over the images of the Kullback-Leibler divergence between the two softmaxes over
        the old classes at temperature 2, times the temperature's square: a scalar.
    """
    student = logits[:, old_classes].float().div(_TEMPERATURE).log_softmax(1)
    target = teacher[:, old_classes].float().div(_TEMPERATURE).log_softmax(1)
    loss = F.kl_div(student, target, reduction="batchmean", log_target=True)
    return loss * _TEMPERATURE**2


def label_distillation(logits: Tensor, probabilities: Tensor, classes: Tensor) -> Tensor:
    """Return how far a network is from soft labels, over the classes that each label knows.

    Args:
        logits: float ``(R, K')`` of replayed images, with a graph.
        probabilities: float ``(R, K)``, rows that sum to one; a class of probability 0 is unknown
            to the label. A label of one class alone, a hard one, adds nothing.
        classes: int64 ``(K,)``, the logit of each of the K classes.

    Returns:
        The sum over the images of the Kullback-Leibler divergence between the two softmaxes at
        temperature 2, times the temperature's square: a scalar.
    """
    unknown = probabilities <= 0
    student = logits[:, classes].float().div(_TEMPERATURE)
    target = probabilities.clamp_min(torch.finfo(torch.float32).tiny).log().div(_TEMPERATURE)
    lowest = torch.finfo(torch.float32).min
    student = student.masked_fill(unknown, lowest).log_softmax(1)
    target = target.masked_fill(unknown, lowest).log_softmax(1)
    distances = (target.exp() * (target - student)).masked_fill(unknown, 0.0)
    return distances.sum() * _TEMPERATURE**2


def find_loss(loss: Loss) -> tuple[str, ReplayLoss]:
    """Return the name of a loss, and the loss.

    Raises:
        ConfigError: It is neither callable nor a registered name, nor ``"auto"``.
    """
    if isinstance(loss, nn.modules.loss._Loss):
        raise ConfigError(
            f"loss says how current and replayed images are weighed; got {loss!r}, which belongs "
            "in the strategy's criterion: leave loss out"
        )
    if callable(loss):
        check_takes("loss", loss, ["step"])
        return getattr(loss, "__name__", type(loss).__name__), loss
    if loss == "auto":
        return "separated", separated
    check_name("loss", loss, ["auto", *LOSSES], or_callable=True)
    return loss, LOSSES[loss]


def _log_shares(shares: Tensor) -> Tensor:
    """Return the logarithm of each class's share, ``(K,)``, up to a constant.

    A class that is nowhere is given the lowest share of those that are somewhere.
    """
    is_absent = shares <= 0
    lowest = shares.masked_fill(is_absent, math.inf).min()
    return torch.where(is_absent, lowest, shares).log()
