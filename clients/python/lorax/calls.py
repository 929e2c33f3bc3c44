"""The calls of both clients, as data: what is sent, and how the answer is read.

`lorax.methods` makes each function a method of `Client` and of `AsyncClient`, which differ only in how they wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, TypeVar

import httpx
import pydantic_core
from pydantic import Field, TypeAdapter

from lorax.errors import LoraxError, UnknownError, ValidationError, parse_error
from lorax.types import (
    BatchRequest,
    ClassifyResponse,
    EmbedResponse,
    Info,
    MergedAdapters,
    Parameters,
    Request,
    Response,
    ResponseFormat,
    TextToken,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request, and how its answer is read. An empty `path` is the base URL itself."""

    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str
    read: Callable[[httpx.Response], T]
    body: Mapping[str, Any] | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


def reader(shape: TypeAdapter[T]) -> Callable[[httpx.Response], T]:
    """Reads JSON of this shape. Raises UnknownError for any other."""

    def read(response: httpx.Response) -> T:
        try:
            return shape.validate_json(response.content)
        except ValueError:
            raise UnknownError(
                f"{response.url.path} did not answer as a LoRAX server does; check the base URL",
                response.status_code,
            ) from None

    return read


def error_of(response: httpx.Response) -> LoraxError:
    """The error of an answer that has been read and is none of success."""
    try:
        payload = pydantic_core.from_json(response.content)
    except ValueError:
        payload = None
    if not isinstance(payload, dict):
        payload = {}
    if response.is_redirect and "error" not in payload:
        payload = {"error": f"moved to {response.headers.get('location')}: use it as the base URL"}
    return parse_error(response.status_code, payload, response.headers)


# -- generation


def generate(
    prompt: str,
    adapter_id: str | None = None,
    adapter_source: str | None = None,
    merged_adapters: MergedAdapters | None = None,
    api_token: str | None = None,
    do_sample: bool = False,
    max_new_tokens: int | None = None,
    ignore_eos_token: bool = False,
    best_of: int | None = None,
    repetition_penalty: float | None = None,
    return_full_text: bool = False,
    seed: int | None = None,
    stop_sequences: list[str] | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    truncate: int | None = None,
    typical_p: float | None = None,
    watermark: bool = False,
    response_format: dict[str, Any] | ResponseFormat | None = None,
    decoder_input_details: bool = False,
    return_k_alternatives: int | None = None,
    details: bool = True,
    *,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    min_p: float | None = None,
    cache_salt: str | None = None,
    priority: int | None = None,
    min_new_tokens: int | None = None,
) -> Call[Response]:
    """The text that follows `prompt`. `lorax.types.Parameters` says what the arguments mean."""
    parameters = Parameters(
        adapter_id=adapter_id,
        adapter_source=adapter_source,
        merged_adapters=merged_adapters,
        api_token=api_token,
        do_sample=do_sample,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        ignore_eos_token=ignore_eos_token,
        best_of=best_of,
        repetition_penalty=repetition_penalty,
        return_full_text=return_full_text,
        seed=seed,
        stop=stop_sequences or [],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        truncate=truncate,
        typical_p=typical_p,
        watermark=watermark,
        response_format=_format(response_format),
        decoder_input_details=decoder_input_details,
        return_k_alternatives=return_k_alternatives,
        details=details,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        min_p=min_p,
        cache_salt=cache_salt,
        priority=priority,
    )
    request = Request(inputs=prompt, parameters=parameters)
    return Call("POST", "", _first, request.model_dump(by_alias=True, exclude_none=True))


def generate_stream(
    prompt: str,
    adapter_id: str | None = None,
    adapter_source: str | None = None,
    merged_adapters: MergedAdapters | None = None,
    api_token: str | None = None,
    do_sample: bool = False,
    max_new_tokens: int | None = None,
    ignore_eos_token: bool = False,
    repetition_penalty: float | None = None,
    return_full_text: bool = False,
    seed: int | None = None,
    stop_sequences: list[str] | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    truncate: int | None = None,
    typical_p: float | None = None,
    watermark: bool = False,
    response_format: dict[str, Any] | ResponseFormat | None = None,
    details: bool = True,
    return_k_alternatives: int | None = None,
    *,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    min_p: float | None = None,
    cache_salt: str | None = None,
    priority: int | None = None,
    min_new_tokens: int | None = None,
) -> Call[None]:
    """The tokens that follow `prompt`, as they come. Closing the iterator cancels the request.

    `lorax.types.Parameters` says what the arguments mean.
    """
    parameters = Parameters(
        adapter_id=adapter_id,
        adapter_source=adapter_source,
        merged_adapters=merged_adapters,
        api_token=api_token,
        do_sample=do_sample,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        ignore_eos_token=ignore_eos_token,
        repetition_penalty=repetition_penalty,
        return_full_text=return_full_text,
        seed=seed,
        stop=stop_sequences or [],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        truncate=truncate,
        typical_p=typical_p,
        watermark=watermark,
        response_format=_format(response_format),
        return_k_alternatives=return_k_alternatives,
        details=details,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        min_p=min_p,
        cache_salt=cache_salt,
        priority=priority,
    )
    request = Request(inputs=prompt, parameters=parameters, stream=True)
    body = request.model_dump(by_alias=True, exclude_none=True)
    return Call("POST", "", lambda response: None, body)


_Answers = Annotated[list[Response], Field(min_length=1)]
_read_answers = reader(TypeAdapter[list[Response]](_Answers))


def _first(response: httpx.Response) -> Response:
    return _read_answers(response)[0]


def _format(given: dict[str, Any] | ResponseFormat | None) -> ResponseFormat | None:
    return ResponseFormat.model_validate(given) if isinstance(given, dict) else given


# -- other routes


def embed(
    inputs: str,
    *,
    adapter_id: str | None = None,
    adapter_source: str | None = None,
    merged_adapters: MergedAdapters | None = None,
    api_token: str | None = None,
) -> Call[EmbedResponse]:
    """The embedding of a text."""
    parameters = Parameters(
        adapter_id=adapter_id,
        adapter_source=adapter_source,
        merged_adapters=merged_adapters,
        api_token=api_token,
    )
    request = Request(inputs=inputs, parameters=parameters)
    body = request.model_dump(exclude_defaults=True)
    return Call("POST", "/embed", reader(TypeAdapter(EmbedResponse)), body)


_read_entities = reader(TypeAdapter(list[dict[str, Any]]))
_read_batch = reader(TypeAdapter(list[list[dict[str, Any]]]))


def classify(inputs: str) -> Call[ClassifyResponse]:
    """The entities in a text."""
    body = Request(inputs=inputs).model_dump(exclude_defaults=True)
    return Call(
        "POST", "/classify", lambda answer: ClassifyResponse(entities=_read_entities(answer)), body
    )


def classify_batch(inputs: list[str]) -> Call[list[ClassifyResponse]]:
    """The entities in each text."""
    body = BatchRequest(inputs=inputs).model_dump(exclude_defaults=True)

    def read(response: httpx.Response) -> list[ClassifyResponse]:
        return [ClassifyResponse(entities=one) for one in _read_batch(response)]

    return Call("POST", "/classify_batch", read, body)


def tokenize(inputs: str, add_special_tokens: bool = True) -> Call[list[TextToken]]:
    """The tokens of a text."""
    body = {"inputs": inputs, "add_special_tokens": add_special_tokens}
    return Call("POST", "/tokenize", reader(TypeAdapter(list[TextToken])), body)


def info() -> Call[Info]:
    """The model, its limits and the version of the server."""
    return Call("GET", "/info", reader(TypeAdapter(Info)))


def health() -> Call[None]:
    return Call("GET", "/health", lambda response: None)


def metrics(format: Literal["prometheus", "json"] = "prometheus") -> Call[str | dict[str, Any]]:
    """The server's metrics: Prometheus's text, or with `json` a dictionary."""
    if format == "json":
        read = reader(TypeAdapter[str | dict[str, Any]](dict[str, Any]))
        return Call("GET", "/metrics", read, headers={"Accept": "application/json"})
    if format != "prometheus":
        raise ValidationError("`format` must be prometheus or json")
    return Call("GET", "/metrics", lambda response: response.text)
