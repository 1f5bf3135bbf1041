"""The honest rivals: real images drawn at random, in as many bytes as a memory.

What is compared is a real file, its header and labels counted, filled with as many images as fit:
either pixels as they are, or JPEG scans under one header.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch
from torch import Tensor

from hmn_replay.budget import Budget
from hmn_replay.convert import CHANNELS
from hmn_replay.data import LabelledImages
from hmn_replay.errors import BudgetError, ConfigError, DataError, MemoryFileError
from hmn_replay.jpeg import SUBSAMPLINGS, decode_jpeg_scans, encode_jpeg_scans, read_jpeg_shape
from hmn_replay.runtime import make_generator
from hmn_replay.storage import write_atomically

__all__ = ["RealImages", "jpeg_images", "load_real_images", "pack_jpeg_images", "raw_images"]

Kind: TypeAlias = Literal["raw", "jpeg"]
Arrays: TypeAlias = "dict[str, npt.NDArray[Any]]"

_KEY = "hmn_replay_images"
_VERSION = "1"
_NAMES: dict[str, set[str]] = {
    "raw": {"classes", "counts", "images"},
    "jpeg": {"classes", "counts", "header", "lengths", "scans"},
}
_SMALL_TYPES = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.int64)
_ENCODED_AT_ONCE = 64


class RealImages:
    """Real images in a file, class by class; :func:`raw_images` and :func:`jpeg_images` make one.

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


def raw_images(data: LabelledImages, budget: Budget | int | str, *, seed: int = 0) -> RealImages:
    """Draw real images, as many as fit a budget as uint8 pixels.

    Args:
        data: Where to draw from, without replacement. The numbers of images of two classes differ
            by one at most, the first classes having more, but for a class that has no more to give.
        budget: Bytes of the file, header and labels counted.
        seed: Of the draw. A larger budget adds images to those of a smaller one.

    Raises:
        BudgetError: Not one image fits; the message gives the smallest budget that does.
    """
    order = _draw_order(data, seed)

    limit = Budget.parse(budget).num_bytes
    most = min(len(order), limit // data.images[0].numel())

    def build(num_images: int) -> RealImages:
        chosen = order[:num_images]
        by_class = chosen[data.labels[chosen].argsort(stable=True)]
        arrays = {**_count(data.labels[chosen]), "images": data.images[by_class].numpy()}
        return RealImages("raw", arrays)

    return _fill(build, most, limit)


def jpeg_images(
    data: LabelledImages,
    budget: Budget | int | str,
    *,
    quality: int,
    subsampling: str | None = None,
    seed: int = 0,
) -> RealImages:
    """Draw real images, as many as fit a budget as JPEG under one header.

    Args:
        data: As in :func:`raw_images`, which draws the same images in the same order.
        budget: Bytes of the file, header and labels counted.
        quality: libjpeg's, 1 to 100.
        subsampling: One of :data:`hmn_replay.jpeg.SUBSAMPLINGS`; not used for grey images.
            Default: the one that lets more images fit.
        seed: Of the draw.

    Raises:
        BudgetError: Not one image fits; the message gives the smallest budget that does.
        ConfigError: ``quality`` or ``subsampling`` is not as said above.
    """
    limit = Budget.parse(budget).num_bytes
    order = _draw_order(data, seed)
    subsamplings = SUBSAMPLINGS if data.image_shape[0] == 3 else SUBSAMPLINGS[:1]
    if subsampling is not None:
        subsamplings = (subsampling,)
    candidates = [_fill_jpeg(data, order, limit, quality, name) for name in subsamplings]
    return max(candidates, key=lambda images: images.num_images)


def pack_jpeg_images(
    header: bytes, scans: Mapping[int, Sequence[bytes]], budget: Budget | int | str
) -> RealImages:
    """Put scans under their header: the first of every label, then the second, while they fit.

    Args:
        header: What the scans share; see :func:`hmn_replay.jpeg.encode_jpeg_scans`.
        scans: The scans of each label, the first to stay first.
        budget: Bytes of the file, header and labels counted.

    Raises:
        BudgetError: Not one image fits; the message gives the smallest budget that does.
        DataError: There is no scan, or ``header`` is none.
    """
    queue = sorted((i, label, scan) for label, own in scans.items() for i, scan in enumerate(own))
    if not queue:
        raise DataError("expected at least one JPEG scan, came none")

    def build(num_images: int) -> RealImages:
        chosen = sorted(queue[:num_images], key=lambda entry: entry[1])
        own = [scan for _, _, scan in chosen]
        arrays = {
            **_count(torch.tensor([label for _, label, _ in chosen])),
            "header": np.frombuffer(header, np.uint8),
            "lengths": _shrink([len(scan) for scan in own]),
            "scans": np.frombuffer(b"".join(own), np.uint8),
        }
        return RealImages("jpeg", arrays)

    return _fill(build, len(queue), Budget.parse(budget).num_bytes)


def load_real_images(path: str | Path) -> RealImages:
    """Read a file that :meth:`RealImages.save` wrote.

    Raises:
        MemoryFileError: The file is not one, is truncated or altered, or of another version.
        OSError: The file is absent or cannot be read.
    """
    with open(path, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise MemoryFileError(f"cannot read {os.fspath(path)!r}: not a regular file")
        data = file.read()
    try:
        return _parse(data)
    except (safetensors.SafetensorError, DataError, MemoryFileError, ValueError) as error:
        raise MemoryFileError(f"cannot read {os.fspath(path)!r}: {error}") from error


def _draw_order(data: LabelledImages, seed: int) -> Tensor:
    """Return the positions of all images: one of every class at random, then another, and on."""
    drawn = []
    for label in data.classes.tolist():
        members = data.of_class(label)
        generator = make_generator(seed, "real images", label)
        drawn.append(members[torch.randperm(len(members), generator=generator)])
    rounds = torch.cat([torch.arange(len(members)) for members in drawn])
    return torch.cat(drawn)[rounds.argsort(stable=True)]


def _fill_jpeg(
    data: LabelledImages, order: Tensor, limit: int, quality: int, subsampling: str
) -> RealImages:
    header, num_bytes = b"", 0
    scans: dict[int, list[bytes]] = defaultdict(list)
    for chunk in order.split(_ENCODED_AT_ONCE):
        header, encoded = encode_jpeg_scans(data.images[chunk], quality, subsampling=subsampling)
        for label, scan in zip(data.labels[chunk].tolist(), encoded, strict=True):
            scans[label].append(scan)
        num_bytes += sum(map(len, encoded))
        if num_bytes > limit:
            break
    return pack_jpeg_images(header, scans, limit)


def _fill(build: Callable[[int], RealImages], most: int, limit: int) -> RealImages:
    """Return the largest file within the limit, by bisection: files grow with their images."""
    fits = 0
    while fits < most:
        middle = (fits + most + 1) // 2
        if build(middle).file_bytes <= limit:
            fits = middle
        else:
            most = middle - 1
    if not fits:
        raise BudgetError(
            f"a budget of {limit:,} bytes does not hold one image; the smallest that does is "
            f"{build(1).file_bytes:,} bytes"
        )
    return build(fits)


def _count(labels: Tensor) -> Arrays:
    classes, counts = labels.unique(return_counts=True)
    return {"classes": _shrink(classes.tolist()), "counts": _shrink(counts.tolist())}


def _shrink(values: Sequence[int]) -> npt.NDArray[Any]:
    """Return integers in the smallest type that holds them all."""
    for dtype in _SMALL_TYPES:
        bounds = np.iinfo(dtype)
        if bounds.min <= min(values) and max(values) <= bounds.max:
            break
    return np.array(values, dtype)


def _checksum(arrays: Arrays) -> str:
    checksum = 0
    for name, array in sorted(arrays.items()):
        checksum = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), checksum)
        checksum = zlib.crc32(array.tobytes(), checksum)
    return f"{checksum:08x}"


def _parse(data: bytes) -> RealImages:
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
