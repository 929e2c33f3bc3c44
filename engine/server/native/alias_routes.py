"""The routes of aliases (`engine.server.aliases`)."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from engine.adapters.ref import AdapterRef
from engine.errors import InvalidRequest
from engine.server.access import TENANT, check_admin, context_of
from engine.server.aliases import Alias
from engine.server.decoding import decode
from engine.server.front import FRONT
from engine.server.keys import ref_of
from engine.server.native.schemas import AdapterBody
from engine.server.responses import json_response
from engine.server.static import UNMERGED


def _shown(alias: Alias) -> dict[str, Any]:
    return {
        "name": alias.name,
        "adapter_id": alias.target.name,
        "adapter_source": alias.target.source,
        "digest": alias.digest or None,
    }


async def put_alias(request: web.Request) -> web.StreamResponse:
    """PUT /adapters/aliases/{name}: loads the adapter, then lets the name stand for it. 201 for a new name."""
    check_admin(request)
    front, name = request.app[FRONT], request.match_info["name"]
    async with front.bodies.read(request) as raw:
        body = decode(raw, AdapterBody)
    target = AdapterRef.parse(body.adapter_id, body.adapter_source)
    front.aliases.check(name, target)
    if (merged := front.backend.info.merged_adapter) is not None:
        raise InvalidRequest(
            f"no alias can be set: {merged.name!r} is merged into the base model, and no other adapter is served",
            field="name",
            hint=UNMERGED,
        )
    token = context_of(request).token(body.api_token)
    with front.loads.admitted():
        lease = await front.backend.acquire(target, token, ref_of(request.get(TENANT)))
        digest = lease.image.digest.hex()
        lease.release()
    alias = Alias(name, target, digest)
    before = front.aliases.put(alias)
    answer = _shown(alias) | {"previous": _shown(before) if before else None}
    return json_response(answer, status=200 if before else 201)


async def list_aliases(request: web.Request) -> web.StreamResponse:
    """GET /adapters/aliases."""
    return json_response({"aliases": [_shown(alias) for alias in request.app[FRONT].aliases]})


async def get_alias(request: web.Request) -> web.StreamResponse:
    """GET /adapters/aliases/{name}."""
    return json_response(_shown(request.app[FRONT].aliases.get(request.match_info["name"])))


async def delete_alias(request: web.Request) -> web.StreamResponse:
    """DELETE /adapters/aliases/{name}: later requests look the name up as an adapter's."""
    check_admin(request)
    return json_response(_shown(request.app[FRONT].aliases.remove(request.match_info["name"])))


def routes() -> list[web.RouteDef]:
    one = "/adapters/aliases/{name:.+}"
    return [
        web.get("/adapters/aliases", list_aliases),
        web.get(one, get_alias),
        web.put(one, put_alias),
        web.delete(one, delete_alias),
    ]
