"""GDumb: from the memory alone, for as many image passes as its rivals are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin

from tests.strategies.support import build, make_model, make_stream


class Watch(SupervisedPlugin[Any], supports_distributed=False):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.passes = 0
        self.images: set[bytes] = set()
        self.weights: list[torch.Tensor] = []

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.passes, self.images = 0, set()
        self.weights.append(next(strategy.model.parameters()).detach().clone())

    def after_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.passes += len(strategy.mb_x)
        self.images |= {image.numpy().tobytes() for image in strategy.mb_x}


@pytest.mark.parametrize(("batch_size_mem", "later"), [(None, 320), (4, 240)])
def test_it_sees_as_many_images_as_a_replaying_rival(
    batch_size_mem: int | None, later: int
) -> None:
    watch = Watch()
    strategy = build("gdumb", epochs=2, batch_size_mem=batch_size_mem, plugins=[watch])
    for number, experience in enumerate(make_stream()):
        strategy.train(experience)
        assert len(watch.images) == 24
        # In whole epochs of 24 images.
        assert abs(watch.passes - (160 if number == 0 else later)) <= 12
    fresh = next(make_model().parameters())
    assert all(weights.equal(fresh) for weights in watch.weights)
    assert not next(strategy.model.parameters()).equal(fresh)
