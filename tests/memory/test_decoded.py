"""Decoded images as a data set, as a memory gives them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hmn_replay.memory.hierarchical import HierarchicalMemory
from hmn_replay.memory.layout import Layout

MakeLayout = Callable[..., Layout]


def test_a_data_set_has_images_labels_and_targets(make_layout: MakeLayout) -> None:
    memory = HierarchicalMemory(make_layout(), [5, 3], [2, 1])
    images, _ = memory.decode()
    dataset = memory.as_dataset()
    assert len(dataset) == 3
    assert dataset.targets == [5, 5, 3]
    for index in range(3):
        image, label = dataset[index]
        assert isinstance(image, Tensor)
        assert image.equal(images[index])
        assert label == dataset.targets[index]


def test_a_data_set_transforms_an_image_each_time_that_it_is_read(make_layout: MakeLayout) -> None:
    calls = itertools.count()
    memory = HierarchicalMemory(make_layout(), [5], 2)
    dataset = memory.as_dataset(lambda image: (image.dtype, next(calls)), dtype=torch.uint8)
    assert dataset[1] == ((torch.uint8, 0), 5)
    assert dataset[1] == ((torch.uint8, 1), 5)


def test_a_data_set_feeds_a_loader(make_layout: MakeLayout) -> None:
    dataset = HierarchicalMemory(make_layout(), [5, 3], 4).as_dataset()
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, generator=torch.Generator())
    batches = list(loader)
    assert torch.cat([labels for _, labels in batches]).tolist() == [5] * 4 + [3] * 4
    assert math.prod(batches[0][0].shape) == 3 * 3 * 8 * 8
