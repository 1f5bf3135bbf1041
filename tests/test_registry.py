"""Tables from names to things, and what things are called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from hmn_replay.errors import ConfigError
from hmn_replay.registry import Registry, fingerprint, name_of


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


def test_a_decorator_without_a_name_is_refused() -> None:
    functions: Registry[object] = Registry("function")
    with pytest.raises(ConfigError, match=r"register takes a name, as @register\('name'\); got"):
        functions.register(len)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="begins with a letter; got 3"):
        functions.add(3, len)  # type: ignore[arg-type]


def test_a_fingerprint_is_of_the_code_and_of_what_it_closes_over() -> None:
    def power(exponent: float, *, named: bool = False) -> Any:
        def raised(x: float) -> Any:
            return x**exponent

        def raised_by_a_lambda(x: float) -> Any:
            return (lambda y: y**exponent)(x)

        return raised_by_a_lambda if named else raised

    def adding(x: float, more: float = 1.0) -> float:
        return x + more

    def subtracting(x: float, more: float = 1.0) -> float:
        return x - more

    class Doubling:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, x: float) -> float:
            return self.factor * x if x in {"a", "b", 1.0} else x

        def halve(self, x: float) -> float:
            return x / self.factor

    calls: list[float] = []

    def counted(x: float) -> Any:
        calls.append(x)
        return x

    before = fingerprint(counted)
    counted(3.0)
    assert fingerprint(counted) == before
    assert fingerprint(power(2.0)) == fingerprint(power(2.0))
    assert fingerprint(Doubling(2.0)) == fingerprint(Doubling(2.0))
    different = [power(2.0), power(3.0), power(2.0, named=True), power(3.0, named=True)]
    different += [adding, subtracting, partial(adding, more=2.0), partial(adding, more=3.0)]
    different += [Doubling(2.0), Doubling(3.0), Doubling, len]
    different += [Doubling(2.0).halve, Doubling(3.0).halve, Doubling.halve]
    assert len({fingerprint(each) for each in different}) == len(different)
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(len))


def test_what_an_entry_refers_to_itself_by_ends() -> None:
    def counting(n: int) -> int:
        return counting(n - 1) if n else 0

    assert fingerprint(counting) == fingerprint(counting)


def test_what_is_not_there_yet_is_closed_over_all_the_same() -> None:
    def using_a_later_one(x: float) -> float:
        return later * x

    before = fingerprint(using_a_later_one)
    later = 2.0
    assert fingerprint(using_a_later_one) != before


def test_what_is_ones_own_has_no_fingerprint(colours: Registry[int]) -> None:
    colours.mark_built_in()
    colours.add_family("web", {"teal": 0x008080}.__getitem__)
    colours.add("mine", 7)
    assert colours.fingerprint("red") == colours.fingerprint("web:teal") == ""
    assert colours.fingerprint("mine") != ""
    with pytest.raises(ConfigError, match="colour must be one of"):
        colours.fingerprint("blue")


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
