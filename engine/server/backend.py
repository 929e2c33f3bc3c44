"""What the HTTP front needs from the engine and the exchange, wherever they run.

`engine.process.ProcessBackend` speaks to other processes; `engine.process.LocalBackend` runs everything in this one
(the command `lorax generate`, tests).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from engine.adapters.ref import AdapterRef
from engine.messages import AdapterImageRef, AdapterStatus, EngineInfo, EngineStats, Request, Update


class Lease(Protocol):
    """An adapter ready in host memory, held there until released."""

    @property
    def image(self) -> AdapterImageRef: ...

    @property
    def cache_salt(self) -> bytes:
        """Not empty for private adapters: separates the prefix cache of their tenants."""
        ...

    def release(self) -> None:
        """Idempotent; does not wait."""
        ...


class Backend(Protocol):
    """One engine and its adapters."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def stats(self) -> EngineStats:
        """The newest that arrived."""
        ...

    @property
    def alive(self) -> bool: ...

    def generate(self, request: Request) -> AsyncIterator[Update]:
        """Submits; yields updates, the last with `finish`.

        Closing the iterator early cancels the request, and returns when the engine has let go of it: only then may its
        adapter be released.

        Raises EngineDead when the engine is gone, and the typed error of `Update.error`.
        """
        ...

    async def acquire(self, ref: AdapterRef, token: str | None) -> Lease:
        """Fetches, checks and stages the adapter; raises AdapterError. Cancelling the caller gives up the wait."""
        ...

    async def adapters(self) -> list[AdapterStatus]: ...

    async def unload(self, name: str) -> bool:
        """Forgets an adapter once nobody uses it; False if there is none of that name."""
        ...

    async def close(self) -> None: ...
