"""Bounds of JSON that a template or a grammar is given."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.server.parameters import invalid

MAX_DEPTH = 16  # levels


def check_size(value: Any, name: str, most: int) -> None:
    """Raises InvalidRequest for JSON of more than `most` bytes, or nested deeper than MAX_DEPTH."""
    if _is_deep(value):
        raise invalid(name, f"is nested deeper than {MAX_DEPTH} levels", "flatten it")
    if (size := len(msgspec.json.encode(value))) > most:
        raise invalid(name, f"has {size} bytes of JSON, the limit is {most}", "shorten it")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True
