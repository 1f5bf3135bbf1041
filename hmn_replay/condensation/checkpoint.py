"""Checkpoints of a condensation: everything that the next step reads, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from hmn_replay.errors import CheckpointError
from hmn_replay.files import digest_tensors, write_atomically

__all__ = [
    "Checkpoint",
    "flatten_state",
    "load_state",
    "read_checkpoint",
    "write_checkpoint",
]

_KEY, _DIGEST_KEY = "hmn_replay_checkpoint", "digest"
# Longer texts, such as those of layouts, are named in messages but not shown.
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands.

    Attributes:
        state: JSON values: the phase, the step and the like.
        tensors: Name to tensor, on the CPU.
    """

    state: dict[str, Any]
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose name begins with ``prefix`` and a slash, without these."""
        start = f"{prefix}/"
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}


def write_checkpoint(
    path: str | Path,
    identity: Mapping[str, str],
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint, all at once or not at all, from the tensors' own memory.

    Args:
        path: Path of the file.
        identity: What tells this run from every other one: texts by name.
        state: JSON values by name.
        tensors: Tensors by name, on any device.

    Raises:
        OSError: The file cannot be written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"identity": dict(identity), "state": state})
    metadata = {_KEY: text, _DIGEST_KEY: digest_tensors(text, stored)}
    try:
        write_atomically(path, partial(safetensors.torch.save_file, stored, metadata=metadata))
    except safetensors.SafetensorError as error:
        raise OSError(f"cannot write the checkpoint {str(path)!r} ({error})") from error


def read_checkpoint(path: str | Path, identity: Mapping[str, str]) -> Checkpoint | None:
    """Read a checkpoint; None where there is none.

    Args:
        path: The file.
        identity: The identity of the run that goes on, by the same names.

    Raises:
        CheckpointError: The file is no checkpoint, is damaged, or belongs to another run; the
            message says which names have other values.
    """
    path = Path(path)
    if not path.exists():
        return None
    advice = f"delete {str(path)!r} to start anew, or give this run another checkpoint"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text, digest = metadata[_KEY], metadata[_DIGEST_KEY]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content = json.loads(text)
        found, state = dict(content["identity"]), content["state"]
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"cannot read the checkpoint ({error}); {advice}") from error
    if digest_tensors(text, tensors) != digest:
        raise CheckpointError(f"the checkpoint was altered or damaged; {advice}")
    if differing := _differences(found, identity):
        raise CheckpointError(
            f"the checkpoint belongs to another run, with {', '.join(differing)}; {advice}"
        )
    return Checkpoint(state, tensors)


def flatten_state(prefix: str, owner: nn.Module | torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of a module's or an optimizer's state under ``prefix/...`` names."""
    if isinstance(owner, nn.Module):
        return {f"{prefix}/{name}": value for name, value in owner.state_dict().items()}
    return {
        f"{prefix}/{index}/{name}": value
        for index, values in owner.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def load_state(owner: nn.Module | torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`flatten_state` took, names without their prefix."""
    if isinstance(owner, nn.Module):
        owner.load_state_dict(dict(tensors))
        return
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    owner.load_state_dict({**owner.state_dict(), "state": state})


def _differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Return, for each name whose texts differ, what was found in place of what was wanted."""
    differing = []
    for name in sorted({*found, *wanted}):
        was, now = found.get(name, "none"), wanted.get(name, "none")
        if was != now:
            long = max(len(was), len(now)) > _SHOWN_CHARACTERS or name in ("data", "memory")
            differing.append(f"other {name}" if long else f"{name} {was} in place of {now}")
    return differing
