"""Answers with a JSON body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

import engine

SERVER = f"lorax/{engine.__version__}"
RETRY_AFTER_S = 1


def json_response(
    body: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body),
        status=status,
        headers=headers,
        content_type="application/json",
    )


def error_response(status: int, body: Any) -> web.Response:
    """The answer to a request that failed."""
    headers = {"Server": SERVER}
    if status == 429:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(body, status, headers)
