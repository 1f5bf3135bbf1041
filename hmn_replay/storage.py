"""The memory file: a safetensors file with one line of metadata and a digest of every byte.

Nothing in it is code, and nothing is believed before it is checked: the header's length, then the
layout that it names, then that the file has exactly the tensors and the size that this layout has,
then the digest. Only then are tensors read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from hmn_replay.errors import BudgetError, HMNReplayError, MemoryFileError, TrainingError
from hmn_replay.files import open_at_once, write_atomically
from hmn_replay.formats import NumberFormat, dequantise, quantise
from hmn_replay.layout import DIGEST_LENGTH, FILE_VERSION, METADATA_KEY, Layout
from hmn_replay.memory import HierarchicalMemory
from hmn_replay.runtime import resolve_device

__all__ = ["deserialise", "load", "save_memory", "serialise"]

_MAX_HEADER_BYTES = 2**16
# A trained memory stays below 100.
_MAX_MAGNITUDE = 1e4
# Near the end of float32; what is saved stays so far below that rounding cannot keep it from being
# loaded.
_MAX_SUM_LOADED, _MAX_SUM_SAVED = 1e37, 1e36


def serialise(memory: HierarchicalMemory) -> bytes:
    """Return the bytes of the memory's file.

    Raises:
        TrainingError: A value is not finite, or is beyond 10,000, or the values together could take
            an image out of float32.
    """
    layout = memory.layout
    digest = "0" * DIGEST_LENGTH
    tensors = _stored_tensors(memory)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_tame(tensor):
            raise TrainingError(
                f"the memory's {name} hold values that are not finite or beyond "
                f"{_MAX_MAGNITUDE:,.0f}: its training diverged; lower the learning rate"
            )
    if not _largest_sum(memory) <= _MAX_SUM_SAVED:
        raise TrainingError(
            "the memory's values are so large that decoding could leave float32: its training "
            "diverged; lower the learning rate"
        )
    metadata = {METADATA_KEY: layout.metadata(memory.budget_bytes, digest)}
    data = safetensors.torch.save(tensors, metadata)
    position = data.index(digest.encode())
    hexadecimal = _digest(data[:position], data[position + DIGEST_LENGTH :])
    return data[:position] + hexadecimal.encode() + data[position + DIGEST_LENGTH :]


def save_memory(memory: HierarchicalMemory, path: str | Path) -> None:
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


def load(path: str | Path, *, device: str | torch.device = "cpu") -> HierarchicalMemory:
    """Read a memory file.

    What the memory decodes to is bit for bit what it was when it was saved, on the same kind of
    device. Reading takes memory in proportion to the file's size, whatever the file says.

    Args:
        path: A file that :meth:`HierarchicalMemory.save` wrote.
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


def deserialise(data: bytes, *, device: str | torch.device = "cpu") -> HierarchicalMemory:
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


def _read(file: BinaryIO, num_bytes: int) -> HierarchicalMemory:
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
    layout, budget_bytes, digest = Layout.from_metadata(text)
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


def _check_header(header: bytes, layout: Layout, budget_bytes: int | None, num_bytes: int) -> int:
    """Check that the header lists just what the layout has; return the number of images."""
    content = json.loads(header)
    try:
        (num_classes,) = content["labels"]["shape"]
        num_images: int = content["instances"]["shape"][0]
        for name, count, least in (("labels", num_classes, 1), ("instances", num_images, 0)):
            if type(count) is not int or count < least:
                raise MemoryFileError(f"it has {count!r} {name}")
        specs = layout.tensors(num_classes, num_images)
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
    expected = layout.file_bytes(num_classes, num_images, budget_bytes)
    if num_bytes != expected:
        what = "truncated" if num_bytes < expected else "followed by bytes that are not its own"
        raise MemoryFileError(f"it is {what}: {num_bytes:,} bytes instead of {expected:,}")
    return num_images


def _parameters(memory: HierarchicalMemory) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each stored tensor's latent values and their scales, but for decoder and biases."""
    return {
        "dataset": (memory.dataset_memory, memory.dataset_scale),
        "classes": (memory.class_memory, memory.class_scale),
        "extractors": (memory.extractor_weight, memory.extractor_scale),
        "instances": (memory.instance_memory, memory.instance_scale[memory.class_index]),
    }


def _scales(memory: HierarchicalMemory) -> list[Tensor]:
    return [
        memory.dataset_scale,
        memory.class_scale,
        memory.extractor_scale,
        memory.instance_scale,
        memory.decoder_scale,
    ]


def _biases(memory: HierarchicalMemory) -> list[Tensor]:
    return [memory.extractor_bias, *memory.decoder_biases]


@torch.no_grad()
def _stored_tensors(memory: HierarchicalMemory) -> dict[str, Tensor]:
    layout = memory.layout
    number_format: NumberFormat = layout.number_format
    tensors = {
        "labels": memory.classes,
        "counts": torch.tensor(memory.images_per_class, dtype=torch.int32),
        "decoder": torch.cat(
            [
                quantise(weight, number_format, scale).flatten()
                for weight, scale in zip(memory.decoder_weights, memory.decoder_scale, strict=True)
            ]
        ),
        "biases": quantise(
            torch.cat([bias.flatten() for bias in _biases(memory)]), layout.bias_format
        ),
    }
    for name, (latent, scale) in _parameters(memory).items():
        tensors[name] = quantise(latent, number_format, scale)
    if number_format == "int8":
        tensors["scales"] = torch.cat([scale.flatten() for scale in _scales(memory)])
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def _restore(
    layout: Layout,
    budget_bytes: int | None,
    num_images: int,
    tensors: dict[str, Tensor],
) -> HierarchicalMemory:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_tame(tensor):
            raise MemoryFileError(f"its {name} hold values that are not finite or far too large")
    counts = tensors["counts"].to(torch.int64)
    if int(counts.min()) < 0 or int(counts.sum()) != num_images:
        raise MemoryFileError("its images a class do not add up to its instance memories")
    memory = HierarchicalMemory(layout, tensors["labels"], counts.tolist())
    memory.budget_bytes = budget_bytes
    if layout.number_format == "int8":
        if float(tensors["scales"].min()) < 1e-9:
            raise MemoryFileError("a scale is not positive")
        scales = _scales(memory)
        for scale, values in zip(
            scales, tensors["scales"].split([s.numel() for s in scales]), strict=True
        ):
            scale.copy_(values.view_as(scale))
    for name, (latent, scale) in _parameters(memory).items():
        latent.copy_(dequantise(tensors[name], scale if layout.number_format == "int8" else None))
    weights = list(memory.decoder_weights)
    for weight, scale, values in zip(
        weights,
        memory.decoder_scale,
        tensors["decoder"].split([w.numel() for w in weights]),
        strict=True,
    ):
        stored = values.view_as(weight)
        weight.copy_(dequantise(stored, scale if layout.number_format == "int8" else None))
    biases = _biases(memory)
    for bias, values in zip(
        biases, tensors["biases"].split([b.numel() for b in biases]), strict=True
    ):
        bias.copy_(values.view_as(bias))
    if not _largest_sum(memory) <= _MAX_SUM_LOADED:
        raise MemoryFileError("its values are so large that decoding could leave float32")
    return memory


def _is_tame(values: Tensor) -> bool:
    # A comparison with NaN is false, so NaN is not tame either.
    return bool((values.abs() <= _MAX_MAGNITUDE).all())


@torch.no_grad()
def _largest_sum(memory: HierarchicalMemory) -> float:
    """Return what nothing in the decoder can exceed, by the triangle inequality."""
    dataset = float(memory.dataset_memory.abs().max())
    rows = memory.extractor_weight.double().abs().sum(dim=2)
    bound = float((rows * dataset + memory.extractor_bias.abs()).max())
    for tier in (memory.class_memory, memory.instance_memory):
        bound = max(bound, float(tier.abs().max())) if len(tier) else bound
    largest = bound
    for weight, bias in zip(memory.decoder_weights, memory.decoder_biases, strict=True):
        rows = weight.double().abs().sum(dim=(1, 2, 3))
        bound = float((rows * bound + bias.abs()).max())
        largest = max(largest, bound)
    return largest


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_LENGTH // 2)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
