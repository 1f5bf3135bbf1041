"""Exported memories, read again by the package's own loader and by Pillow."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder

from hmn_replay.baselines.fill import raw_images
from hmn_replay.data.images import LabelledImages
from hmn_replay.data.sources import load_dataset
from hmn_replay.errors import ConfigError, DataError
from hmn_replay.memory.export import (
    contact_sheet,
    export_dd_ranking,
    export_images,
    export_npz,
)
from hmn_replay.memory.hierarchical import HierarchicalMemory, HMNLayout
from tests.console import Console
from tests.support import real

LABELS = (-3, 7, 1000)
COUNTS = (2, 3, 1)


@pytest.fixture(params=[(3, 8, 8), (1, 12, 9)], ids=["colour", "grey"])
def memory(
    request: pytest.FixtureRequest, make_layout: Callable[..., HMNLayout]
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
    names = {-3: "great white/shark", 7: "../etc", 1000: "Löwe"}
    export_images(memory, tmp_path / "out", class_names=names)
    again = ImageFolder(str(tmp_path / "out"))
    assert again.classes == ["Löwe", "_etc", "great_white_shark"]
    assert again.targets == [0, 1, 1, 1, 2, 2]
    assert load_dataset(tmp_path / "out").class_names == dict(enumerate(again.classes))


def test_classes_of_one_name_or_none_keep_a_folder_each(
    memory: HierarchicalMemory, tmp_path: Path
) -> None:
    export_images(memory, tmp_path / "out", class_names={-3: "Crane", 7: "crane", 1000: ".."})
    folders = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert folders == ["1000", "Crane_-3", "crane_7"]
    export_images(memory, tmp_path / "more", class_names={-3: "a", 7: "a", 1000: "A_-3"})
    counts = {path.name: len(list(path.iterdir())) for path in (tmp_path / "more").iterdir()}
    assert counts == {"a_-3_-3": 2, "a_7": 3, "A_-3_1000": 1}


def test_the_memorys_own_names_are_the_default(tmp_path: Path) -> None:
    memory: Any = Named()
    export_images(memory, tmp_path / "named")
    export_images(memory, tmp_path / "numbered", class_names={})
    assert sorted(path.name for path in (tmp_path / "named").iterdir()) == ["4", "cat"]
    assert sorted(path.name for path in (tmp_path / "numbered").iterdir()) == ["2", "4"]
    export_npz(memory, tmp_path / "named.npz")
    again = load_dataset(tmp_path / "named.npz")
    assert again.class_names == {2: "cat"}
    assert again.labels.tolist() == [2, 2, 4]
    widths = []
    given: list[dict[int, str] | None] = [None, {}]
    for names in given:
        contact_sheet(memory, tmp_path / "sheet.png", class_names=names)
        widths.append(open_sheet(tmp_path / "sheet.png").shape[1])
    assert widths[0] > widths[1], "cat is wider than 2"


class Named:
    """As much of a memory as is exported."""

    class_names: ClassVar = {2: "cat"}

    def decode(self, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return torch.zeros(3, 1, 8, 8, dtype=dtype), torch.tensor([2, 2, 4])


def test_the_contact_sheet_has_a_row_a_class_of_enlarged_images(
    memory: HierarchicalMemory, tmp_path: Path
) -> None:
    contact_sheet(memory, tmp_path / "sheet.png", columns=2)
    sheet = open_sheet(tmp_path / "sheet.png")
    images, labels = decoded(memory)
    _, height, width = memory.image_shape
    factor = -(-64 // min(height, width))
    rows, columns = height * factor + 2, width * factor + 2
    margin = sheet.shape[1] - 2 * columns - 2
    assert margin > 8
    assert sheet.shape[0] == 3 * rows + 2
    for row, label in enumerate(LABELS):
        for column, image in enumerate(images[labels == label][:2]):
            top, left = 2 + row * rows, margin + 2 + column * columns
            block = sheet[top : top + height * factor, left : left + width * factor]
            pixels = image.expand(3, -1, -1).movedim(0, -1).numpy()
            assert (block[::factor, ::factor] == pixels).all()
            assert (block[factor - 1 :: factor, factor - 1 :: factor] == pixels).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 50])
def test_a_contact_sheet_shows_every_class(
    memory: HierarchicalMemory, rows: int, tmp_path: Path
) -> None:
    contact_sheet(memory, tmp_path / "sheet.png", rows=rows, columns=3)
    sheet = open_sheet(tmp_path / "sheet.png")
    _, height, width = memory.image_shape
    factor = -(-64 // min(height, width))
    blocks = -(-3 // rows)
    assert sheet.shape[0] == 2 + min(rows, 3) * (height * factor + 2)
    wide = sheet.shape[1] // blocks
    margin = wide - 2 - 3 * (width * factor + 2)
    images, labels = decoded(memory)
    for position, label in enumerate(LABELS):
        block, row = divmod(position, rows)
        top, left = 2 + row * (height * factor + 2), block * wide + margin + 2
        shown = sheet[top : top + height * factor : factor, left : left + width * factor : factor]
        assert (shown == images[labels == label][0].movedim(0, -1).numpy()).all()


def test_any_class_name_is_shown_and_names_a_folder(
    memory: HierarchicalMemory, tmp_path: Path
) -> None:
    names = {LABELS[0]: "two\nlines", LABELS[1]: "long" * 10_000, LABELS[2]: "long" * 20_000}
    memory.class_names = names
    contact_sheet(memory, tmp_path / "sheet.png")
    assert open_sheet(tmp_path / "sheet.png").shape[1] < 2000
    export_images(memory, tmp_path / "pictures")
    folders = sorted(path.name for path in (tmp_path / "pictures").iterdir() if path.is_dir())
    assert len(folders) == 3 and "two_lines" in folders
    assert max(map(len, folders)) < 130
    export_images(memory, tmp_path / "kanji", class_names=dict.fromkeys(LABELS, "\u9f8d" * 200))
    folders = sorted(path.name for path in (tmp_path / "kanji").iterdir() if path.is_dir())
    assert len(folders) == 3 and max(len(name.encode()) for name in folders) < 130


def test_large_images_are_shown_as_they_are(tmp_path: Path) -> None:
    large = LabelledImages(torch.zeros(1, 3, 70, 90, dtype=torch.uint8), torch.zeros(1).long())
    contact_sheet(raw_images(large, 10**6), tmp_path / "sheet.png", class_names={0: "night"})
    assert len(open_sheet(tmp_path / "sheet.png")) == 70


def test_wrong_options_and_empty_memories_are_refused(
    memory: HierarchicalMemory, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="columns is 1 or more; got 0"):
        contact_sheet(memory, tmp_path / "sheet.png", columns=0)
    with pytest.raises(ConfigError, match="rows is 1 or more; got 0"):
        contact_sheet(memory, tmp_path / "sheet.png", rows=0)
    memory.keep([])
    for export in (export_images, export_npz, contact_sheet):
        with pytest.raises(DataError, match="the memory holds no image"):
            export(memory, tmp_path / "out.png")
    with pytest.raises(ConfigError, match=r"a contact sheet is a \.png file; got '.*sheet\.jpg'"):
        contact_sheet(real("raw"), tmp_path / "sheet.jpg")
    assert list(tmp_path.iterdir()) == []


def test_dd_ranking_gets_normalised_images_class_by_class(tmp_path: Path) -> None:
    memory = real("raw", image_shape=(3, 32, 32), classes=range(10), counts=[3] * 9 + [2])
    export_dd_ranking(memory, tmp_path / "out")
    images = torch.load(tmp_path / "out" / "images.pt", weights_only=True)
    labels = torch.load(tmp_path / "out" / "hard_labels.pt", weights_only=True)
    expected, known = memory.decode()
    assert torch.equal(labels, known) and labels.dtype == torch.int64
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    by_hand = (expected - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(images, by_hand, rtol=0, atol=1e-5)
    lines = (tmp_path / "out" / "config.yaml").read_text().splitlines()
    settings = dict(line.split(": ", 1) for line in lines if not line.startswith((" ", "aug")))
    assert settings["dataset"] == "CIFAR10" and settings["ipc"] == "3"
    assert settings["im_size"] == "[32, 32]"
    # What its LabelRobustScoreHard reads, at b8b0966.
    assert set(settings) >= {
        *("real_data_path", "model_name", "data_aug_func", "optimizer", "lr_scheduler"),
        *("weight_decay", "momentum", "step_size", "num_eval", "num_epochs", "real_batch_size"),
        *("syn_batch_size", "save_path", "use_zca", "use_torchvision", "custom_train_trans"),
        *("custom_val_trans", "num_workers", "device", "dist", "random_data_format"),
        *("random_data_path", "eval_full_data"),
    }
    assert settings["eval_full_data"] == "true"  # its table of accuracies has none of CIFAR
    # And what its DSA reads.
    augmentation = {line.split(":")[0].strip() for line in lines if line.startswith(" ")}
    assert augmentation == {
        *("flip", "rotate", "saturation", "brightness", "contrast", "scale", "crop", "cutout")
    }


def test_dd_ranking_knows_few_data_sets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no data set of 2 classes .* name one of CIFAR10"):
        export_dd_ranking(real("raw", image_shape=(3, 32, 32)), tmp_path / "out")
    with pytest.raises(ConfigError, match="did you mean 'CIFAR10'"):
        export_dd_ranking(real("raw", classes=(0, 1)), tmp_path / "out", dataset="CIFAR-10")
    with pytest.raises(ConfigError, match=r"labels from 0 to 9; got .* from -3 to 7"):
        export_dd_ranking(real("raw"), tmp_path / "out", dataset="CIFAR10")
    export_dd_ranking(real("raw", classes=(0, 9)), tmp_path / "out", dataset="CIFAR10")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("config.yaml", "hard_labels.pt", "images.pt")
    ]


def test_the_command_writes_for_dd_ranking(run: Console, tmp_path: Path) -> None:
    real("raw", classes=(0, 9)).save(tmp_path / "raw.hmn")
    words = ("--dd-ranking", tmp_path / "out", "--dd-ranking-data", "CIFAR10")
    assert "dd ranking" in run("export", tmp_path / "raw.hmn", *words)
    assert (tmp_path / "out" / "images.pt").exists()
