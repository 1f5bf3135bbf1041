"""Raw replay: a reservoir, and how many of its images join a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin

import strategies
from tests.strategies.support import build, easy_set, make_stream


class Sizes(SupervisedPlugin[Any], supports_distributed=False):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []

    def after_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.sizes.append(len(strategy.mb_x))


@pytest.mark.parametrize(("batch_size_mem", "expected"), [(None, 16), (3, 11), (100, 32)])
def test_replayed_images_join_every_batch(batch_size_mem: int | None, expected: int) -> None:
    sizes = Sizes()
    strategy = build("raw", batch_size_mem=batch_size_mem, plugins=[sizes])
    first, second = make_stream(num_per_class=8, num_experiences=2)
    strategy.train(first)
    assert sizes.sizes == [8, 8]
    # The buffer has 16 images by now, and its last batch may be a smaller one.
    strategy.train(second)
    assert sizes.sizes[2] == min(expected, 8 + 16)


def test_the_reservoir_holds_images_of_the_stream_as_they_are() -> None:
    torch.manual_seed(0)
    strategy = build("raw")
    for experience in make_stream():
        strategy.train(experience)
    images, labels = strategies.memory_images(strategy)
    data = easy_set()
    known = {(x.numpy().tobytes(), int(y)) for x, y in zip(data.images, data.labels, strict=True)}
    found = {(x.numpy().tobytes(), int(y)) for x, y in zip(images, labels, strict=True)}
    assert len(found) == 24
    assert found <= known
