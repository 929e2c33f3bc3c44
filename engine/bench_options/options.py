"""Options as fields: each has its help and the reader of its text in its `Annotated`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from engine.config import flag_of
from engine.errors import ConfigError

T = TypeVar("T")

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, slots=True)
class BenchOption:
    """One option, in the `Annotated` of its field."""

    help: str
    read: Callable[[str], Any]  # raises ValueError with the end of a sentence about the text
    default: str  # for the help
    repeated: bool = False  # the flag may be repeated: the field is a tuple of what `read` returns


def bench_options(cls: type[Any]) -> Iterator[tuple[str, BenchOption]]:
    """(field, option) of every field of a dataclass of options."""
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        _, option = get_args(hints[field.name])[:2]
        assert isinstance(option, BenchOption)
        yield field.name, option


def fill(cls: Callable[..., T], given: Mapping[str, str | list[str]]) -> T:
    """The dataclass with the values of `given`. Raises ConfigError that names the flag."""
    values: dict[str, Any] = {}
    for name, option in bench_options(cls):  # type: ignore[arg-type]
        if name not in given:
            continue
        text = given[name]
        try:
            values[name] = (
                tuple(map(option.read, text)) if option.repeated else option.read(str(text))
            )
        except ValueError as error:
            shown = ", ".join(text) if isinstance(text, list) else text
            raise ConfigError(f"{flag_of(name)}: {shown!r} {error}", field=name) from None
    return cls(**values)


# -- readers


def count(text: str) -> int:
    """An integer above 0."""
    number = _integer(text)
    if number < 1:
        raise ValueError("must be above 0")
    return number


def amount(text: str) -> int:
    """An integer, 0 or more."""
    number = _integer(text)
    if number < 0:
        raise ValueError("must be 0 or more")
    return number


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("is not an integer") from None


def number(text: str) -> float:
    """A number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError("must be a number, 0 or more")
    return value


def rate(text: str) -> float:
    """A number above 0."""
    value = number(text)
    if not value:
        raise ValueError("must be above 0")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = number(text)
    if value > 1:
        raise ValueError("must be between 0 and 1")
    return value


def counts(text: str) -> tuple[int, ...]:
    """`8,16` as (8, 16)."""
    return tuple(count(part.strip()) for part in text.split(","))


def rates(text: str) -> tuple[float, ...]:
    """`4.5,9` as (4.5, 9.0), each above 0."""
    return tuple(rate(part.strip()) for part in text.split(","))


def words(text: str) -> tuple[str, ...]:
    """`a,b` as ("a", "b")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def one_of(*allowed: str) -> Callable[[str], str]:
    """A reader of one of these words."""

    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return text

    return read


def some_of(*allowed: str) -> Callable[[str], tuple[str, ...]]:
    """A reader of a comma-separated list of these words."""

    def read(text: str) -> tuple[str, ...]:
        found = words(text)
        if unknown := [word for word in found if word not in allowed]:
            raise ValueError(f"contains {unknown[0]!r}; choose from {', '.join(allowed)}")
        if not found:
            raise ValueError(f"is empty; choose from {', '.join(allowed)}")
        return found

    return read


def names(text: str) -> tuple[str, ...]:
    """`a,b`, `a{0..3}` or `@file` with one name per line."""
    if text.startswith("@"):
        try:
            lines = Path(text[1:]).read_text().splitlines()
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None
        return tuple(line.strip() for line in lines if line.strip())
    found: list[str] = []
    for part in text.split(","):
        found += _expanded(part.strip())
    return tuple(name for name in found if name)


def _expanded(pattern: str) -> list[str]:
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [name for i in range(first, last + 1) for name in _expanded(f"{head}{i}{tail}")]


@dataclass(frozen=True, slots=True)
class Span:
    """A length, or a range of equally likely lengths."""

    low: int
    high: int

    @classmethod
    def read(cls, text: str) -> Span:
        """`128`, or `64-256`."""
        low, dash, high = text.partition("-")
        span = cls(count(low), count(high) if dash else count(low))
        if span.high < span.low:
            raise ValueError("must be a range from low to high")
        return span
