"""Bodies of responses, as chat completions: items become messages."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

from engine.server.decoding import decode
from engine.server.formats import Context, GenerationRequest
from engine.server.grammars import ResponseFormat
from engine.server.openai.responses.format import ResponsesFormatter
from engine.server.openai.responses.schemas import Item, Part, ResponsesBody
from engine.server.openai.schemas import CalledFunction, CalledTool, ChatBody, Message
from engine.server.openai.translation import translated
from engine.server.parameters import invalid

LOGPROBS = "message.output_text.logprobs"
TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_STATE = "send the whole conversation in `input`; the server keeps none"
_NAMES = {"inputs": "input", "max_new_tokens": "max_output_tokens"}
_RENAMED = (
    (r"^messages", "input"),
    (r"^(tools\[\d+\])\.function", r"\1"),
    (r"^response_format(\.json_schema)?", "text.format"),
    (r"^reasoning_effort", "reasoning.effort"),
)


def parse_responses(raw: bytes | bytearray, context: Context, /) -> GenerationRequest:
    """Of /v1/responses. See `Parser`."""
    body = decode(raw, ResponsesBody)
    _check(body)
    chat = ChatBody(
        messages=_messages(body),
        model=body.model,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        tools=_tools(body.tools),
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body),
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        chat_template_kwargs=body.chat_template_kwargs,
        adapter_source=body.adapter_source,
        api_token=body.api_token,
        cache_salt=body.cache_salt,
        priority=body.priority,
    )
    parameters, prompt = translated(chat, context, _NAMES, *_RENAMED)
    return GenerationRequest(
        parameters=parameters,
        prompts=[prompt],
        formatter=partial(ResponsesFormatter, body, body.model or context.model_id),
        stream=bool(body.stream),
        id=f"resp_{uuid.uuid4().hex}",
    )


def _check(body: ResponsesBody) -> None:
    """Raises InvalidRequest for what needs state, and for what is not served."""
    for name, given, remedy in (
        ("previous_response_id", body.previous_response_id, _STATE),
        ("conversation", body.conversation, _STATE),
        ("background", body.background, "leave it out and wait, or use `stream`"),
        ("prompt", body.prompt, "send the text in `instructions` and `input`"),
        ("top_logprobs", body.top_logprobs, "use /v1/chat/completions"),
        ("truncation", body.truncation == "auto", "leave it out, and send fewer items"),
        ("include", LOGPROBS in (body.include or ()), f"leave out {LOGPROBS}"),
    ):
        if given:
            raise invalid(name, "is not supported by this server", remedy)
    if not body.input:
        raise invalid("input", "is empty", "send a text or at least one item")


class _Turns:
    """Messages from items. Reasoning, text and calls that follow each other are one message of the assistant."""

    def __init__(self) -> None:
        self.made: list[Message] = []
        self._reasoning: str | None = None
        self._content: str | None = None
        self._calls: list[CalledTool] = []

    def add(self, message: Message) -> None:
        self.end()
        self.made.append(message)

    def think(self, text: str) -> None:
        self.end()
        self._reasoning = text or None

    def say(self, text: str) -> None:
        if self._content is not None or self._calls:
            self.end()
        self._content = text

    def call(self, call: CalledTool) -> None:
        self._calls.append(call)

    def end(self) -> None:
        """Ends the message of the assistant, if there is one. Reasoning alone is left out."""
        if self._content is not None or self._calls:
            self.made.append(
                Message(
                    "assistant",
                    self._content,
                    tool_calls=self._calls or None,
                    reasoning_content=self._reasoning,
                )
            )
        self._reasoning, self._content, self._calls = None, None, []


def _messages(body: ResponsesBody) -> list[Message]:
    turns = _Turns()
    if body.instructions:
        turns.add(Message("developer", body.instructions))
    if isinstance(body.input, str):
        turns.add(Message("user", body.input))
    else:
        for at, item in enumerate(body.input):
            _add(turns, item, f"input[{at}]")
    turns.end()
    if not turns.made:
        raise invalid("input", "has no message", "send at least one")
    return turns.made


def _add(turns: _Turns, item: Item, where: str) -> None:
    if item.type == "message":
        role = _required(item.role, f"{where}.role")
        text = _text(item.content, f"{where}.content")
        if role == "assistant":
            turns.say(text)
        else:
            turns.add(Message(role, text))
    elif item.type == "function_call":
        function = CalledFunction(
            _required(item.name, f"{where}.name"), _required(item.arguments, f"{where}.arguments")
        )
        turns.call(CalledTool(function, _required(item.call_id, f"{where}.call_id")))
    elif item.type == "function_call_output":
        id = _required(item.call_id, f"{where}.call_id")
        turns.add(Message("tool", _text(item.output, f"{where}.output"), tool_call_id=id))
    elif item.type == "reasoning":
        turns.think(_text(item.content or item.summary or "", f"{where}.content"))
    else:
        raise invalid(
            f"{where}.type",
            f"{item.type!r} is not supported by this server",
            "send messages, function_call, function_call_output and reasoning",
        )


def _required(value: str | None, name: str) -> str:
    if value is None:
        raise invalid(name, "is required")
    return value


def _text(content: str | Sequence[Part] | None, where: str) -> str:
    if content is None:
        raise invalid(where, "is required")
    if isinstance(content, str):
        return content
    for at, part in enumerate(content):
        if part.type not in TEXT_PARTS:
            raise invalid(
                f"{where}[{at}].type",
                f"{part.type!r} is not supported by this server",
                "send parts of text only",
            )
    return "".join(_required(part.text, f"{where}[{at}].text") for at, part in enumerate(content))


def _tools(tools: Sequence[dict[str, Any]] | None) -> list[Any] | None:
    """Functions in the shape of chat completions."""
    if not tools:
        return None
    fields = ("name", "description", "parameters", "strict")
    made: list[Any] = []
    for tool in tools:
        function = {key: tool[key] for key in fields if tool.get(key) is not None}
        made.append({"type": tool.get("type"), "function": function})
    return made


def _choice(given: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(given, dict) and given.get("type") == "function":
        return {"type": "function", "function": {"name": given.get("name")}}
    return given


def _format(body: ResponsesBody) -> ResponseFormat | None:
    """`text.format` as `response_format`: it has the schema at its top level."""
    return body.text.format if body.text else None
