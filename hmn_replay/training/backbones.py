"""Frozen backbones: networks up to their features, the features of images, and heads on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hmn_replay.budget import as_int
from hmn_replay.data.features import LabelledFeatures, check_feature_shape
from hmn_replay.data.images import ImageSource, as_labelled_images
from hmn_replay.data.lookup import images_at_once
from hmn_replay.errors import ConfigError, DataError
from hmn_replay.runtime import without_autocast
from hmn_replay.training.networks import (
    Network,
    build_network,
    device_of,
    evaluating,
    lent_to,
    linear_head,
    requires_grad,
)

__all__ = [
    "FeatureClassifier",
    "FrozenBackbone",
    "extract_features",
    "linear_head",
    "load_backbone",
]


class FrozenBackbone(nn.Module):
    """A network up to its features: in evaluation mode, without gradients, whatever is called.

    Args:
        network: Any module from float images ``(N, C, H, W)``. What counts is what its
            ``embed(images)`` returns, where it has one, as networks of timm's have here; else the
            last output of its ``features(images)``, which are the blocks of a network that
            :func:`hmn_replay.evaluate` or :func:`hmn_replay.build_network` returns; else what it
            returns itself.
        image_shape: ``(C, H, W)`` of an image.
        maps: Whether features are maps ``(C', H', W')``. Default: False, their mean over positions.

    Raises:
        ConfigError: What comes out are no features ``(N, C')`` or ``(N, C', H', W')``, or they have
            the shape of images.

    Attributes:
        image_shape: As given.
        feature_shape: ``(C', H', W')``; H' and W' are 1 for vectors.
    """

    def __init__(
        self, network: nn.Module, image_shape: Sequence[int], *, maps: bool = False
    ) -> None:
        super().__init__()
        self.network, self.maps = network, maps
        channels, height, width = image_shape
        self.image_shape = (channels, height, width)
        with evaluating(network):
            home = device_of(network)
            features = self(torch.zeros((1, *self.image_shape), dtype=torch.float32, device=home))
        self.feature_shape = check_feature_shape(tuple(features.shape[1:]))
        if self.feature_shape == self.image_shape:
            raise ConfigError(
                f"features have the shape {self.feature_shape} of images, which could not be told "
                "from them"
            )
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stay in evaluation mode: batch statistics and dropout would change the features."""
        del mode
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features ``(N, C', H', W')`` of float images ``(N, C, H, W)``."""
        found = self._run(images)
        features: Tensor = found[-1] if isinstance(found, (list, tuple)) else found
        is_tensor = isinstance(features, Tensor) and features.is_floating_point()
        if not is_tensor or features.ndim not in (2, 4) or len(features) != len(images):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ConfigError(
                f"expected a backbone that gives features (N, C) or (N, C, H, W), got {got} for "
                f"images {tuple(images.shape)}; wrap it in a module that does"
            )
        if features.ndim == 2:
            features = features[:, :, None, None]
        vectors: Tensor = features.mean(dim=(2, 3), keepdim=True)
        return features if self.maps else vectors

    def _run(self, images: Tensor) -> Any:
        network: Any = self.network
        body, pixels = network, images
        if isinstance(network, Network):
            body, pixels = network.body, (images - network.mean) / network.std
        if not self.maps and callable(getattr(body, "embed", None)):
            return body.embed(pixels)
        return body.features(pixels) if callable(getattr(body, "features", None)) else body(pixels)


class FeatureClassifier(nn.Module):
    """A frozen backbone and a head, which is what learns.

    It takes images, and features too, which enter behind the backbone: so replayed features can
    stand beside images.

    Args:
        backbone: The backbone.
        head: From features ``(N, C', H', W')`` to logits ``(N, K)``, such as :func:`linear_head`.
    """

    def __init__(self, backbone: FrozenBackbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, K)`` of images, or of features.

        Raises:
            DataError: They have the shape of neither.
        """
        shape = tuple(images.shape[1:])
        if shape == self.backbone.image_shape:
            images = self.backbone(images)
        elif shape != self.backbone.feature_shape:
            raise DataError(
                f"expected images of {self.backbone.image_shape} or features of "
                f"{self.backbone.feature_shape}, got {shape}"
            )
        logits: Tensor = self.head(images)
        return logits


def load_backbone(
    network: str,
    image_shape: Sequence[int],
    *,
    maps: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> FrozenBackbone:
    """Build a network by name, with the weights that timm loads for it, and freeze it.

    Args:
        network: A name in :data:`hmn_replay.NETWORKS`: ``"timm-pretrained:NAME"`` for a network of
            timm's with weights; other networks, such as ``"timm:NAME"``, have random ones.
        image_shape: ``(C, H, W)`` of an image.
        maps: As in :class:`FrozenBackbone`.
        mean: ``(C,)`` subtracted from images in [0, 1]. Default: what the weights were trained
            with, or 0.
        std: ``(C,)`` that they are divided by. Default: the same, or 1.
        seed: Of random weights.

    Raises:
        ConfigError: An unknown name, or a network that gives no features.
        MissingExtraError: timm is not installed.
    """
    built = build_network(network, image_shape, 1, mean=mean, std=std, seed=seed)
    for name, given, own in zip(
        ("mean", "std"), (mean, std), getattr(built.body, "normalization", ()), strict=False
    ):
        if given is None and own is not None:
            values = torch.tensor(own, dtype=torch.float32).view(1, -1, 1, 1)
            # Of grey images, timm adds up the weights of all colours.
            values = values if len(own) == image_shape[0] else values.mean()
            built.get_buffer(name).copy_(values)
    return FrozenBackbone(built, image_shape, maps=maps)


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    images: ImageSource,
    *,
    maps: bool = False,
    transform: Callable[[Tensor], Tensor] | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
) -> LabelledFeatures:
    """Turn labelled images into labelled features, a batch at a time.

    Args:
        backbone: A :class:`FrozenBackbone`; or any module, as that class takes it, which is left in
            its mode and on its device.
        images: Anything that :func:`hmn_replay.as_labelled_images` takes.
        maps: As in :class:`FrozenBackbone`, which has one of its own.
        transform: Applied to float images ``(N, C, H, W)`` in [0, 1] before the backbone, such as
            the normalisation that its weights were trained with. Default: none.
        batch_size: Images at a time. Default: 512 of 32 x 32 pixels, 10 of 224 x 224.
        device: Where to compute. Default: where the backbone is.

    Returns:
        Features on the CPU, float32, in the order of the images, with their labels and class names.

    Raises:
        ConfigError: The backbone gives no features, or ``batch_size`` is below 1.
        DataError: Images or labels that cannot be used, or features that are not finite.
    """
    data = as_labelled_images(images)
    if isinstance(data, LabelledFeatures):
        raise DataError(f"expected images, got features already: {data!r}")
    size = images_at_once(data.image_shape) if batch_size is None else as_int(batch_size)
    if size is None or size < 1:
        raise ConfigError(f"batch_size is a whole number of 1 or more; got {batch_size!r}")
    features = torch.empty(0)
    parameters = list(backbone.parameters())
    with lent_to(backbone, device) as target, requires_grad(parameters, False):
        frozen = backbone
        if not isinstance(backbone, FrozenBackbone):
            frozen = FrozenBackbone(backbone, data.image_shape, maps=maps)
        with without_autocast(target):
            for part in torch.arange(len(data)).split(size):
                floats = data.floats(part).to(target)
                found = frozen(floats if transform is None else transform(floats)).float().cpu()
                if not len(features):
                    features = found.new_empty((len(data), *found.shape[1:]))
                features[part] = found
    return LabelledFeatures(features, data.labels, data.class_names)
