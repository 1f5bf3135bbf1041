"""Memories as files that other programs read: pictures, arrays, and a contact sheet."""

from __future__ import annotations

import io
import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hmn_replay.errors import ConfigError, DataError
from hmn_replay.extras import import_extra
from hmn_replay.files import write_atomically

__all__ = ["contact_sheet", "contact_sheet_png", "export_images", "export_npz", "to_hf_dataset"]

# Smaller images are enlarged on a contact sheet, by a whole factor.
_SHEET_SIDE = 64
_SHEET_GAP = 2
# Half the height of a line of Pillow's own font.
_TEXT_RISE = 6
# Class names of labels from here on are not exported as arrays, which have a place for every label.
_MAX_NAMED_LABEL = 65_536


class DecodableBytes(Protocol):
    """What can be exported: a memory of any kind."""

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

    ``torchvision.datasets.ImageFolder`` and :func:`hmn_replay.load_dataset` read the folder. Both
    number classes by their sorted names; ``load_dataset`` keeps the labels where these name the
    folders, as with ``class_names={}``.

    Args:
        memory: A memory of any kind.
        folder: A folder that does not exist yet, or that is empty. Its parent must exist.
        class_names: Label to name of the class folder; a class without one is named by its label.
            Characters other than letters, digits, ``-``, ``.`` and ``_`` become ``_``; names that
            would be the same get ``_LABEL`` added. Default: the memory's own names.

    Raises:
        ConfigError: ``folder`` exists, and is not an empty folder.
        DataError: The memory holds no image.
        OSError: The folder cannot be written to.
    """
    from torchvision.transforms.functional import to_pil_image

    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"{str(folder)!r} exists already and is not an empty folder; name another one, or "
            "remove it first"
        )
    pixels, labels = _decode(memory)
    names = _folder_names(labels.unique().tolist(), _names_of(memory, class_names))
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"
    ) as temporary:
        building = Path(temporary) / "images"
        building.mkdir()
        for label, name in names.items():
            (building / name).mkdir()
            for position, image in enumerate(pixels[labels == label]):
                to_pil_image(image).save(building / name / f"{position:04d}.png")
        if folder.exists():
            folder.rmdir()
        building.rename(folder)


def export_npz(
    memory: DecodableBytes, path: str | Path, *, class_names: Mapping[int, str] | None = None
) -> None:
    """Write every image to an ``.npz`` file, all at once or not at all.

    Its arrays are ``x_train``, uint8 ``(N, H, W, C)``, ``y_train``, int64 ``(N,)``, and, where
    classes have names, ``class_names``, texts by label; :func:`hmn_replay.load_dataset` reads them
    as a training split. Names of labels below 0 or above 65,535 are left out.

    Args:
        memory: A memory of any kind.
        path: The file.
        class_names: Label to name. Default: the memory's own names.

    Raises:
        DataError: The memory holds no image.
        OSError: The file cannot be written.
    """
    pixels, labels = _decode(memory)
    arrays: dict[str, Any] = {"x_train": pixels.movedim(1, -1).numpy(), "y_train": labels.numpy()}
    names = _names_of(memory, class_names)
    named = [label for label in names if 0 <= label < _MAX_NAMED_LABEL]
    if named:
        arrays["class_names"] = np.array([names.get(n, "") for n in range(max(named) + 1)])
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_atomically(path, file.getvalue())


def to_hf_dataset(memory: DecodableBytes) -> Any:
    """Return the images as a data set of Hugging Face's ``datasets``.

    Args:
        memory: A memory of any kind.

    Returns:
        A ``datasets.Dataset`` with the columns ``image``, PNG in working memory, and ``label``: a
        ``ClassLabel`` where all classes have names and labels are 0, 1, ..., else int64.

    Raises:
        DataError: The memory holds no image.
        MissingExtraError: ``datasets`` is not installed.
    """
    from torchvision.transforms.functional import to_pil_image

    datasets = import_extra("datasets", "hub")
    pixels, labels = _decode(memory)
    names = _names_of(memory, None)
    label: Any = datasets.Value("int64")
    if sorted(names) == list(range(len(names))) == labels.unique().tolist():
        label = datasets.ClassLabel(names=[names[n] for n in range(len(names))])
    return datasets.Dataset.from_dict(
        {"image": list(map(to_pil_image, pixels)), "label": labels.tolist()},
        features=datasets.Features({"image": datasets.Image(), "label": label}),
    )


def contact_sheet(
    memory: DecodableBytes,
    path: str | Path,
    *,
    columns: int = 10,
    rows: int = 50,
    class_names: Mapping[int, str] | None = None,
) -> None:
    """Write one PNG with a row of images for each class, its name in front.

    Images of less than 64 pixels on a side are enlarged by a whole factor, each pixel to a square.

    Args:
        memory: A memory of any kind.
        path: The PNG file, written all at once or not at all.
        columns: Images of each class, 1 or more: its first ones. Default: ``10``.
        rows: Classes below each other, 1 or more; further ones follow to the right. Default:
            ``50``.
        class_names: Label to the text in front of its row; a class without one is named by its
            label. Default: the memory's own names.

    Raises:
        ConfigError: ``columns`` or ``rows`` is below 1.
        DataError: The memory holds no image.
        OSError: The file cannot be written.
    """
    png = contact_sheet_png(memory, columns=columns, rows=rows, class_names=class_names)
    write_atomically(path, png)


def contact_sheet_png(
    memory: DecodableBytes,
    *,
    columns: int = 10,
    rows: int = 50,
    class_names: Mapping[int, str] | None = None,
) -> bytes:
    """Return the bytes of the file that :func:`contact_sheet` writes; arguments as there."""
    from PIL import Image, ImageDraw
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    for option, value in {"columns": columns, "rows": rows}.items():
        if value < 1:
            raise ConfigError(f"{option} is 1 or more; got {value}")
    pixels, labels = _decode(memory)
    names = _names_of(memory, class_names)
    factor = max(1, math.ceil(_SHEET_SIDE / min(pixels.shape[2:])))
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    classes, counts = labels.unique(return_counts=True)
    columns = min(columns, int(counts.max()))
    texts = [names.get(label, str(label)) for label in classes.tolist()]
    cells = pixels.new_full((len(classes), columns, *pixels.shape[1:]), 255)
    for row, label in enumerate(classes):
        own = pixels[labels == label][:columns]
        cells[row, : len(own)] = own
    grids = [
        to_pil_image(make_grid([*block.flatten(0, 1)], columns, _SHEET_GAP, pad_value=255))
        for block in cells.split(rows)
    ]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = max(int(measure.textlength(text)) for text in texts) + 4 * _SHEET_GAP
    width = margin + grids[0].width
    sheet = Image.new("RGB", (len(grids) * width, grids[0].height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, grid in enumerate(grids):
        sheet.paste(grid, (place * width + margin, 0))
    cell_height = pixels.shape[2] + _SHEET_GAP
    for position, text in enumerate(texts):
        place, row = divmod(position, rows)
        top = _SHEET_GAP + row * cell_height + cell_height // 2 - _TEXT_RISE
        draw.text((place * width + 2 * _SHEET_GAP, top), text, fill="black")
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _decode(memory: DecodableBytes) -> tuple[Tensor, Tensor]:
    """Return images, uint8 ``(N, C, H, W)``, and labels ``(N,)``, on the CPU."""
    images, labels = memory.decode(dtype=torch.uint8)
    if not len(images):
        raise DataError("there is nothing to export: the memory holds no image")
    return images.cpu(), labels.cpu()


def _names_of(memory: DecodableBytes, class_names: Mapping[int, str] | None) -> Mapping[int, str]:
    own: Mapping[int, str] = getattr(memory, "class_names", {})
    return own if class_names is None else class_names


def _folder_names(labels: list[int], class_names: Mapping[int, str]) -> dict[int, str]:
    names = {
        label: re.sub(r"[^\w.-]", "_", class_names.get(label, "")).lstrip(".") or str(label)
        for label in labels
    }
    # Some file systems take upper and lower case for the same.
    counts = Counter(name.lower() for name in names.values())
    return {
        label: f"{name}_{label}" if counts[name.lower()] > 1 else name
        for label, name in names.items()
    }
