"""Files: written all at once or not at all, and opened without waiting for anyone."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_target", "digest_tensors", "open_at_once", "write_atomically"]

# A part of a tensor whose rows do not lie one after another is copied to be digested.
_ROWS_AT_ONCE = 512


def check_target(path: str | Path) -> Path:
    """Return where a write to ``path`` goes: the path itself, or what it links to in the end.

    Raises:
        OSError: A folder, a device or a pipe stands there; or the folder around it is absent, or
            cannot be written to.
    """
    target = Path(os.path.realpath(path))
    with contextlib.suppress(FileNotFoundError):
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "Not a regular file, which alone is replaced", str(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(target.parent))
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "Folder cannot be written to", str(target.parent))
    return target


def write_atomically(path: str | Path, content: bytes | Callable[[str], None]) -> None:
    """Write ``path`` so that a reader finds the old file or the new one, never less.

    A link stays one: what it links to is written.

    Args:
        path: Path of the file.
        content: The file's bytes, or a function that writes them to the path that it is given.

    Raises:
        OSError: As :func:`check_target`, or the system refuses. What stood there stays.
    """
    path = check_target(path)
    temporary = str(path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp"))
    # With the permissions that the umask lets, which nobody can ask for without changing it.
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        if callable(content):
            content(temporary)
        else:
            Path(temporary).write_bytes(content)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def open_at_once(path: str, flags: int) -> int:
    """Open a file, for :func:`open`: a pipe is not waited for until someone writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def digest_tensors(text: str, tensors: Mapping[str, Any]) -> str:
    """Return 32 hexadecimal digits that tell a text and named CPU tensors from any others.

    Args:
        text: Any text.
        tensors: Tensors by name, on the CPU, or what has the dtype, shape and rows of one, such as
            a lookup of images.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        rows = tensor[None] if isinstance(tensor, Tensor) and not tensor.ndim else tensor
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            digest.update(part.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
