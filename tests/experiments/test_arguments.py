from __future__ import annotations

from argparse import Namespace

import pytest

from experiments.arguments import (
    add_data,
    add_settings,
    is_digits,
    make_parser,
    parse_names,
    parse_numbers,
    parse_settings,
)
from hmn_replay.errors import ConfigError, UnknownOptionError


def test_the_help_is_a_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser("What it does.\n\n    a command\n\nMore of it.\n")
    add_data(parser, "digits")
    assert parser.parse_args([]).data == "digits"
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "What it does." in text and "\n    a command\n\nMore of it.\n" in text
    assert make_parser(None).parse_args([]) is not None


@pytest.mark.parametrize("data", ["digits", "mnist.npz", "sets/SVHN"])
def test_digits_are_known_by_name_and_file(data: str) -> None:
    assert is_digits(data)
    assert not is_digits("cifar10.npz")


def test_numbers_names_and_options_are_read() -> None:
    assert parse_numbers("--seeds", "3") == (3,)
    assert parse_numbers("--seeds", "0,-1,2") == (0, -1, 2)
    assert parse_names("--rows", "b,a", ["a", "b", "c"]) == ("b", "a")
    assert parse_names("--rows", "all", iter("abc")) == ("a", "b", "c")
    parser = make_parser(None)
    add_settings(parser, "outer_steps=2")
    given = parser.parse_args(["--set", "outer-steps=3", "--set", "beta_grid=0,1"])
    assert parse_settings(given) == {"outer_steps": 3, "beta_grid": (0.0, 1.0)}
    assert parse_settings(parser.parse_args([])) == {"outer_steps": 2}
    assert parse_settings(Namespace(set=[]), {"inner_steps": 4}) == {"inner_steps": 4}


def test_others_are_refused() -> None:
    with pytest.raises(ConfigError, match="--seeds is a number, or several as 0,1,2; got '1,,2'"):
        parse_numbers("--seeds", "1,,2")
    with pytest.raises(ConfigError, match="--rows has no 'd'; choose from a, b"):
        parse_names("--rows", "a,d", "ab")
    with pytest.raises(UnknownOptionError, match="no option 'steps'"):
        parse_settings(Namespace(set=["steps=3"]))
    with pytest.raises(ConfigError, match="this script sets outer_steps itself"):
        parse_settings(Namespace(set=["outer_steps=3"]), {"outer_steps": 0}, "this script")
    with pytest.raises(UnknownOptionError, match="no option 'batch_size'; pass --batch-size by"):
        parse_settings(Namespace(set=["batch-size=3"], batch_size=64))
