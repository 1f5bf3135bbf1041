"""Files: written all at once or not at all, and opened without waiting for anyone."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "check_target",
    "clear_stale",
    "digest_tensors",
    "open_at_once",
    "tensor_bytes",
    "try_lock",
    "write_atomically",
]

# Bytes of a name that a temporary file has of the file it is for: names have up to 255.
_MOST_STEM = 200
# A part of a tensor whose rows do not lie one after another is copied to be digested.
_ROWS_AT_ONCE = 512


def check_target(path: str | Path) -> Path:
    """Return where a write to ``path`` goes: the path itself, or what it links to in the end.

    Raises:
        OSError: A folder, a device or a pipe stands there; or the folder around it is absent, or
            cannot be written to.
    """
    if "\0" in os.fspath(path):
        raise OSError(errno.EINVAL, "A file name holds no null character", str(path))
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
    try:
        temporary, lock = _new_temporary(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        if callable(content):
            content(temporary)
        else:
            Path(temporary).write_bytes(content)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename in (None, temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def clear_stale(path: str | Path) -> None:
    """Delete what writes of ``path`` have left that were killed, and nothing else.

    A file that someone is writing stays: its writer holds a lock on it, which ends with the
    process. Where the system has no such locks, all stay.

    Args:
        path: Path of the file, as for :func:`write_atomically`.
    """
    path = Path(os.path.realpath(path))
    ours = re.compile(re.escape(_stem(path)) + r"[0-9a-f]{16}\.tmp")
    with contextlib.suppress(OSError):
        for name in filter(ours.fullmatch, os.listdir(path.parent)):
            with contextlib.suppress(OSError), open(path.with_name(name), "rb+") as file:
                if try_lock(file.fileno()):
                    os.unlink(path.with_name(name))


def _new_temporary(path: Path) -> tuple[str, int | None]:
    """Return a new file beside ``path``, and what holds the lock on it until it is closed."""
    while True:
        temporary = str(path.with_name(f"{_stem(path)}{secrets.token_hex(8)}.tmp"))
        # With the permissions that the umask lets, which nobody can ask for without changing it.
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if fcntl is None:  # such a system may not replace a file that is open
            os.close(descriptor)
            return temporary, None
        try_lock(descriptor)
        # Another process may have taken it for stale before it was locked.
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)


def _stem(path: Path) -> str:
    """Return how the names of temporary files begin, short enough for any name of a file."""
    return f".{os.fsencode(path.name)[:_MOST_STEM].decode(errors='ignore')}."


def try_lock(descriptor: int) -> bool | None:
    """Lock a file if nobody else has; False where it is locked, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def open_at_once(path: str, flags: int) -> int:
    """Open a file, for :func:`open`: a pipe is not waited for until someone writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def digest_tensors(text: str, tensors: Mapping[str, Any]) -> str:
    """Return 32 hexadecimal digits that tell a text and named tensors from any others.

    Args:
        text: Any text.
        tensors: Tensors by name, on any device, or what has the dtype, shape and rows of one, such
            as a lookup of images.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        rows = tensor[None] if isinstance(tensor, Tensor) and not tensor.ndim else tensor
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            digest.update(tensor_bytes(part))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's values, row by row, however and wherever they are held."""
    # numpy has no bfloat16.
    return tensor.reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data
