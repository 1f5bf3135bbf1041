"""Shapes of the tiers, the size of the file, and what fits a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmn_replay.errors import ConfigError
from hmn_replay.memory.filesize import TensorSpec
from hmn_replay.memory.formats import NUMBER_FORMATS, NumberFormat
from hmn_replay.memory.hierarchical import HierarchicalMemory
from hmn_replay.memory.layout import Layout

MakeLayout = Callable[..., Layout]

CIFAR = Layout((3, 32, 32), "int8", 8, 8, 4, 4, 6, (48, 32, 24))


def test_the_grid_covers_the_image(make_layout: MakeLayout) -> None:
    assert CIFAR.grid == (4, 4)
    assert make_layout(image_shape=(1, 28, 30), stride=8, decoder_channels=(2, 2, 2)).grid == (4, 4)
    assert make_layout(image_shape=(1, 9, 8), stride=2, decoder_channels=(2,)).grid == (5, 4)
    assert make_layout(image_shape=(1, 8, 33), stride=32, decoder_channels=(2,) * 5).grid == (1, 2)


def test_a_layout_of_lists_is_one_of_tuples() -> None:
    fields = dataclasses.asdict(CIFAR)
    lists: dict[str, Any] = {k: list(v) if type(v) is tuple else v for k, v in fields.items()}
    layout = Layout(**lists)
    assert layout == CIFAR
    assert hash(layout) == hash(CIFAR)
    assert layout.image_shape == (3, 32, 32)
    assert layout.decoder_channels == (48, 32, 24)


def test_the_decoder_goes_from_the_concatenated_tiers_to_2_x_2_pixels() -> None:
    assert CIFAR.num_doublings == 3
    assert CIFAR.convolutions == [(14, 48), (48, 32), (32, 24), (24, 12)]
    assert CIFAR.instance_shape == (6, 4, 4)


def test_biases_are_not_kept_as_int8(make_layout: MakeLayout) -> None:
    formats = [make_layout(number_format).bias_format for number_format in NUMBER_FORMATS]
    assert dict(zip(NUMBER_FORMATS, formats, strict=True)) == {
        "float32": "float32",
        "float16": "float16",
        "int8": "float16",
        "entropy": "float16",
    }


def test_num_floats_is_the_papers_count_worked_out_by_hand() -> None:
    dataset, classes, instances = 8 * 16, 10 * 4 * 16, 100 * 6 * 16
    extractors = 10 * (8 * 4 + 4)
    decoder = sum(9 * i * o + o for i, o in ((14, 48), (48, 32), (32, 24), (24, 12)))
    expected = dataset + classes + instances + extractors + decoder
    assert CIFAR.num_floats(10, 100) == expected
    memory = HierarchicalMemory(CIFAR, range(10), 10)
    assert sum(parameter.numel() for parameter in memory.parameters()) == expected


def test_a_spec_counts_its_bytes() -> None:
    specs = [TensorSpec(dtype, (2, 3)) for dtype in ("I8", "F16", "F32", "I32", "I64")]
    assert [spec.num_bytes for spec in specs] == [6, 12, 24, 24, 48]
    assert TensorSpec("F32", ()).num_bytes == 4


GOOD = "1 0123456789abcdef 5000 int8 3,8,8 4 3,2,2,2 5,4"


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("0123456789abcdef", "0123456789abcde"),
        ("5000", "0"),
        ("5000", "-5"),
        ("5000", "+5000"),
        ("5000", "5_000"),
        ("5000", "5e3"),
        ("5000", "9" * 5000),
        ("int8", "int4"),
        ("3,8,8", "3,8"),
        ("3,8,8", "2,8,8"),
        ("3,8,8", "3,7,8"),
        ("3,8,8", "3,8,225"),
        ("3,8,8", "3,08,8"),
        ("3,8,8", "3,8,8,"),
        ("8 4 3", "8 3 3"),
        ("8 4 3", "8 4.0 3"),
        ("3,2,2,2", "3,2,2"),
        ("3,2,2,2", "3,2,2,2,2"),
        ("3,2,2,2", "3,2,2,0"),
        ("3,2,2,2", "3,2,2,513"),
        ("3,2,2,2", ""),
        (" 5,4", " 5,4,4"),
        (" 5,4", " 5"),
        (" 5,4", ""),
        (" 5,4", " 5,4 6"),
        (" 5,4", "  5,4"),
        (" 5,4", " 5,4\n"),
        (" 5,4", " 5,\uff14"),
    ],
)
def test_metadata_that_cannot_be_is_a_value_error(part: str, other: str) -> None:
    assert Layout.from_metadata(GOOD)[1] == 5000
    bad = GOOD.replace(part, other, 1)
    assert bad != GOOD
    with pytest.raises(ValueError, match=r"."):
        Layout.from_metadata(bad)


@given(st.text(alphabet="0123456789, -int8float", max_size=60))
def test_other_texts_are_value_errors(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Layout.from_metadata(text)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stride", 1, "stride is 2, 4, 8, 16 or 32; got 1"),
        ("stride", 12, "stride is 2, 4, 8, 16 or 32; got 12"),
        ("dataset_channels", 0, "dataset_channels is 1 to 512; got 0"),
        ("feature_channels", 513, "feature_channels is 1 to 512; got 513"),
        ("class_channels", 1.0, "class_channels must be int, got 1.0"),
        ("instance_channels", True, "instance_channels must be int, got True"),
        ("decoder_channels", 5, "decoder_channels must be a list, got 5"),
        ("decoder_channels", (5, 0), r"decoder_channels\[1\] is 1 to 512; got 0"),
        ("decoder_channels", (5,), r"one entry a doubling, 2 for stride 4; got \(5,\)"),
        ("decoder_channels", (5, 5, 5), r"one entry a doubling, 2 for stride 4"),
        ("number_format", "int4", "number_format is one of float32"),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(
    make_layout: MakeLayout, field: str, value: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(make_layout(), **{field: value})


# What Layout.choose promises, whatever it chooses.


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
def test_choose_fits_cifar_at_the_papers_budgets(
    num_classes: int, number_format: NumberFormat
) -> None:
    for budget in ("60 KiB", "120 KiB", 1_228_800, 6_144_000):
        layout = Layout.choose(budget, (3, 32, 32), num_classes, number_format)
        assert layout.max_images(budget, num_classes) >= 2 * num_classes


def test_choose_reads_a_budget_as_a_person_writes_it() -> None:
    layout = Layout.choose("120 KiB", (3, 32, 32), 10)
    assert layout == Layout.choose(122_880, (3, 32, 32), 10)
    assert layout.number_format == "int8"


def test_a_memory_of_the_largest_image_decodes() -> None:
    layout = Layout.choose("1 MiB", (3, 224, 224), 1)
    images, _ = HierarchicalMemory(layout, [0], 1).decode()
    assert images.shape == (1, 3, 224, 224)
    assert bool(torch.isfinite(images).all())


def test_integers_of_numpy_are_integers(make_layout: MakeLayout) -> None:
    four: Any = np.int64(4)
    shape: Any = np.array([3, 8, 8])
    layout = make_layout(image_shape=shape, stride=four, decoder_channels=np.array([5, 4]))
    assert layout == make_layout()
    assert all(type(side) is int for side in (*layout.image_shape, *layout.decoder_channels))
    assert type(layout.max_images(20_000, four)) is int
    assert layout.file_bytes(four, four, None) == layout.file_bytes(4, 4, None)
    assert Layout.choose(20_000, shape, four) == Layout.choose(20_000, (3, 8, 8), 4)
