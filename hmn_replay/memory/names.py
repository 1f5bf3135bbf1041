"""Names of classes in a file: JSON texts, compressed, where they take little of the budget."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hmn_replay.errors import DataError, MemoryFileError
from hmn_replay.memory.file import as_bytes

__all__ = ["affordable_names", "read_names", "stored_names", "stored_names_bytes"]

# Names are kept where they take no more than this share of the budget.
_NAMES_SHARE = 0.01
_MAX_NAMES_BYTES = 2**20


def affordable_names(
    class_names: Mapping[int, str], classes: Iterable[int], budget_bytes: int | None
) -> dict[int, str]:
    """Return the names of classes if they take 1 % of the budget at most, else none.

    Args:
        class_names: Label to name.
        classes: The labels of the classes, which may have no name.
        budget_bytes: Bytes of the memory's file; None for no bound.

    Raises:
        DataError: A name is no text that UTF-8 can hold.
    """
    labels = list(classes)
    names = {label: class_names[label] for label in labels if class_names.get(label)}
    limit = _MAX_NAMES_BYTES if budget_bytes is None else _NAMES_SHARE * budget_bytes
    is_short = len(_encoded_names(names, labels)) <= _MAX_NAMES_BYTES
    return names if is_short and stored_names_bytes(names, labels) <= limit else {}


def stored_names_bytes(class_names: Mapping[int, str], classes: Sequence[int]) -> int:
    """Return the bytes that the names of classes take in a file; 0 where none has one."""
    return sum(len(tensor) for tensor in stored_names(class_names, classes).values())


def stored_names(class_names: Mapping[int, str], classes: Sequence[int]) -> dict[str, Tensor]:
    """Return the tensor that holds the names of classes; none where no class has one.

    Raises:
        DataError: They take more than 1 MiB, or are no texts that UTF-8 can hold.
    """
    encoded = _encoded_names(class_names, classes)
    if not encoded:
        return {}
    if len(encoded) > _MAX_NAMES_BYTES:
        raise DataError(
            f"class names take {_MAX_NAMES_BYTES:,} bytes in all at most; these take "
            f"{len(encoded):,}: give shorter ones"
        )
    return {"names": as_bytes(zlib.compress(encoded, 9))}


def read_names(names: Tensor, num_classes: int) -> list[str]:
    """Return the names that a tensor of a file holds, empty ones for classes without.

    Raises:
        MemoryFileError: It holds no such number of texts.
    """
    if names.dtype != torch.uint8 or names.ndim != 1:
        raise MemoryFileError(f"tensor 'names' is {names.dtype} {tuple(names.shape)}")
    inflate = zlib.decompressobj()
    try:
        data = inflate.decompress(names.numpy().tobytes(), _MAX_NAMES_BYTES)
        found = json.loads(data)
    except (zlib.error, ValueError, RecursionError) as error:
        raise MemoryFileError(f"its class names cannot be read ({error})") from error
    texts = [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise MemoryFileError(f"its class names are not all of Unicode ({error})") from error
    if not len(texts) == len(found) == num_classes:
        raise MemoryFileError(f"its class names are not {num_classes} texts")
    return texts


def _encoded_names(class_names: Mapping[int, str], classes: Sequence[int]) -> bytes:
    """Return the names of classes as JSON, not compressed; nothing where none has one."""
    names = [class_names.get(label, "") for label in classes]
    for label, name in zip(classes, names, strict=True):
        try:
            if not isinstance(name, str):
                raise TypeError
            name.encode()
        except (TypeError, UnicodeEncodeError):
            raise DataError(
                f"class names are texts that UTF-8 can hold; that of label {label} is {name!r}: "
                "give another"
            ) from None
    return json.dumps(names, ensure_ascii=False).encode() if any(names) else b""
