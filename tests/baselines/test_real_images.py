"""Files of real images: what they give back, and what is refused."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from hmn_replay.baselines.fill import jpeg_images, raw_images
from hmn_replay.baselines.real_images import RealImages, load_real_images, parse_real_images
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import ConfigError, DataError, MemoryFileError

LABELS = (-3, 7, 1000)


def make(kind: str, num_images: int) -> RealImages:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (num_images, 3, 2, 2)).repeat(8, axis=2).repeat(8, axis=3)
    labels = torch.tensor(LABELS)[torch.arange(num_images) % len(LABELS)]
    data = LabelledImages(torch.from_numpy(coarse.astype(np.uint8)), labels)
    return raw_images(data, 10**6) if kind == "raw" else jpeg_images(data, 10**6, quality=20)


both = pytest.mark.parametrize("kind", ["raw", "jpeg"])


def test_the_scans_are_those_of_each_class_in_order() -> None:
    images = make("jpeg", 30)
    assert list(images.scans) == list(LABELS)
    assert [len(scans) for scans in images.scans.values()] == images.images_per_class
    in_order = b"".join(scan for scans in images.scans.values() for scan in scans)
    assert in_order == images.arrays["scans"].tobytes()


def test_bytes_are_parsed_without_a_file() -> None:
    data = make("jpeg", 9).serialise()
    assert parse_real_images(data).serialise() == data
    for damaged in (b"", data[:-1], data[:-1] + b"x"):
        with pytest.raises(MemoryFileError):
            parse_real_images(damaged)


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dtype is torch\.float32 or torch\.uint8"):
        make("raw", 3).decode(dtype=torch.float64)


@both
def test_a_file_gives_back_what_was_saved(kind: str, tmp_path: Path) -> None:
    images = make(kind, 90)
    images.save(tmp_path / "real.hmn")
    assert (tmp_path / "real.hmn").stat().st_size == images.file_bytes
    loaded = load_real_images(tmp_path / "real.hmn")
    assert loaded.kind == kind
    assert loaded.num_images == images.num_images
    assert loaded.classes.tolist() == list(LABELS)
    assert loaded.image_shape == (3, 16, 16)
    for before, after in zip(images.decode(), loaded.decode(), strict=True):
        assert after.equal(before)
    assert loaded.serialise() == images.serialise()


@both
def test_a_damaged_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "real.hmn"
    images = make(kind, 30)
    whole = images.serialise()
    before, _ = images.decode()
    draw = random.Random(0)
    for trial in range(1500):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            damaged = damaged[: draw.randrange(len(whole))]
        else:
            # Half of the damage goes to the header, which is a small part of the file.
            end = draw.choice([len(whole), 300])
            damaged[draw.randrange(end)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            after, _ = load_real_images(path).decode()
        except MemoryFileError as error:
            assert "real.hmn" in str(error)
        else:
            assert after.equal(before), "only white space can change without being noticed"


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    arrays = {"x": np.zeros(3)}
    for content, message in {
        b"": "cannot read",
        b"\xff" * 100: "cannot read",
        safetensors.numpy.save(arrays): "not a file of real images",
        safetensors.numpy.save(arrays, {"hmn_replay_images": "raw 9 0"}): "version 9; this version",
    }.items():
        path.write_bytes(content)
        with pytest.raises(MemoryFileError, match=message):
            load_real_images(path)
    with pytest.raises(FileNotFoundError):
        load_real_images(tmp_path / "absent")


def test_arrays_that_do_not_fit_each_other_are_refused() -> None:
    raw = make("raw", 9).arrays
    jpeg = make("jpeg", 9).arrays
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("gif", raw, "'gif' images have no such arrays"),
        ("jpeg", raw, "'jpeg' images have no such arrays"),
        ("raw", {**raw, "images": raw["images"].astype(np.float32)}, "images cannot be float32"),
        ("raw", {**raw, "images": raw["images"][:, :2]}, "1 or 3 channels, not 2"),
        ("raw", {**raw, "images": raw["images"][:-1]}, "add up to 9, not to the images"),
        ("raw", {**raw, "counts": np.array([9, 0, 0])}, "need one positive count each"),
        ("raw", {**raw, "counts": np.array([2**63 + 9, 2**63])}, "counts cannot be uint64"),
        ("raw", {**raw, "classes": np.array([7, -3, 1000])}, "classes, sorted"),
        ("raw", {**raw, "classes": np.array([0.0, 1.0, 2.0])}, "classes cannot be float64"),
        ("jpeg", {**jpeg, "scans": jpeg["scans"][:-1]}, "lengths of the scans do not fit"),
        ("jpeg", {**jpeg, "lengths": jpeg["lengths"][:-1]}, "add up to 9, not to the images"),
        ("jpeg", {**jpeg, "header": jpeg["header"][:-1]}, "not a JPEG header, or a damaged one"),
    ]
    for kind, arrays, message in wrong:
        with pytest.raises(DataError, match=message):
            RealImages(kind, arrays)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["BF16", "F8_E8M0"])
def test_a_type_that_numpy_lacks_is_refused(dtype: str) -> None:
    header = json.dumps({"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, 4]}})
    if dtype == "F8_E8M0":
        header = header.replace("[0, 4]", "[0, 2]")
    body = bytes(4 if dtype == "BF16" else 2)
    data = len(header).to_bytes(8, "little") + header.encode() + body
    with pytest.raises(MemoryFileError, match=r"."):
        parse_real_images(data)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.timeout(10)
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MemoryFileError, match="not a regular file"):
        load_real_images(tmp_path / "pipe")
