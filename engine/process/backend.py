"""The front's side of an engine and an exchange in child processes: `engine.backend.Backend`.

The front is an asyncio loop and never waits for a write. When the shard's pipe ends, everything that waits fails with
EngineDead, `alive` turns False and `closed` is set: the program then calls `close` and exits. An exchange that ends is
started again (`engine.process.exchange_client`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from engine.adapters.ref import AdapterRef
from engine.adapters.tiers import HostRegion
from engine.backend import Reader
from engine.config import EngineConfig
from engine.errors import EngineDead, LoraxError, from_wire
from engine.messages import (
    NO_TENANT,
    AdapterStatus,
    EngineInfo,
    EngineStats,
    Request,
    TenantRef,
    TierStats,
)
from engine.process.exchange_client import ExchangeClient, exit_text
from engine.process.grants import GrantLease
from engine.process.parts import Parts
from engine.process.pipe_messages import (
    Drop,
    Failed,
    FromShard,
    Pin,
    Preload,
    Preloaded,
    Setup,
    ShardReady,
    Updates,
)
from engine.process.private import for_exchange, for_shard
from engine.process.questions import fail_future
from engine.process.spawn import END_S, Child
from engine.process.streams import Streams
from engine.process.watch import Watch

logger = logging.getLogger(__name__)


class ProcessBackend:
    """One shard, one exchange, and the front's ends of their pipes. Made by `start`."""

    def __init__(self, config: EngineConfig, parts: Parts, watch: Watch) -> None:
        self.closed = asyncio.Event()  # a child died, or `close` was called
        self.failure: EngineDead | None = None  # why a child died
        self._shard: Child[ShardReady | Preloaded | Failed | Updates] = Child(
            "shard", FromShard, self._from_shard, self._shard_ended
        )
        self._region = HostRegion.create(0)  # the shard makes it as large as the machine allows
        self._exchange = ExchangeClient(
            self._region.fd,
            Setup(for_exchange(config), parts),
            lambda images: self._shard.send(Preload(images)),
            self._exchange_lost,
            watch,
        )
        self._streams = Streams(self._shard.send)
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._exit_report: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, config: EngineConfig, parts: Parts | None = None, watch: Watch | None = None
    ) -> ProcessBackend:
        """Starts both processes in parallel. Raises the error of the one that cannot start."""
        parts = parts or Parts()
        backend = cls(config, parts, watch or Watch())
        try:
            await backend._shard.start(backend._region.fd, Setup(for_shard(config), parts))
            await backend._exchange.start()
            await backend._started
        except BaseException:
            await backend.close(timeout=0)
            raise
        return backend

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "set before start returns"
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def alive(self) -> bool:
        return not self.closed.is_set()

    @property
    def exchange_away(self) -> bool:
        """See `Backend.exchange_away`."""
        return self._exchange.is_away

    @property
    def exchange_restarts(self) -> int:
        """See `Backend.exchange_restarts`."""
        return self._exchange.restarts

    @property
    def pids(self) -> dict[str, int | None]:
        """Role -> process id, for logs and tests."""
        return {"shard": self._shard.pid, "exchange": self._exchange.pid}

    def submit(self, request: Request, reader: Reader) -> None:
        """See `Backend.submit`."""
        self._streams.submit(request, reader)

    def cancel(self, id: str) -> None:
        """See `Backend.cancel`."""
        self._streams.cancel(id)

    def pin(self, digest: bytes, pinned: bool) -> None:
        """See `Backend.pin`."""
        self._shard.send(Pin(digest, pinned))

    def drop(self, digest: bytes) -> None:
        """See `Backend.drop`."""
        self._shard.send(Drop(digest))

    async def acquire(
        self, ref: AdapterRef, token: str | None, tenant: TenantRef = NO_TENANT
    ) -> GrantLease:
        """See `Backend.acquire`."""
        return await self._exchange.acquire(ref, token, tenant)

    async def adapters(self) -> list[AdapterStatus]:
        """See `Backend.adapters`."""
        return await self._exchange.adapters()

    async def unload(
        self, name: str, source: str | None = None, tenants: Collection[bytes] | None = None
    ) -> list[bytes]:
        """See `Backend.unload`."""
        return await self._exchange.unload(name, source, tenants)

    async def tiers(self) -> TierStats:
        """See `Backend.tiers`."""
        return await self._exchange.tiers()

    async def close(self, timeout: float = END_S) -> None:
        """Fails open requests and ends both processes, by force if they do not end. May be called again."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(timeout))
        await asyncio.shield(self._closing)

    async def _close(self, timeout: float) -> None:
        self._fail(EngineDead("the engine is shutting down"))
        self._shard.finish()
        try:
            await asyncio.gather(self._shard.ended(timeout), self._exchange.close(timeout))
        finally:
            self._region.close()
        if self._exit_report is not None:
            await self._exit_report

    def _from_shard(self, message: ShardReady | Preloaded | Failed | Updates) -> None:
        if isinstance(message, Updates):
            self._stats = message.stats or self._stats
            self._streams.deliver(message.updates)
        elif isinstance(message, ShardReady):
            self._info, self._stats = message.info, message.stats
            self._exchange.begin(message.layout, message.info.device)
        elif isinstance(message, Preloaded):
            if not self._started.done():
                self._started.set_result(None)
        else:
            self._fail_start(from_wire(message.error))

    def _shard_ended(self) -> None:
        if self.alive:
            self._die(EngineDead("the shard process ended"))
            self._exit_report = asyncio.create_task(self._report_exit())

    async def _report_exit(self) -> None:
        code = exit_text(await self._shard.ended())
        logger.critical("the shard process ended: %s", code)
        self._fail_start(EngineDead(f"the shard process ended while starting: {code}"))

    def _exchange_lost(self, error: LoraxError) -> None:
        self._fail_start(error)
        if self.failure is None:
            self._die(EngineDead(error.message, hint=error.hint))

    def _fail_start(self, error: LoraxError) -> None:
        self.closed.set()
        fail_future(self._started, error)

    def _die(self, error: EngineDead) -> None:
        self.failure = error
        self._fail(error)

    def _fail(self, error: EngineDead) -> None:
        """Fails all requests, open and later ones."""
        self.closed.set()
        self._streams.fail(error)
        self._exchange.fail(error)
