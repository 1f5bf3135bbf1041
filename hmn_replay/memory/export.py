"""Memories as files that other programs read: pictures, arrays, and a contact sheet."""

from __future__ import annotations

import io
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hmn_replay.errors import ConfigError, DataError
from hmn_replay.extras import import_extra
from hmn_replay.files import write_atomically
from hmn_replay.registry import check_name

if TYPE_CHECKING:
    from hmn_replay.memory.base import Memory

__all__ = [
    "DD_RANKING",
    "contact_sheet",
    "contact_sheet_png",
    "export_dd_ranking",
    "export_images",
    "export_npz",
    "to_hf_dataset",
]

# Smaller images are enlarged on a contact sheet, by a whole factor.
_SHEET_SIDE = 64
_SHEET_GAP = 2
# Of a class name on a sheet.
_TEXT_LETTERS = 40
# Of a class name in the name of a folder, as UTF-8; file systems take 255.
_FOLDER_BYTES = 100
# Half the height of a line of Pillow's own font.
_TEXT_RISE = 6
# Class names of labels from here on are not exported as arrays, which have a place for every label.
_MAX_NAMED_LABEL = 65_536


_CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DD_RANKING: dict[str, tuple[tuple[int, int, int], int, tuple[Sequence[float], Sequence[float]]]] = {
    "CIFAR10": ((3, 32, 32), 10, _CIFAR),
    "CIFAR100": ((3, 32, 32), 100, _CIFAR),
    "TinyImageNet": ((3, 64, 64), 200, _IMAGENET),
    "ImageNette": ((3, 128, 128), 10, _IMAGENET),
    "ImageWoof": ((3, 128, 128), 10, _IMAGENET),
    "ImageMeow": ((3, 128, 128), 10, _IMAGENET),
    "ImageSquawk": ((3, 128, 128), 10, _IMAGENET),
    "ImageFruit": ((3, 128, 128), 10, _IMAGENET),
    "ImageYellow": ((3, 128, 128), 10, _IMAGENET),
    "ImageNet1K": ((3, 224, 224), 1000, _IMAGENET),
}
"""DD-Ranking's data sets: usual image shape, number of classes, and the mean and deviation that it
normalises by. It knows no others."""

# Its own, for CIFAR-10 and data condensed without soft labels.
_DD_RANKING_CONFIG = """\
dataset: {dataset}
real_data_path: ./dataset/
ipc: {ipc}
im_size: {side}
model_name: ConvNet-3
use_torchvision: false
data_aug_func: dsa
aug_params:
  flip: 0.5
  rotate: 15.0
  saturation: 2.0
  brightness: 1.0
  contrast: 0.5
  scale: 1.2
  crop: 0.125
  cutout: 0.5
use_zca: false
custom_train_trans: null
custom_val_trans: null
optimizer: sgd
lr_scheduler: step
step_size: 500
weight_decay: 0.0005
momentum: 0.9
num_eval: 5
num_epochs: 1000
syn_batch_size: 256
real_batch_size: 256
num_workers: 4
device: cuda
dist: false
eval_full_data: true
random_data_format: tensor
random_data_path: ./random_data
save_path: ./hard_label_scores.csv
"""


def export_images(
    memory: Memory,
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
            Characters other than letters, digits, ``-``, ``.`` and ``_`` become ``_``, and names
            are cut to 100 bytes; those that would be the same get ``_LABEL`` added, until none are.
            Default: the memory's own names.

    Raises:
        ConfigError: ``folder`` exists, and is not an empty folder.
        DataError: The memory holds no image.
        OSError: The folder cannot be written to.
    """
    from torchvision.transforms.functional import to_pil_image

    folder = Path(folder)
    check_new_folder(folder)
    pixels, labels = _decode(memory)
    names = _folder_names(
        labels.unique().tolist(), memory.class_names if class_names is None else class_names
    )
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


def check_new_folder(folder: Path) -> None:
    """Raise a ConfigError for what is there already and is not an empty folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"{str(folder)!r} exists already and is not an empty folder; name another one, or "
            "remove it first"
        )


def export_npz(
    memory: Memory, path: str | Path, *, class_names: Mapping[int, str] | None = None
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
    names = memory.class_names if class_names is None else class_names
    named = [label for label in names if 0 <= label < _MAX_NAMED_LABEL]
    if named:
        arrays["class_names"] = np.array([names.get(n, "") for n in range(max(named) + 1)])
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_atomically(path, file.getvalue())


def export_dd_ranking(memory: Memory, folder: str | Path, *, dataset: str | None = None) -> None:
    """Write what DD-Ranking's evaluator reads: images, hard labels and settings.

    ``images.pt`` is float32 ``(N, C, H, W)``, class by class, normalised as DD-Ranking normalises
    its test images, ``hard_labels.pt`` int64 ``(N,)``, and ``config.yaml`` the settings of its
    hard-label score:

        evaluator = LabelRobustScoreHard(Config.from_file("FOLDER/config.yaml"))
        images, labels = (torch.load(f"FOLDER/{name}.pt") for name in ("images", "hard_labels"))
        evaluator.compute_metrics(image_tensor=images, hard_labels=labels, syn_lr=0.01)

    Its ``ipc`` is how many images each class has on average, rounded: that many random real images
    of each class are what it compares with.

    Args:
        memory: A memory of any kind.
        folder: A folder that is made where it is absent. Its parent must exist.
        dataset: The real images: a name in :data:`DD_RANKING`. Default: the first whose image shape
            and number of classes are the memory's.

    Raises:
        ConfigError: No such data set, or images or labels that are not its own.
        DataError: The memory holds no image.
        OSError: The folder cannot be written to.
    """
    pixels, labels = _decode(memory)
    shape, num_classes = tuple(pixels.shape[1:]), len(labels.unique())
    if dataset is None:
        fitting = [name for name, own in DD_RANKING.items() if own[:2] == (shape, num_classes)]
        if not fitting:
            usable = [name for name, own in DD_RANKING.items() if own[0][0] == shape[0]]
            raise ConfigError(
                f"DD-Ranking knows no data set of {num_classes} classes of images of {shape}; "
                + (f"name one of {', '.join(usable)}" if usable else "all of its have 3 channels")
            )
        dataset = fitting[0]
    check_name("data set of DD-Ranking", dataset, DD_RANKING)
    wanted, most, (mean, std) = DD_RANKING[dataset]
    if shape[0] != wanted[0] or not 0 <= int(labels.min()) <= int(labels.max()) < most:
        raise ConfigError(
            f"{dataset} has images of {wanted[0]} channels with labels from 0 to {most - 1}; got "
            f"{shape} with labels from {int(labels.min())} to {int(labels.max())}"
        )
    order = labels.argsort(stable=True)
    constants = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    images = pixels[order].float().div_(255).sub_(next(constants)).div_(next(constants))
    settings = _DD_RANKING_CONFIG.format(
        dataset=dataset, ipc=max(1, round(len(labels) / num_classes)), side=list(shape[1:])
    )
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    for name, tensor in {"images": images, "hard_labels": labels[order]}.items():
        write_atomically(folder / f"{name}.pt", partial(torch.save, tensor))
    write_atomically(folder / "config.yaml", settings.encode())


def to_hf_dataset(memory: Memory) -> Any:
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
    names = memory.class_names
    label: Any = datasets.Value("int64")
    if sorted(names) == list(range(len(names))) == labels.unique().tolist():
        label = datasets.ClassLabel(names=[names[n] for n in range(len(names))])
    return datasets.Dataset.from_dict(
        {"image": list(map(to_pil_image, pixels)), "label": labels.tolist()},
        features=datasets.Features({"image": datasets.Image(), "label": label}),
    )


def contact_sheet(
    memory: Memory,
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
        ConfigError: ``columns`` or ``rows`` is below 1, or ``path`` does not end in ``.png``.
        DataError: The memory holds no image.
        OSError: The file cannot be written.
    """
    check_sheet_name(path)
    png = contact_sheet_png(memory, columns=columns, rows=rows, class_names=class_names)
    write_atomically(path, png)


def check_sheet_name(path: str | Path) -> None:
    """Raise a ConfigError for a contact sheet that is no ``.png`` file."""
    if Path(path).suffix.lower() != ".png":
        raise ConfigError(f"a contact sheet is a .png file; got {os.fspath(path)!r}")


def contact_sheet_png(
    memory: Memory,
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
    names = memory.class_names if class_names is None else class_names
    classes, counts = labels.unique(return_counts=True)
    columns = min(columns, int(counts.max()))
    texts = [_shortened(names.get(label, str(label))) for label in classes.tolist()]
    cells = pixels.new_full((len(classes), columns, *pixels.shape[1:]), 255)
    for row, label in enumerate(classes):
        own = pixels[(labels == label).nonzero().flatten()[:columns]]
        cells[row, : len(own)] = own
    factor = max(1, math.ceil(_SHEET_SIDE / min(pixels.shape[2:])))
    cells = cells.repeat_interleave(factor, 3).repeat_interleave(factor, 4)
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
    cell_height = cells.shape[3] + _SHEET_GAP
    for position, text in enumerate(texts):
        place, row = divmod(position, rows)
        top = _SHEET_GAP + row * cell_height + cell_height // 2 - _TEXT_RISE
        draw.text((place * width + 2 * _SHEET_GAP, top), text, fill="black")
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _decode(memory: Memory) -> tuple[Tensor, Tensor]:
    """Return images, uint8 ``(N, C, H, W)``, and labels ``(N,)``, on the CPU."""
    images, labels = memory.decode(dtype=torch.uint8)
    if not len(images):
        raise DataError("there is nothing to export: the memory holds no image")
    return images.cpu(), labels.cpu()


def _shortened(name: str) -> str:
    """Return a class name on one line of a picture."""
    text = " ".join(name.split())
    return text if len(text) <= _TEXT_LETTERS else f"{text[: _TEXT_LETTERS - 3]}..."


def _folder_name(name: str) -> str:
    """Return a class name as that of a folder, cut where it is long."""
    start = re.sub(r"[^\w.-]", "_", name).encode()[:_FOLDER_BYTES]
    return start.decode(errors="ignore").lstrip(".")


def _folder_names(labels: list[int], class_names: Mapping[int, str]) -> dict[int, str]:
    names = {label: _folder_name(class_names.get(label, "")) or str(label) for label in labels}
    # Some file systems take upper and lower case for the same. A name that was added to may be that
    # of a third class; two that were both added to never are the same.
    while len(counts := Counter(name.lower() for name in names.values())) < len(names):
        names = {
            label: f"{name}_{label}" if counts[name.lower()] > 1 else name
            for label, name in names.items()
        }
    return names
