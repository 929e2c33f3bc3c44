"""The JSON of LoRAX's own routes."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from engine.messages import AdapterPhase, Tier
from engine.server.grammars import ResponseFormat
from engine.server.merged import MergedAdapters


class GenerateParameters(Struct, frozen=True):
    adapter_id: str | None = None
    adapter_source: str | None = None
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    do_sample: bool | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    stop: list[str] | None = None
    truncate: int | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: int | None = None
    apply_chat_template: bool | None = None  # ignored, as by LoRAX
    seed: int | None = None
    response_format: ResponseFormat | None = None
    grammar: ResponseFormat | None = None  # of TGI
    top_n_tokens: int | None = None  # of TGI; refused


class GenerateBody(Struct, frozen=True):
    inputs: str
    parameters: GenerateParameters | None = None
    stream: bool | None = None


class AdapterBody(Struct, frozen=True):
    adapter_id: str
    adapter_source: str | None = None
    api_token: str | None = None


class PinBody(AdapterBody, frozen=True):
    pinned: bool = True


class AdapterProblem(Struct):
    error_type: str
    message: str
    field: str | None
    hint: str | None


class AdapterEntry(Struct):
    """An adapter that the server knows."""

    id: str
    source: str
    revision: str | None
    digest: str | None
    state: AdapterPhase
    tier: Tier
    pinned: bool
    preloaded: bool
    bytes: int
    rank: int | None  # the largest
    ranks: list[int]
    targets: list[str]
    base_model: str | None
    merged: bool
    requests: int  # that use it now
    hits: int
    last_used: str | None  # ISO 8601, UTC
    seconds: dict[str, float]  # stage -> seconds of the last load
    error: AdapterProblem | None


class TokenizeBody(Struct, frozen=True):
    """LoRAX's with `inputs`, vLLM's with `prompt` or `messages`."""

    inputs: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class Tokenized(Struct):
    """vLLM's."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeBody(Struct, frozen=True):
    tokens: list[int]
    model: str | None = None


class Detokenized(Struct):
    prompt: str


class AlternativeToken(Struct):
    id: int
    text: str
    logprob: float | None


class OutputToken(Struct):
    id: int
    text: str
    logprob: float | None
    special: bool
    skipped: bool = False
    alternative_tokens: list[AlternativeToken] | UnsetType = UNSET


class PrefillToken(Struct):
    id: int
    text: str
    logprob: float | None


class BestOfSequence(Struct):
    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[OutputToken]


class Details(Struct):
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[OutputToken]
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET


class GenerateAnswer(Struct):
    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(Struct):
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    seed: int | None


class StreamAnswer(Struct):
    token: OutputToken
    generated_text: str | None = None
    details: StreamDetails | None = None
