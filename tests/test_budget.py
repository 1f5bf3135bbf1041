"""Budgets as a person writes them, and as papers count them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmn_replay.budget import Budget, as_int, largest, smallest
from hmn_replay.errors import BudgetError

UNITS = {
    "": 1,
    "B": 1,
    "kB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("120 KiB", 122_880),
        ("120KiB", 122_880),
        ("122880", 122_880),
        ("122880B", 122_880),
        ("  120\tkib ", 122_880),
        ("120 KIB", 122_880),
        ("1.5MB", 1_500_000),
        ("0.5 KiB", 512),
        ("1.999 B", 1),
        ("007 kB", 7000),
        ("2 GiB", 2**31),
        # 1.005 * 1000 is 1004.99... in floating point.
        ("1.005 kB", 1005),
    ],
)
def test_parse_reads_what_a_person_writes(text: str, expected: int) -> None:
    assert Budget.parse(text).num_bytes == expected


@given(
    st.decimals(Decimal("1"), Decimal(10**9), places=3, allow_nan=False),
    st.sampled_from(sorted(UNITS)),
    st.sampled_from(["", " "]),
)
def test_parse_drops_the_fraction_of_a_byte_and_nothing_else(
    number: Decimal, unit: str, space: str
) -> None:
    assert Budget.parse(f"{number}{space}{unit}").num_bytes == int(number * UNITS[unit])


def test_parse_takes_a_number_or_a_budget() -> None:
    budget = Budget(77)
    assert Budget.parse(budget) is budget
    assert Budget.parse(77) == budget


@pytest.mark.parametrize(
    "text",
    ["", " ", "KiB", "12 parsecs", "1,5 MB", "-3", "+3", "1e6", ".5 kB", "5. kB", "1 2", "nan"],
)
def test_parse_refuses_other_texts_and_shows_how(text: str) -> None:
    with pytest.raises(BudgetError, match=r"cannot read .* as a budget: .* such as '120 KiB'"):
        Budget.parse(text)


@given(st.text(max_size=12))
def test_parse_reads_any_text_or_raises_its_own_error(text: str) -> None:
    with contextlib.suppress(BudgetError):
        assert Budget.parse(text).num_bytes >= 1


@pytest.mark.parametrize("text", ["9" * 5000, "9" * 400 + ".5", "1." + "3" * 5000])
def test_parse_refuses_numbers_of_thousands_of_digits(text: str) -> None:
    with pytest.raises(BudgetError, match="cannot read"):
        Budget.parse(text)


@pytest.mark.parametrize("value", [0, -5, "0", "0.9 B"])
def test_a_budget_below_a_byte_is_refused(value: int | str) -> None:
    with pytest.raises(BudgetError, match=r"1 byte or more, got (0|-5)"):
        Budget.parse(value)


@pytest.mark.parametrize("value", [1.5, 3.0, True, None, [3], b"3"])
def test_a_budget_that_is_no_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(BudgetError, match="whole number of bytes"):
        Budget.parse(value)


def test_ipc_is_the_papers_rule_in_bytes() -> None:
    assert Budget.ipc(1, (3, 32, 32), 10).num_floats == 30_720
    assert Budget.ipc(1, (3, 32, 32), 10).num_bytes == 122_880
    assert Budget.ipc(1, (3, 32, 32), 100).num_floats == 307_200
    assert Budget.ipc(1, (3, 64, 64), 200).num_floats == 2_457_600
    assert Budget.ipc(50, (1, 28, 28), 10).num_floats == 392_000


def test_raw_images_are_a_byte_a_value() -> None:
    assert Budget.raw_images(500, (3, 32, 32)).num_bytes == 1_536_000


@pytest.mark.parametrize("count", [0, -1, 1.0, True])
def test_counts_are_whole_numbers_of_1_or_more(count: Any) -> None:
    with pytest.raises(BudgetError, match=f"images_per_class is .* 1 or more, got {count}"):
        Budget.ipc(count, (3, 32, 32), 10)
    with pytest.raises(BudgetError, match=f"num_classes is .* 1 or more, got {count}"):
        Budget.ipc(1, (3, 32, 32), count)
    with pytest.raises(BudgetError, match=f"num_images is .* 1 or more, got {count}"):
        Budget.raw_images(count, (3, 32, 32))


@pytest.mark.parametrize("shape", [(32, 32), (3, 32, 0), (3, 32, 32, 1), (3, 32.0, 32), ()])
def test_an_image_shape_is_three_positive_integers(shape: Any) -> None:
    with pytest.raises(BudgetError, match=r"\(C, H, W\), three positive integers, got \("):
        Budget.ipc(1, shape, 10)
    with pytest.raises(BudgetError, match=r"\(C, H, W\)"):
        Budget.raw_images(1, shape)


def test_a_budget_reads_well_compares_and_does_not_change() -> None:
    assert str(Budget(122_880)) == "122,880 bytes"
    assert Budget(5) == Budget(5) != Budget(6)
    assert len({Budget(5), Budget(5)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget(5).num_bytes = 6  # type: ignore[misc]


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor])
def test_integers_of_other_libraries_are_integers(kind: Callable[[int], Any]) -> None:
    for budget in (Budget(kind(77)), Budget.parse(kind(77))):
        assert budget == Budget(77)
        assert type(budget.num_bytes) is int
    shape = (kind(3), kind(8), kind(9))
    assert Budget.ipc(kind(2), shape, kind(5)) == Budget.ipc(2, (3, 8, 9), 5)
    assert Budget.raw_images(kind(200), shape) == Budget.raw_images(200, (3, 8, 9))
    assert repr(Budget(kind(77))) == repr(Budget(77))
    with pytest.raises(BudgetError, match="1 byte or more, got 0"):
        Budget(kind(0))


def test_bytes_do_not_wrap_around_in_small_integers() -> None:
    num_images: Any = np.int32(30_000)
    shape: Any = np.array([3, 224, 224], dtype=np.int32)
    assert Budget.raw_images(num_images, shape).num_bytes == 30_000 * 3 * 224 * 224


@pytest.mark.parametrize(
    "value",
    [True, np.True_, 3.0, np.float64(3), "3", None, np.array([3, 4]), torch.tensor([3.0])],
    ids=repr,
)
def test_what_is_no_integer_is_none(value: object) -> None:
    assert as_int(value) is None
    with pytest.raises(BudgetError, match="whole number"):
        Budget(value)  # type: ignore[arg-type]


def test_num_floats_rounds_down() -> None:
    assert [Budget(n).num_floats for n in (3, 4, 7, 8)] == [0, 1, 1, 2]


@pytest.mark.parametrize("shape", [None, 3, (3, None, 8)])
def test_what_is_no_shape_is_refused(shape: Any) -> None:
    with pytest.raises(BudgetError, match=r"an image shape is \(C, H, W\)"):
        Budget.ipc(1, shape, 10)


@given(st.integers(-20, 20), st.integers(0, 30), st.integers(-30, 60))
def test_the_largest_number_that_fits_is_found(low: int, span: int, limit: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= limit

    high = low + span
    assert largest(low, high, fits) == max(low, min(high, limit))
    assert all(low < number <= high for number in asked)


@given(st.floats(-5, 5), st.floats(0.1, 9), st.floats(0, 1))
def test_the_smallest_number_that_fits_is_found(low: float, span: float, share: float) -> None:
    high, limit = low + span, low + share * span

    def fits(number: float) -> bool:
        assert low < number < high
        return number >= limit

    found = smallest(low, high, fits, 20)
    assert limit - 1e-9 <= found <= min(high, limit + span / 2**19)
