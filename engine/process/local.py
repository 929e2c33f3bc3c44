"""The engine and the exchange in this process: `engine.backend.Backend` without pipes.

One worker thread makes all calls of the engine, a turn at a time. The exchange runs on the loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from engine.adapters.ref import AdapterRef
from engine.adapters.tiers import HostRegion
from engine.backend import Lease, Reader
from engine.config import EngineConfig
from engine.errors import EngineDead
from engine.messages import (
    NO_TENANT,
    AdapterStatus,
    EngineInfo,
    EngineStats,
    Request,
    TenantRef,
    TierStats,
    Update,
)
from engine.process.parts import Exchange, Parts, load
from engine.process.pipe_messages import Drop, Pin, ToEngine
from engine.process.stepper import Stepper
from engine.process.streams import Streams

logger = logging.getLogger(__name__)


class LocalBackend:
    """One engine and one exchange. Made by `start`."""

    def __init__(
        self,
        stepper: Stepper,
        exchange: Exchange,
        region: HostRegion,
        worker: ThreadPoolExecutor,
    ) -> None:
        self.closed = asyncio.Event()  # the engine failed, or `close` was called
        self.failure: EngineDead | None = None  # why the engine failed
        self._stepper = stepper
        self._exchange = exchange
        self._region = region
        self._worker = worker
        self._streams = Streams(self._send)
        self._inbox: list[ToEngine] = []
        self._has_messages = asyncio.Event()
        self._info = stepper.engine.info
        self._stats = stepper.engine.stats
        self._running = asyncio.create_task(self._run())
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, config: EngineConfig, parts: Parts | None = None) -> LocalBackend:
        """Builds both. Raises the error of the one that cannot start."""
        parts = parts or Parts()
        worker = ThreadPoolExecutor(1, "engine")
        try:
            in_worker = asyncio.get_running_loop().run_in_executor
            stepper, region = await in_worker(worker, _build, config, parts.engine)
            try:
                engine = stepper.engine
                exchange: Exchange = load(parts.exchange)(
                    config, engine.layout, region, device=engine.info.device
                )
                await _started(exchange)
                for image in exchange.preloaded:
                    stepper.engine.preload(image)
            except BaseException:
                await in_worker(worker, stepper.engine.close)
                region.close()
                raise
        except BaseException:
            worker.shutdown(wait=False)
            raise
        return cls(stepper, exchange, region, worker)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def alive(self) -> bool:
        return not self.closed.is_set()

    @property
    def exchange_away(self) -> bool:
        """Always False: the exchange runs in this process."""
        return False

    @property
    def exchange_restarts(self) -> int:
        return 0

    def submit(self, request: Request, reader: Reader) -> None:
        """See `Backend.submit`."""
        self._streams.submit(request, reader)

    def cancel(self, id: str) -> None:
        """See `Backend.cancel`."""
        self._streams.cancel(id)

    def pin(self, digest: bytes, pinned: bool) -> None:
        """See `Backend.pin`."""
        self._send(Pin(digest, pinned))

    def drop(self, digest: bytes) -> None:
        """See `Backend.drop`."""
        self._send(Drop(digest))

    async def acquire(
        self, ref: AdapterRef, token: str | None, tenant: TenantRef = NO_TENANT
    ) -> Lease:
        """See `Backend.acquire`."""
        return await self._open_exchange().acquire(ref, token, tenant)

    async def adapters(self) -> list[AdapterStatus]:
        return await self._open_exchange().adapters()

    async def unload(
        self, name: str, source: str | None = None, tenants: Collection[bytes] | None = None
    ) -> list[bytes]:
        """See `Backend.unload`."""
        return await self._open_exchange().unload(name, source, tenants)

    async def tiers(self) -> TierStats:
        """See `Backend.tiers`."""
        return await self._open_exchange().tiers({})

    async def close(self) -> None:
        """Fails open requests and ends the engine and the exchange. May be called again."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._fail(EngineDead("the engine is shutting down"))
        self._running.cancel()
        with suppress(asyncio.CancelledError):
            await self._running
        try:
            await self._exchange.close()
        finally:
            engine = self._stepper.engine
            await asyncio.get_running_loop().run_in_executor(self._worker, engine.close)
            self._worker.shutdown()
            self._region.close()

    def _open_exchange(self) -> Exchange:
        if not self.alive:
            raise EngineDead(str(self.failure or "the engine is shutting down"))
        return self._exchange

    def _send(self, message: ToEngine) -> None:
        self._inbox.append(message)
        self._has_messages.set()

    async def _run(self) -> None:
        in_worker = asyncio.get_running_loop().run_in_executor
        try:
            while True:
                await self._wait_for_messages(self._stepper.wait_s)
                messages, self._inbox = self._inbox, []
                updates, stats = await in_worker(self._worker, self._turn, messages)
                self._stats = stats or self._stats
                self._streams.deliver(updates)
        except Exception as error:
            logger.critical("the engine ends", exc_info=True)
            self.failure = error if isinstance(error, EngineDead) else EngineDead(repr(error))
            self._fail(self.failure)

    async def _wait_for_messages(self, wait_s: float | None) -> None:
        if wait_s != 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._has_messages.wait()
        self._has_messages.clear()

    def _turn(self, messages: list[ToEngine]) -> tuple[list[Update], EngineStats | None]:
        updates = self._stepper.turn(messages)
        return updates, self._stepper.report()

    def _fail(self, error: EngineDead) -> None:
        """Fails all requests, open and later ones."""
        self.closed.set()
        self._streams.fail(error)


async def _started(exchange: Exchange) -> None:
    try:
        await exchange.start()
    except BaseException:
        await exchange.close()
        raise


def _build(config: EngineConfig, engine: str) -> tuple[Stepper, HostRegion]:
    from engine.platform import (  # it imports torch; a front with processes does not
        host_tier_bytes,
        set_threads,
    )

    set_threads(config)
    region = HostRegion.create(host_tier_bytes(config))
    try:
        return Stepper(load(engine)(config, region)), region
    except BaseException:
        region.close()
        raise
