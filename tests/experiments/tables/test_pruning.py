"""What is read back of a memory that holds too much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.tables.pruning import pruned
from hmn_replay.memory.hierarchical import HierarchicalMemory, HMNLayout


@pytest.mark.parametrize(
    ("beta", "stays"), [(0.0, [0, 2, 4, 5]), (0.5, [0, 3, 4, 7]), (1.0, [1, 3, 6, 7])]
)
def test_the_hardest_and_the_easiest_of_each_class_go(
    make_layout: Callable[..., HMNLayout], tmp_path: Path, beta: float, stays: list[int]
) -> None:
    memory = HierarchicalMemory(make_layout("float32"), [3, 8], 4)
    path = tmp_path / "rate50.hmn"
    memory.save(path)
    # By score: images 2, 0, 3, 1 of class 3, and 5, 4, 7, 6 of class 8.
    scores = np.array([0.2, 0.9, 0.1, 0.5, -2.0, -3.0, 4.0, 0.0], np.float32)
    np.savez(path.with_suffix(".npz"), scores=scores, num_drop=2)
    images, labels = memory.decode(stays)
    found, found_labels = pruned(path, beta).decode()
    assert found.equal(images) and found_labels.equal(labels)
    assert labels.tolist() == [3, 3, 8, 8]


def test_without_a_beta_all_stay(make_layout: Callable[..., HMNLayout], tmp_path: Path) -> None:
    memory = HierarchicalMemory(make_layout("float32"), [3, 8], 4)
    memory.save(tmp_path / "rate0.hmn")
    assert torch.equal(pruned(tmp_path / "rate0.hmn", None).decode()[0], memory.decode()[0])
