"""What a replay plugin has learned, as tensors, numbers and texts that are safe to load."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hmn_replay.errors import CheckpointError

__all__ = ["ReplayState"]

_VERSION = 1


@dataclass(frozen=True)
class ReplayState:
    """The state of a replay plugin, without its settings.

    Attributes:
        memory: The bytes of the memory's file; none without a memory.
        report: One dict of JSON types an update.
        num_updates: How often the memory was made; 0 or more.
        num_steps: In how many steps it was replayed; 0 or more.
        pending: Raw images that wait; see :meth:`hmn_replay.avalanche.gathering.Gatherer.state_dict`.
    """

    memory: bytes
    report: list[dict[str, Any]]
    num_updates: int
    num_steps: int
    pending: dict[str, Tensor]

    def to_dict(self) -> dict[str, Any]:
        """Return the state as ``torch.load(..., weights_only=True)`` may read it."""
        return {
            "version": _VERSION,
            # torch.frombuffer refuses a buffer of no bytes.
            "memory": torch.frombuffer(bytearray(self.memory + b"\0"), dtype=torch.uint8)[:-1],
            "report": json.dumps(self.report),
            "num_updates": self.num_updates,
            "num_steps": self.num_steps,
            "pending": self.pending,
        }

    @classmethod
    def from_dict(cls, state: Any) -> ReplayState:
        """Read what :meth:`to_dict` gave.

        Raises:
            CheckpointError: Something is missing, of another type, or of another version.
        """
        names = {"version", "memory", "report", "num_updates", "num_steps", "pending"}
        if not isinstance(state, dict) or set(state) != names:
            found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise CheckpointError(f"expected a dict with {sorted(names)}, came {found}")
        if state["version"] != _VERSION:
            raise CheckpointError(
                f"version {state['version']!r}; this version of hmn_replay reads {_VERSION}"
            )
        memory, pending = state["memory"], state["pending"]
        is_memory = isinstance(memory, Tensor) and memory.dtype == torch.uint8 and memory.ndim == 1
        counts = [state["num_updates"], state["num_steps"]]
        if not is_memory or any(type(count) is not int or count < 0 for count in counts):
            raise CheckpointError("its memory is no row of bytes, or its counts are no counts")
        if not isinstance(pending, dict):
            raise CheckpointError(f"expected its pending images as a dict, came {type(pending)}")
        try:
            report = json.loads(state["report"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"its report is no JSON: {error}") from error
        num_updates, num_steps = counts
        return cls(memory.cpu().numpy().tobytes(), report, num_updates, num_steps, pending)
