"""PSNR at equal bytes an image, on next to nothing."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import hmn_replay
from experiments.reconstruction import interpolate, jpeg, layout_at, main, psnr, webp
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.memory.hierarchical import HierarchicalMemory

BUDGET = 6000


def smooth_images(count: int, side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return images.mul(255).to(torch.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = smooth_images(90).movedim(1, 3).numpy()
    labels = np.arange(90) % 3
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images[:6], y_test=labels[:6])
    return path


def run(data: Path, out: Path, *arguments: str) -> dict[str, Any]:
    options = ["--image-bytes", "90,150", "--budget", str(BUDGET), "--steps", "3"]
    assert main(["--data", str(data), "--out", str(out), *options, *arguments]) == 0
    report: dict[str, Any] = json.loads((out / "results.json").read_text())
    return report


def test_each_rate_has_a_memory_and_what_others_make_of_as_many_bytes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(data, tmp_path)
    train = hmn_replay.load_dataset(str(data), "train")
    for row, rate in zip(report["rows"], (90, 150), strict=True):
        path = tmp_path / f"{rate}.hmn"
        memory = hmn_replay.load(path)
        assert row["images"] == memory.num_images
        # So short a training takes fewer bytes an image, and what is left is filled with more.
        assert BUDGET // rate - 2 <= memory.num_images <= 3 * BUDGET // rate
        assert row["bytes"] == path.stat().st_size / memory.num_images
        # By hand: JPEG of the images that each class began with.
        cells = [cell for cell in report["cells"] if cell["rate"] == rate]
        assert len(cells) == 1 + 2 * 15 + 11
        sizes = sorted(cell["bytes"] for cell in cells if cell["codec"] == "JPEG 4:2:0")
        assert (row["JPEG 4:2:0"] is not None) == (sizes[0] <= row["bytes"] <= sizes[-1])
        decoded, labels = memory.decode(dtype=torch.uint8)
        nearest = [
            max(psnr(image[None], other[None]) for other in train.images[train.labels == label])
            for image, label in zip(decoded, labels, strict=True)
        ]
        assert row["HMN"] <= sum(nearest) / len(nearest) + 1e-4
    assert (tmp_path / "reconstruction.png").read_bytes().startswith(b"\x89PNG")
    assert "HMN dB" in (tmp_path / "table.md").read_text()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(hmn_replay, "condense", never)
    assert run(data, tmp_path)["rows"] == report["rows"]


def test_what_a_warm_start_settles_is_not_for_set(data: Path, tmp_path: Path) -> None:
    for setting in ("warm_start_steps=9", "outer_steps=1", "over_budget=0.1", "number_format=int8"):
        with pytest.raises(ConfigError, match=f"{setting.split('=')[0]} is not for --set"):
            run(data, tmp_path, "--set", setting)
    assert not list(tmp_path.iterdir())


def test_a_rate_below_a_byte_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--image-bytes are 1 or more; got 0"):
        run(data, tmp_path, "--image-bytes", "0")
    assert not list(tmp_path.iterdir())


def test_what_failed_is_told_in_the_table(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise BudgetError("too small")

    monkeypatch.setattr(hmn_replay, "condense", fails)
    run(data, tmp_path)
    told = (tmp_path / "table.md").read_text()
    assert re.search(r"- codec HMN, rate \d+, quality 0: BudgetError: too small", told)


def test_a_layout_holds_about_as_many_images_as_fit_at_a_rate() -> None:
    data = LabelledImages(smooth_images(90), torch.arange(90) % 3)
    for rate in (80, 100, 200):
        count = HierarchicalMemory.max_images(layout_at(rate, BUDGET, data), BUDGET, 3)
        assert abs(count - BUDGET // rate) <= 2


def test_jpeg_counts_scans_and_their_header() -> None:
    images = smooth_images(12)
    rough, fine = (jpeg("JPEG 4:4:4", images, quality) for quality in (5, 75))
    assert rough["bytes"] < fine["bytes"]
    assert rough["psnr"] < fine["psnr"]
    many = jpeg("JPEG 4:4:4", images.repeat(10, 1, 1, 1), 5)
    assert many["psnr"] == pytest.approx(rough["psnr"])
    assert many["bytes"] < rough["bytes"]


@pytest.mark.parametrize("channels", [1, 3])
def test_webp_is_counted_without_its_headers(channels: int) -> None:
    images = smooth_images(2)[:, :channels]
    found = webp(images, 50)
    whole = 0
    for image in images:
        picture = Image.fromarray(image.expand(3, -1, -1).movedim(0, 2).contiguous().numpy())
        file = io.BytesIO()
        picture.save(file, "WEBP", quality=50, method=6)
        content = file.getvalue()
        # The frame begins with a tag of 3 bytes, then the start code, width and height.
        assert content[:4] == b"RIFF"
        assert content[12:16] == b"VP8 "
        assert content[23:26] == b"\x9d\x01\x2a"
        assert int.from_bytes(content[26:28], "little") == 16
        whole += len(content)
    assert found["bytes"] == whole / 2 - 30
    assert 15 < found["psnr"] < 60


def test_psnr_is_the_mean_over_images() -> None:
    wanted = torch.full((2, 1, 4, 4), 100, dtype=torch.uint8)
    decoded = wanted.clone()
    decoded[0] += 10
    decoded[1] += 20
    by_hand = [20 * math.log10(255 / error) for error in (10, 20)]
    assert psnr(decoded, wanted) == pytest.approx(sum(by_hand) / 2, abs=1e-4)
    assert psnr(wanted, wanted) == pytest.approx(100)


def test_between_two_sizes_psnr_is_interpolated() -> None:
    points = [(10.0, 20.0), (20.0, 30.0), (40.0, 32.0)]
    assert interpolate(points, 15) == pytest.approx(25)
    assert interpolate(points, 40) == pytest.approx(32)
    assert interpolate(points, 9) is None
    assert interpolate(points, 41) is None
