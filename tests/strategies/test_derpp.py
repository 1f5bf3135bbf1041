"""DER++: what its logits take, when it replays, and what it needs."""

from __future__ import annotations

from typing import Any

import pytest

import strategies
from hmn_replay.errors import ConfigError, DataError
from tests.strategies.support import (
    BUDGET,
    IMAGE_BYTES,
    build,
    make_stream,
    make_stream_without_tasks,
)


def test_logits_are_counted() -> None:
    strategy = build("derpp")
    strategy.train(make_stream(num_experiences=1)[0])
    use = strategies.memory_use(strategy)
    assert use.num_images == BUDGET // (IMAGE_BYTES + 4 * 6) == 21
    assert use.num_bytes == 21 * (IMAGE_BYTES + 4 * 6)


def test_a_buffer_below_one_batch_is_replayed_all_the_same() -> None:
    strategy = build("derpp", batch_size_mem=50, alpha=0.3, beta=0.7)
    assert (strategy.alpha, strategy.beta) == (0.3, 0.7)
    first, second = make_stream(num_per_class=8, num_experiences=2)
    strategy.train(first)
    assert strategy.batch_size_mem == 16
    strategy.train(second)
    assert strategy.batch_logits.shape == (16, 6)


@pytest.mark.parametrize("weights", [{"alpha": -1}, {"alpha": float("nan")}, {"beta": "x"}])
def test_a_weight_is_a_number_of_0_or_more(weights: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be a number of 0 or more; got"):
        build("derpp", **weights)


def test_samples_without_a_task_label_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(image, label, task label\).*got samples of 2"):
        build("derpp").train(make_stream_without_tasks()[0])
