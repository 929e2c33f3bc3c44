"""Managing adapters: `Client.adapters` and `AsyncClient.adapters`, and their calls.

With API keys, those that change something for other clients need an admin's key.
"""

from __future__ import annotations

from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, TypeAdapter

from lorax.calls import Call, reader
from lorax.errors import ValidationError
from lorax.methods import Asks, AsyncAsks, asks, async_asks
from lorax.types import AdapterInfo, Alias

T = TypeVar("T")

# On servers with API keys, Authorization is the key; this is the token of private adapters.
TOKEN_HEADER = "x-adapter-token"


class _Adapters(BaseModel):
    adapters: list[AdapterInfo]


class _Aliases(BaseModel):
    aliases: list[Alias]


class _Unloaded(BaseModel):
    unloaded: list[str]


_read_adapters = reader(TypeAdapter(_Adapters))
_read_adapter = reader(TypeAdapter(AdapterInfo))
_read_aliases = reader(TypeAdapter(_Aliases))
_read_alias = reader(TypeAdapter(Alias))
_read_unloaded = reader(TypeAdapter(_Unloaded))


def list_adapters(
    *,
    state: str | None = None,
    tier: str | None = None,
    prefix: str | None = None,
    limit: int | None = None,
    api_token: str | None = None,
) -> Call[list[AdapterInfo]]:
    """The adapters that the server knows. The arguments select among them.

    A private adapter is listed for the `api_token` that opened it.
    """
    given = {"state": state, "tier": tier, "prefix": prefix, "limit": limit}
    query = {name: str(value) for name, value in given.items() if value is not None}
    return Call(
        "GET",
        "/adapters",
        lambda response: _read_adapters(response).adapters,
        query=query,
        headers=_token(api_token),
    )


def adapter_info(
    adapter_id: str, source: str | None = None, api_token: str | None = None
) -> Call[AdapterInfo]:
    """One adapter."""
    path = f"/adapters/{_segment(adapter_id)}"
    query = {} if source is None else {"source": source}
    return Call("GET", path, _read_adapter, query=query, headers=_token(api_token))


def load(
    adapter_id: str, source: str | None = None, api_token: str | None = None
) -> Call[AdapterInfo]:
    """Loads an adapter, and waits until it is in host memory."""
    return Call("POST", "/adapters/load", _read_adapter, _body(adapter_id, source, api_token))


def prefetch(
    adapter_id: str, source: str | None = None, api_token: str | None = None
) -> Call[None]:
    """Loads an adapter in the background. `info` shows whether it succeeded."""
    return Call("POST", "/adapters/prefetch", _nothing, _body(adapter_id, source, api_token))


def pin(
    adapter_id: str,
    pinned: bool = True,
    source: str | None = None,
    api_token: str | None = None,
) -> Call[AdapterInfo]:
    """Brings an adapter to the device and keeps it there; with `pinned` false, ends that."""
    body = _body(adapter_id, source, api_token) | {"pinned": pinned}
    return Call("POST", "/adapters/pin", _read_adapter, body)


def unload(
    adapter_id: str, source: str | None = None, api_token: str | None = None
) -> Call[list[str]]:
    """Frees an adapter's memory once the requests that use it have ended. The digests of what was unloaded."""
    return Call(
        "POST",
        "/adapters/unload",
        lambda response: _read_unloaded(response).unloaded,
        _body(adapter_id, source, api_token),
    )


def aliases() -> Call[list[Alias]]:
    """All aliases."""
    return Call("GET", "/adapters/aliases", lambda response: _read_aliases(response).aliases)


def alias(name: str) -> Call[Alias]:
    """What a name stands for."""
    return Call("GET", f"/adapters/aliases/{_segment(name)}", _read_alias)


def set_alias(
    name: str, adapter_id: str, source: str | None = None, api_token: str | None = None
) -> Call[Alias]:
    """Loads an adapter, then lets the name stand for it."""
    path = f"/adapters/aliases/{_segment(name)}"
    return Call("PUT", path, _read_alias, _body(adapter_id, source, api_token))


def remove_alias(name: str) -> Call[Alias]:
    """Removes an alias, and says what it stood for."""
    return Call("DELETE", f"/adapters/aliases/{_segment(name)}", _read_alias)


def _body(adapter_id: str, source: str | None, api_token: str | None) -> dict[str, Any]:
    body = {"adapter_id": adapter_id, "adapter_source": source, "api_token": api_token}
    return {name: value for name, value in body.items() if value is not None}


def _token(api_token: str | None) -> dict[str, str]:
    return {} if api_token is None else {TOKEN_HEADER: api_token}


def _nothing(response: httpx.Response) -> None:
    """For answers that say no more than their status."""


def _segment(name: str) -> str:
    """A name as the end of a path. Raises ValidationError for one that would mean another path."""
    if not name or {".", ".."} & set(name.split("/")):
        raise ValidationError(f"{name!r} cannot be the name of an adapter or alias in a path")
    return quote(name, safe="/@:")


# -- the methods


class Adapters:
    """The adapters of a server."""

    def __init__(self, client: Asks) -> None:
        self._client = client

    def _ask(self, call: Call[T]) -> T:
        return self._client._ask(call)

    list = asks(list_adapters)
    info = asks(adapter_info)
    load = asks(load)
    prefetch = asks(prefetch)
    pin = asks(pin)
    unload = asks(unload)
    aliases = asks(aliases)
    alias = asks(alias)
    set_alias = asks(set_alias)
    remove_alias = asks(remove_alias)


class AsyncAdapters:
    """As `Adapters`, for asyncio."""

    def __init__(self, client: AsyncAsks) -> None:
        self._client = client

    async def _ask(self, call: Call[T]) -> T:
        return await self._client._ask(call)

    list = async_asks(list_adapters)
    info = async_asks(adapter_info)
    load = async_asks(load)
    prefetch = async_asks(prefetch)
    pin = async_asks(pin)
    unload = async_asks(unload)
    aliases = async_asks(aliases)
    alias = async_asks(alias)
    set_alias = async_asks(set_alias)
    remove_alias = async_asks(remove_alias)
