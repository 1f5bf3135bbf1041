"""The honest rivals: real images, drawn at random or chosen, in as many bytes as a memory.

What is compared is a real file, its header and labels counted, filled with as many images as fit:
either pixels as they are, or JPEG scans under one header.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hmn_replay.baselines.jpeg import SUBSAMPLINGS, encode_jpeg_scans
from hmn_replay.baselines.real_images import Arrays, RealImages
from hmn_replay.baselines.selection import select_images
from hmn_replay.budget import Budget
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import BudgetError, ConfigError, DataError

__all__ = ["jpeg_images", "pack_jpeg_images", "raw_images"]

_SMALL_TYPES = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.int64)
_ENCODED_AT_ONCE = 64


def raw_images(
    data: LabelledImages,
    budget: Budget | int | str,
    *,
    selection: str | Tensor = "random",
    seed: int = 0,
) -> RealImages:
    """Take real images, as many as fit a budget as uint8 pixels.

    Args:
        data: Where to take them from, each once. With a selection by name, the numbers of images of
            two classes differ by one at most, the first classes having more, but for a class that
            has no more to give.
        budget: Bytes of the file, header and labels counted.
        selection: One of :data:`hmn_replay.baselines.selection.SELECTIONS`; or the order in which images are
            taken while they fit, int64 positions in ``data``, such as those that
            :func:`hmn_replay.baselines.selection.select_images` gives with options of your own.
        seed: Of a selection by name. A larger budget adds images to those of a smaller one.

    Raises:
        BudgetError: Not one image fits; the message gives the smallest budget that does.
        ConfigError: The selection is not as said above.
    """
    limit = Budget.parse(budget).num_bytes
    most = limit // data.images[0].numel()
    order = _order(data, selection, max(1, most), seed)
    most = min(len(order), most)

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
    selection: str | Tensor = "random",
    seed: int = 0,
) -> RealImages:
    """Take real images, as many as fit a budget as JPEG under one header.

    Args:
        data: As in :func:`raw_images`, which takes the same images in the same order.
        budget: Bytes of the file, header and labels counted.
        quality: libjpeg's, 1 to 100.
        subsampling: One of :data:`hmn_replay.baselines.jpeg.SUBSAMPLINGS`; not used for grey images.
            Default: the one that lets more images fit.
        selection: As in :func:`raw_images`; one by name puts all images of ``data`` in order.
        seed: Of a selection by name.

    Raises:
        BudgetError: Not one image fits; the message gives the smallest budget that does.
        ConfigError: ``quality``, ``subsampling`` or ``selection`` is not as said above.
    """
    limit = Budget.parse(budget).num_bytes
    order = _order(data, selection, None, seed)
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
        header: What the scans share; see :func:`hmn_replay.baselines.jpeg.encode_jpeg_scans`.
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


def _order(
    data: LabelledImages, selection: str | Tensor, num_images: int | None, seed: int
) -> Tensor:
    if not isinstance(selection, Tensor):
        return select_images(data, selection, num_images=num_images, seed=seed)
    fits = selection.dtype == torch.int64 and selection.ndim == 1 and len(selection) > 0
    if not fits or not 0 <= int(selection.min()) <= int(selection.max()) < len(data):
        raise ConfigError(
            f"a selection is a name, or int64 positions (n,) in [0, {len(data)}), one or more; got "
            f"{selection.dtype} {tuple(selection.shape)}"
        )
    if len(selection.unique()) < len(selection):
        raise ConfigError("a selection has each position once; this one has some twice")
    return selection.cpu()


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
