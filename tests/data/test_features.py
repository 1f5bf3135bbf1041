"""Labelled features: what is taken in, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hmn_replay import LabelledFeatures, as_labelled_features, as_labelled_images
from hmn_replay.data.images import channel_stats
from hmn_replay.data.lookup import join_images
from hmn_replay.errors import DataError

VECTORS = torch.arange(24.0).view(4, 6) - 10
LABELS = torch.tensor([3, 1, 3, 1])


@pytest.mark.parametrize(
    "given",
    [VECTORS, VECTORS.double(), VECTORS.numpy(), VECTORS.numpy()[::-1][::-1], VECTORS.half()],
)
def test_vectors_of_any_floats_become_maps_of_one_position(given: Any) -> None:
    data = as_labelled_features((given, LABELS.numpy()), class_names={1: "one"})
    assert data.images.equal(VECTORS.view(4, 6, 1, 1)) and data.images.dtype == torch.float32
    assert data.image_shape == (6, 1, 1) and data.labels.equal(LABELS)
    assert data.class_names == {1: "one"} and as_labelled_features(data) is data


def test_they_are_labelled_images_of_any_values() -> None:
    data = LabelledFeatures(VECTORS.view(4, 6, 1, 1), LABELS, {1: "one"})
    assert repr(data) == "LabelledFeatures(4 features of 6x1x1, 2 classes)"
    some = data.take([3, 0])
    assert isinstance(some, LabelledFeatures) and some.class_names == {1: "one"}
    assert some.images.equal(data.images[[3, 0]]) and some.floats().equal(some.images)
    assert data.floats(torch.tensor([2])).equal(data.images[2:3])
    image, label = data[1]
    assert image.equal(data.images[1]) and label == 1
    parts = data.split(0.5)
    assert all(isinstance(part, LabelledFeatures) and len(part) == 2 for part in parts)
    assert as_labelled_images(data) is data
    with pytest.raises(DataError, match="features have no size in pixels, got size=4"):
        as_labelled_images(data, size=4)


def test_their_statistics_are_of_any_values() -> None:
    lookup = join_images([VECTORS.view(4, 6, 1, 1), VECTORS.view(4, 6, 1, 1)])
    mean, std = channel_stats(lookup.take(torch.arange(4)).to(torch.device("cpu")))
    torch.testing.assert_close(mean, VECTORS.mean(dim=0))
    torch.testing.assert_close(std, VECTORS.std(dim=0, unbiased=False))
    with pytest.raises(DataError, match=r"expected floats in \[0, 1\]"):
        channel_stats(VECTORS.view(4, 6, 1, 1))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (VECTORS, r"a pair of floats .*, got float32 \(4, 6\)"),
        ((VECTORS.long(), LABELS), r"got int64 \(4, 6\); extract_features\(\) makes them"),
        ((VECTORS.view(4, 2, 3), LABELS), r"got float32 \(4, 2, 3\)"),
        ((np.zeros((4, 6), np.uint8), LABELS), r"got uint8 \(4, 6\)"),
        ((VECTORS * math.nan, LABELS), "expected finite features"),
        ((VECTORS[:, :0], LABELS), r"shape of features is \(C, H, W\)"),
        ((VECTORS[:0], LABELS[:0]), "at least 1 image"),
        ((VECTORS, LABELS[:3]), "got 4 images and 3 labels"),
        ((VECTORS, LABELS.float()), "expected integers as labels"),
        ("features.npz", "got str"),
    ],
)
def test_other_sources_are_refused(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_labelled_features(source)
