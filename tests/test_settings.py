"""Settings that check and read their values, on a model of a few fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import Field

from hmn_replay.errors import ConfigError, HMNReplayError, UnknownOptionError
from hmn_replay.settings import Settings, one_of

COLOURS = ["red", "green"]


class Paint(Settings):
    """A paint."""

    hints: ClassVar[Mapping[str, str]] = {"coats": "layers counts them"}

    layers: Annotated[int, Field(ge=1)] = 2
    """How many layers there are."""

    colour: Annotated[Any, one_of("colour", COLOURS)] = "red"
    """The colour."""

    shades: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.5,)
    """The shades."""

    price: float | None = None
    """The price."""


def test_a_field_is_described_by_the_string_below_it() -> None:
    assert Paint.model_fields["layers"].description == "How many layers there are."


@pytest.mark.parametrize(
    ("field", "given", "value"),
    [
        ("layers", " 3 ", 3),
        ("layers", np.int64(3), 3),
        ("layers", torch.tensor(3), 3),
        ("layers", 3.0, 3),
        ("price", "none", None),
        ("price", "None", None),
        ("price", "1e-3", 1e-3),
        ("price", 1, 1.0),
        ("shades", "0, 0.5,1", (0.0, 0.5, 1.0)),
        ("shades", "0.5", (0.5,)),
        ("shades", "", ()),
        ("shades", 1, (1.0,)),
        ("shades", [0, 1], (0.0, 1.0)),
        ("shades", np.linspace(0, 1, 3), (0.0, 0.5, 1.0)),
        ("colour", "green", "green"),
        ("colour", len, len),
    ],
)
def test_values_are_read_as_a_person_types_them(field: str, given: Any, value: Any) -> None:
    paint = Paint(**{field: given})
    assert getattr(paint, field) == value
    assert type(getattr(paint, field)) is type(value)
    assert paint == Paint(**{field: value})
    assert hash(paint) == hash(Paint(**{field: value}))


@pytest.mark.parametrize(
    ("field", "given", "message"),
    [
        ("layers", 0, "layers must be greater than or equal to 1; got 0"),
        ("layers", "many", "layers must be a valid integer, .*; got 'many'"),
        ("layers", "none", "layers must be a valid integer, .*; got 'none'"),
        ("layers", 2.5, "layers must be a valid integer, .*; got 2.5"),
        ("layers", True, "layers must be a number or a text, no bool; got True"),
        ("layers", "1" * 9999, r"layers must .*; got '1{100,}\.\.\.$"),
        ("price", float("nan"), "price must be a finite number; got nan"),
        ("price", 10**400, "price must be .*; got 1000"),
        ("shades", (0, 2), r"each entry of shades must be less than .* 1; got \(0, 2\)"),
        ("shades", None, "shades must be a valid tuple; got None"),
        ("colour", "gren", "colour must be one of red, green; got 'gren'; did you mean 'green'"),
    ],
)
def test_an_error_names_field_expectation_and_value(field: str, given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        Paint(**{field: given})


def test_an_unknown_keyword_is_a_type_error_with_the_nearest_name() -> None:
    with pytest.raises(TypeError, match="Paint has no option 'layer'; did you mean 'layers'"):
        Paint(layer=3)  # type: ignore[call-arg]
    with pytest.raises(UnknownOptionError, match="it has layers, colour, shades, price") as error:
        Paint(brush=3)  # type: ignore[call-arg]
    assert isinstance(error.value, HMNReplayError)
    with pytest.raises(TypeError, match=r"Paint has no option 'coats'; layers counts them$"):
        Paint(coats=3)  # type: ignore[call-arg]


def test_settings_are_frozen_and_replaced_with_a_check() -> None:
    paint = Paint(layers=5)
    with pytest.raises(ValueError, match="frozen"):
        setattr(paint, "layers", 6)  # noqa: B010
    assert paint.replace(price=2) == Paint(layers=5, price=2.0)
    with pytest.raises(ConfigError, match="layers must be"):
        paint.replace(layers=0)
