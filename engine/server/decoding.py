"""JSON bodies as msgspec structs. Fields that a struct does not have are ignored, as LoRAX does, and can be named.

Types are strict, except that an integer is accepted for a float. Errors name the field.
"""

from __future__ import annotations

import functools
import re
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import Struct

from engine.errors import InvalidRequest, MalformedRequest

MAX_NAMES, MAX_NAME = 20, 100  # of ignored fields that are named, and characters of each

Body = bytes | bytearray
S = TypeVar("S", bound=Struct)


@functools.cache
def _decoder(cls: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(cls)


def decode(body: Body, cls: type[S]) -> S:
    """Raises MalformedRequest if the body is not a JSON object, InvalidRequest if a field is missing or of the wrong
    type."""
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


def ignored_fields(body: Body, cls: type[Struct]) -> list[str]:
    """The first names in a body that `cls`, or a struct directly in it, does not have; printable ASCII."""
    names = _unknown(body, cls)
    return [
        name.removeprefix("parameters.")[:MAX_NAME].encode("unicode_escape").decode()
        for name in names[:MAX_NAMES]
    ]


def _unknown(body: Body | msgspec.Raw, cls: type[Struct]) -> list[str]:
    given: dict[str, msgspec.Raw] = _decoder(dict[str, msgspec.Raw]).decode(body)
    fields = _fields(cls)
    names = [name for name in given if name not in fields]
    for field, inner in fields.items():
        if inner is not None and bytes(memoryview(given.get(field, b""))[:1]) == b"{":
            names += [f"{field}.{name}" for name in _unknown(given[field], inner)]
    return names


@functools.cache
def _fields(cls: type[Struct]) -> dict[str, type[Struct] | None]:
    """Field -> the struct that it holds, or None."""
    hints = get_type_hints(cls)
    found: dict[str, type[Struct] | None] = {}
    for field in msgspec.structs.fields(cls):
        kinds = (hints[field.name], *get_args(hints[field.name]))
        structs = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Struct)]
        found[field.encode_name] = structs[0] if structs else None
    return found
