"""The gradient of a batch, part by part: within a process's memory, and by several processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hmn_replay.data.lookup import images_at_once
from hmn_replay.distributed import ALONE, Team
from hmn_replay.runtime import autocast

__all__ = ["add_gradients", "mixed_loss"]


def add_gradients(
    network: nn.Module,
    images: Tensor,
    labels_a: Tensor,
    labels_b: Tensor,
    lam: float,
    *,
    precision: str = "float32",
    team: Team = ALONE,
) -> Tensor:
    """Add the gradient of :func:`mixed_loss` over a whole batch to the network's parameters.

    A batch of more images than :func:`~hmn_replay.data.lookup.images_at_once` goes through the network
    in parts, and each process of a team takes its share of the rows: the sum is the gradient of the
    mean over the batch. Batch normalisation looks at the whole batch: with it, there are neither
    parts nor shares, and every process does all.

    Args:
        network: From images to logits ``(N, K)``. Its gradients are those of an earlier part of the
            same batch, or None; every process of a team ends with the same.
        images: float ``(N, C, H, W)``, the same in every process, and so are the others.
        labels_a: int64 ``(N,)``.
        labels_b: int64 ``(N,)``.
        lam: Share of the loss that ``labels_a`` have, in [0, 1].
        precision: As in :func:`hmn_replay.runtime.autocast`.
        team: The processes that share the batch.

    Returns:
        The loss, a scalar without a graph: of this process's share, as a part of the batch's mean.
    """
    parts = images_at_once(images.shape[1:])
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        parts, team = len(images), ALONE
    total = torch.zeros((), device=images.device)
    shares = (team.share(rows).split(parts) for rows in (images, labels_a, labels_b))
    for own, own_a, own_b in zip(*shares, strict=True):
        if not len(own):
            continue
        with autocast(own.device, precision):
            logits = network(own)
        loss = mixed_loss(logits.float(), own_a, own_b, lam) * (len(own) / len(images))
        torch.autograd.backward(loss)
        total += loss.detach()
    team.sum_gradients((p, ...) for p in network.parameters() if p.requires_grad)
    return total


def mixed_loss(logits: Tensor, labels_a: Tensor, labels_b: Tensor, lam: float) -> Tensor:
    """Return the cross-entropy of a batch that CutMix mixed: ``lam`` of it with ``labels_a``."""
    loss = F.cross_entropy(logits, labels_a)
    if lam == 1.0:
        return loss
    return lam * loss + (1.0 - lam) * F.cross_entropy(logits, labels_b)
