"""Anthropic's route that does not generate: the tokens of a conversation."""

from __future__ import annotations

from aiohttp import web

from engine.server.access import TENANT, context_of
from engine.server.anthropic.parse import parse_count
from engine.server.formats import GenerationRequest
from engine.server.front import FRONT
from engine.server.prompts import tokenized_all
from engine.server.responses import json_response
from engine.server.static import acquire, own_text

COUNT = "/v1/messages/count_tokens"


async def _asked(request: web.Request) -> GenerationRequest:
    context = context_of(request)
    async with request.app[FRONT].bodies.read(request) as raw:
        return parse_count(raw, context)


async def count_tokens(request: web.Request) -> web.StreamResponse:
    """POST /v1/messages/count_tokens: the tokens of the prompt that the adapter's chat template makes. It counts
    towards the limit of open requests, because an adapter may have to load."""
    front, tenant = request.app[FRONT], request.get(TENANT)
    asked = await _asked(request)
    generator, parameters, lease = front.generator, asked.parameters, None
    front.places.take(tenant)
    try:
        if parameters.adapter is not None:
            adapter = front.aliases.resolve(parameters.adapter)
            lease = await acquire(front.backend, adapter, parameters.api_token, tenant)
        own = own_text(front.backend, lease)
        text = front.text if own is None else await generator.texts.of(own)
        vocab_size = lease.image.vocab if lease is not None else 0
        (tokens,) = await tokenized_all(
            asked.prompts, parameters, generator.limits, text, vocab_size
        )
    finally:
        if lease is not None:
            lease.release()
        front.places.leave(tenant)
    return json_response({"input_tokens": len(tokens)})


def routes() -> list[web.RouteDef]:
    return [web.post(COUNT, count_tokens)]
