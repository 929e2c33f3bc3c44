"""Options of a benchmark: fields of a dataclass that say what they mean and how their text is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from engine.config import flag_of
from engine.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ask:
    """How one field meets the user; stands in the field's `Annotated`."""

    help: str
    read: Callable[[str], Any]  # raises ValueError that says what the text must be
    default: str  # as shown
    repeated: bool = (
        False  # the flag may be given many times: the field is a tuple of what `read` makes
    )


def asks(cls: type[Any]) -> Iterator[tuple[str, Ask]]:
    """(field, how it is asked for) of a dataclass of options."""
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        _, ask = get_args(hints[field.name])[:2]
        assert isinstance(ask, Ask)
        yield field.name, ask


def fill(cls: Callable[..., T], given: Mapping[str, str | list[str]]) -> T:
    """The dataclass of what was given; raises ConfigError that names the flag."""
    values: dict[str, Any] = {}
    for name, ask in asks(cls):  # type: ignore[arg-type]
        if name not in given:
            continue
        text = given[name]
        try:
            values[name] = tuple(map(ask.read, text)) if ask.repeated else ask.read(str(text))
        except ValueError as error:
            shown = ", ".join(text) if isinstance(text, list) else text
            raise ConfigError(f"{flag_of(name)}: {shown!r} {error}", field=name) from None
    return cls(**values)


# -- what a text may be


def count(text: str) -> int:
    """A whole number above 0."""
    number = _whole(text)
    if number < 1:
        raise ValueError("must be above 0")
    return number


def amount(text: str) -> int:
    """A whole number, 0 or more."""
    number = _whole(text)
    if number < 0:
        raise ValueError("must not be below 0")
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("is not a whole number") from None


def number(text: str) -> float:
    """A number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError("is not a number of 0 or more")
    return value


def rate(text: str) -> float:
    """A number above 0."""
    value = number(text)
    if not value:
        raise ValueError("must be above 0")
    return value


def share(text: str) -> float:
    """A number between 0 and 1."""
    value = number(text)
    if value > 1:
        raise ValueError("must be between 0 and 1")
    return value


def counts(text: str) -> tuple[int, ...]:
    """`8,16` as (8, 16)."""
    return tuple(count(part.strip()) for part in text.split(","))


def words(text: str) -> tuple[str, ...]:
    """`a,b` as its parts."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def one_of(*known: str) -> Callable[[str], str]:
    """A reader of one of these words."""

    def read(text: str) -> str:
        if text not in known:
            raise ValueError(f"must be one of {', '.join(known)}")
        return text

    return read


def some_of(*known: str) -> Callable[[str], tuple[str, ...]]:
    """A reader of a list of these words."""

    def read(text: str) -> tuple[str, ...]:
        found = words(text)
        if unknown := [word for word in found if word not in known]:
            raise ValueError(f"has {unknown[0]!r}; it must be of {', '.join(known)}")
        if not found:
            raise ValueError(f"must be of {', '.join(known)}")
        return found

    return read


@dataclass(frozen=True, slots=True)
class Span:
    """A length, or a range of lengths of which every one is as likely."""

    low: int
    high: int

    @classmethod
    def read(cls, text: str) -> Span:
        """`128`, or `64-256`."""
        low, dash, high = text.partition("-")
        span = cls(count(low), count(high) if dash else count(low))
        if span.high < span.low:
            raise ValueError("is a range that ends before it begins")
        return span
