"""`tools` and `tool_choice` of chat completions."""

from __future__ import annotations

from typing import Any

from engine.server.openai.schemas import ChatBody
from engine.server.parameters import invalid
from engine.server.tools.definitions import Choice, Tool, ToolUse, check_tools, tool, use_of

CHOICES: dict[str, Choice] = {"auto": "auto", "required": "required", "none": "none"}


def use_of_tools(body: ChatBody) -> ToolUse | None:
    """How an answer may use tools; None: it has none. Raises InvalidRequest."""
    for name, value, instead in (
        ("functions", body.functions, "tools"),
        ("function_call", body.function_call, "tool_choice"),
    ):
        if value:
            raise invalid(name, "is not supported by this server", f"use `{instead}`")
    given = body.tools or []
    tools = [_tool(one, f"tools[{at}]") for at, one in enumerate(given)]
    check_tools(tools, given)
    choice, named = _choice(body.tool_choice)
    return use_of(tools, choice, named, body.parallel_tool_calls)


def _tool(given: Any, where: str) -> Tool:
    check_type(given, where)
    function = given.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{where}.function", "is required", "send its name and parameters")
    return tool(
        function.get("name"),
        function.get("parameters"),
        f"{where}.function",
        description=function.get("description"),
        strict=function.get("strict"),
    )


def check_type(given: Any, where: str) -> None:
    """Raises InvalidRequest for a tool that is not a function."""
    if not isinstance(given, dict) or given.get("type") != "function":
        raise invalid(f"{where}.type", "is not supported by this server", "send type `function`")


def _choice(given: str | dict[str, Any] | None) -> tuple[Choice, str | None]:
    """The choice, and the only tool that may be called."""
    if given is None:
        return "auto", None
    if isinstance(given, str) and given in CHOICES:
        return CHOICES[given], None
    if isinstance(given, dict) and given.get("type") == "function":
        function = given.get("function")
        if isinstance(function, dict) and isinstance(name := function.get("name"), str):
            return "required", name
    raise invalid(
        "tool_choice",
        "is not supported by this server",
        'send auto, none, required or {"type": "function", "function": {"name": ...}}',
    )
