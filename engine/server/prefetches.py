"""Loads in the background: a client asks for an adapter before it needs it, and does not wait."""

from __future__ import annotations

import asyncio
import logging

from engine.adapters.ref import AdapterRef
from engine.adapters.sources import token_hash
from engine.adapters.versions import Lru
from engine.backend import Backend
from engine.errors import AGAIN, AdapterLoadFailed, LoraxError, Overloaded
from engine.logs import printable
from engine.messages import NO_TENANT, AdapterPhase, AdapterStatus, TenantRef

MAX_OPEN = 64
MAX_FAILED = 256  # failures that are remembered

log = logging.getLogger(__name__)

Key = tuple[AdapterRef, bytes]  # the reference, and the digest of the client's token


class Prefetches:
    """The open prefetches of one server, and the newest failures."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._open: dict[Key, asyncio.Task[None]] = {}
        self._failed: Lru[Key, tuple[Key, LoraxError]] = Lru(MAX_FAILED)

    def __len__(self) -> int:
        return len(self._open)

    def start(self, ref: AdapterRef, token: str | None, tenant: TenantRef = NO_TENANT) -> None:
        """Starts to load an adapter, unless that is being done. Raises Overloaded."""
        key = (ref, token_hash(token) if token else b"")
        if key in self._open:
            return
        if len(self._open) >= MAX_OPEN:
            raise Overloaded(
                f"{MAX_OPEN} adapters are being prefetched, which is the limit",
                hint="try again when some are loaded",
            )
        self._open[key] = asyncio.create_task(self._load(key, token, tenant))

    def statuses(self) -> list[AdapterStatus]:
        """Those under way and those that failed, as if the exchange had listed them."""
        found = [_status(key, "fetching") for key in self._open]
        for key, error in self._failed.values():
            if key not in self._open:
                found.append(_status(key, "failed", error))
        return found

    async def close(self) -> None:
        """Ends all."""
        tasks = list(self._open.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _load(self, key: Key, token: str | None, tenant: TenantRef) -> None:
        ref = key[0]
        try:
            lease = await self._backend.acquire(ref, token, tenant)
            lease.release()
            self._failed.pop(key)
        except Exception as error:  # a task boundary
            if not isinstance(error, LoraxError):
                log.exception("the prefetch of %s failed", printable(ref.name))
                error = AdapterLoadFailed("the prefetch failed: internal error", hint=AGAIN)
            else:
                log.warning("the prefetch of %s failed: %s", ref.name, printable(str(error)))
            self._failed.put(key, (key, error))
        finally:
            del self._open[key]


def _status(key: Key, state: AdapterPhase, error: LoraxError | None = None) -> AdapterStatus:
    ref, tenant = key
    wire = error.to_wire() if error else None
    return AdapterStatus(
        ref.name, ref.source or "", digest=None, state=state, error=wire, tenant=tenant
    )
