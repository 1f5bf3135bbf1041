"""Where labelled images come from: data sets by name, ``.npz`` arrays and folders of pictures."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch

from hmn_replay.data.images import (
    LabelledImages,
    as_labelled_images,
    check_size,
    stack_images,
)
from hmn_replay.errors import ConfigError, DataError, HMNReplayWarning
from hmn_replay.registry import suggest

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DATASETS", "Split", "dataset_name", "load_dataset"]

Split: TypeAlias = Literal["train", "test"]

TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
}

DATASETS = (*TORCHVISION, "digits")
"""The names that :func:`load_dataset` knows; ``digits`` alone needs no file."""

_DIGITS_TEST_PER_CLASS = 36
# Names of folders that hold classes, and are none, by what they are: also as a word of a longer
# name, such as seg_train.
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation"),
}


def load_dataset(
    name_or_path: str | os.PathLike[str],
    split: Split = "train",
    *,
    data_root: str | os.PathLike[str] = "data",
    download: bool = False,
    size: int | None = None,
) -> LabelledImages:
    """Load one split of a data set.

    Args:
        name_or_path: One of

            * a name of :data:`DATASETS`, in any case: ``cifar10``, ``cifar100``, ``svhn``,
              ``mnist`` and ``fashion_mnist`` are read from torchvision's files; ``digits``, 8 x 8
              pixels in grey, comes with scikit-learn (1,437 training and 360 test images, 36
              of each class, spread evenly over the writers);
            * an ``.npz`` file of arrays ``x_train``, ``y_train``, ``x_test`` and ``y_test``, each
              as :func:`~hmn_replay.data.images.as_labelled_images` takes it, read without pickle;
              optionally ``class_names``, an array of texts; the one at position k, unless empty,
              names label k;
            * a folder of pictures: ``train/CLASS/`` and ``test/CLASS/``, or Tiny-ImageNet's own
              (``val/val_annotations.txt``, whose images then are the test split), or just
              ``CLASS/``, which has no test split. ``Training/`` and ``seg_train/`` will do for
              ``train/``, and where there is no ``test/`` of these classes, ``val/`` or
              ``validation/`` for it. A class folder is searched through. Where all class folders
              are named by integers these are the labels; otherwise the positions in the sorted
              names are, and a folder of other classes numbers them anew.

            A path that is also a name is written with its folder, as ``./digits``.
        split: ``"train"`` or ``"test"``. Default: ``"train"``.
        data_root: Folder of torchvision's files. Default: ``"data"``.
        download: Fetch a missing torchvision data set into ``data_root``. Default: ``False``.
        size: Side in pixels to resize the shorter side and crop the centre to; needed where the
            pictures of a folder differ in size. Default: ``None``, as they are.

    Raises:
        DataError: There is no such data set, it is not on this machine, or it cannot be read.
        ConfigError: ``split`` or ``size`` is not as said above.

    Warns:
        HMNReplayWarning: A class folder has no picture of its own, but several folders of them, as
            where the path of a data set's parent was given.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"split must be 'train' or 'test', got {split!r}")
    check_size(size)
    if not isinstance(name_or_path, str | os.PathLike):
        raise DataError(f"expected the name or the path of a data set, got {name_or_path!r}")
    name = dataset_name(name_or_path)
    if name:
        loaded = (
            _load_digits(split)
            if name == "digits"
            else _load_torchvision(TORCHVISION[name], split, Path(data_root), download)
        )
        return as_labelled_images(loaded, size=size)
    path = Path(os.path.expanduser(name_or_path))  # an unknown user is no error of its own
    if path.is_dir():
        return _load_folder(path, split, size)
    if path.is_file():
        return _load_npz(path, split, size)
    wanted = os.fspath(name_or_path)
    raise DataError(
        f"no data set is called {wanted!r} and no file or folder is there; expected one of "
        f"{', '.join(DATASETS)}, an .npz file, or a folder of pictures"
        + suggest(wanted.lower(), list(DATASETS))
    )


def dataset_name(name_or_path: str | os.PathLike[str]) -> str:
    """Return the name in :data:`DATASETS` that a text is, however spelled; else an empty one."""
    name = name_or_path.lower().replace("-", "_") if isinstance(name_or_path, str) else ""
    return name if name in DATASETS else ""


def _load_digits(split: Split) -> LabelledImages:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    levels = torch.from_numpy(images).reshape(-1, 1, 8, 8)
    digits = LabelledImages(
        (levels * (255 / 16)).round().to(torch.uint8),
        torch.from_numpy(labels).long(),
        {digit: str(digit) for digit in range(10)},
    )
    # The file goes from writer to writer: evenly spaced test images come from all of them.
    in_test = torch.zeros(len(digits), dtype=torch.bool)
    for digit in range(10):
        positions = digits.of_class(digit)
        steps = torch.arange(_DIGITS_TEST_PER_CLASS) * len(positions) // _DIGITS_TEST_PER_CLASS
        in_test[positions[steps]] = True
    return digits.take(in_test if split == "test" else ~in_test)


def _load_torchvision(name: str, split: Split, root: Path, download: bool) -> LabelledImages:
    from torchvision import datasets

    which: dict[str, Any] = {"split": split} if name == "SVHN" else {"train": split == "train"}
    try:
        source = getattr(datasets, name)(root.expanduser(), download=download, **which)
    except Exception as error:  # downloads and parsers fail in ways that torchvision does not list
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        if download:
            raise DataError(
                f"{name} could not be fetched into {root} ({first_line}); put torchvision's files "
                "there yourself, or name their folder with --data-root (data_root=); the data set "
                "'digits' needs no file"
            ) from error
        reason = "is not" if "not found" in first_line else f"cannot be read ({first_line})"
        raise DataError(
            f"{name} {reason} in {root}; pass --download (download=True) to fetch it, or name the "
            "folder of torchvision's files with --data-root (data_root=); the data set 'digits' "
            "needs no file"
        ) from error
    labels = source.labels if name == "SVHN" else source.targets
    plain = as_labelled_images((source.data, labels))
    names = getattr(source, "classes", [str(digit) for digit in range(10)])
    return LabelledImages(plain.images, plain.labels, dict(enumerate(names)))


def _load_npz(path: Path, split: Split, size: int | None) -> LabelledImages:
    wanted = (f"x_{split}", f"y_{split}")
    if path.suffix == ".hmn":
        raise DataError(f"{path} is a memory file, not a data set: hmn_replay.load reads it")
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"{path} is not a whole .npz file of arrays x_train, y_train, x_test and y_test; write "
            "it again with numpy.savez"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            present = list(file)
            arrays = {key: file[key] for key in (*wanted, "class_names") if key in present}
    except MemoryError as error:
        raise DataError(
            f"{path} does not fit in memory ({error or 'an allocation failed'}); write fewer "
            "images, or smaller ones"
        ) from error
    except Exception as error:  # a zip file can be damaged in more ways than numpy lists
        raise DataError(
            f"{path} cannot be read ({error}); write plain arrays of numbers and texts, not "
            "pickled objects, with numpy.savez"
        ) from error
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise DataError(
            f"{path} has no {' and no '.join(missing)}: expected arrays x_train, y_train, x_test "
            f"and y_test, got {', '.join(present) or 'none'}"
        )
    names = arrays.get("class_names", np.empty(0, np.str_))
    if names.dtype.kind != "U" or names.ndim != 1:
        raise DataError(
            f"{path}: expected class_names as an array of texts, shape (K,), got {names.dtype} "
            f"{names.shape}; write it as numpy.array(list_of_str)"
        )
    try:
        plain = as_labelled_images((arrays[wanted[0]], arrays[wanted[1]]), size=size)
    except DataError as error:
        raise DataError(f"{path}, {split} split: {error}") from error
    class_names = {label: name for label, name in enumerate(names.tolist()) if name}
    return LabelledImages(plain.images, plain.labels, class_names)


def _load_folder(path: Path, split: Split, size: int | None) -> LabelledImages:
    splits = _find_splits(path)
    # A folder "training" beside classes may be a mistake; beside a "testing", it is none.
    is_split = len(splits) > 1 or (path / "train") in splits.values()
    train = splits.get("train", path) if is_split else path
    names = _class_names(train)
    if not names:
        raise DataError(
            f"{path} has no folder of pictures for each class: expected train/CLASS/ and "
            "test/CLASS/, or CLASS/"
        )
    if found := list(_find_splits(train).values()):
        raise DataError(
            f"{train} has a folder {found[0].name!r}, which is no class but a split of a data set: "
            "expected train/CLASS/ and test/CLASS/ (or val/CLASS/), or CLASS/; rename the folder"
        )
    if found := [train / name for name in names if len(_find_splits(train / name)) > 1]:
        raise DataError(f"{found[0]} is a data set, not a class of one: give its path")
    labels = _number_classes(names)
    if split == "train":
        pictures = _list_pictures(train, labels)
        _warn_of_nested(train, names, pictures)
    elif train != path:
        pictures = _list_test_pictures(path, splits, labels)
    else:
        raise DataError(
            f"{path} has no test split: expected train/CLASS/ and test/CLASS/ (or val/CLASS/) in "
            "it, got CLASS/ alone; move the test pictures to a folder of their own, or hold some "
            "out: --test-share 0.2, or load_dataset(path).split(0.2)"
        )
    return stack_images(
        lambda position: (_open_picture(pictures[position][0]), pictures[position][1]),
        len(pictures),
        size=size,
        class_names={label: name for name, label in labels.items()},
        describe=lambda position: pictures[position][0],
        remedy="pass size= (--size) to resize and crop them all",
    )


def _find_splits(folder: Path) -> dict[str, Path]:
    """Return the folders of a data set's splits, ``"train"`` first; empty where it has none."""
    exact: dict[str, Path] = {}
    longer: dict[str, Path] = {}
    names = _class_names(folder)
    for split, known in _SPLITS.items():
        for name in names:
            is_named = not {*re.split(r"[\W_]+", name.lower())}.isdisjoint(known)
            # What else a folder holds is asked last, as a class has many pictures. (Tiny-ImageNet's
            # val/ has all of them in one folder.)
            if is_named and _class_names(folder / name):
                longer.setdefault(split, folder / name)
                if name.lower() in known:
                    exact.setdefault(split, folder / name)
    # A class may be called crash_test; what is beside a seg_train is none.
    return {**longer, **exact} if "train" in longer and len(longer) > 1 else exact


def _warn_of_nested(train: Path, names: list[str], pictures: list[tuple[str, int]]) -> None:
    """Warn of class folders that have pictures in several folders of theirs, and none beside."""
    inside: dict[str, set[str]] = {name: set() for name in names}
    for path, _ in pictures:
        name, *folders = Path(path).relative_to(train).parent.parts
        inside[name].add(folders[0] if folders else "")
    nested = [name for name, folders in inside.items() if len(folders) > 1 and "" not in folders]
    if nested:
        warnings.warn(
            f"{train / nested[0]} has its pictures in {len(inside[nested[0]])} folders, which "
            "count as one class: if each is a class, give the path of the folder that holds them",
            HMNReplayWarning,
            stacklevel=4,
        )


def _class_names(folder: Path) -> list[str]:
    # Unlike Path.iterdir, this knows folders from the hundreds of pictures beside them for free.
    with os.scandir(folder) as entries:
        return sorted(
            each.name for each in entries if not each.name.startswith(".") and each.is_dir()
        )


def _number_classes(names: list[str]) -> dict[str, int]:
    """Number class folders: by their names where these are integers, else by their order."""
    if all(re.fullmatch("-?[0-9]{1,18}", name) for name in names):
        numbers = {name: int(name) for name in names}
        if len(set(numbers.values())) == len(names):
            return numbers
    return {name: position for position, name in enumerate(names)}


def _list_pictures(folder: Path, labels: dict[str, int]) -> list[tuple[str, int]]:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    extensions = (*IMG_EXTENSIONS, ".gif")

    def is_picture(path: str) -> bool:
        name = os.path.basename(path)
        return name.lower().endswith(extensions) and not name.startswith(".")

    try:
        pictures: list[tuple[str, int]] = make_dataset(
            folder, labels, is_valid_file=is_picture, allow_empty=False
        )
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: {error}; each class folder needs a picture ({', '.join(extensions)}): fill "
            "or remove it"
        ) from error
    return pictures


def _list_test_pictures(
    path: Path, splits: dict[str, Path], labels: dict[str, int]
) -> list[tuple[str, int]]:
    annotations = path / "val" / "val_annotations.txt"
    if annotations.is_file():
        return _list_annotated(annotations, labels)
    for split in ("test", "validation"):
        names = _class_names(splits[split]) if split in splits else []
        if labels.keys() & names:
            if unknown := [name for name in names if name not in labels]:
                raise DataError(
                    f"{splits[split] / unknown[0]} is of a class that train/ does not have; add it "
                    "there too"
                )
            return _list_pictures(splits[split], {name: labels[name] for name in names})
    raise DataError(
        f"{path} has no test split: expected test/CLASS/ or val/CLASS/ with the classes of train/"
    )


def _list_annotated(annotations: Path, labels: dict[str, int]) -> list[tuple[str, int]]:
    """Read Tiny-ImageNet's list: a picture's name, a tab, its class, then what we leave."""
    pictures = []
    for number, line in enumerate(annotations.read_text("utf-8", "replace").splitlines(), 1):
        name, class_name = [*line.split("\t"), "", ""][:2]
        if class_name not in labels:
            raise DataError(
                f"{annotations}, line {number}: expected a picture, a tab and a class of train/, "
                f"got {line[:60]!r}"
            )
        pictures.append((str(annotations.parent / "images" / name), labels[class_name]))
    return pictures


def _open_picture(path: str) -> Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)  # a camera's photographs stand upright
    except (OSError, ValueError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be read as a picture ({error}); repair or remove it"
        ) from error
