"""Random JSON schemas that people might write: nested objects, enums, patterns, bounds, unions, recursion."""

from __future__ import annotations

import random
from typing import Any

NAMES = ("id", "name", "age", "tags", "items", "price", "kind", "note", "next", "left", "right")
PATTERNS = (r"^[A-Z]{2}\d{3}$", r"^(red|green|blue)-\d{1,2}$", r"^[a-z]{2,8}$", r"^\+?\d{3,9}$")
FORMATS = ("date", "ipv4", "uuid")


def schema(chosen: random.Random) -> dict[str, Any]:
    """An object schema; one of three is recursive."""
    made = _object(chosen, depth=3)
    if chosen.random() < 1 / 3:
        node = {
            "type": "object",
            "properties": {
                "value": _leaf(chosen),
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
        made["$defs"] = {"node": node}
        made["properties"]["tree"] = {"$ref": "#/$defs/node"}
        made["required"].append("tree")
    return made


def _object(chosen: random.Random, depth: int) -> dict[str, Any]:
    names = chosen.sample(NAMES, chosen.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _any(chosen, depth - 1) for name in names},
        "required": [name for name in names if chosen.random() < 0.8],
        "additionalProperties": False,
    }


def _any(chosen: random.Random, depth: int) -> dict[str, Any]:
    draw = chosen.random()
    if depth > 0 and draw < 0.2:
        return _object(chosen, depth)
    if depth > 0 and draw < 0.4:
        low = chosen.randint(0, 2)
        items = _any(chosen, depth - 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}
    if depth > 0 and draw < 0.5:
        return {"anyOf": [_leaf(chosen), _object(chosen, depth - 1)]}
    return _leaf(chosen)


def _leaf(chosen: random.Random) -> dict[str, Any]:
    low = chosen.randint(-50, 50)
    return chosen.choice(
        [
            {"type": "string", "maxLength": chosen.randint(1, 16)},
            {"type": "string", "minLength": 2, "maxLength": 8},
            {"type": "string", "pattern": chosen.choice(PATTERNS)},
            {"type": "string", "format": chosen.choice(FORMATS)},
            {"type": "integer", "minimum": low, "maximum": low + chosen.randint(0, 1000)},
            {"type": "integer", "exclusiveMinimum": low, "maximum": low + 5},
            {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
            {"enum": ["a", 1, None, True, "longer value"]},
            {"const": chosen.choice(["fixed", 42, None])},
            {"type": ["boolean", "null"]},
        ]
    )
