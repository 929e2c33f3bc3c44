"""OpenAI's routes that do not generate: the list of models."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from engine.errors import AdapterNotFound
from engine.server.access import seen_by
from engine.server.front import FRONT
from engine.server.parameters import BASE_NAMES
from engine.server.responses import json_response


async def _models(request: web.Request) -> list[dict[str, Any]]:
    """What the client may see: adapters that only another client's token opens are left out."""
    front = request.app[FRONT]
    base, merged = front.backend.info.model_id, front.backend.info.merged_adapter
    seen = seen_by(request)
    adapters = [one for one in await front.backend.adapters() if one.tenant in seen]
    names = dict.fromkeys(alias.name for alias in front.aliases)
    names |= dict.fromkeys(
        status.name for status in adapters if status.state != "failed" and not status.merged
    )
    if merged is not None:
        names = {merged.name: None}
    shared = {"object": "model", "created": int(front.started), "owned_by": "lorax", "root": base}
    listed = [{"id": base, **shared, "parent": None}]
    return listed + [{"id": name, **shared, "parent": base} for name in names]


async def list_models(request: web.Request) -> web.StreamResponse:
    """GET /v1/models: the base model, the aliases, then every adapter that the exchange lists, without merges. With an
    adapter in the base model's weights: the base model and that adapter."""
    return json_response({"object": "list", "data": await _models(request)})


async def get_model(request: web.Request) -> web.StreamResponse:
    """GET /v1/models/{id}."""
    models = await _models(request)
    wanted = request.match_info["id"]
    if wanted in BASE_NAMES and request.app[FRONT].backend.info.merged_adapter is None:
        return json_response(models[0])
    for model in models:
        if model["id"] == wanted:
            return json_response(model)
    raise AdapterNotFound(
        f"no model {wanted!r} is loaded", field="model", hint="GET /v1/models lists them"
    )


def routes() -> list[web.RouteDef]:
    return [
        web.get("/v1/models", list_models),
        web.get("/v1/models/{id:.+}", get_model),
    ]
