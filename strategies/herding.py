"""Replay of herded images: of each class those whose features, in order, keep close to its mean.

iCaRL's selection (Rebuffi et al. 2017, Algorithm 4), as many images of every class, as uint8
pixels. When classes come, the others drop their last images. Avalanche's own buffer herds what is
left anew each time, takes features of two axes alone, and leaves the model in evaluation mode.
The features are those of the network as it is when the memory is renewed: by default before it is
trained on an experience, with renew="after", as iCaRL has it, after that.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from avalanche.training.supervised import Naive
from torch import Tensor, nn

from hmn_replay import LabelledImages, RawReplay
from hmn_replay.baselines.selection import herding
from hmn_replay.data.lookup import images_at_once
from hmn_replay.errors import ConfigError
from hmn_replay.training.networks import evaluating, find_head, logits_and_features
from strategies.settings import Settings, Strategy

__all__ = ["build", "class_features", "herd"]


def build(settings: Settings) -> Strategy:
    """Build it.

    Raises:
        ConfigError: The model has no linear layer, whose inputs are the features.
    """
    settings.choose()
    if not _linear_layers(settings.model):
        raise ConfigError(
            "herding takes the inputs of the nn.Linear that makes the logits; the model has none"
        )
    most = settings.budget_bytes // math.prod(settings.image_shape)
    replay = RawReplay(
        settings.budget_bytes,
        selection=partial(herd, most=most),
        expected_classes=settings.expected_classes,
        **settings.replay_options(),
    )
    return Naive(**settings.common(replay))


def herd(images: LabelledImages, model: nn.Module, *, most: int) -> Tensor:
    """Return the positions of images, at most so many of a class, each in the order of herding."""
    # Found by images that differ, which those of a class may not.
    device = next(model.parameters()).device
    head = find_head(model, images.floats(torch.tensor([0, len(images) - 1])).to(device))
    orders = []
    for label in images.classes.tolist():
        members = images.of_class(label)
        features = class_features(model, images.floats(members), head)
        orders.append(members[herding(features, max(1, min(most, len(members))))])
    return torch.cat(orders)


@torch.no_grad()
def class_features(model: nn.Module, images: Tensor, head: nn.Linear) -> Tensor:
    """Return the features of images: what the model's head takes in, at unit length.

    Args:
        model: Runs in evaluation mode; the mode of every module is as it was afterwards.
        images: float ``(N, C, H, W)`` in [0, 1].
        head: The layer that makes the logits.

    Returns:
        float ``(N, D)`` on the CPU.
    """
    device = next(model.parameters()).device
    with evaluating(model):
        parts = images.split(images_at_once(images.shape[1:]))
        found = [logits_and_features(model, head, part.to(device))[1] for part in parts]
    return torch.cat([F.normalize(part).cpu() for part in found])


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]
