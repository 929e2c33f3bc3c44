"""The JSON of Anthropic's messages."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

# -- requests


class InBlock(Struct, frozen=True):
    """A block of a message, with the fields of every type that is served."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[InBlock] | None = None


class InMessage(Struct, frozen=True):
    role: str
    content: str | list[InBlock]


class CountBody(Struct, frozen=True, kw_only=True):
    """Of POST /v1/messages/count_tokens. The fields from `adapter_source` on are ours."""

    messages: list[InMessage]
    model: str | None = None
    system: str | list[InBlock] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    adapter_source: str | None = None
    api_token: str | None = None


class MessagesBody(CountBody, frozen=True, kw_only=True):
    """Of POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    container: Any = None
    mcp_servers: Any = None
    cache_salt: str | None = None
    priority: int | None = None


# -- answers


class OutBlock(Struct):
    """A block of an answer. Fields of other types are left out."""

    type: str
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    input: Any = UNSET


class OutUsage(Struct):
    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class OutMessage(Struct):
    id: str
    model: str
    content: list[OutBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: OutUsage
    type: str = "message"
    role: str = "assistant"
