"""JPEG scans under one header, against whole JPEG files of Pillow."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hmn_replay.baselines.jpeg import decode_jpeg_scans, encode_jpeg_scans, read_jpeg_shape
from hmn_replay.errors import ConfigError, DataError


def some_images(*shape: int, seed: int = 0) -> Tensor:
    """Smooth images under some noise."""
    rng = np.random.default_rng(seed)
    num_images, channels, height, width = shape
    slope = np.linspace(0, 150, height)[:, None] + np.linspace(0, 50, width)
    noise = rng.integers(0, 50, shape)
    shift = rng.integers(0, 10, (num_images, channels, 1, 1))
    return torch.from_numpy((slope + noise + shift).clip(0, 255).astype(np.uint8))


def pillow_file(image: Tensor, **options: object) -> bytes:
    file = io.BytesIO()
    pixels = image.movedim(0, -1).numpy()
    Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(file, "JPEG", **options)
    return file.getvalue()


def open_file(data: bytes) -> Tensor:
    pixels = np.array(Image.open(io.BytesIO(data)))
    return torch.from_numpy(pixels[..., None] if pixels.ndim == 2 else pixels).movedim(-1, 0)


@pytest.mark.parametrize(
    "shape", [(3, 3, 32, 32), (3, 1, 28, 28), (2, 1, 8, 8), (2, 3, 9, 17), (1, 3, 120, 100)]
)
@pytest.mark.parametrize("quality", [1, 10, 50, 100])
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_images_are_those_of_whole_jpeg_files(
    shape: tuple[int, ...], quality: int, subsampling: str
) -> None:
    images = some_images(*shape)
    header, scans = encode_jpeg_scans(images, quality, subsampling=subsampling)
    files = [pillow_file(image, quality=quality, subsampling=subsampling) for image in images]
    assert decode_jpeg_scans(header, scans).equal(torch.stack([open_file(file) for file in files]))
    assert all(file.endswith(scan + b"\xff\xd9") for file, scan in zip(files, scans, strict=True))
    assert read_jpeg_shape(header) == shape[1:]


def test_chroma_is_halved_by_default() -> None:
    images = some_images(2, 3, 32, 32)
    assert encode_jpeg_scans(images, 20) == encode_jpeg_scans(images, 20, subsampling="4:2:0")


@pytest.mark.parametrize(("channels", "num_bytes"), [(1, 94), (3, 173)])
def test_one_short_header_serves_all_images_of_a_size_and_quality(
    channels: int, num_bytes: int
) -> None:
    first, first_scans = encode_jpeg_scans(some_images(2, channels, 16, 16), 20)
    second, second_scans = encode_jpeg_scans(some_images(3, channels, 16, 16, seed=1), 20)
    assert first == second
    assert len(first) == num_bytes
    assert decode_jpeg_scans(first, first_scans + second_scans).shape == (5, channels, 16, 16)
    assert encode_jpeg_scans(some_images(2, channels, 16, 16), 21)[0] != first


def test_a_header_with_its_own_huffman_tables_is_decoded_by_them() -> None:
    (image,) = some_images(1, 3, 32, 32)
    data = pillow_file(image, quality=30, optimize=True)
    start = data.index(b"\xff\xda")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    (decoded,) = decode_jpeg_scans(data[:end], [data[end:-2]])
    assert decoded.equal(open_file(data))


def test_no_scans_decode_to_no_images() -> None:
    header, _ = encode_jpeg_scans(some_images(1, 3, 16, 24), 20)
    assert decode_jpeg_scans(header, []).shape == (0, 3, 16, 24)


@pytest.mark.parametrize("quality", [0, 101, -1, True, 2.5, "20"])
def test_a_quality_that_libjpeg_does_not_have_is_refused(quality: int) -> None:
    with pytest.raises(ConfigError, match="quality is a whole number from 1 to 100; got"):
        encode_jpeg_scans(some_images(1, 1, 8, 8), quality)


def test_an_unknown_subsampling_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"subsampling is one of .*; got '4:1:1'"):
        encode_jpeg_scans(some_images(1, 3, 8, 8), 20, subsampling="4:1:1")


def test_images_of_another_kind_are_refused() -> None:
    with pytest.raises(DataError, match="expected images as a uint8 tensor"):
        encode_jpeg_scans(torch.zeros(1, 3, 8, 8), 20)
    for shape in ((1, 2, 8, 8), (0, 3, 8, 8)):
        with pytest.raises(DataError, match="with 1 or 3 channels, came"):
            encode_jpeg_scans(torch.zeros(shape, dtype=torch.uint8), 20)


def test_a_scan_too_short_for_its_frame_is_refused_before_it_is_decoded() -> None:
    header, scans = encode_jpeg_scans(some_images(1, 1, 16, 16), 20)
    frame = header.index(b"\xff\xc0")
    huge = header[: frame + 5] + b"\xff\xff\xff\xff" + header[frame + 9 :]
    with pytest.raises(DataError, match=r"bytes cannot hold 65535 x 65535 pixels"):
        decode_jpeg_scans(huge, scans)


@pytest.mark.parametrize("header", [b"", b"\xff\xd8", b"GIF89a", b"\xff\xd8\xff\xda\x00\x02"])
def test_what_is_no_header_is_refused(header: bytes) -> None:
    with pytest.raises(DataError, match="JPEG header"):
        decode_jpeg_scans(header, [b"\x00"])


def test_damage_is_told_by_a_data_error_or_shows_in_pixels_alone() -> None:
    header, scans = encode_jpeg_scans(some_images(1, 3, 16, 16), 20)
    draw = random.Random(0)
    num_refused = 0
    for _ in range(2000):
        damaged = bytearray(header + scans[0])
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        damaged = damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])]
        split = len(header)
        try:
            decode_jpeg_scans(bytes(damaged[:split]), [bytes(damaged[split:])])
        except DataError:
            num_refused += 1
    assert num_refused > 500
