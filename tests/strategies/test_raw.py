"""Raw replay, ours and Avalanche's: how many images join a batch, and which are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin

import strategies
from hmn_replay.errors import ConfigError
from tests.strategies.support import build, easy_set, make_stream


class Sizes(SupervisedPlugin[Any], supports_distributed=False):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []

    def after_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.sizes.append(len(strategy.mb_x))


@pytest.mark.parametrize(("batch_size_mem", "expected"), [(None, 16), (3, 11), (100, 32)])
def test_a_reservoirs_images_join_every_batch(batch_size_mem: int | None, expected: int) -> None:
    sizes = Sizes()
    strategy = build("avalanche-replay", batch_size_mem=batch_size_mem, plugins=[sizes])
    first, second = make_stream(num_per_class=8, num_experiences=2)
    strategy.train(first)
    assert sizes.sizes == [8, 8]
    # The buffer has 16 images by now, and its last batch may be a smaller one.
    strategy.train(second)
    assert sizes.sizes[2] == min(expected, 8 + 16)


@pytest.mark.parametrize("name", ["raw", "avalanche-replay"])
def test_what_is_kept_are_images_of_the_stream_as_they_are(name: str) -> None:
    torch.manual_seed(0)
    strategy = build(name)
    for experience in make_stream():
        strategy.train(experience)
    images, labels = strategies.memory_images(strategy)
    data = easy_set()
    known = {(x.numpy().tobytes(), int(y)) for x, y in zip(data.images, data.labels, strict=True)}
    found = {(x.numpy().tobytes(), int(y)) for x, y in zip(images, labels, strict=True)}
    assert len(found) == len(images) >= 20
    assert found <= known
    if name == "raw":
        counts = labels.bincount().tolist()
        assert max(counts) - min(counts) <= 1


def test_avalanches_replay_needs_current_images() -> None:
    with pytest.raises(ConfigError, match='no mode "memory_only"'):
        build("avalanche-replay", mode="memory_only")
