"""The seam between the HTTP front and the engine with its adapters, in whichever process they run.

`engine.process.ProcessBackend` runs them in other processes, `engine.process.LocalBackend` in this one (for the command
`lorax generate` and for tests).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from engine.adapters.ref import AdapterRef
from engine.errors import LoraxError
from engine.messages import (
    NO_TENANT,
    AdapterImageRef,
    AdapterStatus,
    AdapterText,
    EngineInfo,
    EngineStats,
    Request,
    TenantRef,
    Tier,
    TierStats,
    Update,
)


class Lease(Protocol):
    """An adapter that is ready in host memory and stays there until `release`."""

    @property
    def image(self) -> AdapterImageRef: ...

    @property
    def cache_salt(self) -> bytes:
        """Separates the prefix caches of tenants. Empty for public adapters."""
        ...

    @property
    def text(self) -> AdapterText | None:
        """Its tokens and chat template, where they differ from the base model's. None: they do not."""
        ...

    @property
    def tier(self) -> Tier:
        """Where the adapter was when it was acquired, the device apart."""
        ...

    def release(self) -> None:
        """Idempotent; does not wait."""
        ...


class Reader(Protocol):
    """Receives the updates of one request. Called on the event loop: must neither wait nor raise."""

    def take(self, update: Update) -> None:
        """Updates, in order. The last has `finish` or `error`; the engine has then dropped the request."""
        ...

    def on_engine_lost(self, error: LoraxError) -> None:
        """The engine is gone: called instead of the last update."""
        ...


class Backend(Protocol):
    """One engine and its adapters."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def stats(self) -> EngineStats:
        """The newest that have arrived."""
        ...

    @property
    def alive(self) -> bool: ...

    @property
    def exchange_away(self) -> bool:
        """No adapter can be loaded at the moment. The base model and adapters in use are still served."""
        ...

    @property
    def exchange_restarts(self) -> int: ...

    def submit(self, request: Request, reader: Reader) -> None:
        """Starts a request; `reader` receives its updates later. Each id is used once.

        Raises EngineDead if the engine is gone, and InvalidRequest if a request with this id is open.
        """
        ...

    def cancel(self, id: str) -> None:
        """Ends a request early. Its last update still comes; its adapter must not be released before that."""
        ...

    def pin(self, digest: bytes, pinned: bool) -> None:
        """An adapter stays on the device as long as requests find room without it, or no longer."""
        ...

    def drop(self, digest: bytes) -> None:
        """An adapter leaves the device when no request uses it. Ends its pin there."""
        ...

    async def acquire(
        self, ref: AdapterRef, token: str | None, tenant: TenantRef = NO_TENANT
    ) -> Lease:
        """Fetches, checks and stages the adapter; raises AdapterError. May be cancelled.

        `token`: for private adapters. `tenant`: see `TenantRef`.
        """
        ...

    async def adapters(self) -> list[AdapterStatus]:
        """The adapters that the exchange lists; while it is away, the last list."""
        ...

    async def unload(
        self, name: str, source: str | None = None, tenants: Collection[bytes] | None = None
    ) -> list[bytes]:
        """Removes adapters of this name from host memory, for later requests at once; their memory is free when no
        request uses them. Returns the digests of those that were there.

        `source`: None means any. `tenants`: those whose adapters are meant; None means all.
        """
        ...

    async def tiers(self) -> TierStats:
        """Host memory and disk. Counters never decrease, also when the exchange restarts. While it is away, the last
        values."""
        ...

    async def close(self) -> None: ...
