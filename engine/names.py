"""Names and values from an adapter's files, as they may stand in a message, a note or a log."""

from __future__ import annotations

MAX_SHOWN = 120  # characters


def shown(text: str, limit: int = MAX_SHOWN) -> str:
    """At most `limit` characters on one line: control characters are escaped, a long middle is left out."""
    if len(text) > limit:
        half = (limit - 3) // 2
        text = f"{_escaped(text[:limit])[:half]}...{_escaped(text[-limit:])[-half:]}"
    escaped = _escaped(text)
    return escaped if len(escaped) <= limit else shown(escaped, limit)


def shown_value(value: object) -> str:
    """A value of a configuration: itself if it is a text, a number or null, else its kind."""
    if isinstance(value, str):
        return f"'{shown(value)}'"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    return shown(repr(value))


def shown_shape(shape: tuple[int, ...]) -> str:
    """The sizes of a tensor in brackets, the first few of very many."""
    return shown(str(list(shape[:50])))


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )
