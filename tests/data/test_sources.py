"""Data sets by name, .npz arrays and folders of pictures, on small files in the real formats."""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from hmn_replay.data.sources import DATASETS, load_dataset
from hmn_replay.errors import ConfigError, DataError, HMNReplayWarning

Pixels = npt.NDArray[np.uint8]


def some_pixels(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save_picture(path: Path, pixels: Pixels | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(some_pixels(4, 4, 3) if pixels is None else pixels).save(path)
    return path


def save_arrays(path: Path, **arrays: Any) -> Path:
    whole = {
        "x_train": some_pixels(6, 8, 8, 3, seed=1),
        "y_train": np.array([7, -3, 1000] * 2),
        "x_test": some_pixels(3, 8, 8, 3, seed=2),
        "y_test": np.array([1000, 7, -3]),
    }
    np.savez(path, **{**whole, **arrays})
    return path


# --- torchvision's data sets


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Any]) -> dict[str, Any]:
    """Write small batches of CIFAR, and have torchvision expect their checksums."""

    def dump(name: str, content: dict[str, Any]) -> list[str]:
        path = root / kind.base_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content, protocol=2))
        return [name, hashlib.md5(path.read_bytes()).hexdigest()]

    key = "fine_labels" if kind is datasets.CIFAR100 else "labels"
    names = [f"class {label}" for label in range(3)]
    written: dict[str, Any] = {}
    for which, attribute in (("train", "train_list"), ("test", "test_list")):
        files, pixels = [], []
        labels: list[int] = []
        for seed, (name, _) in enumerate(getattr(kind, attribute)):
            pixels.append(some_pixels(3, 3072, seed=seed))
            labels += [(seed + row) % 3 for row in range(3)]
            files.append(dump(name, {"data": pixels[-1], key: labels[-3:]}))
        monkeypatch.setattr(kind, attribute, files)
        written[which] = np.concatenate(pixels).reshape(-1, 3, 32, 32), labels
    name, checksum = dump(kind.meta["filename"], {kind.meta["key"]: names})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": checksum})
    return written


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_batches(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_cifar(tmp_path, monkeypatch, getattr(datasets, name.upper()))
    for split in ("train", "test"):
        data = load_dataset(name.upper(), split, data_root=tmp_path)
        pixels, labels = written[split]
        np.testing.assert_array_equal(data.images, pixels)
        assert data.labels.tolist() == labels
        assert data.class_names == {0: "class 0", 1: "class 1", 2: "class 2"}
    assert load_dataset(name, data_root=tmp_path, size=16).image_shape == (3, 16, 16)


def test_a_damaged_cifar_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, datasets.CIFAR10)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"CIFAR10 is not in .*pass --download"):
        load_dataset("cifar10", data_root=tmp_path)


def write_idx(path: Path, values: Pixels) -> None:
    """Write an array in the format of the MNIST files: a magic number, big-endian sizes, bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = [0, 0, 8, values.ndim] + [byte for n in values.shape for byte in n.to_bytes(4, "big")]
    path.write_bytes(bytes(header) + values.tobytes())


@pytest.mark.parametrize(
    ("name", "folder", "first"),
    [("mnist", "MNIST", "0 - zero"), ("fashion-mnist", "FashionMNIST", "T-shirt/top")],
)
def test_mnist_is_read_from_its_idx_files(
    name: str, folder: str, first: str, tmp_path: Path
) -> None:
    raw = tmp_path / folder / "raw"
    for prefix, count in (("train", 5), ("t10k", 3)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", some_pixels(count, 28, 28, seed=count))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8))
    for split, count in (("train", 5), ("test", 3)):
        data = load_dataset(name, split, data_root=tmp_path)  # type: ignore[arg-type]
        np.testing.assert_array_equal(data.images[:, 0], some_pixels(count, 28, 28, seed=count))
        assert data.labels.tolist() == list(range(count))
        assert data.class_names[0] == first
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"MNIST cannot be read \(.+\) in .*--download"):
        load_dataset(name, data_root=tmp_path)


def test_svhn_is_read_from_its_mat_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {}
    for split, count in (("train", 5), ("test", 3)):
        path = tmp_path / f"{split}_32x32.mat"
        pixels = some_pixels(count, 3, 32, 32, seed=count)
        labels = np.arange(10, 10 - count, -1, dtype=np.uint8)[:, None]
        savemat(path, {"X": pixels.transpose(2, 3, 1, 0), "y": labels})
        entries[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", entries)
    for split, labels_read in (("train", [0, 9, 8, 7, 6]), ("test", [0, 9, 8])):
        data = load_dataset("svhn", split, data_root=tmp_path)  # type: ignore[arg-type]
        pixels = some_pixels(len(labels_read), 3, 32, 32, seed=len(labels_read))
        np.testing.assert_array_equal(data.images, pixels)
        assert data.labels.tolist() == labels_read
        assert data.class_names[9] == "9"


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_an_absent_data_set_says_how_to_go_on(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        load_dataset(name, data_root=tmp_path)
    for hint in ("is not in", str(tmp_path), "--download", "--data-root", "'digits'"):
        assert hint in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_failed_download_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(DataError, match=r"not be fetched .*\(no route to host\).*--data-root"):
        load_dataset("cifar10", data_root=tmp_path, download=True)


# --- digits


def test_digits_are_split_once_and_for_all() -> None:
    train, test = load_dataset("digits"), load_dataset("Digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert test.labels.bincount().tolist() == [36] * 10
    assert train.num_classes == 10
    assert train.image_shape == test.image_shape == (1, 8, 8)
    assert (int(train.images.min()), int(train.images.max())) == (0, 255)
    assert train.class_names[3] == "3"
    assert load_dataset("digits", "test").images.equal(test.images)


def test_digits_are_all_there() -> None:
    from sklearn.datasets import load_digits

    whole = np.sort(load_digits().data.sum(axis=1))
    parts = torch.cat([load_dataset("digits", split).images for split in ("train", "test")])
    levels = (parts.double() * 16 / 255).round().sum(dim=(1, 2, 3))
    np.testing.assert_array_equal(levels.sort().values, whole)


# --- .npz


def test_arrays_are_read(tmp_path: Path) -> None:
    path = save_arrays(tmp_path / "some.npz")
    train, test = load_dataset(path), load_dataset(str(path), "test")
    np.testing.assert_array_equal(
        train.images, some_pixels(6, 8, 8, 3, seed=1).transpose(0, 3, 1, 2)
    )
    assert train.labels.tolist() == [7, -3, 1000] * 2
    assert test.labels.tolist() == [1000, 7, -3]
    assert test.class_names == {}
    assert load_dataset(path, size=4).image_shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("images", "shape"),
    [
        (some_pixels(6, 3, 8, 8), (3, 8, 8)),
        (some_pixels(6, 8, 8), (1, 8, 8)),
        (some_pixels(6, 8, 8, 1), (1, 8, 8)),
        (some_pixels(6, 8, 8) / 255, (1, 8, 8)),
    ],
)
def test_arrays_of_other_layouts_are_read(
    images: npt.NDArray[Any], shape: tuple[int, int, int], tmp_path: Path
) -> None:
    assert load_dataset(save_arrays(tmp_path / "a.npz", x_train=images)).image_shape == shape


def test_arrays_may_have_names_and_lack_the_other_split(tmp_path: Path) -> None:
    path = tmp_path / "some.npz"
    np.savez(path, x_test=some_pixels(2, 8, 8), y_test=[0, 2], class_names=["cat", "", "dog"])
    assert load_dataset(path, "test").class_names == {0: "cat", 2: "dog"}
    with pytest.raises(
        DataError, match=r"no x_train and no y_train: .* got x_test, y_test, class_names"
    ):
        load_dataset(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_train": np.zeros(5, int)}, "some.npz, train split: .* 6 images and 5 labels"),
        ({"y_train": np.eye(6)}, "multi-label"),
        ({"y_train": np.zeros(6)}, "expected integers as labels, got float64"),
        ({"x_train": np.zeros((6, 64), np.uint8)}, r"each image of shape .* got \(64,\)"),
        ({"x_train": np.zeros((6, 8, 8), np.int32)}, "uint8, or as floats"),
        ({"x_train": np.full((6, 8, 8), np.nan)}, "NaN or infinity"),
        ({"x_train": np.full((6, 8, 8), -1.0)}, "undo your normalisation"),
        ({"x_train": np.zeros((0, 8, 8)), "y_train": []}, "empty data set"),
        ({"x_train": np.full(6, None)}, "cannot be read .* not pickled objects"),
        ({"class_names": np.array(["a", None])}, "cannot be read .* not pickled objects"),
        ({"class_names": np.arange(3)}, "expected class_names as an array of texts"),
        ({"class_names": np.array("cat")}, r"expected class_names .* got <U3 \(\)"),
    ],
)
def test_arrays_of_anything_else_are_refused(
    arrays: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = save_arrays(tmp_path / "some.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_dataset(path)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def garble(content: bytes) -> bytes:
    return content[:300] + bytes(64) + content[364:]


@pytest.mark.parametrize("damage", [cut, garble, lambda _: b"", lambda _: b"PK\x03\x04"])
def test_a_damaged_file_of_arrays_is_refused(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = save_arrays(tmp_path / "some.npz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"some.npz (is not a whole|cannot be read)"):
        load_dataset(path)


@pytest.mark.parametrize("num_images", [10**7, 10**13])
def test_a_file_that_claims_more_than_it_holds_is_refused(num_images: int, tmp_path: Path) -> None:
    path = tmp_path / "some.npz"
    header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, 64, 64)}
    with zipfile.ZipFile(path, "w") as archive, archive.open("x_train.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, header)
        member.write(bytes(64))
    with pytest.raises(DataError, match=r"some.npz (cannot be read|does not fit in memory) \("):
        load_dataset(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a whole \.npz file"):
        load_dataset(save_picture(tmp_path / "cat.png"))
    np.save(tmp_path / "one.npy", some_pixels(2, 8, 8))
    with pytest.raises(DataError, match=r"is not a whole \.npz file"):
        load_dataset(tmp_path / "one.npy")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("x_train", "text")
    with pytest.raises(DataError, match="no y_train"):
        load_dataset(tmp_path / "other.zip")


# --- folders of pictures


def test_a_folder_with_a_test_split_is_read(tmp_path: Path) -> None:
    cat, dog = some_pixels(4, 4, 3, seed=1), some_pixels(4, 4, 3, seed=2)
    for held_out in ("test", "val"):
        folder = tmp_path / held_out
        save_picture(folder / "train/dog/b.png", dog)
        save_picture(folder / "train/cat/deeper/a.PNG", cat)
        save_picture(folder / "train/cat/c.bmp", dog)
        save_picture(folder / f"{held_out}/dog/d.png", cat)
        (folder / "train/cat/notes.txt").write_text("no picture")
        (folder / "train/cat/._c.png").write_bytes(b"left by a file manager")
        (folder / "train/.cache").mkdir()
        train, test = load_dataset(folder), load_dataset(folder, "test")
        assert train.labels.tolist() == [0, 0, 1]
        assert train.class_names == test.class_names == {0: "cat", 1: "dog"}
        np.testing.assert_array_equal(train.images.permute(0, 2, 3, 1), [dog, cat, dog])
        assert test.labels.tolist() == [1]
        np.testing.assert_array_equal(test.images[0].permute(1, 2, 0), cat)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("Train", "Test"), ("train", "validation"), ("seg_train", "seg_test"), ("training", "val-2")],
)
def test_splits_have_many_names(train: str, held_out: str, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save_picture(tmp_path / train / name / "a.png")
        save_picture(tmp_path / held_out / name / "a.png")
    (tmp_path / "test_results").mkdir()  # holds no classes
    for split in ("train", "test"):
        data = load_dataset(tmp_path, split)
        assert data.class_names == {0: "cat", 1: "dog"} and len(data) == 2
    with pytest.raises(DataError, match="is a data set, not a class of one: give its path"):
        load_dataset(tmp_path.parent)


def test_a_validation_split_is_not_taken_for_a_test_split_that_is_there(tmp_path: Path) -> None:
    save_picture(tmp_path / "train/cat/a.png")
    for number, name in enumerate(("valid", "test")):
        for index in range(number + 1):
            save_picture(tmp_path / name / f"cat/{index}.png")
    assert len(load_dataset(tmp_path, "test")) == 2


def test_a_class_of_several_folders_may_be_a_mistake(tmp_path: Path) -> None:
    save_picture(tmp_path / "pets/cat/a.png")
    assert load_dataset(tmp_path).class_names == {0: "pets"}
    save_picture(tmp_path / "pets/dog/a.png")
    with pytest.warns(HMNReplayWarning, match="pets has its pictures in 2 folders, which count as"):
        assert load_dataset(tmp_path).class_names == {0: "pets"}


def test_a_folder_of_classes_alone_has_no_test_split(tmp_path: Path) -> None:
    save_picture(tmp_path / "cat/a.png")
    save_picture(tmp_path / "train/a.png")
    assert load_dataset(tmp_path).class_names == {0: "cat", 1: "train"}
    with pytest.raises(DataError, match=r"has no test split: .* got CLASS/ alone"):
        load_dataset(tmp_path, "test")


@pytest.mark.parametrize("folder", ["training/cat", "test/cat", "Val/cat"])
def test_a_split_is_no_class(folder: str, tmp_path: Path) -> None:
    save_picture(tmp_path / "dog/a.png")
    save_picture(tmp_path / folder / "a.png")
    with pytest.raises(DataError, match=f"folder '{folder[:-4]}', which is no class but a split"):
        load_dataset(tmp_path)


def test_a_data_set_is_no_class_of_another(tmp_path: Path) -> None:
    save_picture(tmp_path / "pets/train/cat/a.png")
    assert load_dataset(tmp_path).class_names == {0: "pets"}
    save_picture(tmp_path / "pets/test/cat/a.png")
    with pytest.raises(DataError, match="pets is a data set, not a class of one: give its path"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["-3", "7", "1000"], [-3, 7, 1000]),
        (["000", "001", "010"], [0, 1, 10]),
        (["7", "07", "8"], [0, 1, 2]),
        (["7", "8", "cat"], [0, 1, 2]),
        (["7", "8", "9" * 30], [0, 1, 2]),
    ],
)
def test_class_folders_named_by_integers_are_labels(
    names: list[str], labels: list[int], tmp_path: Path
) -> None:
    for name in names:
        save_picture(tmp_path / name / "a.png")
    data = load_dataset(tmp_path)
    assert data.classes.tolist() == labels
    assert sorted(data.class_names.values()) == sorted(names)


def test_tiny_imagenet_is_read(tmp_path: Path) -> None:
    pixels = {name: some_pixels(6, 6, 3, seed=seed) for seed, name in enumerate("abcd")}
    save_picture(tmp_path / "train/n02/images/n02_0.png", pixels["a"])
    save_picture(tmp_path / "train/n01/images/n01_0.png", pixels["b"])
    (tmp_path / "train/n01/n01_boxes.txt").write_text("n01_0.png\t0\t0\t6\t6\n")
    save_picture(tmp_path / "val/images/val_0.png", pixels["c"])
    save_picture(tmp_path / "val/images/val_1.png", pixels["d"])
    save_picture(tmp_path / "test/images/test_0.png")
    annotations = tmp_path / "val/val_annotations.txt"
    annotations.write_text("val_0.png\tn02\t0\t0\t6\t6\nval_1.png\tn01\t0\t0\t6\t6\n")
    train, test = load_dataset(tmp_path), load_dataset(tmp_path, "test")
    assert train.class_names == test.class_names == {0: "n01", 1: "n02"}
    assert train.labels.tolist() == [0, 1]
    assert test.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(test.images.permute(0, 2, 3, 1), [pixels["c"], pixels["d"]])

    annotations.write_text("val_0.png\tn02\nval_1.png n01\n")
    with pytest.raises(DataError, match="line 2: expected a picture, a tab and a class of train/"):
        load_dataset(tmp_path, "test")
    annotations.write_text("val_0.png\tn02\nval_9.png\tn01\n")
    with pytest.raises(DataError, match=r"val_9\.png cannot be read as a picture"):
        load_dataset(tmp_path, "test")


def test_pictures_of_many_sizes_need_a_size(tmp_path: Path) -> None:
    save_picture(tmp_path / "cat/a.png", some_pixels(6, 8, 3))
    save_picture(tmp_path / "cat/b.png", some_pixels(9, 5))
    with pytest.raises(DataError, match=r"b\.png is 9 x 5 .* is 6 x 8: .* pass size= \(--size\)"):
        load_dataset(tmp_path)
    assert load_dataset(tmp_path, size=4).image_shape == (3, 4, 4)


def test_a_photograph_stands_upright(tmp_path: Path) -> None:
    pixels = some_pixels(6, 8, 3)
    path = save_picture(tmp_path / "cat/a.png", pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned by a quarter
    Image.fromarray(pixels).save(path, exif=exif)
    upright = torch.from_numpy(pixels).permute(2, 0, 1).rot90(-1, (1, 2))
    assert load_dataset(tmp_path).images[0].equal(upright)


def test_a_folder_that_lacks_something_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder of pictures for each class"):
        load_dataset(tmp_path)
    save_picture(tmp_path / "train/cat/a.png")
    with pytest.raises(DataError, match="has no test split: expected test/CLASS/ or val/CLASS/"):
        load_dataset(tmp_path, "test")
    (tmp_path / "train/dog").mkdir()
    with pytest.raises(DataError, match=r"classes dog.* needs a picture \(\.jpg, "):
        load_dataset(tmp_path)
    save_picture(tmp_path / "test/cat/a.png")
    save_picture(tmp_path / "test/eel/a.png")
    with pytest.raises(DataError, match=r"eel is of a class that train/ does not have"):
        load_dataset(tmp_path, "test")


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    path = save_picture(tmp_path / "cat/a.png", some_pixels(64, 64, 3))
    path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(DataError, match=r"a\.png cannot be read as a picture \(.+\); repair"):
        load_dataset(tmp_path)
    path.write_text("no picture")
    with pytest.raises(DataError, match=r"a\.png cannot be read as a picture"):
        load_dataset(tmp_path)


# --- names


def test_a_path_wins_over_a_name_when_it_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_picture(tmp_path / "digits/cat/a.png")
    for path in ("./digits", Path("digits")):
        assert load_dataset(path).class_names == {0: "cat"}
    assert len(load_dataset("digits")) == 1437


def test_an_unknown_name_lists_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        load_dataset("cifr10")
    for hint in (*DATASETS, "'cifr10'", "did you mean 'cifar10'", ".npz", "folder of pictures"):
        assert hint in str(raised.value)
    with pytest.raises(DataError, match="no file or folder is there; expected one of"):
        load_dataset(tmp_path / "gone.npz")


def test_options_outside_what_they_may_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="'train' or 'test', got 'valid'"):
        load_dataset("digits", "valid")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="1 to 8192; got -8"):
        load_dataset("digits", size=-8)


def test_arrays_that_do_not_fit_in_memory_are_said_to_be_too_large(tmp_path: Path) -> None:
    """A file of few bytes may claim any shape."""
    path, header = tmp_path / "large.npz", io.BytesIO()
    fields = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 3, 10**4, 10**4)}
    np.lib.format.write_array_header_1_0(header, fields)
    with zipfile.ZipFile(path, "w") as file:
        for name in ("x_train", "y_train"):
            file.writestr(f"{name}.npy", header.getvalue())
    with pytest.raises(DataError, match=r"does not fit in memory \(Unable to allocate .* TiB"):
        load_dataset(path)


@pytest.mark.parametrize("size", ["x", 2.5, -1, 10**9, [8]])
def test_a_size_that_is_no_side_of_an_image_is_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match="size is the side of an image in pixels, 1 to 8192"):
        load_dataset("digits", size=size)


@pytest.mark.parametrize("name", [None, 3, ["digits"]])
def test_a_name_that_is_no_text_is_refused(name: Any) -> None:
    with pytest.raises(DataError, match="expected the name or the path of a data set"):
        load_dataset(name)


def test_a_memory_file_is_no_data_set(tmp_path: Path) -> None:
    path = tmp_path / "seen.hmn"
    path.write_bytes(b"any")
    with pytest.raises(DataError, match=r"is a memory file, not a data set: hmn_replay\.load"):
        load_dataset(path)
