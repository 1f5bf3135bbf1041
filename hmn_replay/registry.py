"""Things that are chosen by name: memory kinds, objectives, losses, number formats, networks."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from types import CodeType, MethodType
from typing import Any, Generic, TypeVar

from hmn_replay.errors import ConfigError

__all__ = [
    "Registry",
    "UnknownNameError",
    "check_name",
    "check_takes",
    "fingerprint",
    "name_of",
    "suggest",
]

T = TypeVar("T")
U = TypeVar("U")


class Registry(Mapping[str, T], Generic[T]):
    """A table from names to things, to which users may add their own.

    Args:
        what: What is registered, as error messages call it, such as ``"objective"``.

    Example:
        >>> COLOURS: Registry[int] = Registry("colour")
        >>> COLOURS.add("red", 0xFF0000)
        >>> list(COLOURS)
        ['red']
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, T] = {}
        self._families: dict[str, Callable[[str], T]] = {}
        self._built_in: tuple[T, ...] = ()

    def add(self, name: str, entry: T) -> None:
        """Register an entry.

        Args:
            name: Letters, digits, ``-``, ``_``, ``:`` and ``.``, beginning with a letter.
            entry: What the name stands for.

        Raises:
            ConfigError: The name is taken, or has other characters.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w:.-]*", name, re.ASCII):
            raise ConfigError(
                f"the name of a registered {self.what} has letters, digits, '-', '_', ':' and '.', "
                f"and begins with a letter; got {name!r}"
            )
        if name in self._entries:
            raise ConfigError(f"there is a {self.what} {name!r} already; register another name")
        self._entries[name] = entry

    def add_family(self, prefix: str, find: Callable[[str], T]) -> None:
        """Register entries that another library names: ``PREFIX:NAME`` is what ``find`` returns.

        They are found by name, and not listed.

        Args:
            prefix: What stands before the colon.
            find: From what stands behind it to the entry; raises a KeyError where there is none.
        """
        self._families[prefix] = find

    def register(self, name: str) -> Callable[[U], U]:
        """Return a decorator that registers a class or function, and returns it as it is.

        Raises:
            ConfigError: No name was given.
        """
        if not isinstance(name, str):
            raise ConfigError(f"register takes a name, as @register('name'); got {name!r:.60}")

        def decorate(entry: U) -> U:
            self.add(name, entry)  # type: ignore[arg-type]
            return entry

        return decorate

    def remove(self, name: str) -> None:
        """Remove an entry, such as one that a test added.

        Raises:
            ConfigError: There is none of that name.
        """
        self[name]
        del self._entries[name]

    def mark_built_in(self, *others: T) -> None:
        """Take the entries that there are now for this package's own, and others without a name."""
        self._built_in = (*self._entries.values(), *others)

    def is_built_in(self, entry: str | T) -> bool:
        """Return whether an entry, or the one of a name, is this package's own.

        A user's is not, though it may compare equal to one, or have no hash.

        Raises:
            ConfigError: There is none of that name.
        """
        found = self[entry] if isinstance(entry, str) else entry
        return any(found is own for own in self._built_in)

    def fingerprint(self, entry: str | T) -> str:
        """Return the :func:`fingerprint` of an entry, or of the one of a name.

        ``""`` for one that is this package's own, or another library's, which its name tells.
        """
        if isinstance(entry, str) and entry not in self._entries:
            self[entry]
            return ""
        found = self[entry] if isinstance(entry, str) else entry
        return "" if self.is_built_in(found) else fingerprint(found)

    def __getitem__(self, name: str) -> T:
        """Return the entry of that name.

        Raises:
            ConfigError: There is none; the message lists the names, and the nearest one.
        """
        if isinstance(name, str) and name not in self._entries:
            prefix, colon, rest = name.partition(":")
            if colon and prefix in self._families:
                return self._families[prefix](rest)
        if not isinstance(name, str) or name not in self._entries:
            raise UnknownNameError(self.what, name, list(self._entries))
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Registry({self.what!r}: {', '.join(self)})"


class UnknownNameError(ConfigError, KeyError):
    """A name that is not registered. Also a KeyError, which a mapping raises."""

    def __init__(
        self, what: str, name: object, known: list[str], or_callable: bool = False
    ) -> None:
        others = "a callable or " if or_callable else ""
        self.message = f"{what} must be {others}one of {', '.join(known)}; got {name!r}"
        self.message += suggest(name, known)
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


def check_name(
    what: str, name: object, known: Collection[str], *, or_callable: bool = False
) -> None:
    """Raise an :class:`UnknownNameError` unless a name is one of those that are known.

    Where a function may stand in place of a name (``or_callable``), any callable passes.
    """
    if or_callable and callable(name):
        return
    if not isinstance(name, str) or name not in known:
        raise UnknownNameError(what, name, list(known), or_callable)


def name_of(entry: object) -> str:
    """Return what reports and files call a thing that is given by name, or as a function.

    A name is returned as it is, and a function or class as its module and name, such as
    ``"my_project.losses.match_means"``. A wrapper has the name of its function, a partial its
    arguments as well, as in ``"my_project.losses.match_means(power=2)"``, and any other callable
    the name of its class.
    """
    if isinstance(entry, str):
        return entry
    if isinstance(entry, partial):
        given = [*map(_shown, entry.args), *(f"{k}={_shown(v)}" for k, v in entry.keywords.items())]
        return f"{name_of(entry.func)}({', '.join(given)})" if given else name_of(entry.func)
    if wrapped := getattr(entry, "__wrapped__", None):
        return name_of(wrapped)
    named = entry if hasattr(entry, "__qualname__") else type(entry)
    return f"{named.__module__}.{named.__qualname__}"


def fingerprint(entry: object) -> str:
    """Return 16 hexadecimal digits that tell a function from others of its name.

    They are of its code, of its defaults and of what it closes over: numbers, texts, tuples and
    functions by what they are, anything else, such as a list that it counts in, by its type. Those
    of a class are of its methods, those of a method of its object's class and attributes, too, and
    those of any other callable of its class and attributes.
    Another version of Python compiles other code.
    """
    digest = hashlib.blake2b(digest_size=8)
    seen: dict[int, Any] = {}  # held, so that no other has its number

    def feed_code(code: CodeType) -> None:
        digest.update(code.co_code)
        digest.update(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                feed_code(constant)
            elif isinstance(constant, frozenset):  # whose order is another in every process
                digest.update(repr(sorted(map(repr, constant))).encode())
            else:
                digest.update(repr(constant).encode())

    def feed(value: Any) -> None:
        digest.update(f"{type(value).__module__}.{type(value).__qualname__};".encode())
        if id(value) in seen:
            return
        if isinstance(value, str | bytes | int | float | None):
            digest.update(repr(value).encode())
            return
        seen[id(value)] = value
        code = getattr(value, "__code__", None)
        if isinstance(value, partial):
            feed((value.func, value.args, tuple(sorted(value.keywords.items()))))
        elif isinstance(value, MethodType):
            owner = value.__self__
            feed((value.__func__, type(owner), *getattr(owner, "__dict__", {}).items()))
        elif isinstance(code, CodeType):
            feed_code(code)
            feed((value.__defaults__, tuple(sorted((value.__kwdefaults__ or {}).items()))))
            for cell in getattr(value, "__closure__", None) or ():
                with contextlib.suppress(ValueError):  # nothing has been put there yet
                    feed(cell.cell_contents)
        elif isinstance(value, tuple):
            for each in value:
                feed(each)
        elif isinstance(value, type):
            digest.update(name_of(value).encode())
            feed(tuple(own for own in vars(value).values() if hasattr(own, "__code__")))
        elif callable(value):
            digest.update(name_of(value).encode())
            feed((type(value), *getattr(value, "__dict__", {}).items()))

    feed(entry)
    return digest.hexdigest()


def check_takes(option: str, function: Callable[..., Any], arguments: Sequence[str]) -> None:
    """Raise a ConfigError for a function of the user's that does not take some arguments.

    Args:
        option: What it was given as, for the message.
        function: The function. One whose arguments Python does not know passes.
        arguments: What it will be called with, by position; their names are for the message.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ConfigError(
            f"{option} is called with ({', '.join(arguments)}); {name_of(function)} takes "
            f"{signature}: {error}"
        ) from None


def _shown(argument: object) -> str:
    """Return an argument as it is, if it is a plain value; else what kind of thing it is."""
    if callable(argument):
        return name_of(argument)
    if isinstance(argument, list | tuple):
        return f"[{', '.join(map(_shown, argument))}]"
    is_plain = isinstance(argument, str | bytes | int | float | None)
    return repr(argument) if is_plain else type(argument).__name__


def suggest(name: object, known: list[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to ``name``, or ``""``."""
    nearest = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
