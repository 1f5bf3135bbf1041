"""Equal-bytes baselines: real images, drawn at random or chosen, in as many bytes as a memory.

What is compared is a real file, its header and labels counted, filled with as many images as fit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hmn_replay.baselines.selection import select_images
from hmn_replay.budget import Budget
from hmn_replay.data.images import LabelledImages
from hmn_replay.memory.jpeg import SUBSAMPLINGS
from hmn_replay.memory.real import (
    AnyReal,
    JPEGMemory,
    LosslessMemory,
    RawMemory,
    check_order,
)

__all__ = ["jpeg_images", "lossless_images", "raw_images"]


def raw_images(
    data: LabelledImages,
    budget: Budget | int | str,
    *,
    selection: str | Tensor = "random",
    seed: int = 0,
) -> RawMemory:
    """Take real images, as many as fit a budget as uint8 pixels.

    Args:
        data: Where to take them from, each once. With a selection by name, the numbers of images of
            two classes differ by one at most, the first classes having more, but for a class that
            has no more to give.
        budget: Bytes of the file, header and labels counted.
        selection: One of :data:`hmn_replay.baselines.selection.SELECTIONS`; or the order in which
            images are taken while they fit, int64 positions in ``data``, such as those that
            :func:`hmn_replay.baselines.selection.select_images` gives with options of your own.
        seed: Of a selection by name. A larger budget adds images to those of a smaller one.

    Raises:
        BudgetError: Not one image fits; the message gives the smallest budget that does.
        ConfigError: The selection is not as said above.
    """
    most = max(1, Budget.parse(budget).num_bytes // data.images[0].numel())
    return _fill(RawMemory, data, budget, _order(data, selection, most, seed))


def jpeg_images(
    data: LabelledImages,
    budget: Budget | int | str,
    *,
    quality: int,
    subsampling: str | None = None,
    selection: str | Tensor = "random",
    seed: int = 0,
) -> JPEGMemory:
    """Take real images, as many as fit a budget as JPEG under one header.

    Args:
        data: As in :func:`raw_images`, which takes the same images in the same order.
        budget: Bytes of the file, header and labels counted.
        quality: libjpeg's, 1 to 100.
        subsampling: One of :data:`hmn_replay.memory.jpeg.SUBSAMPLINGS`; not used for grey images.
            Default: the one with which more images fit.
        selection: As in :func:`raw_images`; one by name puts all images of ``data`` in order.
        seed: Of a selection by name.

    Raises:
        BudgetError: Not one image fits; the message gives the smallest budget that does.
        ConfigError: ``quality``, ``subsampling`` or ``selection`` is not as said above.
    """
    order = _order(data, selection, None, seed)
    subsamplings = SUBSAMPLINGS if data.image_shape[0] == 3 else SUBSAMPLINGS[:1]
    if subsampling is not None:
        subsamplings = (subsampling,)
    candidates = [
        _fill(JPEGMemory, data, budget, order, quality=quality, subsampling=name)
        for name in subsamplings
    ]
    return max(candidates, key=len)


def lossless_images(
    data: LabelledImages,
    budget: Budget | int | str,
    *,
    selection: str | Tensor = "random",
    seed: int = 0,
) -> LosslessMemory:
    """Take real images, as many as fit a budget as lossless WebP.

    Args:
        data: As in :func:`raw_images`, which takes the same images in the same order.
        budget: Bytes of the file, header and labels counted.
        selection: As in :func:`raw_images`; one by name puts all images of ``data`` in order.
        seed: Of a selection by name.

    Raises:
        BudgetError: Not one image fits; the message gives the smallest budget that does.
        ConfigError: ``selection`` is not as said above.
    """
    return _fill(LosslessMemory, data, budget, _order(data, selection, None, seed))


def _fill(
    memory_type: type[AnyReal],
    data: LabelledImages,
    budget: Budget | int | str,
    order: Tensor,
    **options: Any,
) -> AnyReal:
    memory = memory_type(data.image_shape, budget=budget, **options)
    memory.extend(data, order=order)
    return memory


def _order(
    data: LabelledImages, selection: str | Tensor, num_images: int | None, seed: int
) -> Tensor:
    if isinstance(selection, Tensor):
        return check_order(selection, len(data))
    return select_images(data, selection, num_images=num_images, seed=seed)
