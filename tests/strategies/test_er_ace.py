"""ER-ACE: its buffer is balanced, and is replayed even below one batch."""

from __future__ import annotations

import strategies
from tests.strategies.support import build, make_stream


def test_a_buffer_below_one_batch_is_replayed_all_the_same() -> None:
    strategy = build("er_ace", batch_size_mem=50)
    first, second = make_stream(num_per_class=8, num_experiences=2)
    strategy.train(first)
    assert not hasattr(strategy, "mb_buffer_x")
    strategy.train(second)
    assert len(strategy.mb_buffer_x) == 24
    assert strategies.memory_images(strategy)[1].bincount().tolist() == [6, 6, 6, 6]
