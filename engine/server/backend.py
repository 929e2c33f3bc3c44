"""What the HTTP front needs from the engine and the exchange, wherever they run.

`engine.process.ProcessBackend` speaks to other processes; `engine.process.LocalBackend` runs everything in this one
(the command `lorax generate`, tests).
"""

from __future__ import annotations

from typing import Protocol

from engine.adapters.ref import AdapterRef
from engine.errors import LoraxError
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


class Reader(Protocol):
    """Who hears of one request. Called from the event loop, between other things: must neither wait nor raise."""

    def take(self, update: Update) -> None:
        """News, in order. The last has `finish` or `error`: then the engine has let go of the request."""
        ...

    def on_engine_lost(self, error: LoraxError) -> None:
        """The engine is gone, instead of a last update."""
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

    @property
    def exchange_away(self) -> bool:
        """Adapters cannot be loaded for the moment; the base model and adapters in use are served."""
        ...

    @property
    def exchange_restarts(self) -> int: ...

    def submit(self, request: Request, reader: Reader) -> None:
        """Starts a request; what comes of it is told to `reader`, later. Ids are never used twice.

        Raises EngineDead when the engine is gone, and InvalidRequest for an id that is open.
        """
        ...

    def cancel(self, id: str) -> None:
        """Asks for the end of a request. Its last update still comes, and only then may its adapter be released."""
        ...

    async def acquire(self, ref: AdapterRef, token: str | None) -> Lease:
        """Fetches, checks and stages the adapter; raises AdapterError. Cancelling the caller gives up the wait."""
        ...

    async def adapters(self) -> list[AdapterStatus]:
        """What the exchange knows; while it is away, what it knew last."""
        ...

    async def unload(self, name: str) -> bool:
        """Forgets an adapter once nobody uses it; False if there is none of that name."""
        ...

    async def close(self) -> None: ...
