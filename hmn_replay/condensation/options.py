"""Options of dataclasses: their values checked and brought to the types of their fields."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from hmn_replay.budget import as_int
from hmn_replay.errors import ConfigError

__all__ = ["convert", "convert_fields"]


def convert_fields(config: Any) -> None:
    """Bring every field of a frozen dataclass to its type, where nothing is lost by that.

    Raises:
        ConfigError: A value of another type.
    """
    for field in dataclasses.fields(config):
        value = convert(field.name, getattr(config, field.name), str(field.type))
        object.__setattr__(config, field.name, value)


def convert(name: str, value: Any, kind: str) -> Any:
    """Return ``value`` as a field's type, where nothing is lost by that; else raise.

    Args:
        name: Of the field, for the message.
        value: Anything.
        kind: The type as it is written: ``int``, ``float`` or ``str``, one of these ``| None``, or
            ``tuple[..., ...]`` of one of them.

    Raises:
        ConfigError: A value of another type.
    """
    if kind.startswith("tuple["):
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ConfigError(f"{name} must be a list, got {value!r}")
        return tuple(convert(name, entry, kind[6:].split(",")[0]) for entry in value)
    if value is None and kind.endswith("| None"):
        return None
    number = as_int(value)
    if kind.startswith("int") and number is not None:
        return number
    if kind.startswith("float") and (number is not None or isinstance(value, float)):
        with contextlib.suppress(OverflowError):
            return float(value)
    if kind.removesuffix(" | None") in ("str", "NumberFormat") and isinstance(value, str):
        return value
    raise ConfigError(f"{name} must be {kind}, got {value!r}")
