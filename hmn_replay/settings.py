"""Settings: frozen models whose fields say their type, range, default and meaning, once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import NoneType
from typing import Any, ClassVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import Self

from hmn_replay.errors import ConfigError, HMNReplayError, UnknownOptionError
from hmn_replay.registry import check_name, suggest

__all__ = ["Settings", "check_options", "one_of"]


class Settings(BaseModel):
    """Base of the settings of this package: frozen, hashable, compared by value.

    A field is declared by a type (with :func:`pydantic.Field` for its range), a default, and a
    string below it that says what it means, which is its ``description`` in ``model_fields``.

    Values may be given as a person types them: ``"3"``, ``"none"``, and for a tuple ``"0, 0.5, 1"``
    or one value alone. Numbers of numpy and torch, and their arrays, count as Python's.

    Raises:
        UnknownOptionError: A keyword that is no field.
        ConfigError: A value of another type, or outside its range.
    """

    hints: ClassVar[Mapping[str, str]] = {}
    """What to say of keywords that are no fields, and that somebody may expect."""

    catalogue: ClassVar[str] = ""
    """Where the fields can be read, where they are too many to name in an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
    )

    def __init__(self, **options: Any) -> None:
        known = type(self).model_fields
        check_options(type(self).__name__, options, known, self.hints, self.catalogue)
        try:
            super().__init__(**options)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise _explained(first, options[str(first["loc"][0])]) from None

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: Any) -> Any:
        kind = cls.model_fields[info.field_name].annotation
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, str):
            if value.strip().lower() == "none" and NoneType in get_args(kind):
                return None
            if get_origin(kind) is tuple:
                return tuple(word.strip() for word in value.split(",") if word.strip())
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise PydanticCustomError("bool", "Input should be a number or a text, no bool")
        if get_origin(kind) is tuple and (callable(value) or isinstance(value, int | float)):
            return (value,)
        return value

    def replace(self, **options: Any) -> Self:
        """Return the settings with some fields replaced, checked like new ones."""
        return type(self)(**{**dict(self), **options})


def one_of(what: str, known: Collection[str]) -> AfterValidator:
    """Return the check of a field, as the second argument of ``Annotated``, that is a name.

    Args:
        what: What is named, for the message, such as ``"objective"``.
        known: The names, looked up when a value is checked: a registry may grow. A value that is
            callable passes: it is what a name would stand for.
    """

    def check(value: Any) -> Any:
        if not callable(value):
            check_name(what, value, known)
        return value

    check.known = known  # type: ignore[attr-defined]  # for those who list the names
    return AfterValidator(check)


def check_options(
    owner: str,
    given: Iterable[str],
    known: Collection[str],
    hints: Mapping[str, str] | None = None,
    catalogue: str = "",
) -> None:
    """Raise an error for the first of some keywords that is not known.

    Args:
        owner: What takes the keywords, for the message.
        given: The keywords that it was given.
        known: The keywords that ``owner`` takes.
        hints: What to say of some that are not known, in place of the nearest that is.
        catalogue: Where the known ones can be read, in place of all their names.

    Raises:
        UnknownOptionError: Also a TypeError, as Python raises for such a keyword.
    """
    for name in given:
        if name not in known:
            hint = f"; {hints[name]}" if hints and name in hints else suggest(name, list(known))
            all_of_them = catalogue or f"it has {', '.join(known)}"
            raise UnknownOptionError(f"{owner} has no option {name!r}{hint or f'; {all_of_them}'}")


def _explained(details: ErrorDetails, given: Any) -> ConfigError:
    """Return the error that names a field, what was expected, and what was got."""
    name, *inside = map(str, details["loc"])
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, HMNReplayError):
        named = str(cause).startswith(name.replace("_", " "))
        return ConfigError(str(cause) if named else f"{name}: {cause}")
    wanted = details["msg"].rpartition(" should ")[2]
    each = "each entry of " if any(part.isdigit() for part in inside) else ""
    shown = repr(given)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    return ConfigError(f"{each}{name} must {wanted}; got {shown}")
