"""Messages of chat completions in the form that chat templates take."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.server.conversation import (
    Conversation,
    arguments_of,
    check_calls,
    documents_of,
    variables_of,
)
from engine.server.openai.schemas import CalledTool, ChatBody, ContentPart, Message
from engine.server.openai.tools import use_of_tools
from engine.server.parameters import invalid


def conversation(body: ChatBody) -> Conversation:
    """The conversation of a request. Raises InvalidRequest."""
    if not body.messages:
        raise invalid("messages", "is empty", "send at least one message")
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise invalid(
            "continue_final_message",
            "cannot be combined with `add_generation_prompt`",
            "leave out one of them",
        )
    if continues and body.messages[-1].role != "assistant":
        raise invalid(
            "continue_final_message",
            "needs an assistant message at the end",
            "leave it out, or add the message that the answer continues",
        )
    variables = variables_of(body.chat_template_kwargs)
    if body.reasoning_effort is not None:
        variables = variables_of({"reasoning_effort": body.reasoning_effort} | variables)
    use = use_of_tools(body)
    prompts = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    return Conversation(
        messages=[_message(one, f"messages[{at}]") for at, one in enumerate(body.messages)],
        tools=body.tools if use is not None else None,
        documents=documents_of(body.documents),
        template=body.chat_template,
        variables=variables,
        add_generation_prompt=prompts,
        continue_final_message=continues,
        use=use,
    )


def _message(message: Message, where: str) -> dict[str, Any]:
    """A message with parts of type text joined, and without fields that were not given."""
    if message.function_call is not None:
        raise invalid(
            f"{where}.function_call", "is not supported by this server", "use `tool_calls`"
        )
    content = message.content
    if isinstance(content, list):
        content = _joined(content, f"{where}.content")
    if content is None and not message.tool_calls:
        raise invalid(f"{where}.content", "is required")
    made: dict[str, Any] = msgspec.to_builtins(message)
    made |= {} if content is None else {"content": content}
    if message.tool_calls:
        check_calls(message.tool_calls, f"{where}.tool_calls")
        made["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(message.tool_calls)
        ]
    return made


def _joined(parts: list[ContentPart], where: str) -> str:
    for index, part in enumerate(parts):
        if part.type != "text":
            raise invalid(
                f"{where}[{index}].type",
                f"{part.type!r} is not supported by this server",
                "send parts of type text only",
            )
        if part.text is None:
            raise invalid(f"{where}[{index}].text", "is required")
    return "".join(part.text or "" for part in parts)


def _call(call: CalledTool, where: str) -> dict[str, Any]:
    if call.type != "function":
        raise invalid(
            f"{where}.type",
            f"{call.type!r} is not supported by this server",
            "send calls of type function only",
        )
    arguments = arguments_of(call.function.arguments, f"{where}.function.arguments")
    made: dict[str, Any] = {} if call.id is None else {"id": call.id}
    return made | {
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }
