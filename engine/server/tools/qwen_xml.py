"""Calls of Qwen 3 Coder: `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`.

A value becomes what the tool's schema says; text where the schema says nothing, or where the value does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engine.server.tools.definitions import MAX_TOOL_NAME, NAME, Tool
from engine.server.tools.machine import Machine, Reading

MAX_KEY = 256
_BEGIN, _FUNCTION, _END = "<tool_call>", "<function=", "</tool_call>"
_PARAMETER, _END_PARAMETER, _END_FUNCTION = "<parameter=", "</parameter>", "</function>"
_PYTHON = {"True": "true", "False": "false", "None": "null"}


class QwenXml(Machine):
    def __init__(self, tools: Sequence[Tool]) -> None:
        self._schemas = {tool.name: tool.parameters for tool in tools}
        super().__init__()

    def _read(self) -> Reading[None]:
        while True:
            mark = yield from self._find((_BEGIN, _FUNCTION, _END))
            if mark == _END:
                if self._after_call:
                    self._finish()
                else:
                    self._reject()
                continue
            if mark == _BEGIN:
                yield from self._skip()
                if (yield from self._word(_FUNCTION)) is None:
                    continue
            name = yield from self._up_to(">", MAX_TOOL_NAME)
            if name is not None and NAME.fullmatch(name):
                yield from self._call(name)
            elif name is not None:
                self._reject()

    def _call(self, name: str) -> Reading[None]:
        schema = self._schemas.get(name, {})
        self._begin(name)
        self._add("{")
        separator = ""
        while True:
            yield from self._skip()
            mark = yield from self._word(_PARAMETER, _END_FUNCTION)
            if mark == _PARAMETER:
                key = yield from self._up_to(">", MAX_KEY)
                if key is not None:
                    value = yield from self._value()
                    self._accept()
                    self._add(f"{separator}{_text(key)}: {_value_of(value, schema, key)}")
                    separator = ", "
                    continue
            self._add("}")
            if mark == _END_FUNCTION:
                self._finish()
            return

    def _value(self) -> Reading[str]:
        found: list[str] = []
        end = len(_END_PARAMETER)
        while "".join(found[-end:]) != _END_PARAMETER:
            found.append((yield from self._next()))
        return "".join(found[:-end]).removeprefix("\n").removesuffix("\n")


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _value_of(value: str, schema: Mapping[str, Any], key: str) -> str:
    """The JSON of a parameter's value."""
    properties = schema.get("properties")
    types = types_of(properties.get(key)) if isinstance(properties, dict) else set()
    if types == {"string"} or not types or ("string" in types and value != "null"):
        return _text(value)
    plain = _PYTHON.get(value.strip(), value.strip())
    try:
        msgspec.json.decode(plain)
    except (msgspec.DecodeError, RecursionError):
        return _text(value)
    return plain


def types_of(schema: Any) -> set[str]:
    """The JSON types that a schema names; none if it names none."""
    if not isinstance(schema, dict):
        return set()
    named = schema.get("type")
    found = {named} if isinstance(named, str) else set()
    if isinstance(named, list):
        found |= {one for one in named if isinstance(one, str)}
    for choices in (schema.get("anyOf"), schema.get("oneOf")):
        for one in choices if isinstance(choices, list) else ():
            found |= types_of(one)
    return found
