"""Anthropic's route that does not generate: the tokens of a conversation."""

from __future__ import annotations

from aiohttp import web

from engine.server.access import context_of
from engine.server.anthropic.parse import parse_count
from engine.server.formats import GenerationRequest
from engine.server.front import FRONT
from engine.server.prompts import tokenized_all
from engine.server.request_text import text_of
from engine.server.responses import json_response

COUNT = "/v1/messages/count_tokens"


async def _asked(request: web.Request) -> GenerationRequest:
    context = context_of(request)
    async with request.app[FRONT].bodies.read(request) as raw:
        return parse_count(raw, context)


async def count_tokens(request: web.Request) -> web.StreamResponse:
    """POST /v1/messages/count_tokens: the tokens of the prompt that the adapter's chat template makes."""
    asked, limits = await _asked(request), request.app[FRONT].generator.limits
    async with text_of(request, asked.parameters) as (text, vocab_size):
        (tokens,) = await tokenized_all(asked.prompts, asked.parameters, limits, text, vocab_size)
    return json_response({"input_tokens": len(tokens)})


def routes() -> list[web.RouteDef]:
    return [web.post(COUNT, count_tokens)]
