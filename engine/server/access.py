"""Who may use the server: API keys, pages of other origins, and which header means what.

A request *with a key* has one of the server's keys in `Authorization: Bearer` or in `x-api-key`. Without server keys,
`Authorization: Bearer` is the client's token for private adapters, as in LoRAX. With them it never leaves the server.
"""

from __future__ import annotations

import re

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from engine.adapters.sources import token_hash
from engine.config import ServerConfig
from engine.errors import ConfigError, Forbidden, LoraxError, Unauthorized
from engine.server.formats import Context, bearer
from engine.server.front import FRONT
from engine.server.keys import Tenant
from engine.server.native.routes import health
from engine.server.refusals import refused
from engine.server.responses import SERVER

API_KEY = "x-api-key"
ADAPTER_TOKEN = "x-adapter-token"
TENANT = web.RequestKey("tenant", Tenant)  # set if the server has keys
READING = ("GET", "HEAD")
HEADER_NAMES = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z, -]*")
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\s]+")


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses pages of origins that are not allowed, and clients without a key. Only health needs no key."""
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is not None and request.method not in READING and not _allows(request, origin):
        raise _foreign()
    # By handler, not by path, so that no spelling of a path can pass for another.
    if request.app[FRONT].keys.required and request.match_info.handler is not health:
        request[TENANT] = _tenant_of(request)
    return await handler(request)


def context_of(request: web.Request) -> Context:
    """What parsers may know of a request. A server with keys does not pass on `Authorization`."""
    front = request.app[FRONT]
    authorization = "" if front.keys.required else request.headers.get(hdrs.AUTHORIZATION, "")
    return Context(
        authorization=authorization,
        model_id=front.backend.info.model_id,
        config=front.config,
        adapter_token=request.headers.get(ADAPTER_TOKEN, ""),
        keys=front.keys,
    )


def seen_by(request: web.Request, token: str | None = None) -> tuple[bytes, ...]:
    """The tenants whose adapters a client may see: everybody's, and those of its own token (in the body, or in a
    header). Raises InvalidRequest."""
    own = context_of(request).token(token)
    return (b"", token_hash(own)) if own else (b"",)


def check_admin(request: web.Request) -> None:
    """For routes that change what others get. Raises Forbidden if the server has keys and this one has no right."""
    tenant = request.get(TENANT)
    if tenant is not None and not tenant.admin:
        raise Forbidden(
            f"the keys of {tenant.name!r} may not load, pin or unload adapters and set aliases",
            field="Authorization",
            hint="use a key of --api-key, or set `admin: true` with the tenant's keys in --api-keys-file",
        )


def _tenant_of(request: web.Request) -> Tenant:
    """Raises Unauthorized."""
    keys, headers = request.app[FRONT].keys, request.headers
    given = [
        key for key in (bearer(headers.get(hdrs.AUTHORIZATION, "")), headers.get(API_KEY)) if key
    ]
    for key in given:
        if (tenant := keys.tenant_of(key)) is not None:
            return tenant
    raise Unauthorized(
        "the API key is unknown" if given else "this server needs an API key",
        field="Authorization",
        hint=f"send one of its keys as `Authorization: Bearer KEY` or `{API_KEY}: KEY`",
    )


# -- pages of other origins (CORS)


@web.middleware
async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answers a browser that asks whether a page of an allowed origin may send a request."""
    asks = request.method == "OPTIONS" and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
    if not asks or not _allows(request, request.headers.get(hdrs.ORIGIN)):
        return await handler(request)
    asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
    if not asked or not HEADER_NAMES.fullmatch(asked):
        asked = "authorization, content-type"
    headers = {
        hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST, OPTIONS",
        hdrs.ACCESS_CONTROL_ALLOW_HEADERS: asked,
        hdrs.ACCESS_CONTROL_MAX_AGE: "86400",
    }
    return web.Response(status=204, headers=headers)


async def sign(request: web.Request, response: web.StreamResponse) -> None:
    """Headers of every answer: the server's name, and the origin whose pages may read it (--cors-allow-origin)."""
    response.headers[hdrs.SERVER] = SERVER
    allowed = request.app[FRONT].config.server.cors_allow_origin
    if not allowed:
        return
    if "*" in allowed:
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = "*"
        return
    response.headers[hdrs.VARY] = "Origin"
    origin = request.headers.get(hdrs.ORIGIN)
    if origin in allowed:
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin


def check_origins(config: ServerConfig) -> None:
    """Raises ConfigError for a value of --cors-allow-origin that no browser sends."""
    for origin in config.cors_allow_origin:
        if not ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"--cors-allow-origin {origin!r} is not an origin",
                field="cors_allow_origin",
                hint="write * or scheme://host[:port] in small letters, without a path",
            )


def _allows(request: web.Request, origin: str | None) -> bool:
    allowed = request.app[FRONT].config.server.cors_allow_origin
    return "*" in allowed or origin in allowed


def _foreign() -> LoraxError:
    return refused(
        403,
        "pages of this origin may not use the server",
        "start the server with --cors-allow-origin for the origin of the page",
    )
