"""The exact size of a safetensors file, from the shapes of its tensors alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["TensorSpec", "file_size"]

# In the order of the file: the most strictly aligned types first.
_ITEM_BYTES = {"I64": 8, "F32": 4, "I32": 4, "F16": 2, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class TensorSpec:
    """The shape and the safetensors data type (``"I8"``, ``"F32"``, ...) of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's values."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def file_size(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> int:
    """Return the bytes of the file that ``safetensors.torch.save`` makes of such tensors.

    Eight bytes of length, a JSON header filled up with spaces to a multiple of eight, the values.

    Args:
        specs: Name to type and shape of each tensor.
        metadata: The texts in the header.
    """
    order = list(_ITEM_BYTES)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in sorted(specs.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        end = offset + spec.num_bytes
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (offset, end)}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + 8 * math.ceil(length / 8) + offset
