"""The memory file: a safetensors file with one line of metadata and a digest of every byte.

This is the only module that knows a byte of the file. What a memory kind stores is a
:class:`Record`: words that describe it, and tensors. Nothing in a file is code, and nothing is used
before it is checked: the header's length, the version, the digest, and then, by the memory kind,
that the tensors are those that its words announce.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hmn_replay.budget import Budget
from hmn_replay.errors import HMNReplayError, MemoryFileError
from hmn_replay.files import open_at_once

__all__ = [
    "FILE_VERSION",
    "FREE_VALUES",
    "MAX_VALUES_PER_BYTE",
    "Record",
    "TensorSpec",
    "as_bytes",
    "check_claims",
    "integer_dtype",
    "pack",
    "packed_size",
    "read_file",
    "specs_of",
    "unpack",
]

FILE_VERSION = 2

# What a file may claim to hold for each byte of its tensors; and whatever its bytes, beside that:
# it costs a few megabytes, or milliseconds.
MAX_VALUES_PER_BYTE, FREE_VALUES = 64, 2**20
_MAX_IMAGES_PER_BYTE, _FREE_IMAGES = 8, 2**17
# Of the multiplications that decode one image.
_MAX_WORK_PER_BYTE, _FREE_WORK = 2**15, 2**28
_DIGEST_LENGTH = 16
# One key alone: safetensors writes the keys of several in an order that changes from run to run.
_METADATA_KEY = "hmn_replay"
_MAX_HEADER_BYTES = 2**16
# In the order of the file: the most strictly aligned types first.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class TensorSpec:
    """The type and the shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's values."""
        return math.prod(self.shape) * self.dtype.itemsize


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Return the type and the shape of each tensor, by name."""
    return {name: TensorSpec(each.dtype, tuple(each.shape)) for name, each in tensors.items()}


@dataclass(frozen=True)
class Record:
    """What a memory stores.

    Attributes:
        kind: The memory kind's registered name.
        num_images: How many images it decodes to.
        budget_bytes: Bytes that its file may take, or None.
        words: What the kind says of itself, such as number format and image shape; no spaces.
        tensors: Name to tensor.
    """

    kind: str
    num_images: int
    budget_bytes: int | None
    words: tuple[str, ...]
    tensors: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors' values."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def as_bytes(data: bytes) -> Tensor:
    """Return bytes as a tensor, uint8 ``(n,)``."""
    if not data:  # torch.frombuffer refuses it
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def pack(record: Record) -> bytes:
    """Return the bytes of a memory file."""
    digest = "0" * _DIGEST_LENGTH
    tensors = {name: tensor.cpu().contiguous() for name, tensor in record.tensors.items()}
    text = _text(record.kind, record.num_images, record.budget_bytes, record.words, digest)
    data = safetensors.torch.save(tensors, {_METADATA_KEY: text})
    start = data.index(digest.encode())
    end = start + _DIGEST_LENGTH
    return b"".join((data[:start], _digest(data[:start], data[end:]).encode(), data[end:]))


def packed_size(
    kind: str,
    num_images: int,
    budget_bytes: int | None,
    words: Sequence[str],
    specs: Mapping[str, TensorSpec],
) -> int:
    """Return the exact number of bytes that :func:`pack` makes of such tensors.

    Eight bytes of length, a JSON header filled up with spaces to a multiple of eight, the values.
    """
    text = _text(kind, num_images, budget_bytes, words, "0" * _DIGEST_LENGTH)
    order = list(_DTYPES)
    header: dict[str, object] = {"__metadata__": {_METADATA_KEY: text}}
    offset = 0
    for name, spec in sorted(specs.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        end = offset + spec.num_bytes
        header[name] = {
            "dtype": _DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + 8 * math.ceil(length / 8) + offset


def unpack(data: bytes) -> Record:
    """Read the bytes of a memory file: the inverse of :func:`pack`.

    Raises:
        MemoryFileError: They are not such a file, are truncated or altered, or of another version.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise MemoryFileError(f"expected the bytes of a memory file; got {type(data).__name__}")
    return _unpack(io.BytesIO(data), len(data))


def read_file(path: str | Path) -> Record:
    """Read a memory file.

    Raises:
        MemoryFileError: As :func:`unpack`.
        OSError: The file is absent or cannot be read.
    """
    if "\0" in os.fspath(path):
        raise MemoryFileError(f"a file name holds no null character; got {os.fspath(path)!r}")
    with open(path, "rb", opener=open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise MemoryFileError("not a regular file")
        return _unpack(file, status.st_size)


def check_claims(num_bytes: int, num_images: int, num_values: int = 0, image_work: int = 0) -> None:
    """Check that what a file claims to hold is in proportion to its bytes.

    To be called before there is room for any of it: what a file costs whoever reads it then is in
    proportion to its bytes, too. The bounds are far above what any memory of use takes.

    Args:
        num_bytes: Bytes of the file's tensors.
        num_images: How many images it claims.
        num_values: How many stored values.
        image_work: How many multiplications decode an image.

    Raises:
        MemoryFileError: More than the format lets a file of so many bytes claim.
    """
    claims = (
        ("images", num_images, _FREE_IMAGES, _MAX_IMAGES_PER_BYTE),
        ("values", num_values, FREE_VALUES, MAX_VALUES_PER_BYTE),
        ("multiplications for an image", image_work, _FREE_WORK, _MAX_WORK_PER_BYTE),
    )
    for what, claimed, free, per_byte in claims:
        if claimed > (most := free + per_byte * num_bytes):
            raise MemoryFileError(
                f"its {num_bytes:,} bytes are too few for {claimed:,} {what}: a file has up to "
                f"{free:,}, and {per_byte:,} more for each byte of its tensors, here {most:,}"
            )


def integer_dtype(low: int, high: int) -> torch.dtype:
    """Return the smallest integer type that holds ``low`` to ``high``."""
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        bounds = torch.iinfo(dtype)
        if bounds.min <= low and high <= bounds.max:
            return dtype
    return torch.int64


def _unpack(file: BinaryIO, num_bytes: int) -> Record:
    prefix = file.read(8)
    header_length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or header_length > num_bytes - 8:
        raise MemoryFileError(
            f"not a memory file, or a truncated one: {num_bytes} bytes do not hold the header "
            "that they announce"
        )
    if header_length > _MAX_HEADER_BYTES:
        raise MemoryFileError(
            f"not a memory file: a header of {header_length:,} bytes, over {_MAX_HEADER_BYTES:,}"
        )
    header = file.read(header_length)
    kind, num_images, budget_bytes, words, digest = _read_text(header)
    data = file.read(num_bytes - 8 - header_length)
    before, found, after = header.partition(digest.encode())
    if not found or _digest(prefix + before, after + data) != digest:
        raise MemoryFileError(
            "its digest does not fit its content: the file was truncated, altered or damaged; "
            "write it again"
        )
    try:
        tensors = safetensors.torch.load(prefix + header + data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise MemoryFileError(f"its tensors cannot be read ({error})") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise MemoryFileError(f"tensor {name!r} is {tensor.dtype}, which no memory stores")
    return Record(kind, num_images, budget_bytes, words, tensors)


def _text(
    kind: str, num_images: int, budget_bytes: int | None, words: Sequence[str], digest: str
) -> str:
    budget = "-" if budget_bytes is None else str(budget_bytes)
    return " ".join((str(FILE_VERSION), digest, kind, str(num_images), budget, *words))


def _read_text(header: bytes) -> tuple[str, int, int | None, tuple[str, ...], str]:
    """Return kind, number of images, budget, the kind's words and the digest."""
    try:
        text = json.loads(header)["__metadata__"][_METADATA_KEY]
        version = int(text.split(" ", 1)[0])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MemoryFileError("not a memory file: its header is not hmn_replay's") from error
    if version != FILE_VERSION:
        raise MemoryFileError(
            f"file version {version}; this version of hmn_replay reads version {FILE_VERSION}: "
            "install the version that wrote the file, or condense again"
        )
    try:
        _, digest, kind, images, budget, *words = text.split(" ")
        num_images = int(images)
        budget_bytes = None if budget == "-" else Budget(int(budget)).num_bytes
        if num_images < 0 or len(digest) != _DIGEST_LENGTH or not digest.isascii():
            raise ValueError("a negative number of images, or a digest of another length")
        if _text(kind, num_images, budget_bytes, words, digest) != text:
            raise ValueError("its numbers are written in another way than this package writes them")
    except (ValueError, HMNReplayError) as error:
        raise MemoryFileError(
            f"not a memory file: its metadata cannot be read ({error})"
        ) from error
    return kind, num_images, budget_bytes, tuple(words), digest


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=_DIGEST_LENGTH // 2)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
