"""Tables from names to things, and what things are called."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest

from hmn_replay.errors import ConfigError
from hmn_replay.registry import Registry, name_of


@pytest.fixture
def colours() -> Registry[int]:
    colours: Registry[int] = Registry("colour")
    colours.add("red", 0xFF0000)
    colours.add("light-blue", 0x8080FF)
    return colours


def test_entries_are_added_found_and_removed(colours: Registry[int]) -> None:
    assert dict(colours) == {"red": 0xFF0000, "light-blue": 0x8080FF}
    assert "red" in colours and "blue" not in colours and len(colours) == 2
    colours.remove("red")
    assert list(colours) == ["light-blue"]


def test_a_decorator_returns_what_it_registers() -> None:
    functions: Registry[object] = Registry("function")

    @functions.register("square")
    def square(x: int) -> int:
        return x * x

    assert square(3) == 9
    assert functions["square"] is square


def test_an_unknown_name_is_refused_with_the_nearest(colours: Registry[int]) -> None:
    message = "colour must be one of red, light-blue; got 'lite-blue'; did you mean 'light-blue'"
    with pytest.raises(ConfigError, match=message) as error:
        colours["lite-blue"]
    assert isinstance(error.value, KeyError)
    with pytest.raises(ConfigError, match=r"got 'green'$"):
        colours.remove("green")


@pytest.mark.parametrize("name", ["", "1a", "a b", "a/b", "naïve", "-a"])
def test_other_characters_are_refused(colours: Registry[int], name: str) -> None:
    with pytest.raises(ConfigError, match="the name of a registered colour has letters"):
        colours.add(name, 1)


def test_a_name_is_registered_once(colours: Registry[int]) -> None:
    with pytest.raises(ConfigError, match="there is a colour 'red' already"):
        colours.add("red", 1)


@dataclass
class Shade:
    """Equal to others of its level, and without a hash."""

    level: int


def test_what_users_add_is_not_built_in_though_it_is_equal() -> None:
    shades: Registry[Shade] = Registry("shade")
    own, unnamed, users = Shade(1), Shade(2), Shade(1)
    shades.add("own", own)
    shades.mark_built_in(unnamed)
    shades.add("users", users)
    assert shades.is_built_in("own") and shades.is_built_in(own) and shades.is_built_in(unnamed)
    assert not shades.is_built_in("users") and not shades.is_built_in(users)
    shades.remove("own")
    assert shades.is_built_in(own)
    with pytest.raises(ConfigError, match="shade must be one of users; got 'own'"):
        shades.is_built_in("own")


class Callable:
    def __call__(self) -> None: ...


def test_things_are_called_by_module_and_name() -> None:
    assert name_of("red") == "red"
    assert name_of(name_of) == name_of(partial(name_of)) == "hmn_replay.registry.name_of"
    assert name_of(Registry) == "hmn_replay.registry.Registry"
    assert name_of(Callable()) == f"{__name__}.Callable"
    bound = partial(print, (2, name_of), 0.5, "x", sep=Callable(), file=object())
    given = f"[2, hmn_replay.registry.name_of], 0.5, 'x', sep={__name__}.Callable, file=object"
    assert name_of(bound) == f"builtins.print({given})"
