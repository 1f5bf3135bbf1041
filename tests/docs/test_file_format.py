"""The page on the file format: its reader, which knows nothing of this package, reads a file."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hmn_replay

PAGES = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def memory() -> hmn_replay.HierarchicalMemory:
    layout = hmn_replay.HierarchicalMemory.choose_layout("8 KiB", (3, 20, 12), 3)
    memory = hmn_replay.HierarchicalMemory(layout, [7, 300, 1], 4, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    memory.class_names = {7: "cat", 300: "dog"}
    return memory


def test_the_reader_of_the_page_reads_what_is_written(
    memory: hmn_replay.HierarchicalMemory,
) -> None:
    reader: dict[str, Any] = runpy.run_path(str(PAGES / "read_memory_file.py"))
    words, tensors = reader["read"](memory.to_bytes())
    assert words[:1] + words[2:4] + words[5:7] == ["2", "hmn", "12", "entropy", "3,20,12"]
    assert tensors["labels"].tolist() == [7, 300, 1]
    assert tensors["counts"].tolist() == [4, 4, 4]
    for name, values in reader["decode"](words, tensors).items():
        indices = torch.tensor([0, 4, 8]) if values.shape[0] == 3 else torch.arange(12)
        stored = memory.value(name, indices).detach().numpy()
        np.testing.assert_array_equal(values, stored, err_msg=name)
    images, _ = memory.decode()
    np.testing.assert_allclose(reader["images"](words, tensors), images.numpy(), atol=1e-5)


def test_the_reader_of_the_page_refuses_an_altered_file(
    memory: hmn_replay.HierarchicalMemory,
) -> None:
    reader: dict[str, Any] = runpy.run_path(str(PAGES / "read_memory_file.py"))
    data = bytearray(memory.to_bytes())
    data[-1] ^= 1
    with pytest.raises(AssertionError):
        reader["read"](bytes(data))


def test_the_page_names_every_kind_and_tensor(memory: hmn_replay.HierarchicalMemory) -> None:
    from hmn_replay.memory.base import MEMORIES

    page = (PAGES / "file-format.md").read_text()
    _, tensors = runpy.run_path(str(PAGES / "read_memory_file.py"))["read"](memory.to_bytes())
    missing = [name for name in (*MEMORIES, *tensors) if f"`{name}`" not in page]
    assert missing == []
