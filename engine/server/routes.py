"""Every route. `FORMATS` is the table of response formats; a format entered there is served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from engine.errors import LoraxError
from engine.server import anthropic, native, openai, openapi
from engine.server.anthropic import routes as anthropic_routes
from engine.server.formats import Format
from engine.server.inference import handler_of
from engine.server.native import adapter_routes, alias_routes, token_routes
from engine.server.native import routes as native_routes
from engine.server.openai import lora_routes
from engine.server.openai import routes as openai_routes

# Path -> format of POST requests.
FORMATS: Mapping[str, Format] = {
    "/": native.INVOCATIONS,
    "/invocations": native.INVOCATIONS,
    "/generate": native.GENERATE,
    "/generate_stream": native.GENERATE_STREAM,
    "/v1/chat/completions": openai.CHAT_COMPLETIONS,
    "/v1/completions": openai.COMPLETIONS,
    "/v1/responses": openai.RESPONSES,
    "/v1/messages": anthropic.MESSAGES,
}


def routes(formats: Mapping[str, Format] = FORMATS) -> list[web.RouteDef]:
    """The routes of `formats`, and those that do not generate."""
    posts = [web.post(path, handler_of(format)) for path, format in formats.items()]
    return [
        *posts,
        *native_routes.routes(),
        *token_routes.routes(),
        *alias_routes.routes(),
        *adapter_routes.routes(),
        *openai_routes.routes(),
        *lora_routes.routes(),
        *anthropic_routes.routes(),
        *openapi.routes(),
    ]


def describe_error(formats: Mapping[str, Format], path: str, error: LoraxError) -> tuple[int, Any]:
    """Status and body of an error at `path`: in the format of that path, else in OpenAI's below /v1/, else in
    LoRAX's."""
    if path == anthropic_routes.COUNT:
        default = anthropic.MESSAGES
    else:
        default = openai.COMPLETIONS if path.startswith("/v1/") else native.GENERATE
    format = formats.get(path, default)
    return format.status_of(error), format.error_body(error)
