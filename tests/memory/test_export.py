"""Exported memories, read again by the package's own loader and by Pillow."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from hmn_replay.baselines.fill import raw_images
from hmn_replay.data.images import LabelledImages
from hmn_replay.data.sources import load_dataset
from hmn_replay.errors import ConfigError, DataError
from hmn_replay.memory.export import contact_sheet, export_images, export_npz
from hmn_replay.memory.hierarchical import HierarchicalMemory
from hmn_replay.memory.layout import Layout

LABELS = (-3, 7, 1000)
COUNTS = (2, 3, 1)


@pytest.fixture(params=[(3, 8, 8), (1, 12, 9)], ids=["colour", "grey"])
def memory(
    request: pytest.FixtureRequest, make_layout: Callable[..., Layout]
) -> HierarchicalMemory:
    return HierarchicalMemory(make_layout(image_shape=request.param), LABELS, COUNTS)


def decoded(memory: HierarchicalMemory) -> tuple[Tensor, Tensor]:
    return memory.decode(dtype=torch.uint8)


def open_sheet(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as sheet:
        return np.array(sheet)


def test_pictures_read_again_are_the_decoded_images(
    memory: HierarchicalMemory, tmp_path: Path
) -> None:
    export_images(memory, tmp_path / "out")
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in tmp_path.rglob("*.png"))
    assert names == sorted(
        f"{label}/{position:04d}.png"
        for label, count in zip(LABELS, COUNTS, strict=True)
        for position in range(count)
    )
    again = load_dataset(tmp_path / "out")
    images, labels = decoded(memory)
    for label in LABELS:
        assert again.images[again.of_class(label)].equal(images[labels == label])


def test_arrays_read_again_are_the_decoded_images(
    memory: HierarchicalMemory, tmp_path: Path
) -> None:
    export_npz(memory, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"x_train", "y_train"}
        channels, height, width = memory.image_shape
        assert arrays["x_train"].shape == (6, height, width, channels)
        assert arrays["x_train"].dtype == np.uint8
        assert arrays["y_train"].dtype == np.int64
    again = load_dataset(tmp_path / "out.npz")
    images, labels = decoded(memory)
    assert again.images.equal(images)
    assert again.labels.equal(labels)


def test_a_folder_that_is_not_empty_is_left_alone(
    memory: HierarchicalMemory, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ConfigError, match="exists already and is not an empty folder"):
            export_images(memory, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(memory: HierarchicalMemory, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_images(memory, str(tmp_path / "out"))
    assert len(list(tmp_path.rglob("*.png"))) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_that_fails_leaves_nothing(
    memory: HierarchicalMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []

    def save(_: Image.Image, path: Path) -> None:
        saved.append(path)
        path.write_bytes(b"half")
        if len(saved) == 4:
            raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="No space left"):
        export_images(memory, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_the_folder_is_as_open_as_any_other(memory: HierarchicalMemory, tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    export_images(memory, tmp_path / "out")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "out")]
    assert modes[0] == modes[1]


def test_class_names_name_the_folders(memory: HierarchicalMemory, tmp_path: Path) -> None:
    names = {-3: "great white/shark", 7: "..", 1000: "Löwe"}
    with pytest.raises(ConfigError, match="or one would have no name"):
        export_images(memory, tmp_path / "out", class_names=names)
    names[7] = "../etc"
    export_images(memory, tmp_path / "out", class_names=names)
    folders = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert folders == ["Löwe", "_etc", "great_white_shark"]


def test_two_classes_never_share_a_folder(memory: HierarchicalMemory, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two classes would share a folder"):
        export_images(memory, tmp_path / "out", class_names={-3: "Crane", 7: "crane"})
    assert list(tmp_path.iterdir()) == []


def test_the_contact_sheet_has_a_row_a_class_of_enlarged_images(
    memory: HierarchicalMemory, tmp_path: Path
) -> None:
    contact_sheet(memory, tmp_path / "sheet.png", columns=2)
    sheet = open_sheet(tmp_path / "sheet.png")
    images, labels = decoded(memory)
    _, height, width = memory.image_shape
    factor = -(-64 // min(height, width))
    rows, columns = height * factor + 2, width * factor + 2
    margin = sheet.shape[1] - 2 * columns
    assert margin > 8
    assert sheet.shape[0] == 3 * rows + 2
    for row, label in enumerate(LABELS):
        for column, image in enumerate(images[labels == label][:2]):
            top, left = 2 + row * rows, margin + column * columns
            block = sheet[top : top + height * factor, left : left + width * factor]
            pixels = image.expand(3, -1, -1).movedim(0, -1).numpy()
            assert (block[::factor, ::factor] == pixels).all()
            assert (block[factor - 1 :: factor, factor - 1 :: factor] == pixels).all()


def test_a_contact_sheet_shows_no_more_classes_than_asked(
    memory: HierarchicalMemory, tmp_path: Path
) -> None:
    heights = []
    for max_classes in (1, 2, 50):
        contact_sheet(memory, tmp_path / "sheet.png", max_classes=max_classes)
        heights.append(len(open_sheet(tmp_path / "sheet.png")))
    one, two, all_three = heights
    assert one < two < all_three
    assert two - one == all_three - two


def test_large_images_are_shown_as_they_are(tmp_path: Path) -> None:
    large = LabelledImages(torch.zeros(1, 3, 70, 90, dtype=torch.uint8), torch.zeros(1).long())
    contact_sheet(raw_images(large, 10**6), tmp_path / "sheet.png", class_names={0: "night"})
    assert len(open_sheet(tmp_path / "sheet.png")) == 2 + 72


def test_wrong_options_and_empty_memories_are_refused(
    memory: HierarchicalMemory, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="columns is 1 or more; got 0"):
        contact_sheet(memory, tmp_path / "sheet.png", columns=0)
    with pytest.raises(ConfigError, match="max_classes is 1 or more; got 0"):
        contact_sheet(memory, tmp_path / "sheet.png", max_classes=0)
    memory.keep([])
    for export in (export_images, export_npz, contact_sheet):
        with pytest.raises(DataError, match="the memory holds no image"):
            export(memory, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
