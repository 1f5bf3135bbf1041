"""What is measured is what is there."""

from __future__ import annotations

import strategies
from strategies.buffers import ReservoirBuffer
from tests.strategies.support import IMAGE_BYTES, build, make_stream


def test_a_buffer_that_holds_more_than_promised_is_found_out() -> None:
    strategy = build("raw")
    buffer = ReservoirBuffer(30)
    strategy.plugins[0].storage_policy = buffer
    strategy.train(make_stream()[0])
    assert strategies.memory_use(strategy).num_bytes == 30 * IMAGE_BYTES
    assert strategies.memory_use(strategy).seconds == buffer.seconds > 0


def test_a_file_is_measured_whole() -> None:
    strategy = build("jpeg")
    strategy.train(make_stream()[0])
    replay = strategy.plugins[0]
    use = strategies.memory_use(strategy)
    assert use.num_bytes == len(replay.memory.serialise())
    assert use.num_images == replay.memory.num_images
    assert use.seconds == replay.report[0]["seconds"]
