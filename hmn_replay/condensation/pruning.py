"""Double-ended pruning by the area under the margin (AUM), as functions over numbers.

Zheng et al. 2024, Section 3.2: condense more images than fit, then drop both the hardest and the
easiest of each class until the budget holds. AUM is Pleiss et al. 2020, arXiv 2001.10528.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from hmn_replay.budget import as_int
from hmn_replay.data.lookup import Images, as_floats, check_labelled, images_at_once
from hmn_replay.distributed import ALONE, Team
from hmn_replay.errors import ConfigError
from hmn_replay.registry import check_takes, name_of
from hmn_replay.training.networks import device_of, evaluating

__all__ = [
    "MarginRecorder",
    "PruningFunction",
    "aum",
    "double_ended_prune",
    "margins",
    "score_by",
]

PruningFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Scores decoded images for :func:`double_ended_prune`, in the place of AUM.

It is given the images, float32 ``(N, C, H, W)`` in [0, 1], and the position of each one's class
among the memory's, int64 ``(N,)``, both on the memory's device; and returns a number for each
image, float ``(N,)``: low for a hard image, high for an easy one. It is called once before any
work, to see that it does so, and once in the end; if it draws from a global generator, that is
seeded for it, and restored.
"""


def score_by(function: PruningFunction, images: Tensor, class_indices: Tensor) -> Tensor:
    """Return what a function of the user's scores images by, checked to be scores.

    Returns:
        float32 ``(N,)`` on the CPU.

    Raises:
        ConfigError: It takes no images and class indices, or returned anything but a finite number
            for each image.
    """
    check_takes("pruning", function, ["images", "class_indices"])
    with torch.no_grad():
        scores = function(images, class_indices)
    name, expected = name_of(function), f"a finite number for each of the {len(images)} images"
    if not isinstance(scores, Tensor):
        raise ConfigError(f"pruning returns {expected}, as a tensor; {name} returned {scores!r}")
    if scores.shape != class_indices.shape or scores.is_complex():
        got = f"{scores.dtype} {tuple(scores.shape)}"
        raise ConfigError(f"pruning returns {expected}; {name} returned {got}")
    scores = scores.float().cpu()
    if not bool(scores.isfinite().all()):
        raise ConfigError(f"pruning returns {expected}; {name} returned NaN or infinity")
    return scores


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return by how much each image's own logit beats the largest other one.

        M(x, y) = z_y - max_{j != y} z_j

    Args:
        logits: float ``(..., N, K)`` with K of 2 or more.
        labels: integers ``(N,)`` in ``0 .. K - 1``.

    Returns:
        float ``(..., N)``: positive where the network is right.

    Raises:
        ConfigError: The shapes do not fit each other, there is one class alone, or a label is no
            integer or outside ``0 .. K - 1``.
    """
    if logits.ndim < 2 or logits.shape[-1] < 2 or logits.shape[-2] != len(labels):
        raise ConfigError(
            f"logits are (..., N, K) with K of 2 or more and N labels; got logits "
            f"{tuple(logits.shape)} and {len(labels)} labels"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ConfigError(f"labels are integers; got {labels.dtype}")
    labels, num_classes = labels.long(), logits.shape[-1]
    if bool(((labels < 0) | (labels >= num_classes)).any()):
        raise ConfigError(
            f"labels are in 0 .. {num_classes - 1}, as many as logits; got {int(labels.min())} to "
            f"{int(labels.max())}: give positions among the sorted labels, not labels"
        )
    return _margins(logits, labels)


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return :func:`margins`, which are not checked, so that a GPU is not waited for."""
    own_class = labels.expand(logits.shape[:-1]).unsqueeze(-1)
    others = logits.scatter(-1, own_class, -math.inf).amax(dim=-1)
    return logits.gather(-1, own_class).squeeze(-1) - others


def aum(margins_per_epoch: Tensor | Sequence[Tensor]) -> Tensor:
    """Return each image's area under the margin: the mean of its margins over the epochs.

    Args:
        margins_per_epoch: float ``(T, N)``, or T tensors ``(N,)``: :func:`margins` after each of
            the T epochs of one training.

    Returns:
        float ``(N,)``. Low: hard, or badly decoded. High: easy.

    Raises:
        ConfigError: No epoch at all, or epochs of different lengths.
    """
    if len(margins_per_epoch) == 0:
        raise ConfigError("AUM is a mean over epochs; got the margins of none")
    if isinstance(margins_per_epoch, Tensor):
        return margins_per_epoch.mean(dim=0)
    if len(shapes := {tuple(margins.shape) for margins in margins_per_epoch}) > 1:
        raise ConfigError(f"every epoch has a margin for each image; got shapes {sorted(shapes)}")
    return torch.stack(list(margins_per_epoch)).mean(dim=0)


class MarginRecorder:
    """Records the margins of images after each epoch of a training: an ``on_epoch`` of it.

    Args:
        images: uint8, or float in [0, 1], ``(N, C, H, W)``.
        class_indices: int64 ``(N,)``, the logit of each image's class.
        team: The processes that train together; each shows its share of the images.

    Raises:
        DataError: Images or class indices that are not as said above.
    """

    def __init__(self, images: Images, class_indices: Tensor, team: Team = ALONE) -> None:
        check_labelled(images, class_indices)
        self.images, self.class_indices, self.team = images, class_indices, team
        self.recorded: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, epoch: int, network: nn.Module) -> None:
        """Record what the network of an epoch says of the images, in evaluation mode."""
        images, labels = self.images, self.class_indices
        home = device_of(network, labels.device)
        margins_of = _margins if self.recorded else margins
        found = torch.zeros(len(images), dtype=torch.float32, device=labels.device)
        positions = torch.arange(len(images), device=labels.device)
        with evaluating(network):
            for part in self.team.share(positions.split(images_at_once(images.shape[1:]))):
                logits = network(as_floats(images[part].to(home))).float()
                found[part] = margins_of(logits.to(found.device), labels[part])
        self.team.add_up(found)
        self.recorded.append(found)

    def aum(self) -> Tensor:
        """Return :func:`aum` of what was recorded, float32 ``(N,)`` on the CPU."""
        return aum(self.recorded).cpu()


def double_ended_prune(
    scores: Tensor, labels: Tensor, num_drop: int | Sequence[int], beta: float
) -> Tensor:
    """Choose the images that stay when each class drops its hardest and its easiest ones.

    Of a class's k images to drop, floor(beta k) are those of lowest score and the other
    k - floor(beta k) those of highest score. Where scores tie, the image that comes first counts as
    the harder one.

    Args:
        scores: float ``(N,)``, AUM of each image.
        labels: int64 ``(N,)``, its class.
        num_drop: k, for every class alike, or one a class in the order of the sorted labels.
        beta: Share of the hard ones among the dropped, in [0, 1].

    Returns:
        int64, ascending: positions of the images that stay.

    Raises:
        ConfigError: beta outside [0, 1], NaN among the scores, lengths that do not fit, or a class
            that does not have k images.

    Example:
        >>> scores = torch.tensor([0.1, 0.9, 0.5, 0.4])
        >>> double_ended_prune(scores, torch.zeros(4, dtype=torch.int64), 2, beta=0.5)
        tensor([2, 3])
    """
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta is in [0, 1]; got {beta}")
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ConfigError(
            f"scores and labels are (N,) both; got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    if bool(scores.isnan().any()):
        raise ConfigError("scores hold NaN: the training that they come from diverged")
    classes = labels.unique()
    given = num_drop if isinstance(num_drop, Iterable) else [num_drop] * len(classes)
    drops = [drop for drop in map(as_int, given) if drop is not None]
    if len(drops) != len(classes):
        raise ConfigError(
            f"num_drop is an integer, or {len(classes)} of them, one a class; got {num_drop!r}"
        )
    kept = [labels.new_empty(0, dtype=torch.int64)]
    for label, drop in zip(classes, drops, strict=True):
        members = (labels == label).nonzero().flatten()
        if not 0 <= drop <= len(members):
            raise ConfigError(
                f"class {int(label)} has {len(members)} images; it cannot drop {drop} of them"
            )
        # 0.29 * 100 is 28.999... in floating point; the little that is added mends that.
        num_hardest = math.floor(beta * drop + 1e-9)
        by_difficulty = members[scores[members].argsort(stable=True)]
        kept.append(by_difficulty[num_hardest : len(members) - (drop - num_hardest)])
    return torch.cat(kept).sort().values
