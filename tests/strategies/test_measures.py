"""What is measured is what is there."""

from __future__ import annotations

import pytest
from avalanche.training.plugins.replay import ReplayPlugin

import strategies
from hmn_replay.errors import ConfigError
from strategies.buffers import ReservoirBuffer
from tests.strategies.support import IMAGE_BYTES, build, make_stream

OURS = ("hmn", "fred", "jpeg", "lossless", "subsampled", "raw", "herding")


def test_a_buffer_that_holds_more_than_promised_is_found_out() -> None:
    strategy = build("avalanche-replay")
    buffer = ReservoirBuffer(30)
    strategy.plugins[0].storage_policy = buffer
    strategy.train(make_stream()[0])
    assert strategies.memory_use(strategy).num_bytes == 30 * IMAGE_BYTES
    assert strategies.memory_use(strategy).seconds == buffer.seconds > 0


def test_a_buffer_of_avalanches_is_measured_too() -> None:
    strategy = build("naive")
    strategy.plugins.append(ReplayPlugin(mem_size=6))
    strategy.train(make_stream()[0])
    use = strategies.memory_use(strategy)
    assert (use.num_images, use.num_bytes) == (6, 6 * IMAGE_BYTES)
    assert len(strategies.memory_images(strategy)[0]) == 6


def test_a_file_is_measured_whole() -> None:
    strategy = build("jpeg")
    strategy.train(make_stream()[0])
    replay = strategy.plugins[0]
    use = strategies.memory_use(strategy)
    assert use.num_bytes == len(replay.memory.to_bytes())
    assert use.num_images == replay.memory.num_images
    assert use.seconds == replay.report[0]["seconds"]


@pytest.mark.parametrize("name", strategies.STRATEGIES)
def test_loss_and_renewal_are_named(name: str) -> None:
    strategy = build(name)
    stream = make_stream(num_per_class=4, num_experiences=2)
    for step in [stream] if name == "joint" else stream:
        strategy.train(step)
    expected = {"derpp": "DER", "er_ace": "ER_ACE"}
    expected |= dict.fromkeys(OURS, "separated")
    assert strategies.protocol_used(strategy) == {
        "loss_used": expected.get(name, "plain"),
        "renew_used": "before" if name in OURS else None,
        "distill_used": float(name in OURS),
    }


def test_all_memories_of_this_package_are_replayed_with_the_loss_that_is_asked_for() -> None:
    for name in OURS:
        strategy = build(name, loss="asymmetric")
        strategy.train(make_stream(num_per_class=4, num_experiences=1)[0])
        used = strategies.protocol_used(strategy)
        assert (used["loss_used"], used["renew_used"]) == ("asymmetric", "after")
        with pytest.raises(ConfigError, match="loss must be"):
            build(name, loss="assymetric")
