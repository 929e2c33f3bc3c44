"""The JSON of every route, as msgspec structs. Fields that a struct does not name are ignored, as LoRAX does.

Types are strict, but an integer may stand for a float. `decode` turns what is wrong with a body into the error that a
client can act on.
"""

from __future__ import annotations

import functools
import re
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType

from engine.errors import InvalidRequest, MalformedRequest

MAX_NAMES, MAX_NAME = 20, 100  # names that are logged, and characters of each

T = TypeVar("T")


@functools.cache
def _decoder(cls: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(cls)


def decode(body: bytes | bytearray, cls: type[T]) -> T:
    """The body as `cls`.

    Raises MalformedRequest if it is not a JSON object, InvalidRequest if a field is missing or of the wrong type.
    """
    try:
        struct: Any = cls
        found: T = _decoder(struct).decode(body)
        return found
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        missing = re.match(r"Object missing required field `(\w+)`", problem)
        where = path.rstrip("`").lstrip(".")
        if missing:
            where = f"{where}.{missing[1]}" if where else missing[1]
        if not where:
            raise MalformedRequest(
                f"the body must be a JSON object: {problem}",
                hint="see docs/api.md for the fields of this route",
            ) from None
        name = where.removeprefix("parameters.")
        what = f"has the wrong type: {problem[:1].lower()}{problem[1:]}"
        raise InvalidRequest(f"`{name}` {'is required' if missing else what}", field=name) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedRequest(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise MalformedRequest("the body is nested too deeply") from None


def ignored(body: bytes | bytearray, cls: type[Struct]) -> list[str]:
    """The names in a body that `cls` does not have, at its top and in `parameters`; for the log, so not all of them."""
    given = msgspec.json.decode(body)
    known = {field.encode_name for field in msgspec.structs.fields(cls)}
    inner = {field.encode_name for field in msgspec.structs.fields(GenerateParameters)}
    names = [name for name in given if name not in known]
    if "parameters" in known and isinstance(given.get("parameters"), dict):
        names += [name for name in given["parameters"] if name not in inner]
    return [name[:MAX_NAME].encode("unicode_escape").decode() for name in names[:MAX_NAMES]]


# -- LoRAX's own routes


class GenerateParameters(Struct, frozen=True):
    adapter_id: str | None = None
    adapter_source: str | None = None
    merged_adapters: dict[str, Any] | None = None
    api_token: str | None = None
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
    response_format: dict[str, Any] | None = None


class GenerateBody(Struct, frozen=True):
    inputs: str
    parameters: GenerateParameters | None = None
    stream: bool | None = None


class TokenizeBody(Struct, frozen=True):
    inputs: str
    add_special_tokens: bool | None = None


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


# -- OpenAI's routes: what goes in


class ContentPart(Struct, frozen=True):
    type: str
    text: str | None = None


class Message(Struct, frozen=True, omit_defaults=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class StreamOptions(Struct, frozen=True):
    include_usage: bool | None = None


class OpenAIBody(Struct, frozen=True, kw_only=True):
    """What both routes share. `model` names the adapter; the last fields are not OpenAI's."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    repetition_penalty: float | None = None
    top_k: int | None = None
    typical_p: float | None = None
    min_p: float | None = None
    ignore_eos_token: bool | None = None
    adapter_source: str | None = None
    api_token: str | None = None


class ChatBody(OpenAIBody, frozen=True, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None


class CompletionBody(OpenAIBody, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


# -- OpenAI's routes: what comes out


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CachedTokens(Struct):
    cached_tokens: int


class OpenAIUsage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class AnswerMessage(Struct):
    role: str
    content: str
    refusal: None = None


class ChatChoice(Struct):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class Delta(Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class OpenAIAnswer(Struct):
    """A whole answer (with `usage`) or a chunk of a stream (`usage` only in the last, if asked for)."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice] | list[ChatChunkChoice] | list[CompletionChoice]
    usage: OpenAIUsage | None | UnsetType = UNSET
