"""What a replay plugin's state looks like, and which ones are refused."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from hmn_replay.avalanche.replay_state import ReplayState
from hmn_replay.errors import CheckpointError

STATE = ReplayState(b"bytes", [{"seconds": 1.5, "beta": None}], 1, 7, {"images": torch.ones(2)})


def test_a_state_comes_back_through_a_safe_load() -> None:
    for memory in (b"", b"bytes", bytes(range(256))):
        state = ReplayState(memory, STATE.report, 1, 7, STATE.pending)
        file = io.BytesIO()
        torch.save(state.to_dict(), file)
        file.seek(0)
        read = ReplayState.from_dict(torch.load(file, weights_only=True))
        assert (read.memory, read.report, read.num_updates, read.num_steps) == (
            memory,
            STATE.report,
            1,
            7,
        )
        assert torch.equal(read.pending["images"], STATE.pending["images"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 9}, "version 9"),
        ({"version": None}, "version None"),
        ({"memory": torch.zeros(3)}, "no row of bytes"),
        ({"memory": b"bytes"}, "no row of bytes"),
        ({"num_updates": True}, "no counts"),
        ({"num_steps": -1}, "no counts"),
        ({"pending": []}, "as a dict"),
        ({"report": "{"}, "no JSON"),
        ({"report": 4}, "no JSON"),
        ({"other": 4}, "expected a dict with"),
    ],
)
def test_a_damaged_state_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ReplayState.from_dict({**STATE.to_dict(), **changes})


def test_something_else_is_refused() -> None:
    with pytest.raises(CheckpointError, match="came list"):
        ReplayState.from_dict([])
