"""JSON bodies as msgspec structs. Fields that a struct does not have are ignored, as LoRAX does.

Types are strict, except that an integer is accepted for a float. Errors name the field.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from engine.errors import InvalidRequest, MalformedRequest

log = logging.getLogger(__name__)

MAX_NAMES, MAX_NAME = 20, 100  # ignored fields in one log line, and characters of each

Body = bytes | bytearray
S = TypeVar("S", bound=Struct)


def decode(body: Body, cls: type[S], nested: Mapping[str, type[Struct]] | None = None) -> S:
    """The body as `cls`; logs the fields that it ignores, those of `nested` objects (field -> struct) included.

    Raises MalformedRequest if the body is not a JSON object, InvalidRequest if a field is missing or of the wrong type.
    """
    found = _decode(body, cls)
    if log.isEnabledFor(logging.DEBUG) and (names := _ignored(body, cls, nested or {})):
        log.debug("ignored unknown fields: %s", ", ".join(names))
    return found


@functools.cache
def _decoder(cls: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(cls)


def _decode(body: Body, cls: type[S]) -> S:
    try:
        str(body, "utf-8")  # msgspec does not check what it skips
        struct: Any = cls
        found: S = _decoder(struct).decode(body)
        return found
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        missing = re.match(r"Object missing required field `(\w+)`", problem)
        where = path.rstrip("`").lstrip(".")
        if missing:
            where = f"{where}.{missing[1]}" if where else missing[1]
        if not where:
            raise MalformedRequest(
                f"the body must be a JSON object: {problem}",
                hint="docs/api.md lists the fields of this route",
            ) from None
        name = where.removeprefix("parameters.")
        what = f"has the wrong type: {problem[:1].lower()}{problem[1:]}"
        raise InvalidRequest(f"`{name}` {'is required' if missing else what}", field=name) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedRequest(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise MalformedRequest("the body is nested too deeply") from None


def _ignored(body: Body, cls: type[Struct], nested: Mapping[str, type[Struct]]) -> list[str]:
    """The first names in a body that `cls`, or the struct of a nested object, does not have."""
    given = msgspec.json.decode(body)
    names = [name for name in given if name not in _fields(cls)]
    for field, inner in nested.items():
        if isinstance(given.get(field), dict):
            names += [name for name in given[field] if name not in _fields(inner)]
    return [name[:MAX_NAME].encode("unicode_escape").decode() for name in names[:MAX_NAMES]]


def _fields(cls: type[Struct]) -> set[str]:
    return {field.encode_name for field in msgspec.structs.fields(cls)}
