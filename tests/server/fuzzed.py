"""Bodies that no client should send, made from valid ones: the same number and seed give the same body.

`case(seed, number)` is one request. The routes and their fields come from the OpenAPI table, so a new route is fuzzed
as soon as it is there; `VALID` has bodies that reach further than the required fields do.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

from msgspec import inspect

from engine.server.openapi import OPERATIONS
from tests.server.fuzz_data import BYTES, NAMES, NUMBERS, TEXTS, VALID, WHOLE, WRONG, Json

Path = tuple[str | int, ...]

LONGEST = 100_000  # characters of a huge text
DEEPEST = 20_000  # levels
HOLE = "@@hole@@"  # stands for raw bytes in a body


@dataclass(frozen=True)
class Case:
    """One request. `kind`: how it was made."""

    number: int
    kind: str
    method: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = self.body if len(self.body) <= 2000 else self.body[:2000] + b"..."
        return (
            f"case {self.number} ({self.kind}): {self.method} {self.path} {self.headers} {shown!r}"
        )

    @property
    def unpacked(self) -> bytes | None:
        """The body as the server reads it; None: it cannot."""
        encoding = self.headers.get("Content-Encoding")
        if encoding is None:
            return self.body
        try:
            return gzip.decompress(self.body) if encoding == "gzip" else None
        except (OSError, EOFError, zlib.error):
            return None

    @property
    def is_json(self) -> bool | None:
        """Whether the body is JSON for a strict reader other than the server's; None: that one cannot say."""
        body = self.unpacked
        if body is None:
            return None
        try:
            json.loads(body.decode(), parse_constant=_refuse)
        except RecursionError:
            return None
        except ValueError as error:
            return None if "integer string" in str(error) else False
        return True


def _refuse(name: str) -> None:
    raise ValueError(name)


@cache
def targets() -> list[tuple[str, str]]:
    """Method and path of every route that takes a body."""
    return [route for route in OPERATIONS if route[0] in ("POST", "PUT")]


def cases(seed: int, count: int) -> Iterator[Case]:
    """The first `count` cases: the routes in turn."""
    return (case(seed, number) for number in range(count))


def case(seed: int, number: int) -> Case:
    rng = random.Random(f"{seed} {number}")
    method, path = targets()[number % len(targets())]
    kind = rng.choice(tuple(KINDS))
    body = KINDS[kind](rng, (method, path))
    headers = {"Content-Type": rng.choice(("application/json",) * 8 + ("text/plain", "x", ""))}
    if rng.random() < 0.1:
        kind = f"{kind}, packed"
        headers["Content-Encoding"], body = _packed(rng, body)
    name = rng.choice(NAMES)
    return Case(number, kind, method, path.replace("{name}", name), body, headers)


def _packed(rng: random.Random, body: bytes) -> tuple[str, bytes]:
    """A Content-Encoding, and bytes that may be in it."""
    packed = gzip.compress(body, mtime=0)
    made = (
        ("gzip", packed),
        ("gzip", packed[: rng.randrange(len(packed))]),
        ("gzip", packed + packed),
        ("gzip", packed + b"garbage"),
        ("gzip", body),
        ("gzip", _flipped(rng, packed)),
        ("deflate", zlib.compress(body)),
        ("deflate", zlib.compress(body)[2:-4]),
        ("deflate", rng.randbytes(30)),
        ("br", body),
        ("gzip, gzip", packed),
        ("x", body),
    )
    return rng.choice(made)


# -- how a body is made

Route = tuple[str, str]


def _valid(rng: random.Random, route: Route) -> Json:
    known = VALID.get(route[1])
    if known:
        return copy.deepcopy(rng.choice(known))
    kind = OPERATIONS[route].body
    return {} if kind is None else _plain(inspect.type_info(kind))


def _plain(kind: inspect.Type) -> Json:
    """The simplest value of a type."""
    if isinstance(kind, inspect.StructType):
        return {one.encode_name: _plain(one.type) for one in kind.fields if one.required}
    if isinstance(kind, inspect.UnionType):
        return _plain(kind.types[0])
    for cls, value in (
        (inspect.StrType, "x"),
        (inspect.IntType, 1),
        (inspect.FloatType, 1.5),
        (inspect.BoolType, True),
        (inspect.ListType, []),
        (inspect.DictType, {}),
    ):
        if isinstance(kind, cls):
            return value
    return None


@cache
def _fields(route: Route) -> list[Path]:
    """Every field that the route's body may have, nested ones too."""
    found: list[Path] = []

    def add(kind: inspect.Type, path: Path) -> None:
        if len(path) > 4:
            return
        if isinstance(kind, inspect.UnionType):
            for one in kind.types:
                add(one, path)
        elif isinstance(kind, inspect.StructType):
            for one in kind.fields:
                found.append((*path, one.encode_name))
                add(one.type, (*path, one.encode_name))
        elif isinstance(kind, inspect.ListType):
            add(kind.item_type, (*path, 0))

    if (body := OPERATIONS[route].body) is not None:
        add(inspect.type_info(body), ())
    return found or [("inputs",)]


def _places(tree: Json, path: Path = ()) -> Iterator[Path]:
    """Every value within a body."""
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _at(tree: Json, path: Path) -> Json:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: Json, path: Path, value: Json) -> None:
    """Sets a field; objects and lists on the way are made."""
    key, *rest = path
    if isinstance(tree, list):
        tree[key:] = tree[key:] or [None]
    if rest:
        made: Json = [] if isinstance(rest[0], int) else {}
        inner = tree[key] if isinstance(tree, list) else tree.get(key)
        if type(inner) is not type(made):
            tree[key] = inner = made
        _set(inner, tuple(rest), value)
    else:
        tree[key] = value


def _dump(tree: Json, raw: bytes = b"") -> bytes:
    """The JSON of a body, `raw` in place of HOLE."""
    return json.dumps(tree, ensure_ascii=False).encode().replace(f'"{HOLE}"'.encode(), raw)


def _odd(rng: random.Random) -> bytes:
    """A value that may not be one."""
    share = rng.random()
    if share < 0.35:
        return rng.choice(NUMBERS).encode()
    if share < 0.6:
        return rng.choice(TEXTS).encode()
    if share < 0.8:
        return rng.choice(WRONG).encode()
    if share < 0.88:
        return rng.choice(BYTES)
    return rng.choice((_deep, _huge, _chain))(rng)


def _deep(rng: random.Random) -> bytes:
    levels = rng.choice((5, 16, 17, 100, 300, 900, 990, 1100, DEEPEST))
    before, after = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'{"type":"object","not":', b"}")))
    return before * levels + rng.choice((b"1", b"[]", b"")) + after * levels


def _huge(rng: random.Random) -> bytes:
    count = rng.choice((1000, 5000, 70_000, LONGEST))
    unit = rng.choice(
        (b"a", b" ", b"\\u0000", "ß".encode(), "\U0001f389".encode(), b"1,", b"[", b'\\"')
    )
    return b'"' + unit * (count // len(unit)) + b'"'


def _chain(rng: random.Random) -> bytes:
    """A grammar or a schema that leads from one rule to the next, in one of the fields' forms."""
    count = rng.choice((10, 500, 4000))
    rules = "".join(f"\nr{at}: (r{at + 1})" for at in range(count))
    lark = f'start: r0{rules}\nr{count}: "a"'
    schema: Json = {"$ref": "#/$defs/0", "$defs": {str(count): {"enum": ["a"]}}}
    schema["$defs"] |= {str(at): {"$ref": f"#/$defs/{at + 1}"} for at in range(count)}
    forms = (
        *(lark, schema, json.dumps(schema), {"grammar": lark}, {"json": schema}),
        *({"type": "lark", "grammar": lark}, {"type": "json_object", "schema": schema}),
    )
    return _dump(rng.choice(forms))


def _whole(rng: random.Random, route: Route) -> bytes:
    share = rng.random()
    if share < 0.5:
        return rng.choice(WHOLE)
    if share < 0.7:
        return rng.randbytes(rng.randrange(1, 200))
    return _deep(rng) if share < 0.85 else _odd(rng)


def _replaced(rng: random.Random, route: Route) -> bytes:
    tree = _valid(rng, route)
    places = list(_places(tree)) or [("inputs",)]
    _set(tree, rng.choice(places), HOLE)
    return _dump(tree, _odd(rng))


def _added(rng: random.Random, route: Route) -> bytes:
    tree = _valid(rng, route)
    _set(tree, rng.choice(_fields(route)), HOLE)
    return _dump(tree, _odd(rng))


def _several(rng: random.Random, route: Route) -> bytes:
    """Several fields at once, most of them of a type that can be right."""
    tree = _valid(rng, route)
    for path in rng.sample(_fields(route), min(4, len(_fields(route)))):
        _set(
            tree,
            path,
            rng.choice((1, 0, -1, 0.5, True, False, "x", "", [], {}, ["x"], 5, "auto", None)),
        )
    return _dump(tree)


def _dropped(rng: random.Random, route: Route) -> bytes:
    tree = _valid(rng, route)
    for path in rng.sample(places := list(_places(tree)), min(2, len(places))):
        try:
            del _at(tree, path[:-1])[path[-1]]
        except (KeyError, IndexError):  # within the other one
            continue
    return _dump(tree)


def _doubled(rng: random.Random, route: Route) -> bytes:
    """A key twice."""
    tree = _valid(rng, route)
    places = [path for path in _places(tree) if isinstance(path[-1], str)] or [("inputs",)]
    path = rng.choice(places)
    before = _dump(_at(tree, path) if tree else 1)
    _set(tree, path, HOLE)
    return _dump(tree, before + b"," + _dump(path[-1]) + b":" + _odd(rng))


def _cut(rng: random.Random, route: Route) -> bytes:
    body = _dump(_valid(rng, route))
    return body[: rng.randrange(len(body))]


def _flipped(rng: random.Random, body: bytes) -> bytes:
    changed = bytearray(body)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed) + 1)
        changed[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(changed)


def _mutated(rng: random.Random, route: Route) -> bytes:
    return _flipped(rng, _dump(_valid(rng, route)))


def _encoded(rng: random.Random, route: Route) -> bytes:
    """In an encoding that JSON does not have."""
    text = _dump(_valid(rng, route)).decode()
    return text.encode(
        rng.choice(("utf-16", "utf-32-be", "latin-1", "utf-7", "utf-8-sig")), "replace"
    )


KINDS: dict[str, Callable[[random.Random, Route], bytes]] = {
    "valid": lambda rng, route: _dump(_valid(rng, route)),
    "whole": _whole,
    "replaced": _replaced,
    "added": _added,
    "added again": _added,
    "several": _several,
    "dropped": _dropped,
    "doubled": _doubled,
    "cut": _cut,
    "mutated": _mutated,
    "encoded": _encoded,
}
