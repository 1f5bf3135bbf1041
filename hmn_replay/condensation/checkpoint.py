"""Checkpoints of a condensation: everything that the next step reads, in one safetensors file."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
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
    "check_json",
    "check_like",
    "flatten_state",
    "load_state",
    "read_checkpoint",
    "write_checkpoint",
]

_KEY, _DIGEST_KEY = "hmn_replay_checkpoint", "digest"
# Longer texts, such as those of layouts, are named in messages but not shown.
_SHOWN_CHARACTERS = 60
# Once a parameter has been updated: what an optimizer keeps of it.
_OPTIMIZER_STATE = {
    torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
}


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
    """Write a checkpoint, all at once or not at all.

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
    # Not safetensors' save_file, which renames another file over the one that is locked here.
    write_atomically(path, safetensors.torch.save(stored, metadata))


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
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no file"
        raise CheckpointError(
            f"{str(path)!r} is {what}, where the checkpoint is to be; move it away, or give this "
            "run another checkpoint"
        )
    advice = f"delete {str(path)!r} to start anew, or give this run another checkpoint"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text, digest = metadata[_KEY], metadata[_DIGEST_KEY]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content = json.loads(text)
        found, state = dict(content["identity"]), dict(content["state"])
        found = {name: str(value) for name, value in found.items()}
    except (
        safetensors.SafetensorError,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
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
    """Put back what :func:`flatten_state` took, names without their prefix.

    Raises:
        CheckpointError: The tensors are not those that such an owner has.
    """
    if isinstance(owner, nn.Module):
        check_like(tensors, owner.state_dict())
        owner.load_state_dict(dict(tensors))
        return
    parameters = [p for group in owner.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    wanted: dict[str, Tensor] = {}
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        if not (index.isdecimal() and int(index) < len(parameters)):
            raise CheckpointError(f"the checkpoint has {key!r}, which the optimizer has not")
        state.setdefault(int(index), {})[name] = value
    for number, own in state.items():
        for name in _OPTIMIZER_STATE[type(owner)]:
            # Torch counts steps in the default dtype.
            step = torch.zeros((), dtype=_count_dtype(own.get(name)))
            like = step if name == "step" else parameters[number]
            wanted[f"{number}/{name}"] = like.detach()
    check_like(tensors, wanted)
    owner.load_state_dict({**owner.state_dict(), "state": state})


def check_like(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Check that tensors have the names, types and shapes of others.

    Raises:
        CheckpointError: They have not; the message names one that differs.
    """
    found, expected = (
        {name: (value.dtype, tuple(value.shape)) for name, value in each.items()}
        for each in (tensors, wanted)
    )
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            got, like = (_entry_text(each.get(name)) for each in (found, expected))
            raise CheckpointError(
                f"the checkpoint is not as this run would have written it: {name!r} is {got}, "
                f"expected {like}; delete it to start anew"
            )


def check_json(found: Any, wanted: Any, name: str = "state") -> None:
    """Check that a JSON value has the form of another: names, and types of what they stand for.

    Where a value of ``wanted`` is None, a number or None is expected; where it is a map without
    names, one of texts to numbers; numbers are finite, and not below 0 where ``wanted``'s are 0.

    Raises:
        CheckpointError: It has not; the message says where.
    """
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    if isinstance(wanted, dict) and isinstance(found, dict):
        if wanted and found.keys() != wanted.keys():
            different = sorted(found.keys() ^ wanted.keys())[0]
            raise CheckpointError(f"{name} of the checkpoint has other names, such as {different}")
        for key, value in found.items():
            check_json(value, wanted.get(key, 0.0), f"{name}, {key}")
        return
    if wanted is None:
        fits = found is None or (is_number and math.isfinite(found))
    elif isinstance(wanted, str):
        fits = isinstance(found, str)
    elif isinstance(wanted, int | float):
        fits = is_number and math.isfinite(found) and found >= 0
        fits = fits and (isinstance(wanted, float) or isinstance(found, int))
    else:
        fits = False
    if not fits:
        raise CheckpointError(
            f"{name} of the checkpoint is {found!r:.60}, which this run does not write; delete it "
            "to start anew"
        )


def _count_dtype(count: Tensor | None) -> torch.dtype:
    is_float = count is not None and count.dtype in (torch.float32, torch.float64)
    return count.dtype if count is not None and is_float else torch.float32


def _entry_text(entry: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "absent" if entry is None else f"{entry[0]} {entry[1]}"


def _differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Return, for each name whose texts differ, what was found in place of what was wanted."""
    differing = []
    for name in dict.fromkeys([*wanted, *found]):
        was, now = found.get(name) or "none", wanted.get(name) or "none"
        if was != now:
            are_digests = name in ("data", "memory", "networks", "teacher", "functions")
            long = max(len(was), len(now)) > _SHOWN_CHARACTERS or are_digests
            differing.append(f"other {name}" if long else f"{name} {was} in place of {now}")
    return differing
