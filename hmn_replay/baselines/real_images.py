"""Real images in a file: pixels as they are, or JPEG scans under one header."""

from __future__ import annotations

import json
import os
import stat
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch
from torch import Tensor

from hmn_replay.baselines.jpeg import decode_jpeg_scans, read_jpeg_shape
from hmn_replay.data.images import CHANNELS
from hmn_replay.errors import ConfigError, DataError, MemoryFileError
from hmn_replay.files import open_at_once, write_atomically

__all__ = ["Arrays", "RealImages", "load_real_images", "parse_real_images"]

Kind: TypeAlias = Literal["raw", "jpeg"]
Arrays: TypeAlias = "dict[str, npt.NDArray[Any]]"

_KEY = "hmn_replay_images"
_VERSION = "1"
_NAMES: dict[str, set[str]] = {
    "raw": {"classes", "counts", "images"},
    "jpeg": {"classes", "counts", "header", "lengths", "scans"},
}


class RealImages:
    """Real images, class by class; those of :mod:`hmn_replay.baselines.fill` fill a budget.

    Args:
        kind: ``"raw"`` or ``"jpeg"``.
        arrays: What the file holds: ``classes``, integers ``(K,)``; ``counts``, integers ``(K,)``,
            the images of each class; and, of raw images, ``images``, uint8 ``(N, C, H, W)``; of
            JPEG images ``header``, uint8; ``scans``, uint8, one after another; and ``lengths``,
            integers ``(N,)``, the bytes of each.

    Raises:
        DataError: The arrays do not fit each other.
    """

    def __init__(self, kind: Kind, arrays: Arrays) -> None:
        self.kind = kind
        self.arrays = arrays
        _check_arrays(kind, arrays)

    @property
    def classes(self) -> Tensor:
        """int64 ``(K,)``, the labels that occur, sorted."""
        return torch.from_numpy(self.arrays["classes"].astype(np.int64))

    @property
    def images_per_class(self) -> list[int]:
        """How many images each class has, in the order of :attr:`classes`."""
        counts: list[int] = self.arrays["counts"].tolist()
        return counts

    @property
    def num_images(self) -> int:
        """How many images there are."""
        return sum(self.images_per_class)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        if self.kind == "jpeg":
            return read_jpeg_shape(self.arrays["header"].tobytes())
        _, channels, height, width = self.arrays["images"].shape
        return channels, height, width

    @property
    def scans(self) -> dict[int, list[bytes]]:
        """The scans of each label, in the order stored; of JPEG images only."""
        ends = self.arrays["lengths"].cumsum(dtype=np.int64)
        scans = iter(np.split(self.arrays["scans"], ends[:-1]))
        return {
            label: [next(scans).tobytes() for _ in range(count)]
            for label, count in zip(self.classes.tolist(), self.images_per_class, strict=True)
        }

    @cached_property
    def file_bytes(self) -> int:
        """The size of the file that :meth:`save` writes."""
        return len(self.serialise())

    def decode(self, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Decode every image from the bytes that are stored.

        Args:
            dtype: ``torch.float32`` or ``torch.uint8``.

        Returns:
            Images ``(N, C, H, W)``, float32 in [0, 1] or uint8, and labels, int64 ``(N,)``; class
            by class.

        Raises:
            DataError: A JPEG scan is damaged.
        """
        if dtype not in (torch.float32, torch.uint8):
            raise ConfigError(f"dtype is torch.float32 or torch.uint8; got {dtype}")
        if self.kind == "raw":
            images = torch.from_numpy(self.arrays["images"].copy())
        else:
            scans = [scan for own in self.scans.values() for scan in own]
            images = decode_jpeg_scans(self.arrays["header"].tobytes(), scans)
        labels = self.classes.repeat_interleave(torch.tensor(self.images_per_class))
        return images if dtype == torch.uint8 else images.float().div_(255), labels

    def serialise(self) -> bytes:
        """Return the bytes of the file: safetensors, and a checksum of the arrays."""
        metadata = {_KEY: f"{self.kind} {_VERSION} {_checksum(self.arrays)}"}
        return safetensors.numpy.save(self.arrays, metadata)

    def save(self, path: str | Path) -> None:
        """Write the file, all at once or not at all."""
        write_atomically(path, self.serialise())


def load_real_images(path: str | Path) -> RealImages:
    """Read a file that :meth:`RealImages.save` wrote.

    Raises:
        MemoryFileError: The file is not one, is truncated or altered, or of another version.
        OSError: The file is absent or cannot be read.
    """
    with open(path, "rb", opener=open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise MemoryFileError(f"cannot read {os.fspath(path)!r}: not a regular file")
        data = file.read()
    try:
        return parse_real_images(data)
    except MemoryFileError as error:
        raise MemoryFileError(f"cannot read {os.fspath(path)!r}: {error}") from error


def parse_real_images(data: bytes) -> RealImages:
    """Read the bytes that :meth:`RealImages.serialise` made; see :func:`load_real_images`."""
    try:
        arrays = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        words = header.get("__metadata__", {}).get(_KEY, "").split(" ")
        if len(words) != 3:
            raise MemoryFileError("not a file of real images")
        kind, version, checksum = words
        if version != _VERSION:
            raise MemoryFileError(f"version {version}; this version of hmn_replay reads {_VERSION}")
        if checksum != _checksum(arrays):
            raise MemoryFileError("its checksum does not fit: the file was altered; write it again")
        return RealImages(kind, arrays)
    except (safetensors.SafetensorError, ValueError) as error:
        raise MemoryFileError(str(error)) from error
    except KeyError as error:  # safetensors, of a type that numpy does not have
        raise MemoryFileError(f"its tensors are of type {error}, not integers") from error


def _checksum(arrays: Arrays) -> str:
    checksum = 0
    for name, array in sorted(arrays.items()):
        checksum = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), checksum)
        checksum = zlib.crc32(array.tobytes(), checksum)
    return f"{checksum:08x}"


def _check_arrays(kind: str, arrays: Arrays) -> None:
    names = _NAMES.get(kind)
    if names is None or set(arrays) != names:
        raise DataError(f"{kind!r} images have no such arrays: {', '.join(sorted(arrays))}")
    for name, array in arrays.items():
        num_axes = 4 if name == "images" else 1
        is_fit = array.dtype == np.uint8
        if name in ("classes", "counts", "lengths"):
            is_fit = array.dtype.kind in "iu" and np.can_cast(array.dtype, np.int64)
        if not is_fit or array.ndim != num_axes or not array.size:
            raise DataError(f"{name} cannot be {array.dtype} of shape {array.shape}")
    # Python's integers, which do not wrap around where a hostile file would like them to.
    classes, counts = arrays["classes"].tolist(), arrays["counts"].tolist()
    if len(counts) != len(classes) or min(counts) < 1 or sorted(set(classes)) != classes:
        raise DataError("classes, sorted, need one positive count each")
    lengths = arrays["lengths"].tolist() if kind == "jpeg" else []
    if sum(counts) != len(lengths or arrays["images"]):
        raise DataError(f"the counts of the classes add up to {sum(counts)}, not to the images")
    if kind == "raw":
        if arrays["images"].shape[1] not in CHANNELS:
            raise DataError(f"images have 1 or 3 channels, not {arrays['images'].shape[1]}")
    elif min(lengths) < 1 or sum(lengths) != len(arrays["scans"]):
        raise DataError("the lengths of the scans do not fit the scans")
    else:
        read_jpeg_shape(arrays["header"].tobytes())
