"""Libraries that only some of this package needs: imported where they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hmn_replay.errors import MissingExtraError

__all__ = ["import_extra"]


def import_extra(name: str, extra: str) -> Any:
    """Import a library that an extra of this package installs.

    Args:
        name: The module, such as ``"huggingface_hub"``.
        extra: The extra that has it, such as ``"hub"``.

    Raises:
        MissingExtraError: It is not installed; the message says how to install it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingExtraError(
            f"{name} is needed for this, and it is not installed: pip install 'hmn-replay[{extra}]'"
        ) from error
