"""The JSON of answers that are plain objects, for the OpenAPI document. `tests/server/test_openapi.py` holds the routes
to them, field by field."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from engine.server.native.schemas import AdapterEntry

# -- OpenAI's and Anthropic's


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Response(TypedDict):
    """Of /v1/responses. Its items are those of OpenAI's reference."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: str
    usage: dict[str, Any] | None
    metadata: dict[str, Any]


class ResponseEvent(TypedDict):
    """`type` says which further fields there are."""

    type: str
    sequence_number: int
    response: NotRequired[Response]
    output_index: NotRequired[int]
    item_id: NotRequired[str]
    delta: NotRequired[str]


class MessageEvent(TypedDict):
    """`type` says which further fields there are."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    index: NotRequired[int]


class TokenCount(TypedDict):
    input_tokens: int


# -- adapters


class AdapterList(TypedDict):
    adapters: list[AdapterEntry]
    total: int


class Prefetched(TypedDict):
    id: str
    source: str | None


class Unloaded(TypedDict):
    id: str
    unloaded: list[str]  # digests


class AliasEntry(TypedDict):
    name: str
    adapter_id: str
    adapter_source: str | None
    digest: str | None


class AliasList(TypedDict):
    aliases: list[AliasEntry]


class AliasChange(AliasEntry):
    previous: AliasEntry | None


class DeviceTier(TypedDict):
    bytes: int
    capacity_bytes: int
    adapters: int
    in_use: int
    placements: int
    evictions: int


class HostTier(TypedDict):
    bytes: int
    capacity_bytes: int
    adapters: int
    leased_bytes: int
    pinned: int
    evictions: int


class DiskTier(TypedDict):
    bytes: int
    capacity_bytes: int | None
    entries: int
    hits: int
    misses: int
    evictions: int


class Cache(TypedDict):
    device: DeviceTier
    host: HostTier
    disk: DiskTier
    hits: dict[str, int]
    loads: int
    load_failures: int
    loaded_bytes: int
    seconds: dict[str, float]


# -- the server


class Degraded(TypedDict):
    """While no adapter can be loaded."""

    status: Literal["degraded"]
    adapter_exchange: Literal["restarting"]


class Version(TypedDict):
    version: str


class Merged(TypedDict):
    name: str
    source: str
    revision: str | None


class Resident(TypedDict):
    name: str
    digest: str
    bytes: int


class Info(TypedDict):
    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_total_tokens: int
    waiting_served_ratio: float
    max_batch_total_tokens: int
    max_waiting_tokens: int
    validation_workers: int
    eager_prefill: bool
    version: str
    model_type: str
    quantize: str | None
    merged_adapter: Merged | None
    device_name: str
    vocab_size: int
    max_batch_size: int
    max_step_tokens: int
    max_num_alternatives: int
    block_size: int
    adapter_bytes: int
    host_bytes: int
    backends: dict[str, str]
    memory_plan: dict[str, int]
    targets: list[str]
    chat_template: bool
    adapters_resident: list[Resident]
    waiting: int
    running: int


# -- errors


class NativeError(TypedDict):
    error: str
    error_type: str
    field: NotRequired[str]


class OpenAIProblem(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | int  # a number on vLLM's routes for adapters


class OpenAIError(TypedDict):
    error: OpenAIProblem


class AnthropicProblem(TypedDict):
    type: str
    message: str
    param: str | None


class AnthropicError(TypedDict):
    type: Literal["error"]
    error: AnthropicProblem
