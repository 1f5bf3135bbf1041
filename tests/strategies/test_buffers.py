"""The buffers' clock, and Avalanche's warnings kept away."""

from __future__ import annotations

import time
import warnings
from types import SimpleNamespace

import pytest

from strategies.buffers import BalancedBuffer, ReservoirBuffer
from tests.strategies.support import make_stream


@pytest.mark.parametrize("kind", [ReservoirBuffer, BalancedBuffer])
def test_updates_are_timed_and_give_no_warning(
    kind: type[ReservoirBuffer | BalancedBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter([1.0, 1.5, 7.0, 9.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    buffer = kind(10)
    with warnings.catch_warnings(record=True) as caught:
        for experience in make_stream(num_per_class=8, num_experiences=2):
            buffer.update(SimpleNamespace(experience=experience))
            assert len(buffer.buffer) == 10
    assert buffer.seconds == 2.5
    assert not caught
