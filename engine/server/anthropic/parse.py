"""Anthropic's bodies, as chat completions: blocks become messages, tools become functions."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

from engine.server.anthropic.format import MessagesFormatter
from engine.server.anthropic.schemas import CountBody, InBlock, InMessage, MessagesBody
from engine.server.decoding import decode
from engine.server.formats import Context, GenerationRequest
from engine.server.openai.schemas import CalledFunction, CalledTool, ChatBody, Message
from engine.server.openai.translation import translated
from engine.server.parameters import invalid, refuse

ROLES = ("user", "assistant")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_NAMES = {"inputs": "messages", "max_new_tokens": "max_tokens", "stop": "stop_sequences"}
_RENAMED = (
    (r"^(tools\[\d+\])\.function\.parameters", r"\1.input_schema"),
    (r"^(tools\[\d+\])\.function", r"\1"),
)


def parse_messages(raw: bytes | bytearray, context: Context, /) -> GenerationRequest:
    """Of /v1/messages. See `Parser`."""
    body = decode(raw, MessagesBody)
    refuse(container=body.container, mcp_servers=body.mcp_servers)
    chat = chat_of(
        body,
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        cache_salt=body.cache_salt,
        priority=body.priority,
    )
    parameters, prompt = translated(chat, context, _NAMES, *_RENAMED)
    return GenerationRequest(
        parameters=parameters,
        prompts=[prompt],
        formatter=partial(MessagesFormatter, body.model or context.model_id),
        stream=bool(body.stream),
        id=f"msg_{uuid.uuid4().hex}",
    )


def parse_count(raw: bytes | bytearray, context: Context, /) -> GenerationRequest:
    """Of /v1/messages/count_tokens; nothing is generated. See `Parser`."""
    body = decode(raw, CountBody)
    parameters, prompt = translated(chat_of(body), context, _NAMES, *_RENAMED)
    return GenerationRequest(
        parameters=parameters,
        prompts=[prompt],
        formatter=partial(MessagesFormatter, ""),
        stream=False,
    )


def chat_of(body: CountBody, **more: Any) -> ChatBody:
    """The chat completion that means the same. Raises InvalidRequest."""
    if not body.messages:
        raise invalid("messages", "is empty", "send at least one message")
    system = _text(body.system, "system") if body.system else None
    messages = [Message("system", system)] if system else []
    for at, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{at}]")
    last = messages[-1]
    choice, parallel = _choice(body.tool_choice)
    return ChatBody(
        messages=messages,
        model=body.model,
        continue_final_message=last.role == "assistant" and not last.tool_calls,
        tools=_tools(body.tools),
        tool_choice=choice,
        parallel_tool_calls=parallel,
        chat_template_kwargs=_thinking(body.thinking),
        reasoning_effort=_effort(body.output_config),
        adapter_source=body.adapter_source,
        api_token=body.api_token,
        **more,
    )


def _messages(message: InMessage, where: str) -> list[Message]:
    """One message of each kind that the blocks have: results first, as templates want them."""
    if message.role not in ROLES:
        raise invalid(f"{where}.role", "must be user or assistant", "use `system` for instructions")
    if isinstance(message.content, str):
        return [Message(message.role, message.content)]
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[CalledTool] = []
    results: list[Message] = []
    for at, block in enumerate(message.content):
        place = f"{where}.content[{at}]"
        if block.type == "text":
            texts.append(_required(block.text, f"{place}.text"))
        elif block.type == "tool_result" and message.role == "user":
            id = _required(block.tool_use_id, f"{place}.tool_use_id")
            content = _text(block.content or "", f"{place}.content")
            results.append(Message("tool", content, tool_call_id=id))
        elif block.type == "tool_use" and message.role == "assistant":
            name = _required(block.name, f"{place}.name")
            function = CalledFunction(name, block.input or {})
            calls.append(CalledTool(function, _required(block.id, f"{place}.id")))
        elif block.type == "thinking" and message.role == "assistant":
            thoughts.append(_required(block.thinking, f"{place}.thinking"))
        elif block.type != "redacted_thinking":
            raise invalid(
                f"{place}.type",
                f"{block.type!r} is not supported in a message of this role",
                "send text, tool_use (assistant) and tool_result (user)",
            )
    if texts or calls or not results:
        made = Message(
            message.role,
            "\n".join(texts) if texts or not calls else None,
            tool_calls=calls or None,
            reasoning_content="\n".join(thoughts) or None,
        )
        results.append(made)
    return results


def _required(value: str | None, name: str) -> str:
    if value is None:
        raise invalid(name, "is required")
    return value


def _text(content: str | Sequence[InBlock], where: str) -> str:
    """A text, or blocks of text, joined."""
    if isinstance(content, str):
        return content
    for at, block in enumerate(content):
        if block.type != "text":
            raise invalid(
                f"{where}[{at}].type",
                f"{block.type!r} is not supported by this server",
                "send blocks of type text only",
            )
    return "\n".join(_required(one.text, f"{where}[{at}].text") for at, one in enumerate(content))


def _tools(tools: Sequence[dict[str, Any]] | None) -> list[Any] | None:
    if not tools:
        return None
    made = []
    for at, tool in enumerate(tools):
        if tool.get("type", "custom") not in ("custom", None):
            raise invalid(
                f"tools[{at}].type", "is not supported by this server", "send tools of your own"
            )
        renamed = {"name": "name", "description": "description", "input_schema": "parameters"}
        function = {new: tool[old] for old, new in renamed.items() if old in tool}
        made.append({"type": "function", "function": function})
    return made


def _choice(given: dict[str, Any] | None) -> tuple[Any, bool]:
    """`tool_choice` of a chat completion, and whether calls may be parallel."""
    if given is None:
        return None, True
    kind, parallel = given.get("type"), given.get("disable_parallel_tool_use") is not True
    if kind == "tool":
        return {"type": "function", "function": {"name": given.get("name")}}, parallel
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise invalid(
            "tool_choice.type", "is not supported by this server", "send auto, any, tool or none"
        )
    return _CHOICES[kind], parallel


def _thinking(given: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if given is None else {"enable_thinking": given.get("type") != "disabled"}


def _effort(given: dict[str, Any] | None) -> str | None:
    """`output_config.effort`. Raises InvalidRequest for a format."""
    config = given or {}
    if config.get("format"):
        raise invalid(
            "output_config.format",
            "is not supported on this route",
            "use `response_format` of /v1/chat/completions",
        )
    effort = config.get("effort")
    return effort if isinstance(effort, str) else None
