"""The routes that show, load, pin and unload adapters, and the one that shows the tiers."""

from __future__ import annotations

from typing import Any, TypeVar, get_args

from aiohttp import web

from engine.adapters.ref import AdapterRef
from engine.messages import AdapterPhase, Tier
from engine.server.access import TENANT, check_admin, context_of, seen_by
from engine.server.decoding import decode
from engine.server.front import FRONT
from engine.server.keys import ref_of
from engine.server.native.adapter_entries import entries, entry_of, loaded_entry
from engine.server.native.schemas import AdapterBody, PinBody
from engine.server.parameters import invalid
from engine.server.responses import json_response
from engine.server.unload import unload

DEFAULT_LIMIT, MAX_LIMIT = 1000, 10_000  # entries of one answer

B = TypeVar("B", bound=AdapterBody)


async def list_adapters(request: web.Request) -> web.StreamResponse:
    """GET /adapters?state=&tier=&prefix=&limit=."""
    query = request.query
    state, tier = _choice(request, "state", AdapterPhase), _choice(request, "tier", Tier)
    prefix, limit = query.get("prefix", ""), _limit(query.get("limit"))
    found = [
        one
        for one in await entries(request.app[FRONT], seen_by(request))
        if one.id.startswith(prefix) and state in (None, one.state) and tier in (None, one.tier)
    ]
    return json_response({"adapters": found[:limit], "total": len(found)})


async def get_adapter(request: web.Request) -> web.StreamResponse:
    """GET /adapters/{id}?source=."""
    front = request.app[FRONT]
    ref = AdapterRef.parse(request.match_info["id"], request.query.get("source"))
    return json_response(await entry_of(front, front.aliases.resolve(ref), seen_by(request)))


async def load_adapter(request: web.Request) -> web.StreamResponse:
    """POST /adapters/load: answers when the adapter is in host memory."""
    check_admin(request)
    front = request.app[FRONT]
    body, ref = await _read(request, AdapterBody)
    token = context_of(request).token(body.api_token)
    with front.loads.admitted():
        lease = await front.backend.acquire(ref, token, ref_of(request.get(TENANT)))
        image = lease.image
        lease.release()
    return json_response(await loaded_entry(front, image))


async def prefetch_adapter(request: web.Request) -> web.StreamResponse:
    """POST /adapters/prefetch: answers 202 at once."""
    body, ref = await _read(request, AdapterBody)
    token = context_of(request).token(body.api_token)
    request.app[FRONT].prefetches.start(ref, token, ref_of(request.get(TENANT)))
    return json_response({"id": ref.name, "source": ref.source}, status=202)


async def pin_adapter(request: web.Request) -> web.StreamResponse:
    """POST /adapters/pin: answers when the adapter is on the device; with `pinned` false, ends the pin."""
    check_admin(request)
    front = request.app[FRONT]
    body, ref = await _read(request, PinBody)
    if body.pinned:
        image = await front.pins.pin(ref, context_of(request).token(body.api_token))
        return json_response(await loaded_entry(front, image))
    images = front.pins.unpin(ref.name, ref.source, seen_by(request, body.api_token))
    if not images:
        raise invalid("adapter_id", f"{ref.name!r} is not pinned", "GET /adapters shows the pins")
    return json_response(await loaded_entry(front, images[0]))


async def unload_adapter(request: web.Request) -> web.StreamResponse:
    """POST /adapters/unload."""
    check_admin(request)
    body, ref = await _read(request, AdapterBody)
    digests = await unload(request.app[FRONT], ref, seen_by(request, body.api_token))
    return json_response({"id": ref.name, "unloaded": [digest.hex() for digest in digests]})


async def show_cache(request: web.Request) -> web.StreamResponse:
    """GET /cache: the tiers, and what happened since the start."""
    front = request.app[FRONT]
    stats, tiers, use = front.backend.stats, await front.backend.tiers(), front.generator.use
    counts = tiers.counts
    answer: dict[str, Any] = {
        "device": {
            "bytes": stats.arena_used,
            "capacity_bytes": stats.arena_bytes,
            "adapters": len(stats.resident),
            "in_use": stats.in_use,
            "placements": stats.placements,
            "evictions": stats.evictions,
        },
        "host": {
            "bytes": tiers.host_used,
            "capacity_bytes": tiers.host_capacity,
            "adapters": tiers.host_images,
            "leased_bytes": tiers.host_leased,
            "pinned": len(front.pins),
            "evictions": counts.host_evictions,
        },
        "disk": {
            "bytes": tiers.disk_used,
            "capacity_bytes": tiers.disk_capacity or None,
            "entries": tiers.disk_entries,
            "hits": counts.disk_hits,
            "misses": counts.disk_misses,
            "evictions": counts.disk_evictions,
        },
        "hits": {tier: use.by_tier[tier] for tier in get_args(Tier)},
        "loads": counts.loads,
        "load_failures": counts.failed_loads,
        "loaded_bytes": counts.loaded_bytes,
        "seconds": counts.seconds,
    }
    return json_response(answer)


async def _read(request: web.Request, cls: type[B]) -> tuple[B, AdapterRef]:
    """The body, and the adapter that it names. An alias means its adapter."""
    front = request.app[FRONT]
    async with front.bodies.read(request) as raw:
        body = decode(raw, cls)
    ref = AdapterRef.parse(body.adapter_id, body.adapter_source)
    if ref.name in front.aliases.reserved:
        raise invalid("adapter_id", "names the base model", "name an adapter")
    return body, front.aliases.resolve(ref)


def _choice(request: web.Request, name: str, choices: Any) -> str | None:
    """A query parameter with a closed set of values; None if it is missing."""
    value = request.query.get(name)
    if value is not None and value not in get_args(choices):
        raise invalid(name, "has an unknown value", f"use {', '.join(get_args(choices))}")
    return value


def _limit(text: str | None) -> int:
    if text is None:
        return DEFAULT_LIMIT
    limit = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if not 0 <= limit <= MAX_LIMIT:
        raise invalid("limit", f"must be a whole number from 0 to {MAX_LIMIT}")
    return limit


def routes() -> list[web.RouteDef]:
    """Behind those of the aliases, whose paths are more exact."""
    return [
        web.get("/adapters", list_adapters),
        web.post("/adapters/load", load_adapter),
        web.post("/adapters/prefetch", prefetch_adapter),
        web.post("/adapters/pin", pin_adapter),
        web.post("/adapters/unload", unload_adapter),
        web.get("/adapters/{id:.+}", get_adapter),
        web.get("/cache", show_cache),
    ]
