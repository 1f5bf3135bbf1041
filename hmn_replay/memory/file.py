"""The memory file: a safetensors file with one line of metadata and a digest of every byte.

Nothing in it is code, and nothing is believed before it is checked: the header's length, then the
layout that it names, then that the file has exactly the tensors and the size that this layout has,
then the digest. Only then are tensors read.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from hmn_replay.errors import BudgetError, HMNReplayError, MemoryFileError, TrainingError
from hmn_replay.files import open_at_once, write_atomically
from hmn_replay.memory.base import Container
from hmn_replay.memory.container_layout import (
    DIGEST_LENGTH,
    FILE_VERSION,
    METADATA_KEY,
    ContainerLayout,
)
from hmn_replay.memory.entropy import NUM_LEVELS, decode, encode, least_bits
from hmn_replay.memory.formats import Stored, dequantise, quantise
from hmn_replay.memory.registry import make_container, read_layout
from hmn_replay.runtime import resolve_device

__all__ = ["deserialise", "load", "save_memory", "serialise"]

_MAX_HEADER_BYTES = 2**16
# A trained memory stays below 100.
_MAX_MAGNITUDE = 1e4
# Near the end of float32; what is saved stays so far below that rounding cannot keep it from being
# loaded.
_MAX_SUM_LOADED, _MAX_SUM_SAVED = 1e37, 1e36


def serialise(memory: Container) -> bytes:
    """Return the bytes of the memory's file.

    Raises:
        TrainingError: A value is not finite, or is beyond 10,000, or the values together could take
            an image out of float32.
    """
    layout = memory.layout
    digest = "0" * DIGEST_LENGTH
    tensors = _stored_tensors(memory)
    # Integers do not show it, int8's scales and what codes are made of do.
    floats = {name: [tensor] for name, tensor in tensors.items() if tensor.is_floating_point()}
    if layout.is_coded:
        floats |= {name: [part.latent for part in parts] for name, parts in memory.stored().items()}
    for name, values in floats.items():
        if not all(map(_is_tame, values)):
            raise TrainingError(
                f"the memory's {name} hold values that are not finite or beyond "
                f"{_MAX_MAGNITUDE:,.0f}: its training diverged; lower the learning rate"
            )
    if not memory.largest_sum() <= _MAX_SUM_SAVED:
        raise TrainingError(
            "the memory's values are not finite, or so large that decoding could leave float32: "
            "its training diverged; lower the learning rate"
        )
    metadata = {METADATA_KEY: layout.metadata(memory.budget_bytes, digest)}
    data = safetensors.torch.save(tensors, metadata)
    position = data.index(digest.encode())
    hexadecimal = _digest(data[:position], data[position + DIGEST_LENGTH :])
    return data[:position] + hexadecimal.encode() + data[position + DIGEST_LENGTH :]


def save_memory(memory: Container, path: str | Path) -> None:
    """Write a memory to ``path``, all at once or not at all.

    Raises:
        BudgetError: The file would be over the memory's budget; nothing is written.
        TrainingError: As :func:`serialise`.
    """
    data = serialise(memory)
    if memory.budget_bytes is not None and len(data) > memory.budget_bytes:
        raise BudgetError(
            f"the memory takes {len(data):,} bytes, over its budget of {memory.budget_bytes:,}; "
            "drop images with keep() first"
        )
    write_atomically(path, data)


def load(path: str | Path, *, device: str | torch.device = "cpu") -> Container:
    """Read a memory file.

    What the memory decodes to is bit for bit what it was when it was saved, on the same kind of
    device. Reading takes memory in proportion to the file's size, whatever the file says.

    Args:
        path: A file that :meth:`Container.save` wrote.
        device: Where the tensors go; ``"auto"`` is the best device present.

    Raises:
        MemoryFileError: The file is not a memory file, is truncated or altered, or has a version
            that this package does not read.
        OSError: The file is absent or cannot be read.
    """
    target = resolve_device(device)
    with open(path, "rb", opener=open_at_once) as file:
        try:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise MemoryFileError("not a regular file")
            memory = _read(file, status.st_size)
        except (HMNReplayError, safetensors.SafetensorError, ValueError) as error:
            raise MemoryFileError(f"cannot read {os.fspath(path)!r}: {error}") from error
    return memory.to(target)


def deserialise(data: bytes, *, device: str | torch.device = "cpu") -> Container:
    """Read the bytes of a memory file: the inverse of :func:`serialise`, with every check.

    Args:
        data: The bytes.
        device: As in :func:`load`.

    Raises:
        MemoryFileError: As :func:`load`.
    """
    target = resolve_device(device)
    try:
        memory = _read(io.BytesIO(data), len(data))
    except (HMNReplayError, safetensors.SafetensorError, ValueError) as error:
        raise MemoryFileError(f"cannot read the bytes of a memory: {error}") from error
    return memory.to(target)


def _read(file: BinaryIO, num_bytes: int) -> Container:
    prefix = file.read(8)
    header_length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or header_length > num_bytes - 8:
        raise MemoryFileError(
            f"not a memory file, or a truncated one: {num_bytes} bytes do not hold the header "
            "that they announce"
        )
    if header_length > _MAX_HEADER_BYTES:
        raise MemoryFileError(
            f"not a memory file: a header of {header_length:,} bytes, over {_MAX_HEADER_BYTES:,}"
        )
    header = file.read(header_length)
    text = _metadata(header)
    layout, budget_bytes, digest = read_layout(text)
    num_images = _check_header(header, layout, budget_bytes, num_bytes)
    data = file.read(num_bytes - 8 - header_length)
    before, found, after = header.partition(digest.encode())
    if not found or _digest(prefix + before, after + data) != digest:
        raise MemoryFileError(
            "its digest does not fit its content: the file was altered or damaged; write it again"
        )
    tensors = safetensors.torch.load(prefix + header + data)
    return _restore(layout, budget_bytes, num_images, tensors)


def _metadata(header: bytes) -> str:
    try:
        content = json.loads(header)
        text = content["__metadata__"][METADATA_KEY]
        version = int(text.split(" ", 1)[0])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MemoryFileError("not a memory file: its header is not hmn_replay's") from error
    if version != FILE_VERSION:
        raise MemoryFileError(
            f"file version {version}; this version of hmn_replay reads version {FILE_VERSION}: "
            "install the version that wrote the file, or condense again"
        )
    assert isinstance(text, str)
    return text


def _check_header(
    header: bytes, layout: ContainerLayout, budget_bytes: int | None, num_bytes: int
) -> int:
    """Check that the header lists just what the layout has; return the number of images.

    That of an entropy-coded memory is not in the header: 0 stands for it.
    """
    content = json.loads(header)
    per_image = "code" if layout.is_coded else layout.per_image
    try:
        (num_classes,) = content["labels"]["shape"]
        num_rows = content[per_image]["shape"][0]
        for name, count, least in (("labels", num_classes, 1), (per_image, num_rows, 0)):
            if type(count) is not int or count < least:
                raise MemoryFileError(f"it has {count!r} {name}")
        code_bytes: int | None = num_rows if layout.is_coded else None
        num_images: int = 0 if layout.is_coded else num_rows * layout.group_size
        specs = layout.file_tensors(num_classes, num_images, code_bytes)
        for name, spec in specs.items():
            entry = content[name]
            if entry["dtype"] != spec.dtype or tuple(entry["shape"]) != spec.shape:
                raise MemoryFileError(
                    f"tensor {name!r} is {entry['dtype']} {tuple(entry['shape'])}, but the layout "
                    f"has {spec.dtype} {spec.shape}"
                )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise MemoryFileError(f"its tensors are not those of a memory ({error!r})") from error
    if extra := set(content) - set(specs) - {"__metadata__"}:
        raise MemoryFileError(f"tensors that no memory has: {sorted(extra)[:5]}")
    expected = layout.file_bytes(num_classes, num_images, budget_bytes, code_bytes)
    if num_bytes != expected:
        what = "truncated" if num_bytes < expected else "followed by bytes that are not its own"
        raise MemoryFileError(f"it is {what}: {num_bytes:,} bytes instead of {expected:,}")
    return num_images


@torch.no_grad()
def _stored_tensors(memory: Container) -> dict[str, Tensor]:
    specs = memory.layout.tensors(memory.num_classes, memory.num_images)
    tensors = {
        "labels": memory.classes,
        "counts": torch.tensor(memory.images_per_class, dtype=torch.int32),
    }
    for name, parts in memory.stored().items():
        if name in specs:
            rounded = [quantise(*part[:3]).flatten() for part in parts]
            tensors[name] = torch.cat(rounded).view(specs[name].shape)
    if "code" in specs:
        coded = memory.coded()
        tensors["levels"] = torch.cat([levels.flatten() for _, levels in coded])
        tensors["code"] = torch.frombuffer(bytearray(encode(coded)), dtype=torch.uint8)
    if "scales" in specs:
        tensors["scales"] = torch.cat([scale.flatten() for scale in memory.scales()])
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def _restore(
    layout: ContainerLayout,
    budget_bytes: int | None,
    num_images: int,
    tensors: dict[str, Tensor],
) -> Container:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_tame(tensor):
            raise MemoryFileError(f"its {name} hold values that are not finite or far too large")
    counts = tensors["counts"].to(torch.int64)
    if layout.is_coded:
        num_images = int(counts.sum())
        _check_code(layout, num_images, tensors)
    if int(counts.min()) < 0 or int(counts.sum()) != num_images:
        raise MemoryFileError(f"its images a class do not add up to its {num_images} images")
    memory = make_container(layout, tensors["labels"], counts.tolist())
    memory.budget_bytes = budget_bytes
    if "scales" in tensors:
        if float(tensors["scales"].min()) < 1e-9:
            raise MemoryFileError("a scale is not positive")
        _copy(tensors["scales"], memory.scales())
    parts = memory.stored()
    if layout.is_coded:
        coded = [part for name in parts if name not in tensors for part in parts[name]]
        for part, integers in zip(coded, _decode(coded, tensors), strict=True):
            part.latent.copy_(dequantise(integers, part.scale))
    for name in parts.keys() & tensors.keys():
        sizes = [part.latent.numel() for part in parts[name]]
        for part, values in zip(parts[name], tensors[name].flatten().split(sizes), strict=True):
            scale = part.scale if part.number_format == "int8" else None
            part.latent.copy_(dequantise(values.view_as(part.latent), scale))
    if not memory.largest_sum() <= _MAX_SUM_LOADED:
        raise MemoryFileError("its values are so large that decoding could leave float32")
    return memory


def _check_code(layout: ContainerLayout, num_images: int, tensors: dict[str, Tensor]) -> None:
    """Check that a code can hold so many images, before there is room for them."""
    if int(tensors["levels"].max()) >= NUM_LEVELS:
        raise MemoryFileError(f"a level is {NUM_LEVELS} or more")
    shapes = layout.shapes(len(tensors["labels"]), num_images)
    sizes = [sum(map(math.prod, level_shapes)) for level_shapes in layout.level_shapes.values()]
    least = 0.0
    for name, levels in zip(layout.level_shapes, tensors["levels"].split(sizes), strict=True):
        least += math.prod(shapes[name]) * float(least_bits(levels).min())
    if least > 8 * len(tensors["code"]):
        raise MemoryFileError(
            f"its code of {len(tensors['code']):,} bytes is too short for {num_images:,} images"
        )


def _decode(coded: Sequence[Stored], tensors: dict[str, Tensor]) -> list[Tensor]:
    shapes = [part.levels.shape for part in coded if part.levels is not None]
    flat = tensors["levels"].split([math.prod(shape) for shape in shapes])
    levels = [own.view(shape) for own, shape in zip(flat, shapes, strict=True)]
    sizes = [part.latent.shape for part in coded]
    return decode(tensors["code"].numpy().tobytes(), list(zip(sizes, levels, strict=True)))


def _copy(values: Tensor, targets: list[Tensor]) -> None:
    for target, own in zip(targets, values.split([t.numel() for t in targets]), strict=True):
        target.copy_(own.view_as(target))


def _is_tame(values: Tensor) -> bool:
    # A comparison with NaN is false, so NaN is not tame either.
    return bool((values.abs() <= _MAX_MAGNITUDE).all())


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_LENGTH // 2)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
