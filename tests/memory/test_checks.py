"""Labels, positions and counts that users give: what is read, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hmn_replay.errors import ConfigError
from hmn_replay.memory.checks import check_classes, check_counts, check_groups, check_indices


@pytest.mark.parametrize(
    "classes", [[7, -3], (7, -3), np.array([7, -3]), torch.tensor([7, -3]), [np.int8(7), -3]]
)
def test_labels_of_any_kind_become_a_list(classes: Any) -> None:
    found = check_classes(classes)
    assert found == [7, -3]
    assert all(type(label) is int for label in found)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "1 to 1000 classes; got 0"),
        (range(1001), "1 to 1000 classes; got 1001"),
        ([1, 2, 1], "classes come once each"),
        ([1.0, 2.0], r"classes are integers of 64 bits; got \[1.0, 2.0\]"),
        (["cat"], "classes are integers"),
        ([True, False], "classes are integers"),
        (torch.tensor([0.5]), "classes are integers"),
        (5, "classes are a sequence of integers"),
        (None, "classes are a sequence of integers"),
        (torch.tensor(5), "classes are a sequence of integers"),
        ([0, 2**63], r"integers of 64 bits; got \[0, 9223372036854775808\]"),
        ([-(2**63) - 1], "integers of 64 bits"),
        (np.array([2**63], dtype=np.uint64), "integers of 64 bits"),
    ],
)
def test_what_are_no_labels_is_refused(classes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_classes(classes)


@pytest.mark.parametrize(
    "indices", [[4, 0, 4], (4, 0, 4), np.array([4, 0, 4], dtype=np.int32), torch.tensor([4, 0, 4])]
)
def test_positions_of_any_kind_become_a_tensor(indices: Any) -> None:
    found = check_indices(indices, 5)
    assert found.dtype == torch.int64
    assert found.tolist() == [4, 0, 4]


def test_no_position_at_all_is_fine() -> None:
    assert check_indices([], 0).tolist() == []
    assert check_indices([], 0).dtype == torch.int64


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 6], "positions from 0 to 5; got 0 to 6"),
        ([-1, 2], "positions from 0 to 5; got -1 to 2"),
        ([0.0, 1.5], r"indices are integers; got torch\.float32"),
        ([True, False], r"indices are integers; got torch\.bool: pass mask\.nonzero"),
        (None, "indices are integers; got None"),
        ("01", "indices are integers; got '01'"),
    ],
)
def test_what_are_no_positions_is_refused(indices: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_indices(indices, 6)


@pytest.mark.parametrize(
    ("indices", "group_size", "groups"),
    [
        ([], 3, []),
        ([0, 2, 5], 1, [0, 2, 5]),
        ([0, 1, 2], 3, [0]),
        ([3, 4, 5, 9, 10, 11], 3, [1, 3]),
    ],
)
def test_whole_groups_are_named(indices: list[int], group_size: int, groups: list[int]) -> None:
    found = check_groups(torch.tensor(indices, dtype=torch.int64), group_size)
    assert found.dtype == torch.int64
    assert found.tolist() == groups


@pytest.mark.parametrize("indices", [[0], [0, 1], [1, 2, 3], [0, 1, 3], [0, 1, 2, 3], [2, 3, 4]])
def test_parts_of_groups_are_refused(indices: list[int]) -> None:
    with pytest.raises(ConfigError, match="groups of 3 that share stored values, and stay or go"):
        check_groups(torch.tensor(indices), 3)


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        (4, [4, 4]),
        (0, [0, 0]),
        (np.int64(2), [2, 2]),
        (torch.tensor(2), [2, 2]),
        ([4, 0], [4, 0]),
        (np.array([2, 6]), [2, 6]),
    ],
)
def test_one_count_is_for_all_classes(counts: Any, found: list[int]) -> None:
    assert check_counts(counts, 2, 2) == found


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (1.0, "integer of 0 or more, or 2 of them; got 1.0"),
        (True, "integer of 0 or more, or 2 of them; got True"),
        (None, "integer of 0 or more, or 2 of them; got None"),
        (-1, "integer of 0 or more, or 2 of them; got -1"),
        ([1], r"or 2 of them; got \[1\]"),
        ([1, -1], r"or 2 of them; got \[1, -1\]"),
        ([1, 1.5], r"or 2 of them; got \[1, 1.5\]"),
        ([2, 3], r"groups of 2 that share stored values; .* is a multiple of that; got \[2, 3\]"),
        (1, "images come in groups of 2"),
    ],
)
def test_what_are_no_counts_is_refused(counts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_counts(counts, 2, 2)
