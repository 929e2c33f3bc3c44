"""The text of a request that reads a prompt and generates nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from engine.server.access import TENANT
from engine.server.front import FRONT
from engine.server.parameters import Parameters
from engine.server.static import acquire, own_text
from engine.server.text import Text


@asynccontextmanager
async def text_of(request: web.Request, parameters: Parameters) -> AsyncIterator[tuple[Text, int]]:
    """The tokenizer and the chat template of the adapter, or of the base model; and the number of its tokens.

    It counts towards the limit of open requests, because an adapter may have to load. Raises AdapterError, Overloaded.
    """
    front, tenant, lease = request.app[FRONT], request.get(TENANT), None
    generator = front.generator
    front.places.take(tenant)
    try:
        if parameters.adapter is not None:
            adapter = front.aliases.resolve(parameters.adapter)
            lease = await acquire(front.backend, adapter, parameters.api_token, tenant)
        own = own_text(front.backend, lease)
        text = front.text if own is None else await generator.texts.of(own)
        vocab_size = lease.image.vocab if lease is not None else 0
        yield text, vocab_size or generator.limits.vocab_size
    finally:
        if lease is not None:
            lease.release()
        front.places.leave(tenant)
