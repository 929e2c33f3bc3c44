"""The OpenAPI 3.1 document of the server and a page that shows it, both from the types of the routes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from html import escape
from typing import Annotated, Any, NamedTuple

import msgspec
from aiohttp import web
from msgspec import Meta

import engine
from engine.adapters.ref import MAX_ID_LENGTH, MAX_SOURCE_LENGTH
from engine.messages import AdapterPhase, Tier
from engine.server import answers, told
from engine.server.anthropic import schemas as anthropic_schemas
from engine.server.native import schemas
from engine.server.native.adapter_routes import MAX_LIMIT
from engine.server.openai import schemas as openai_schemas
from engine.server.openai.responses import schemas as responses_schemas
from engine.server.responses import json_response
from engine.server.text import Span

REFS = "#/components/schemas/{name}"
ERRORS = (
    *("400", "401", "403", "404", "408", "409", "413", "414", "415"),
    *("422", "424", "429", "431", "500", "503"),
)


class Operation(NamedTuple):
    """One route. With neither `answer` nor `event` nor `text` it has only errors."""

    tag: str
    summary: str
    body: Any = None
    answer: Any = None  # of JSON
    event: Any = None  # of a stream
    status: str = "200"  # of success; several with a space
    text: str = ""  # media type of an answer that is a text
    query: Mapping[str, Any] = {}  # name -> type


def _openai(name: str, choice: type[msgspec.Struct]) -> Any:
    """OpenAI's answer or chunk with choices of this type. (msgspec describes no union of structs.)"""
    fields = [
        (one.name, list[choice] if one.name == "choices" else one.type, one.default)  # type: ignore[valid-type]
        for one in msgspec.structs.fields(openai_schemas.OpenAIAnswer)
    ]
    return msgspec.defstruct(
        name,
        [
            (one, kind) if default is msgspec.NODEFAULT else (one, kind, default)
            for one, kind, default in fields
        ],
    )


_GENERATE, _OPENAI, _ANTHROPIC = "Generate", "OpenAI", "Anthropic"
_ADAPTERS, _SERVER = "Adapters", "Server"
_LIMIT = Annotated[int, Meta(ge=0, le=MAX_LIMIT)]
_SOURCE = Annotated[str, Meta(max_length=MAX_SOURCE_LENGTH)]
_HEALTH = Operation(
    _SERVER, "Health; with JSON while it is degraded", answer=answers.Degraded, text="text/plain"
)

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/generate"): Operation(
        _GENERATE, "Generate text", schemas.GenerateBody, schemas.GenerateAnswer
    ),
    ("POST", "/generate_stream"): Operation(
        _GENERATE, "Generate a stream of tokens", schemas.GenerateBody, event=schemas.StreamAnswer
    ),
    ("POST", "/"): Operation(
        _GENERATE,
        "Generate text, as a stream if the body says so",
        schemas.GenerateBody,
        list[schemas.GenerateAnswer],
        schemas.StreamAnswer,
    ),
    ("POST", "/invocations"): Operation(
        _GENERATE,
        "As POST /, for SageMaker",
        schemas.GenerateBody,
        list[schemas.GenerateAnswer],
        schemas.StreamAnswer,
    ),
    ("POST", "/tokenize"): Operation(
        _GENERATE, "The tokens of a text", schemas.TokenizeBody, schemas.Tokenized | list[Span]
    ),
    ("POST", "/detokenize"): Operation(
        _GENERATE, "The text of tokens", schemas.DetokenizeBody, schemas.Detokenized
    ),
    ("POST", "/v1/chat/completions"): Operation(
        _OPENAI,
        "Chat completion",
        openai_schemas.ChatBody,
        _openai("ChatAnswer", openai_schemas.ChatChoice),
        _openai("ChatChunk", openai_schemas.ChatChunkChoice),
    ),
    ("POST", "/v1/completions"): Operation(
        _OPENAI,
        "Completion",
        openai_schemas.CompletionBody,
        _openai("CompletionAnswer", openai_schemas.CompletionChoice),
        _openai("CompletionChunk", openai_schemas.CompletionChoice),
    ),
    ("POST", "/v1/responses"): Operation(
        _OPENAI,
        "Response, stateless",
        responses_schemas.ResponsesBody,
        answers.Response,
        answers.ResponseEvent,
    ),
    ("GET", "/v1/models"): Operation(
        _OPENAI, "The base model, aliases and adapters", answer=answers.Models
    ),
    ("GET", "/v1/models/{id}"): Operation(_OPENAI, "One model", answer=answers.Model),
    ("POST", "/v1/load_lora_adapter"): Operation(
        _OPENAI,
        "vLLM's: load an adapter under a name",
        openai_schemas.LoadLoraBody,
        text="text/plain",
    ),
    ("POST", "/v1/unload_lora_adapter"): Operation(
        _OPENAI, "vLLM's: unload that name", openai_schemas.UnloadLoraBody, text="text/plain"
    ),
    ("POST", "/v1/messages"): Operation(
        _ANTHROPIC,
        "Message",
        anthropic_schemas.MessagesBody,
        anthropic_schemas.OutMessage,
        answers.MessageEvent,
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        _ANTHROPIC, "Tokens of a conversation", anthropic_schemas.CountBody, answers.TokenCount
    ),
    ("GET", "/adapters"): Operation(
        _ADAPTERS,
        "All adapters that the client may see",
        answer=answers.AdapterList,
        query={"state": AdapterPhase, "tier": Tier, "prefix": str, "limit": _LIMIT},
    ),
    ("GET", "/adapters/{id}"): Operation(
        _ADAPTERS, "One adapter", answer=schemas.AdapterEntry, query={"source": _SOURCE}
    ),
    ("POST", "/adapters/load"): Operation(
        _ADAPTERS, "Load into host memory", schemas.AdapterBody, schemas.AdapterEntry
    ),
    ("POST", "/adapters/prefetch"): Operation(
        _ADAPTERS, "Begin to load", schemas.AdapterBody, answers.Prefetched, status="202"
    ),
    ("POST", "/adapters/pin"): Operation(
        _ADAPTERS, "Keep on the device, or no longer", schemas.PinBody, schemas.AdapterEntry
    ),
    ("POST", "/adapters/unload"): Operation(
        _ADAPTERS, "Free when no request uses it", schemas.AdapterBody, answers.Unloaded
    ),
    ("GET", "/adapters/aliases"): Operation(_ADAPTERS, "All aliases", answer=answers.AliasList),
    ("GET", "/adapters/aliases/{name}"): Operation(
        _ADAPTERS, "One alias", answer=answers.AliasEntry
    ),
    ("PUT", "/adapters/aliases/{name}"): Operation(
        _ADAPTERS,
        "Let a name stand for an adapter; 201 for a new name",
        schemas.AdapterBody,
        answers.AliasChange,
        status="200 201",
    ),
    ("DELETE", "/adapters/aliases/{name}"): Operation(
        _ADAPTERS, "Remove an alias", answer=answers.AliasEntry
    ),
    ("GET", "/cache"): Operation(
        _ADAPTERS, "The tiers: device, host memory, disk", answer=answers.Cache
    ),
    ("GET", "/"): _HEALTH,
    ("GET", "/health"): _HEALTH,
    ("GET", "/ping"): _HEALTH,
    ("GET", "/startup"): Operation(
        _SERVER, "Ready when it has generated a token", text="text/plain"
    ),
    ("GET", "/info"): Operation(
        _SERVER, "The model, its limits and the memory plan", answer=answers.Info
    ),
    ("GET", "/metrics"): Operation(
        _SERVER,
        "Prometheus metrics, with `format=json` as JSON",
        answer=dict[str, dict[str, Any]],
        text="text/plain",
        query={"format": str},
    ),
    ("GET", "/version"): Operation(_SERVER, "The version of the server", answer=answers.Version),
    ("POST", "/embed"): Operation(_GENERATE, "Not served: the model generates text"),
    ("POST", "/classify"): Operation(_GENERATE, "Not served: the model generates text"),
    ("POST", "/classify_batch"): Operation(_GENERATE, "Not served: the model generates text"),
    ("POST", "/v1/embeddings"): Operation(_OPENAI, "Not served: the model generates text"),
    ("GET", "/openapi.json"): Operation(_SERVER, "This document", answer=dict[str, Any]),
    ("GET", "/api-doc/openapi.json"): Operation(
        _SERVER, "This document, where LoRAX has it", answer=dict[str, Any]
    ),
    ("GET", "/docs"): Operation(_SERVER, "This document as a page", text="text/html"),
}


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI document."""
    used = [kind for one in OPERATIONS.values() for kind in one[2:5] if kind is not None]
    _, components = msgspec.json.schema_components([*used, *_ERROR_TYPES], ref_template=REFS)
    told.tell(components)
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _operation(path, operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "LoRAX",
            "version": engine.__version__,
            "description": "One base model, many LoRA adapters.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


_ERROR_TYPES = (answers.NativeError, answers.OpenAIError, answers.AnthropicError)


def _error_of(path: str) -> Any:
    if path.startswith("/v1/messages"):
        return answers.AnthropicError
    return answers.OpenAIError if path.startswith("/v1/") else answers.NativeError


def _operation(path: str, operation: Operation) -> dict[str, Any]:
    content = _content(path, operation)
    success = {"description": "Success", "content": content}
    made: dict[str, Any] = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": {status: success for status in operation.status.split() if content}
        | {status: _error(path) for status in ERRORS if not (status == "422" and "/v1/" in path)},
    }
    if parameters := _parameters(path, operation):
        made["parameters"] = parameters
    if operation.body is not None:
        made["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _schema(operation.body)}},
        }
    return made


def _error(path: str) -> dict[str, Any]:
    schema = _schema(_error_of(path))
    return {"description": "Error", "content": {"application/json": {"schema": schema}}}


def _content(path: str, operation: Operation) -> dict[str, Any]:
    """Media types of success -> their schemas."""
    content: dict[str, Any] = {}
    if operation.text:
        content[operation.text] = {"schema": {"type": "string"}}
    if operation.answer is not None:
        content["application/json"] = {"schema": _schema(operation.answer)}
    if operation.event is not None:
        data = {"anyOf": [_schema(operation.event), _schema(_error_of(path))]}
        json: dict[str, Any] = {"contentMediaType": "application/json", "contentSchema": data}
        if path.startswith("/v1/") and path.endswith("completions"):
            json = {"anyOf": [{"const": "[DONE]"}, json]}
        # Each event has this form, as OpenAPI 3.2 says it of server-sent events.
        event = {"type": "object", "properties": {"data": {"type": "string", **json}}}
        content["text/event-stream"] = {"schema": event | {"required": ["data"]}}
    return content


def _parameters(path: str, operation: Operation) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    if "{" in path:
        name = path.partition("{")[2].rstrip("}")
        schema = {"type": "string", "minLength": 1, "maxLength": MAX_ID_LENGTH}
        made.append({"name": name, "in": "path", "required": True, "schema": schema})
    made += [
        {"name": name, "in": "query", "schema": _schema(kind)}
        for name, kind in operation.query.items()
    ]
    return made


def _schema(kind: Any) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=REFS)
    return schema


@functools.cache
def page() -> str:
    """The document as HTML, without scripts and without files of others."""
    schemas_of = document()["components"]["schemas"]
    parts = [f"<h1>LoRAX {escape(engine.__version__)}</h1>"]
    for tag in dict.fromkeys(one.tag for one in OPERATIONS.values()):
        parts.append(f"<h2>{tag}</h2>")
        for (method, path), one in OPERATIONS.items():
            if one.tag == tag:
                parts.append(
                    f"<h3><code>{method} {escape(path)}</code></h3><p>{escape(one.summary)}</p>"
                )
                parts.append(_fields("Body", one.body, schemas_of))
                parts.append(_fields("Answer", one.answer, schemas_of))
    style = "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}td{padding:0 1rem 0 0}"
    head = f'<meta charset="utf-8"><title>LoRAX</title><style>{style}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def _fields(title: str, kind: Any, schemas_of: Mapping[str, Any]) -> str:
    schema = {} if kind is None else _schema(kind)
    schema = schemas_of.get(str(schema.get("$ref", "")).rpartition("/")[2], schema)
    fields = schema.get("properties")
    if not fields:
        return ""
    needed = schema.get("required", ())
    rows = (
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_type(one))}</td>"
        f"<td>{'required' if name in needed else ''}</td></tr>"
        for name, one in fields.items()
    )
    return f"<details><summary>{title}</summary><table>{''.join(rows)}</table></details>"


def _type(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items') or {})}"
    return str(schema.get("type", "any"))


async def show_document(request: web.Request) -> web.StreamResponse:
    """GET /openapi.json, /api-doc/openapi.json."""
    return json_response(document())


async def show_page(request: web.Request) -> web.StreamResponse:
    """GET /docs."""
    return web.Response(text=page(), content_type="text/html")


def routes() -> list[web.RouteDef]:
    return [
        web.get("/openapi.json", show_document),
        web.get("/api-doc/openapi.json", show_document),
        web.get("/docs", show_page),
    ]
