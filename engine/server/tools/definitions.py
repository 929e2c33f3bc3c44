"""The tools of a request, checked and bounded, and how it wants them called. The formats of all protocols end here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.server.bounds import check_size
from engine.server.parameters import invalid

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 << 10  # of JSON, all tools together
MAX_TOOL_NAME = 64
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

Choice = Literal["auto", "required", "none"]


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)  # JSON schema; empty: any
    description: str | None = None
    strict: bool = False

    @property
    def openai(self) -> dict[str, Any]:
        """As chat templates take it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function | {"parameters": dict(self.parameters)}}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools an answer may call, and whether it must. `named`: the only one that it may call."""

    tools: Sequence[Tool]
    required: bool = False
    named: str | None = None
    parallel: bool = True  # several calls in one answer

    @property
    def callable(self) -> Sequence[Tool]:
        return [tool for tool in self.tools if self.named in (None, tool.name)]


def tool(
    name: Any,
    parameters: Any,
    where: str,
    *,
    description: Any = None,
    strict: Any = None,
    schema: str = "parameters",
) -> Tool:
    """One tool. `where`: its place in the body, `schema`: its field's name there. Raises InvalidRequest.

    A function without parameters takes none, as OpenAI defines it.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise invalid(
            f"{where}.name",
            "is not the name of a tool",
            f"use letters, digits, _, - and ., 1 to {MAX_TOOL_NAME} characters",
        )
    if description is not None and not isinstance(description, str):
        raise invalid(f"{where}.description", "has the wrong type", "send a text")
    given = NO_PARAMETERS if parameters is None else parameters
    if not isinstance(given, dict) or given.get("type", "object") != "object":
        raise invalid(f"{where}.{schema}", "is not the JSON schema of an object", "send one")
    return Tool(name, given, description, strict is True)


def check_tools(tools: Sequence[Tool], given: Any, name: str = "tools") -> None:
    """Raises InvalidRequest for too many or too large tools, and for two of one name. `given`: as in the body."""
    if len(tools) > MAX_TOOLS:
        raise invalid(name, f"has {len(tools)} entries, the limit is {MAX_TOOLS}", "send fewer")
    check_size(given, name, MAX_TOOLS_BYTES)
    names = [one.name for one in tools]
    if twice := next((one for one in names if names.count(one) > 1), None):
        raise invalid(name, f"has two tools named {twice!r}", "rename one")


def use_of(
    tools: Sequence[Tool], choice: Choice, named: str | None, parallel: bool | None
) -> ToolUse | None:
    """How the tools are used; None: not at all. `named`: the only tool to call. Raises InvalidRequest."""
    if not tools:
        if choice == "required" or named is not None:
            raise invalid("tool_choice", "needs `tools`", "leave it out, or send tools")
        return None
    if named is not None and named not in [one.name for one in tools]:
        raise invalid(
            "tool_choice",
            f"names {named[:MAX_TOOL_NAME]!r}, which is not in `tools`",
            "name one of them",
        )
    if choice == "none":
        return None
    return ToolUse(tools, choice == "required" or named is not None, named, parallel is not False)
