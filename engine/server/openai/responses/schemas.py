"""The JSON of requests for responses."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from engine.server.grammars import ResponseFormat


class Part(Struct, frozen=True):
    """A part of a message, of an output or of reasoning."""

    type: str = ""
    text: str | None = None


class Item(Struct, frozen=True):
    """An item of the input, with the fields of every type that is served."""

    type: str = "message"
    role: str | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    summary: list[Part] | None = None


class TextConfig(Struct, frozen=True):
    format: ResponseFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(Struct, frozen=True):
    effort: str | None = None
    summary: str | None = None


class ResponsesBody(Struct, frozen=True, kw_only=True):
    """The fields from `adapter_source` on are ours."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    metadata: dict[str, Any] | None = None
    truncation: str | None = None
    include: list[str] | None = None
    background: bool | None = None
    conversation: Any = None
    previous_response_id: str | None = None
    prompt: Any = None
    adapter_source: str | None = None
    api_token: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    top_k: int | None = None
    seed: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
