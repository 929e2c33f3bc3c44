"""Calls as a Python list, `[f(a=1, b="x"), g()]`, at the beginning of an answer (Llama 3.2, Llama 4)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from engine.server.tools.definitions import Tool
from engine.server.tools.machine import Machine, Reading

MAX_DEPTH = 32
_MARKS = ("<|python_start|>", "<|python_tag|>")
_END = "<|python_end|>"
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
    r"""|(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"""
    r"""|(?P<name>[A-Za-z_][\w.-]*)|(?P<mark>[\[\](){},:=]))\s*""",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|\r?\n|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
_CONSTANTS = {
    **{"True": True, "False": False, "None": None},
    **{"true": True, "false": False, "null": None},
}

Call = tuple[str, dict[str, Any]]


class Pythonic(Machine):
    """Passes a call on when it is complete."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._names = frozenset(tool.name for tool in tools)
        super().__init__()

    def _read(self) -> Reading[None]:
        char = yield from self._skip()
        if char == "<" and (yield from self._word(*_MARKS)) is not None:
            char = yield from self._skip()
        if char == "[":
            yield from self._calls()
        elif self._held:
            self._reject_last()
        if self._after_call and (yield from self._skip()) == "<" and (yield from self._word(_END)):
            self._finish()
        yield from self._rest()

    def _calls(self) -> Reading[None]:
        """Reads the list, whose `[` was read."""
        start = len(self._held) - 1
        name, char = "", (yield from self._skip())
        while char.isalnum() or char in "_.-":
            name += char
            char = yield from self._next()
        if char != "(" or name not in self._names:
            self._reject_last()
            return
        depth, quote, escaped = 2, "", False
        while depth:
            char = yield from self._next()
            if quote:
                if escaped:
                    escaped = False
                elif char == "\\":
                    escaped = True
                elif char == quote:
                    quote = ""
            elif char in "'\"":
                quote = char
            else:
                depth += (char in "([{") - (char in ")]}")
        calls = calls_of("".join(self._held[start:]))
        if calls is None or any(name not in self._names for name, _ in calls):
            self._reject()
            return
        for name, arguments in calls:
            self._begin(name)
            self._add(json.dumps(arguments, ensure_ascii=False))
        self._finish()


def calls_of(text: str) -> list[Call] | None:
    """The calls in a list; None if it is something else. Nothing is evaluated."""
    try:
        tokens = _tokens(text)
        _expect(tokens, "[")
        calls = []
        while True:
            calls.append(_call(tokens))
            if _expect(tokens, ",", "]") == "]":
                break
        return calls if next(tokens, None) is None else None
    except (_NoCallError, StopIteration):
        return None


class _NoCallError(Exception):
    pass


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or found.lastgroup is None:
            raise _NoCallError
        yield found.lastgroup, found[found.lastgroup]
        at = found.end()


def _expect(tokens: Iterator[tuple[str, str]], *marks: str) -> str:
    kind, text = next(tokens)
    if kind != "mark" or text not in marks:
        raise _NoCallError
    return text


def _call(tokens: Iterator[tuple[str, str]]) -> Call:
    kind, name = next(tokens)
    if kind != "name":
        raise _NoCallError
    _expect(tokens, "(")
    arguments: dict[str, Any] = {}
    while True:
        kind, key = next(tokens)
        if (kind, key) == ("mark", ")"):
            return name, arguments
        if kind != "name":
            raise _NoCallError
        _expect(tokens, "=")
        arguments[key] = _value(next(tokens), tokens, 0)
        if _expect(tokens, ",", ")") == ")":
            return name, arguments


def _value(token: tuple[str, str], tokens: Iterator[tuple[str, str]], depth: int) -> Any:
    """A literal whose first token is `token`."""
    kind, text = token
    if depth > MAX_DEPTH:
        raise _NoCallError
    if kind == "string":
        return _ESCAPE.sub(_unescaped, text[1:-1])
    if kind == "number":
        return _number(text)
    if kind == "name":
        if text not in _CONSTANTS:
            raise _NoCallError
        return _CONSTANTS[text]
    if text in ("[", "("):
        return list(_items(tokens, {"[": "]", "(": ")"}[text], depth))
    if text == "{":
        return dict(_pairs(tokens, depth))
    raise _NoCallError


def _items(tokens: Iterator[tuple[str, str]], close: str, depth: int) -> Iterator[Any]:
    while (token := next(tokens, ("", ""))) != ("mark", close):
        yield _value(token, tokens, depth + 1)
        if _mark(tokens, close):
            return


def _pairs(tokens: Iterator[tuple[str, str]], depth: int) -> Iterator[tuple[str, Any]]:
    while (token := next(tokens, ("", ""))) != ("mark", "}"):
        key = _value(token, tokens, depth + 1)
        if not isinstance(key, str) or next(tokens, None) != ("mark", ":"):
            raise _NoCallError
        yield key, _value(next(tokens, ("", "")), tokens, depth + 1)
        if _mark(tokens, "}"):
            return


def _mark(tokens: Iterator[tuple[str, str]], close: str) -> bool:
    """Whether a list ends; else a comma comes."""
    token = next(tokens, None)
    if token == ("mark", close):
        return True
    if token != ("mark", ","):
        raise _NoCallError
    return False


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        found = float(text)
    if found in (float("inf"), float("-inf")):
        raise _NoCallError
    return found


def _unescaped(found: re.Match[str]) -> str:
    escape = found[1]
    if len(escape) > 2 and escape[0] in "xuU":
        code = int(escape[1:], 16)
        return chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else "\ufffd"
    return _ESCAPES.get(escape, escape if escape in "'\"\\/" else f"\\{escape}")
