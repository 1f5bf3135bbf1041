"""The size that is computed is the size that safetensors writes."""

from __future__ import annotations

import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmn_replay.memory.filesize import TensorSpec, file_size

DTYPES = {
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "I8": torch.int8,
}
SPECS = st.builds(
    TensorSpec,
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 7), max_size=4).map(tuple),
)
NAMES = st.text("abcxyz._019", min_size=1, max_size=12)


@given(st.dictionaries(NAMES, SPECS, min_size=1, max_size=8), st.text(max_size=30))
def test_is_what_safetensors_writes(specs: dict[str, TensorSpec], text: str) -> None:
    tensors = {n: torch.zeros(spec.shape, dtype=DTYPES[spec.dtype]) for n, spec in specs.items()}
    written = safetensors.torch.save(tensors, {"key": text})
    assert file_size(specs, {"key": text}) == len(written)


def test_counts_the_bytes_of_values() -> None:
    assert TensorSpec("F16", (3, 5)).num_bytes == 30
    assert TensorSpec("I64", ()).num_bytes == 8
