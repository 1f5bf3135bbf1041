"""Replay of herded images: of each class those whose features, in order, keep close to its mean.

iCaRL's selection (Rebuffi et al. 2017, Algorithm 4), as many images of every class, as uint8
pixels; labels are not counted, in its favour. When classes come, the others drop their last images.
Avalanche's own buffer herds what is left anew each time, takes features of two axes alone, and
leaves the model in evaluation mode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from avalanche.training.storage_policy import BalancedExemplarsBuffer, ReservoirSamplingBuffer
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hmn_replay.baselines.selection import herding
from hmn_replay.errors import ConfigError
from strategies.buffers import MeasuredBuffer, replay_plugin
from strategies.settings import Settings, Strategy

if TYPE_CHECKING:
    _Groups = BalancedExemplarsBuffer[ReservoirSamplingBuffer]
else:
    _Groups = BalancedExemplarsBuffer

__all__ = ["HerdingBuffer", "build", "class_features"]

_BATCH = 512


def build(settings: Settings) -> Strategy:
    """Build it.

    Raises:
        BudgetError: The budget does not hold one image.
        ConfigError: The model has no linear layer, whose inputs are the features.
    """
    settings.choose()
    if not _linear_layers(settings.model):
        raise ConfigError("herding takes the inputs of the last nn.Linear; the model has none")
    buffer = HerdingBuffer(settings.num_images())
    return Naive(**settings.common(replay_plugin(settings, buffer)))


class HerdingBuffer(MeasuredBuffer, _Groups):
    """The herded images of each class, those chosen first to stay longest.

    A class that comes again is herded anew, from its new images and those still kept.
    """

    def post_adapt(self, agent: Any, exp: Any) -> None:
        """Herd the classes of an experience by the features of ``agent.model``."""
        data = exp.dataset.eval()
        labels = torch.as_tensor([int(label) for label in data.targets])
        classes = labels.unique().tolist()
        num_classes = len(self.buffer_groups.keys() | set(classes))
        lengths = self.get_group_lengths(num_classes)  # type: ignore[no-untyped-call]
        for label in classes:
            members = data.subset((labels == label).nonzero().flatten().tolist())
            if label in self.buffer_groups:
                members = members.concat(self.buffer_groups[label].buffer)
            features = class_features(agent.model, members, agent.device)
            group = ReservoirSamplingBuffer(max(lengths))
            group.buffer = members.subset(herding(features, max(lengths)).tolist())
            self.buffer_groups[label] = group
        # A reservoir that is resized keeps its first images.
        for group, length in zip(self.buffer_groups.values(), lengths, strict=True):
            group.resize(agent, length)


def class_features(model: nn.Module, data: Any, device: torch.device) -> Tensor:
    """Return the features of images: what the model's last linear layer takes in, at unit length.

    Args:
        model: Runs in evaluation mode; the mode of every module is as it was afterwards.
        data: A map-style data set of ``(image, ...)``.
        device: Where the model is.

    Returns:
        float ``(N, D)`` on ``device``.
    """
    features: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features.append(F.normalize(inputs[0].flatten(1)))

    modes = {module: module.training for module in model.modules()}
    hook = _linear_layers(model)[-1].register_forward_pre_hook(record)
    # Without a generator, a loader would draw from torch's global one.
    loader = DataLoader(data, batch_size=_BATCH, generator=torch.Generator())
    try:
        model.eval()
        with torch.no_grad():
            for images, *_ in loader:
                model(images.to(device))
    finally:
        hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return torch.cat(features)


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]
