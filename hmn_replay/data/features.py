"""Labelled features: what a frozen network makes of images, in the place of the images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, Union

import numpy as np
import torch
from torch import Tensor

from hmn_replay.budget import as_int
from hmn_replay.data.images import (
    Array,
    ImageSource,
    LabelledImages,
    as_labelled_images,
    check_tensor,
    to_labels,
)
from hmn_replay.errors import ConfigError, DataError

__all__ = [
    "FeatureSource",
    "LabelledFeatures",
    "as_labelled_features",
    "check_feature_shape",
    "read_data",
]

_MAX_SIDE, _MAX_VALUES = 224, 2**18

FeatureSource: TypeAlias = Union["LabelledFeatures", "tuple[Array, Array | Sequence[int]]"]
"""What :func:`as_labelled_features` takes."""


@dataclass(frozen=True, eq=False)
class LabelledFeatures(LabelledImages):
    """Features of images and their labels: :class:`LabelledImages` whose values are any floats.

    Args:
        images: float32 ``(N, C, H, W)`` on the CPU, finite, of 1 to 262,144 values each: the
            features, in the place of the images. Vectors are ``(N, C, 1, 1)``.
        labels: As in :class:`LabelledImages`.
        class_names: As in :class:`LabelledImages`.

    Raises:
        DataError: A tensor is of another type, dtype, shape or device, a value is not finite, the
            lengths differ, or there are none. :func:`as_labelled_features` takes more.
    """

    def _check_images(self) -> None:
        check_tensor(self.images, "features", torch.float32, ("N", "C", "H", "W"))

    def _check_shape(self) -> None:
        try:
            check_feature_shape(self.images.shape[1:])
        except ConfigError as error:
            raise DataError(str(error)) from error
        if not all(bound.isfinite() for bound in self.images.aminmax()):
            raise DataError("expected finite features, got NaN or infinity")

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the features of one image, float32 ``(C, H, W)``, and its label."""
        return self.images[index], int(self.labels[index])

    def __repr__(self) -> str:
        """Describe the data in a line, without its values."""
        return super().__repr__().replace("Images", "Features").replace("images", "features")


def as_labelled_features(
    source: FeatureSource | ImageSource, *, class_names: Mapping[int, str] | None = None
) -> LabelledFeatures:
    """Bring labelled features to one form.

    Args:
        source: :class:`LabelledFeatures`; or a pair ``(features, labels)`` of tensors or numpy
            arrays: features are floats, vectors ``(N, C)`` or maps ``(N, C, H, W)``, and labels
            integers ``(N,)``.
        class_names: Label to name. Default: those of the source, or none.

    Raises:
        DataError: It is something else, such as images.
    """
    if isinstance(source, LabelledFeatures) and class_names is None:
        return source
    if isinstance(source, LabelledFeatures):
        return LabelledFeatures(source.images, source.labels, dict(class_names or {}))
    is_pair = isinstance(source, (tuple, list)) and len(source) == 2
    values: Any = source[0] if is_pair else source
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        values = torch.from_numpy(np.ascontiguousarray(values))
    fits = isinstance(values, Tensor) and values.is_floating_point() and values.ndim in (2, 4)
    if not (is_pair and fits):
        got = type(values).__name__
        if isinstance(values, (Tensor, np.ndarray)):
            got = f"{values.dtype} {tuple(values.shape)}".removeprefix("torch.")
        raise DataError(
            "expected features and labels: LabelledFeatures, or a pair of floats (N, C) or "
            f"(N, C, H, W) and integers, got {got}; extract_features() makes them of images"
        )
    features = values.detach().cpu().float()
    if features.ndim == 2:
        features = features[:, :, None, None]
    return LabelledFeatures(features, to_labels(source[1], "labels"), dict(class_names or {}))


def read_data(source: ImageSource | FeatureSource, *, holds_features: bool) -> LabelledImages:
    """Return images, or features, whichever a memory holds.

    Args:
        source: As :func:`hmn_replay.as_labelled_images` or :func:`as_labelled_features` takes it.
        holds_features: Whether the memory holds features.

    Raises:
        DataError: It is the other, or cannot be used.
    """
    if holds_features:
        return as_labelled_features(source)
    data = as_labelled_images(source)
    if isinstance(data, LabelledFeatures):
        raise DataError(f"expected images, got {data!r}; kind='features' is for these")
    return data


def check_feature_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return a shape that features can have, or raise :class:`ConfigError`."""
    sides = [as_int(side) for side in shape] if isinstance(shape, Sequence) else []
    whole = [side for side in sides if side is not None and side >= 1]
    if len(whole) == len(sides) == 3:
        channels, height, width = whole
        if max(height, width) <= _MAX_SIDE and math.prod(whole) <= _MAX_VALUES:
            return channels, height, width
    raise ConfigError(
        f"the shape of features is (C, H, W) with H, W from 1 to {_MAX_SIDE} and no more than "
        f"{_MAX_VALUES:,} values; got {tuple(shape) if isinstance(shape, Sequence) else shape!r}"
    )
