"""Memories as files that other programs read: pictures, arrays, and a sheet to look at."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hmn_replay.errors import ConfigError, DataError
from hmn_replay.files import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DecodableBytes", "contact_sheet", "export_images", "export_npz"]

# Smaller images are enlarged on a contact sheet, by a whole factor.
_SHEET_SIDE = 64
_SHEET_GAP = 2
# Half the height of a line of Pillow's own font.
_TEXT_RISE = 6


class DecodableBytes(Protocol):
    """What can be exported: a memory, or :class:`hmn_replay.baselines.real_images.RealImages`."""

    def decode(self, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return images ``(N, C, H, W)`` of ``dtype``, and int64 labels ``(N,)``."""
        ...


def export_images(
    memory: DecodableBytes,
    folder: str | Path,
    *,
    class_names: Mapping[int, str] | None = None,
) -> None:
    """Write every image as ``folder/CLASS/0000.png`` and so on, all of them or none.

    :func:`hmn_replay.load_dataset` reads the folder again, with the same labels where the class
    folders are named by these.

    Args:
        memory: What to export.
        folder: A folder that does not exist yet, or that is empty. Its parent must exist.
        class_names: Label to name of the class folder; characters other than letters, digits,
            ``-``, ``.`` and ``_`` become ``_``. Default: the labels themselves name the folders.

    Raises:
        ConfigError: ``folder`` is there already, and is not an empty folder; or two classes would
            share a folder.
        DataError: The memory holds no image.
        OSError: The folder cannot be written to.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"{str(folder)!r} exists already and is not an empty folder; name another one, or "
            "remove it first"
        )
    pixels, labels = _decode(memory)
    names = _folder_names(np.unique(labels).tolist(), class_names or {})
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"
    ) as temporary:
        building = Path(temporary) / "images"
        building.mkdir()
        for label, name in names.items():
            (building / name).mkdir()
            for position, image in enumerate(pixels[labels == label]):
                _to_picture(image).save(building / name / f"{position:04d}.png")
        if folder.exists():
            folder.rmdir()
        building.rename(folder)


def export_npz(memory: DecodableBytes, path: str | Path) -> None:
    """Write every image to an ``.npz`` file, all at once or not at all.

    Its arrays are ``x_train``, uint8 ``(N, H, W, C)``, and ``y_train``, int64 ``(N,)``:
    :func:`hmn_replay.load_dataset` reads them as a training split.

    Raises:
        DataError: The memory holds no image.
        OSError: The file cannot be written.
    """
    pixels, labels = _decode(memory)
    file = io.BytesIO()
    np.savez_compressed(file, x_train=pixels, y_train=labels)
    write_atomically(path, file.getvalue())


def contact_sheet(
    memory: DecodableBytes,
    path: str | Path,
    *,
    columns: int = 10,
    max_classes: int = 50,
    class_names: Mapping[int, str] | None = None,
) -> None:
    """Write one PNG with a row of images for each class, its label in front.

    Images of less than 64 pixels a side are enlarged by a whole factor, each pixel to a square.

    Args:
        memory: What to show.
        path: The PNG file, written all at once or not at all.
        columns: Images of each class, 1 or more: its first ones.
        max_classes: Rows, 1 or more; of more classes the first ones, by label, are shown.
        class_names: Label to the text in front of its row. Default: the labels.

    Raises:
        ConfigError: ``columns`` or ``max_classes`` is below 1.
        DataError: The memory holds no image.
        OSError: The file cannot be written.
    """
    from PIL import Image, ImageDraw

    for option, value in {"columns": columns, "max_classes": max_classes}.items():
        if value < 1:
            raise ConfigError(f"{option} is 1 or more; got {value}")
    pixels, labels = _decode(memory)
    classes = np.unique(labels)[:max_classes].tolist()
    texts = {label: (class_names or {}).get(label, str(label)) for label in classes}
    height, width = pixels.shape[1:3]
    factor = max(1, -(-_SHEET_SIDE // min(height, width)))
    cell = height * factor + _SHEET_GAP, width * factor + _SHEET_GAP
    used = min(columns, max(int((labels == label).sum()) for label in classes))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = max(int(measure.textlength(text)) for text in texts.values()) + 4 * _SHEET_GAP
    size = (margin + used * cell[1], _SHEET_GAP + len(classes) * cell[0])
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(classes):
        top = _SHEET_GAP + row * cell[0]
        draw.text((2 * _SHEET_GAP, top + cell[0] // 2 - _TEXT_RISE), texts[label], fill="black")
        for column, image in enumerate(pixels[labels == label][:columns]):
            enlarged = image.repeat(factor, axis=0).repeat(factor, axis=1)
            sheet.paste(_to_picture(enlarged), (margin + column * cell[1], top))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    write_atomically(path, file.getvalue())


def _decode(memory: DecodableBytes) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return images ``(N, H, W, C)`` and labels ``(N,)``."""
    images, labels = memory.decode(dtype=torch.uint8)
    if not len(images):
        raise DataError("there is nothing to export: the memory holds no image")
    return images.movedim(1, -1).contiguous().cpu().numpy(), labels.cpu().numpy()


def _folder_names(labels: list[int], class_names: Mapping[int, str]) -> dict[int, str]:
    names = {
        label: re.sub(r"[^\w.-]", "_", class_names.get(label, str(label))).lstrip(".")
        for label in labels
    }
    # Some file systems take upper and lower case for the same.
    if "" in names.values() or len({name.lower() for name in names.values()}) < len(names):
        raise ConfigError(
            f"two classes would share a folder, or one would have no name: {names}; give each "
            "class a name of its own, or leave the names away"
        )
    return names


def _to_picture(image: npt.NDArray[np.uint8]) -> Image:
    from PIL.Image import fromarray

    return fromarray(image[..., 0] if image.shape[-1] == 1 else image)
