from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from experiments.figures import (
    SAMPLES,
    draw_accuracy,
    draw_memories,
    draw_shortcut,
    save_samples,
)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def pixels_of(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.fixture
def report() -> dict[str, Any]:
    run = {
        "accuracy_seen": [0.9, 0.6],
        "final_accuracy": 0.6,
        "memory_images": 4,
        "memory_bytes": 256,
    }
    joint = run | {"accuracy_seen": [None, 0.8], "final_accuracy": 0.8}
    return {
        "configuration": {
            "classes_per_experience": [7, 3],
            "data": "digits",
            "budget": 256,
        },
        "results": {
            "raw": {"0": run, "1": run | {"accuracy_seen": [0.7, 0.5]}},
            "joint": {"0": joint},
            "hmn": {"0": {"error": "ValueError: no"}},
        },
    }


def test_samples_take_every_class_in_turn(tmp_path: Path) -> None:
    # Class 1 has 30 images, class 0 two and class 5 one; a pixel tells the class and the rank.
    labels = torch.tensor([1] * 30 + [0, 5, 0])
    images = torch.zeros(33, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([*range(100, 130), 10, 50, 11])
    save_samples(images, labels, tmp_path / "strip.png")
    strip = pixels_of(tmp_path / "strip.png")
    assert strip.shape == (2, 2 * SAMPLES)
    assert strip[0, ::2].tolist() == [10, 11, *range(100, 117), 50]


def test_samples_keep_colours(tmp_path: Path) -> None:
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    images[1, 0] = 255
    save_samples(images, torch.arange(3), tmp_path / "strip.png")
    strip = pixels_of(tmp_path / "strip.png")
    assert strip.shape == (4, 12, 3)
    assert strip[0, 4].tolist() == [255, 0, 0]


def test_curves_are_drawn_without_failures(tmp_path: Path, report: dict[str, Any]) -> None:
    draw_accuracy(report, tmp_path / "accuracy.png")
    assert size_of(tmp_path / "accuracy.png")[0] > 500
    draw_accuracy(report | {"results": {}}, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()


def test_memories_are_drawn_where_there_are_some(tmp_path: Path, report: dict[str, Any]) -> None:
    draw_memories(report, tmp_path, tmp_path / "memory.png")
    assert not (tmp_path / "memory.png").exists()
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    for name in ("raw", "hmn"):
        save_samples(images, torch.arange(4), tmp_path / f"memory-{name}-seed1.png")
    draw_memories(report, tmp_path, tmp_path / "memory.png")
    one_row = size_of(tmp_path / "memory.png")[1]
    save_samples(images, torch.arange(4), tmp_path / "memory-joint-seed0.png")
    draw_memories(report, tmp_path, tmp_path / "memory.png")
    assert size_of(tmp_path / "memory.png")[1] > one_row


def test_the_shortcut_is_drawn_where_it_was_measured(
    tmp_path: Path, report: dict[str, Any]
) -> None:
    draw_shortcut(report, tmp_path / "shortcut.png")
    assert not (tmp_path / "shortcut.png").exists()
    shares = {"called_new": 0.4}
    shortcut = {"balanced_share": 0.3, "clean": shares, "codec": None, "decoded": shares}
    for run in report["results"]["raw"].values():
        run["shortcut"] = shortcut
    draw_shortcut(report, tmp_path / "shortcut.png")
    one_row = size_of(tmp_path / "shortcut.png")[1]
    report["results"]["joint"]["0"]["shortcut"] = shortcut | {"decoded": None, "codec": shares}
    draw_shortcut(report, tmp_path / "shortcut.png")
    assert size_of(tmp_path / "shortcut.png")[1] > one_row


def test_the_suffix_chooses_the_format(tmp_path: Path, report: dict[str, Any]) -> None:
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    save_samples(images, torch.arange(4), tmp_path / "memory-raw-seed0.png")
    for suffix, start in (("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
        draw_accuracy(report, tmp_path / f"accuracy.{suffix}")
        draw_memories(report, tmp_path, tmp_path / f"memory.{suffix}")
        for name in ("accuracy", "memory"):
            content = (tmp_path / f"{name}.{suffix}").read_bytes()
            assert content.startswith(start) and len(content) > 1000
