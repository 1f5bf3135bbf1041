"""timm's networks by name: ``timm:NAME``, ``timm-pretrained:NAME`` with weights that it loads."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from hmn_replay.errors import ConfigError
from hmn_replay.extras import import_extra
from hmn_replay.registry import UnknownNameError

__all__ = ["find_timm"]

_NEAR = 10


def find_timm(name: str, *, pretrained: bool = False) -> Callable[..., nn.Module]:
    """Return the function that builds a network of timm's.

    Args:
        name: As in ``timm.create_model``, such as ``"resnet18"``.
        pretrained: Whether timm loads weights, of the tag after the name's dot or its first.

    Raises:
        UnknownNameError: timm has no such model, or none with weights.
        MissingExtraError: timm is not installed.
    """
    timm = import_extra("timm", "timm")
    if not timm.is_model(name) or (pretrained and not timm.is_model_pretrained(name)):
        known = timm.list_models(pretrained=pretrained)
        near = difflib.get_close_matches(name, known, n=_NEAR, cutoff=0.4)
        kind = "pretrained timm model" if pretrained else "timm model"
        raise UnknownNameError(kind, name, near or ["those that timm.list_models() gives"])
    return partial(_build, name=name, pretrained=pretrained)


def _build(
    image_shape: Sequence[int], num_classes: int, *, name: str, pretrained: bool
) -> nn.Module:
    timm = import_extra("timm", "timm")
    channels, height, width = image_shape
    options: dict[str, Any] = {}
    if timm.get_pretrained_cfg(name).fixed_input_size:  # those that count patches
        options["img_size"] = (height, width)
    try:
        model = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=channels, **options
        )
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"timm cannot build {name} for images of {tuple(image_shape)}: {error}"
        ) from error
    return _Timm(model)


class _Timm(nn.Module):
    """A model of timm's, whose blocks can be seen."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    @property
    def normalization(self) -> tuple[Any, Any]:
        """Mean and deviation of pixels in [0, 1] that the weights were trained with, or None."""
        config = getattr(self.model, "pretrained_cfg", None) or {}
        return config.get("mean"), config.get("std")

    def embed(self, images: Tensor) -> Tensor:
        """Return what the last layer sees, ``(N, C')``."""
        vectors: Tensor = self.model.forward_head(
            self.model.forward_features(images), pre_logits=True
        )
        return vectors

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the output of every stage, ``(N, C', H', W')``, first stage first."""
        if not hasattr(self.model, "forward_intermediates"):
            raise ConfigError(
                f"{type(self.model).__name__} of timm does not show its stages, whose features "
                "are compared; choose another network or objective"
            )
        stages: list[Tensor] = self.model.forward_intermediates(images, intermediates_only=True)
        return stages
