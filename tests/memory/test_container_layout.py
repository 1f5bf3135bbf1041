"""What holds for the layouts of all containers: the size of the file, and what fits a budget."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.memory.container_layout import (
    FILE_VERSION,
    MAX_CLASSES,
    ContainerLayout,
    check_image_shape,
    check_num_classes,
    first_that_fits,
)
from hmn_replay.memory.file import serialise
from hmn_replay.memory.formats import PLAIN_FORMATS, NumberFormat
from hmn_replay.memory.haba import HaBaLayout
from hmn_replay.memory.layout import Layout
from hmn_replay.memory.linba import LinBaLayout
from hmn_replay.memory.pixels import IDCLayout, RawLayout
from hmn_replay.memory.registry import CONTAINERS, make_container, read_layout
from tests.support import LAYOUTS

every_container = pytest.mark.parametrize("container", CONTAINERS)

image_shapes = st.tuples(st.sampled_from([1, 3]), st.integers(8, 224), st.integers(8, 224))
few = st.integers(1, 6)


@st.composite
def layouts(draw: st.DrawFn, container: str) -> ContainerLayout:
    """Draw a layout whose images take few bytes."""
    number_format = draw(st.sampled_from(PLAIN_FORMATS))
    channels, *sides = draw(image_shapes)
    if container == "hmn":
        stride = draw(st.sampled_from([2, 4, 8, 16, 32]))
        # A grid of thousands of cells would make files of megabytes.
        height, width = (min(side, 12 * stride) for side in sides)
        decoder = tuple(draw(few) for _ in range(stride.bit_length() - 1))
        return Layout(
            (channels, height, width),
            number_format,
            stride,
            dataset_channels=draw(few),
            feature_channels=draw(few),
            class_channels=draw(few),
            instance_channels=draw(few),
            decoder_channels=decoder,
        )
    height, width = (min(side, 24) for side in sides)
    shape = (channels, height, width)
    if container == "idc":
        return IDCLayout(
            shape, number_format, draw(st.integers(2, min(8, height // 2, width // 2)))
        )
    if container == "haba":
        return HaBaLayout(shape, number_format, draw(few))
    if container == "linba":
        return LinBaLayout(shape, number_format, draw(st.integers(1, 40)), draw(st.integers(1, 8)))
    return RawLayout(shape, number_format)


@st.composite
def fitted(draw: st.DrawFn, container: str) -> tuple[ContainerLayout, int, int]:
    """Draw a layout, a number of classes and a budget that holds a group a class, and not much."""
    layout = draw(layouts(container))
    num_classes = draw(st.one_of(st.integers(1, 12), st.integers(1, MAX_CLASSES)))

    def needed(num_classes: int) -> int:
        return layout.file_bytes(num_classes, num_classes * layout.group_size, 10**6)

    num_classes = min(num_classes, max(1, 200_000 * num_classes // needed(num_classes)))
    extra_bytes = draw(st.one_of(st.integers(0, 300), st.integers(0, 60_000)))
    return layout, num_classes, needed(num_classes) + extra_bytes


def smallest_named(error: pytest.ExceptionInfo[BudgetError]) -> int:
    """Return the last number of bytes in the message: the smallest budget that would do."""
    return int(re.findall(r"([\d,]+) bytes", str(error.value))[-1].replace(",", ""))


@every_container
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_the_real_file_never_exceeds_its_budget_and_no_further_image_fits(
    container: str, data: st.DataObject
) -> None:
    layout, num_classes, budget = data.draw(fitted(container))
    size = layout.group_size
    num_images = layout.max_images(budget, num_classes)
    assert num_images % size == 0
    fair, extra = divmod(num_images // size, num_classes)
    counts = [size * (fair + (index < extra)) for index in range(num_classes)]
    assert counts[-1] > 0
    memory = make_container(layout, range(-5, num_classes - 5), counts)
    memory.budget_bytes = budget

    num_bytes = len(serialise(memory))

    assert num_bytes <= budget
    assert num_bytes == memory.file_bytes == layout.file_bytes(num_classes, num_images, budget)
    assert layout.file_bytes(num_classes, num_images + size, budget) > budget
    assert budget - num_bytes < layout.group_bytes + 40  # 40: of a header with one digit more

    groups = data.draw(st.sets(st.integers(0, num_images // size - 1), max_size=20))
    memory.keep([size * group + j for group in sorted(groups) for j in range(size)])
    assert len(serialise(memory)) == memory.file_bytes <= budget


@every_container
@settings(deadline=None)
@given(data=st.data(), num_classes=st.integers(1, MAX_CLASSES), budget=st.integers(1, 10**9))
def test_the_budget_named_as_the_smallest_does_and_a_byte_less_does_not(
    container: str, data: st.DataObject, num_classes: int, budget: int
) -> None:
    layout = data.draw(layouts(container))
    try:
        num_images = layout.max_images(budget, num_classes)
    except BudgetError:
        pass
    else:
        assert num_images >= num_classes * layout.group_size
        return
    group = "one image" if layout.group_size == 1 else rf"{layout.group_size} images, which .*,"
    with pytest.raises(BudgetError, match=f"{budget:,} bytes does not hold {group} of") as error:
        layout.max_images(budget, num_classes)
    smallest = smallest_named(error)
    assert smallest > budget
    assert layout.max_images(smallest, num_classes) >= num_classes
    with pytest.raises(BudgetError):
        layout.max_images(smallest - 1, num_classes)


@every_container
def test_every_budget_of_few_bytes_names_one_that_does(container: str) -> None:
    """The digits of the budget are in the header, so the answer may move as it is named."""
    layout = LAYOUTS[container]((1, 8, 8), "int8")
    for num_classes in range(1, 60):
        with pytest.raises(BudgetError) as error:
            layout.max_images(1, num_classes)
        smallest = smallest_named(error)
        assert layout.max_images(smallest, num_classes) >= num_classes
        with pytest.raises(BudgetError):
            layout.max_images(smallest - 1, num_classes)


@every_container
def test_a_budget_may_be_a_text(container: str) -> None:
    layout = LAYOUTS[container]((3, 8, 8), "int8")
    assert layout.max_images("120 KiB", 10) == layout.max_images(122_880, 10)


@every_container
@pytest.mark.parametrize("num_classes", [None, "4", 4.0, True, 0, -1, 1001])
def test_a_number_of_classes_that_cannot_be_is_refused(container: str, num_classes: Any) -> None:
    layout = LAYOUTS[container]((3, 8, 8), "int8")
    with pytest.raises(ConfigError, match="num_classes is 1 to 1000; got"):
        layout.max_images(20_000, num_classes)
    with pytest.raises(ConfigError, match="num_classes is 1 to 1000; got"):
        type(layout).choose(20_000, (3, 8, 8), num_classes)


def test_a_number_of_classes_may_be_numpys_and_have_another_name() -> None:
    assert type(check_num_classes(np.int64(4))) is int  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected_classes is 1 to 1000; got 0"):
        check_num_classes(0, "expected_classes")


# The file's metadata.


@every_container
@given(data=st.data(), budget=st.none() | st.integers(1, 10**15))
def test_metadata_is_read_back(container: str, data: st.DataObject, budget: int | None) -> None:
    layout = data.draw(layouts(container))
    text = layout.metadata(budget, "0123456789abcdef")
    assert text.startswith(f"{FILE_VERSION} 0123456789abcdef ")
    wanted = (layout, budget, "0123456789abcdef")
    assert type(layout).from_metadata(text) == read_layout(text) == wanted


WORDS = {
    "raw": ["raw 2", "raw raw", "raw "],
    "idc": ["idc", "idc 1", "idc 9", "idc 02", "idc 2.0", "idc 2,2", "idc 2 2", "idc -2", "idc x"],
    "haba": ["haba", "haba 0", "haba 65", "haba 05", "haba 5.0", "haba 5,5", "haba 5 5"],
    "linba": ["linba", "linba 4", "linba 4,0", "linba 0,2", "linba 4,2,1", "linba 1025,2"],
    "hmn": ["hmn", "hmn 4 3,2,2,2 5,4", "raw", "4 3,2,2,2", "xyz 3", ""],
}


@every_container
def test_words_that_no_layout_writes_are_value_errors(container: str) -> None:
    layout = LAYOUTS[container]((3, 8, 8), "int8")
    before = f"{FILE_VERSION} 0123456789abcdef 5000 int8 3,8,8"
    assert layout.metadata(5000, "0123456789abcdef").startswith(f"{before} ")
    for words in WORDS[container]:
        with pytest.raises(ValueError, match=r"."):
            type(layout).from_metadata(f"{before} {words}")


# Fields.


@every_container
def test_fields_are_brought_to_their_types(container: str) -> None:
    layout = LAYOUTS[container]((3, 8, 8), "int8")
    shape: Any = np.array([3, 8, 8])
    same = LAYOUTS[container](image_shape=shape, number_format="int8")
    assert same == layout
    assert hash(same) == hash(layout)
    assert all(type(side) is int for side in same.image_shape)


@every_container
@pytest.mark.parametrize(
    "shape",
    [(2, 8, 8), (3, 7, 8), (3, 8, 225), (3, 8), (3, 8, 8, 8), (True, 8, 8), (3, 8.0, 8), (), None],
)
def test_an_image_shape_out_of_range_is_refused(container: str, shape: Any) -> None:
    message = r"\(C, H, W\) with C 1 or 3 and H, W from 8 to 224; got"
    for refuse in (
        lambda: LAYOUTS[container](shape, "int8"),
        lambda: CONTAINERS[container].choose("1 MiB", shape, 2),
        lambda: check_image_shape(shape),
    ):
        with pytest.raises(ConfigError, match=message):
            refuse()


@every_container
def test_a_number_format_out_of_range_is_refused(container: str) -> None:
    with pytest.raises(ConfigError, match=r"number_format is one of float32, .*; got 'int4'"):
        LAYOUTS[container]((3, 8, 8), "int4")
    with pytest.raises(ConfigError, match=r"number_format is one of float32, .*; got 'int4'"):
        CONTAINERS[container].choose("1 MiB", (3, 8, 8), 2, "int4")  # type: ignore[arg-type]


# What choose promises, whatever it chooses.


@every_container
@settings(max_examples=30, deadline=None)
@given(
    shape=image_shapes,
    number_format=st.sampled_from(PLAIN_FORMATS),
    num_classes=st.integers(1, MAX_CLASSES),
    budget=st.integers(1, 500),
)
def test_choose_names_the_smallest_budget_that_does(
    container: str,
    shape: tuple[int, int, int],
    number_format: NumberFormat,
    num_classes: int,
    budget: int,
) -> None:
    choose = CONTAINERS[container].choose
    with pytest.raises(BudgetError, match="bytes") as error:
        choose(budget, shape, num_classes, number_format)
    smallest = smallest_named(error)
    layout = choose(smallest, shape, num_classes, number_format)
    assert (layout.image_shape, layout.number_format) == (shape, number_format)
    assert layout.max_images(smallest, num_classes) >= num_classes
    with pytest.raises(BudgetError) as error:
        choose(smallest - 1, shape, num_classes, number_format)
    assert smallest_named(error) == smallest


@every_container
@settings(max_examples=30, deadline=None)
@given(
    shape=image_shapes,
    number_format=st.sampled_from(PLAIN_FORMATS),
    num_classes=st.integers(1, MAX_CLASSES),
    factor=st.floats(1, 3000),
)
def test_choose_gives_a_layout_that_holds_each_class_at_any_budget_above(
    container: str,
    shape: Sequence[int],
    number_format: NumberFormat,
    num_classes: int,
    factor: float,
) -> None:
    choose = CONTAINERS[container].choose
    with pytest.raises(BudgetError) as error:
        choose(1, shape, num_classes, number_format)
    budget = math.ceil(factor * smallest_named(error))
    layout = choose(budget, list(shape), num_classes, number_format)
    assert layout == choose(budget, shape, num_classes, number_format)
    assert (layout.image_shape, layout.number_format) == (shape, number_format)
    num_images = layout.max_images(budget, num_classes)
    assert num_images >= num_classes
    assert layout.file_bytes(num_classes, num_images, budget) <= budget


def test_the_first_layout_that_fits_is_taken() -> None:
    large, middle, small = (HaBaLayout((3, 8, 8), "int8", count) for count in (9, 5, 2))
    enough = middle.file_bytes(3, 15, 10_000)
    assert first_that_fits([large, middle, small], enough, 3) is middle
    assert first_that_fits(iter([small, middle]), enough, 3) is small
    with pytest.raises(BudgetError, match="does not hold 2 images, which come together, of each"):
        first_that_fits([large, small], 100, 3)
