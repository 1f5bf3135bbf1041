"""JPEG without its repetitions: one header for many images, and of each image its scan alone.

Baseline JPEG files of one size and one quality all begin with the same bytes: quantisation tables,
frame and start of scan (ITU-T T.81, Annex B). These are kept once, without the application marker
and without the Huffman tables of Annex K, which a decoder can know.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hmn_replay.budget import as_int
from hmn_replay.data.images import CHANNELS, check_tensor
from hmn_replay.errors import ConfigError, DataError
from hmn_replay.registry import check_name

__all__ = ["SUBSAMPLINGS", "decode_jpeg_scans", "encode_jpeg_scans", "read_jpeg_shape"]

SUBSAMPLINGS = ("4:2:0", "4:4:4")
"""How chroma may be stored: at half the sides, or in full."""

_START, _END = b"\xff\xd8", b"\xff\xd9"
_FRAME, _HUFFMAN, _SCAN, _APPLICATION = 0xC0, 0xC4, 0xDA, 0xE0
# The typical tables of T.81, Annex K.3, as the segments that libjpeg writes: DC and AC of luma,
# then of chroma. A grey image has the first two alone.
_LUMA_TABLES = bytes.fromhex(
    "ffc4001f0000010501010101010100000000000000000102030405060708090a0bffc400b510000201030302040305"
    "0504040000017d01020300041105122131410613516107227114328191a1082342b1c11552d1f02433627282090a16"
    "1718191a25262728292a3435363738393a434445464748494a535455565758595a636465666768696a737475767778"
    "797a838485868788898a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2"
    "d3d4d5d6d7d8d9dae1e2e3e4e5e6e7e8e9eaf1f2f3f4f5f6f7f8f9fa"
)
_CHROMA_TABLES = bytes.fromhex(
    "ffc4001f0100030101010101010101010000000000000102030405060708090a0bffc400b511000201020404030407"
    "05040400010277000102031104052131061241510761711322328108144291a1b1c109233352f0156272d10a162434"
    "e125f11718191a262728292a35363738393a434445464748494a535455565758595a636465666768696a7374757677"
    "78797a82838485868788898a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9"
    "cad2d3d4d5d6d7d8d9dae2e3e4e5e6e7e8e9eaf2f3f4f5f6f7f8f9fa"
)
# A block of 8 x 8 values takes two code words, each of one bit or more.
_MAX_PIXELS_PER_BYTE = 64 * 4


def encode_jpeg_scans(
    images: Tensor, quality: int, *, subsampling: str = "4:2:0"
) -> tuple[bytes, list[bytes]]:
    """Encode images as JPEG, and part what they share from what is each one's own.

    Args:
        images: uint8 ``(N, C, H, W)`` on the CPU; N is 1 or more, C is 1 (grey) or 3 (RGB).
        quality: libjpeg's, 1 (smallest) to 100 (best).
        subsampling: ``"4:2:0"`` or ``"4:4:4"``. Not used for grey images. Default: ``"4:2:0"``.

    Returns:
        The header, and the entropy-coded scan of each image, without the end marker. The header
        depends on C, H, W, ``quality`` and ``subsampling`` alone, so that scans of several calls
        can stand under one.

    Raises:
        ConfigError: ``quality`` or ``subsampling`` is not as said above.
        DataError: The images are not.
    """
    from PIL import Image

    level = as_int(quality) or 0
    if not 1 <= level <= 100:
        raise ConfigError(f"quality is a whole number from 1 to 100; got {quality!r}")
    check_name("subsampling", subsampling, SUBSAMPLINGS)
    check_tensor(images, "images", torch.uint8, ("N", "C", "H", "W"))
    if images.shape[1] not in CHANNELS or images.numel() == 0:
        raise DataError(
            "expected images (N, C, H, W) of at least 1 pixel, with 1 or 3 channels; got "
            f"{tuple(images.shape)}"
        )
    is_grey = images.shape[1] == 1
    options = {} if is_grey else {"subsampling": subsampling}
    prefix, scans = b"", []
    for pixels in images.movedim(1, -1).contiguous().numpy():
        file = io.BytesIO()
        image = Image.fromarray(pixels[..., 0] if is_grey else pixels)
        image.save(file, "JPEG", quality=level, optimize=False, progressive=False, **options)
        data = file.getvalue()
        prefix = prefix or data[: _segments(data)[-1][2]]
        assert data.startswith(prefix) and data.endswith(_END)
        scans.append(data[len(prefix) : -len(_END)])
    return _shorten(prefix), scans


def decode_jpeg_scans(header: bytes, scans: Sequence[bytes]) -> Tensor:
    """Decode what :func:`encode_jpeg_scans` made.

    Args:
        header: The header that the scans share.
        scans: Scans, as many as wanted, or none.

    Returns:
        uint8 ``(N, C, H, W)``.

    Raises:
        DataError: The header, or a scan, is damaged in a way that shows.
    """
    from PIL import Image

    channels, height, width = read_jpeg_shape(header)
    tables = b"" if any(m == _HUFFMAN for m, _, _ in _segments(header)) else _standard(channels)
    images = np.empty((len(scans), height, width, channels), np.uint8)
    for position, scan in enumerate(scans):
        if height * width > _MAX_PIXELS_PER_BYTE * len(scan):
            raise DataError(
                f"JPEG scan {position}: {len(scan)} bytes cannot hold {height} x {width} pixels; "
                "it is damaged"
            )
        file = io.BytesIO(b"".join((_START, tables, header[len(_START) :], scan, _END)))
        try:
            with Image.open(file, formats=["JPEG"]) as image:
                images[position] = np.asarray(image).reshape(height, width, channels)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"JPEG scan {position} cannot be decoded ({error})") from error
    return torch.from_numpy(images).movedim(-1, 1).contiguous()


def read_jpeg_shape(header: bytes) -> tuple[int, int, int]:
    """Return the ``(C, H, W)`` that a JPEG header announces.

    Raises:
        DataError: It is no header of a baseline JPEG file of 1 or 3 channels.
    """
    frames = [header[start:end] for marker, start, end in _segments(header) if marker == _FRAME]
    if len(frames) != 1 or len(frames[0]) < 10:
        raise DataError("a JPEG header without a baseline frame, or a damaged one")
    height, width = (int.from_bytes(frames[0][i : i + 2], "big") for i in (5, 7))
    channels = frames[0][9]
    if channels not in CHANNELS or not (height and width):
        raise DataError(f"a JPEG header for {channels} channels of {height} x {width} pixels")
    return channels, height, width


def _segments(data: bytes) -> list[tuple[int, int, int]]:
    """List the segments up to the start of the scan: marker, first byte, and end."""
    segments: list[tuple[int, int, int]] = []
    start = len(_START)
    while not segments or segments[-1][0] != _SCAN:
        length = int.from_bytes(data[start + 2 : start + 4], "big")
        end = start + 2 + length
        if not data.startswith(_START) or data[start : start + 1] != b"\xff" or end > len(data):
            raise DataError(f"not a JPEG header, or a damaged one (at byte {start})")
        segments.append((data[start + 1], start, end))
        start = end
    return segments


def _shorten(prefix: bytes) -> bytes:
    """Drop the application marker, and the Huffman tables where they are the standard's."""
    segments = _segments(prefix)
    tables = b"".join(prefix[start:end] for marker, start, end in segments if marker == _HUFFMAN)
    dropped = {_APPLICATION}
    if tables == _standard(read_jpeg_shape(prefix)[0]):
        dropped.add(_HUFFMAN)
    kept = [prefix[start:end] for marker, start, end in segments if marker not in dropped]
    return _START + b"".join(kept)


def _standard(channels: int) -> bytes:
    return _LUMA_TABLES if channels == 1 else _LUMA_TABLES + _CHROMA_TABLES
