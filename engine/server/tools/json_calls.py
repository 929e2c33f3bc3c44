"""Calls that are written as JSON: `{"name": ..., "arguments": {...}}`, alone or in a list, behind a mark or bare.

Arguments are passed on while they arrive, as the model wrote them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import msgspec

from engine.server.tools.definitions import NAME, Tool
from engine.server.tools.machine import Machine, Reading

_STRING = r'"((?:[^"\\]|\\.)*)"'
# A call up to the `{` of its arguments.
_HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*' + _STRING + r"\s*,\s*"
    r'"(?:arguments|parameters)"\s*:\s*',
    re.DOTALL,
)
# A call whose arguments come first.
_ARGUMENTS_FIRST = re.compile(r'\s*\{\s*"(?:arguments|parameters)"\s*:\s*')
_NAME_CHARACTERS = re.compile(r"[A-Za-z0-9_.-]")


class Extent:
    """How far a JSON object or list goes."""

    __slots__ = ("_escaped", "depth", "quoted")

    def __init__(self) -> None:
        self.depth = 0
        self.quoted = False
        self._escaped = False

    def feed(self, char: str) -> None:
        if self.quoted:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self.quoted = False
        elif char == '"':
            self.quoted = True
        elif char in "{[":
            self.depth += 1
        elif char in "}]":
            self.depth -= 1


class JsonCalls(Machine):
    """`bare`: only the tools of the request are calls, because JSON may be an answer too."""

    bare = False

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._names = frozenset(tool.name for tool in tools)
        super().__init__()

    def _takes(self, name: str) -> bool:
        return name in self._names or (not self.bare and NAME.fullmatch(name) is not None)

    def _object(self) -> Reading[bool]:
        """Reads a call whose `{` was read. False: it is none, and still held."""
        start, extent, first = len(self._held) - 1, Extent(), True
        extent.feed("{")
        while extent.depth:
            char = yield from self._next()
            extent.feed(char)
            if char == "{" and extent.depth == 2 and first and not extent.quoted:
                first = False
                before = "".join(self._held[start:-1])
                head = _HEAD.fullmatch(before)
                name = _unquoted(head[1]) if head else None
                if name is not None and self._takes(name):
                    yield from self._arguments(name, extent)
                    return True
                if self.bare and not _ARGUMENTS_FIRST.fullmatch(before):
                    return False
        call = _call_of("".join(self._held[start:]))
        if call is None or not self._takes(call[0]):
            return False
        self._begin(call[0])
        self._add(call[1])
        self._finish()
        return True

    def _arguments(self, name: str, extent: Extent) -> Reading[None]:
        """Passes on the arguments of a call, whose `{` was read, and reads the rest of the call."""
        outside = extent.depth - 1
        self._begin(name)
        self._add("{")
        while extent.depth > outside:
            char = yield from self._next()
            self._accept()
            extent.feed(char)
            self._add(char)
        while extent.depth:
            extent.feed((yield from self._next()))
            self._accept()
        self._finish()

    def _list(self) -> Reading[bool]:
        """Reads a list of calls, whose `[` was read. False: something else came, which was passed on."""
        while True:
            if (yield from self._skip()) != "{":
                self._reject_last()
                return False
            if not (yield from self._object()):
                self._reject()
                return False
            char = yield from self._skip()
            if char == "]":
                self._finish()
                return True
            if char != ",":
                self._reject_last()
                return False


class Marked(JsonCalls):
    """Calls behind `begins`: one, or a list of them; the `ends` are optional."""

    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()

    def _read(self) -> Reading[None]:
        while True:
            mark = yield from self._find(self.begins + self.ends)
            if mark in self.begins:
                yield from self._behind_mark()
            elif self._after_call:
                self._finish()
            else:
                self._reject()

    def _behind_mark(self) -> Reading[None]:
        char = yield from self._skip()
        if char == "[":
            yield from self._list()
        elif char != "{":
            self._reject_last()
        elif not (yield from self._object()):
            self._reject()


class Hermes(Marked):
    """`<tool_call>{...}</tool_call>`: Hermes, Qwen 2.5, Qwen 3."""

    begins = ("<tool_call>",)
    ends = ("</tool_call>",)


class Granite(Marked):
    """`<|tool_call|>[{...}]`: Granite, Phi 4 mini."""

    begins = ("<|tool_call|>", "<tool_call>")
    ends = ("<|/tool_call|>", "</tool_call>")


class Mistral(Marked):
    """`[TOOL_CALLS] [{...}]`, or `[TOOL_CALLS]name[ARGS]{...}`, also with `[CALL_ID]id` before `[ARGS]`."""

    begins = ("[TOOL_CALLS]",)

    def _behind_mark(self) -> Reading[None]:
        char = yield from self._skip()
        if char == "[":
            yield from self._list()
        elif char == "{":
            if not (yield from self._object()):
                self._reject()
        else:
            yield from self._named(char)

    def _named(self, char: str) -> Reading[None]:
        """A call that begins with its name."""
        name = yield from self._name(char)
        if self._held[-1] == "[":
            mark = yield from self._word("[ARGS]", "[CALL_ID]")
            if mark == "[CALL_ID]":
                yield from self._name((yield from self._next()))
                mark = yield from self._word("[ARGS]")
            if mark is None:
                return
            yield from self._skip()
        if self._held[-1] != "{" or not self._takes(name):
            self._reject_last()
            return
        extent = Extent()
        extent.feed("{")
        yield from self._arguments(name, extent)

    def _name(self, char: str) -> Reading[str]:
        """Reads a name or an id and the character after it."""
        name = ""
        while _NAME_CHARACTERS.fullmatch(char):
            name += char
            char = yield from self._next()
        return name


class Llama3(JsonCalls):
    """`{"name": ..., "parameters": {...}}` at the beginning of an answer, also after `<|python_tag|>`; several are
    separated by semicolons."""

    bare = True
    begins = ("<|python_tag|>", "<|python_start|>")
    end_mark = "<|python_end|>"

    def _read(self) -> Reading[None]:
        separators = ""
        while True:
            char = yield from self._skip(separators)
            if char == "<":
                ends = (self.end_mark,) if self._after_call else ()
                mark = yield from self._word(*self.begins, *ends)
                if mark is None:
                    break
                if mark in ends:
                    self._finish()
                continue
            if char == "[":
                if not (yield from self._list()):
                    break
            elif char != "{":
                self._reject_last()
                break
            elif not (yield from self._object()):
                self._reject()
                break
            separators = ";,"
        yield from self._rest()


def _unquoted(text: str) -> str | None:
    try:
        found = json.loads(f'"{text}"')
    except ValueError:
        return None
    return str(found)


def _call_of(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call in any order of its fields; None if it is none."""
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        return found["name"], arguments
    return (found["name"], _text_of(arguments)) if isinstance(arguments, dict) else None


def _text_of(arguments: dict[str, object]) -> str:
    return json.dumps(arguments, ensure_ascii=False)
