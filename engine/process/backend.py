"""The engine and the exchange in processes of their own, seen from the front: `engine.server.backend.Backend`.

The front is an asyncio loop and never waits for a write. When a child's pipe ends, everything that waits for either
child fails with EngineDead, `alive` turns False and `closed` is set: the program then calls `close` and exits.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any, TypeVar

import msgspec

from engine.adapters.ref import AdapterRef
from engine.adapters.tiers import HostRegion
from engine.config import EngineConfig
from engine.errors import EngineDead, LoraxError, from_wire
from engine.messages import AdapterImageRef, AdapterStatus, EngineInfo, EngineStats, Request
from engine.process.messages import (
    Acquire,
    Acquired,
    Adapters,
    Begin,
    ExchangeReady,
    Failed,
    FromExchange,
    FromShard,
    ListAdapters,
    Preload,
    Preloaded,
    Refused,
    Release,
    Setup,
    ShardReady,
    Unload,
    Unloaded,
    Updates,
)
from engine.process.parts import Parts
from engine.process.spawn import END_S, Child
from engine.process.streams import Reader, Streams

T = TypeVar("T")
Answer = Acquired | Adapters | Unloaded

logger = logging.getLogger(__name__)


class ProcessLease:
    """An adapter held in the exchange's process."""

    def __init__(self, backend: ProcessBackend, acquired: Acquired) -> None:
        self._backend: ProcessBackend | None = backend
        self._acquired = acquired

    @property
    def image(self) -> AdapterImageRef:
        return self._acquired.image

    @property
    def cache_salt(self) -> bytes:
        return self._acquired.cache_salt

    def release(self) -> None:
        if self._backend is not None:
            self._backend.release(self._acquired.call)
            self._backend = None


class ProcessBackend:
    """One shard, one exchange, and the front's ends of their pipes. Made by `start`."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()  # a child died, or `close` was called
        self.failure: EngineDead | None = None  # why a child died
        self._shard: Child[ShardReady | Preloaded | Failed | Updates] = Child(
            "shard", FromShard, self._from_shard, lambda: self._child_ended(self._shard)
        )
        self._exchange: Child[ExchangeReady | Failed | Refused | Answer] = Child(
            "exchange",
            FromExchange,
            self._from_exchange,
            lambda: self._child_ended(self._exchange),
        )
        self._streams = Streams(self._shard.send)
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._calls = itertools.count(1)
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._burial: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, config: EngineConfig, parts: Parts | None = None) -> ProcessBackend:
        """Starts both processes side by side; raises what kept one of them from starting."""
        setup = Setup(config, parts or Parts())
        backend = cls()
        region = HostRegion.create(0)  # the shard makes it as large as the machine allows
        try:
            await backend._shard.start(region.fd, setup)
            await backend._exchange.start(region.fd, setup)
            await backend._started
        except BaseException:
            await backend.close(timeout=0)
            raise
        finally:
            region.close()
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
    def pids(self) -> dict[str, int | None]:
        """Role -> process id, for logs and tests."""
        return {child.role: child.pid for child in (self._shard, self._exchange)}

    def submit(self, request: Request, reader: Reader) -> None:
        """See `Backend.submit`."""
        self._streams.submit(request, reader)

    def cancel(self, id: str) -> None:
        """See `Backend.cancel`."""
        self._streams.cancel(id)

    async def acquire(self, ref: AdapterRef, token: str | None) -> ProcessLease:
        """See `Backend.acquire`."""
        call = next(self._calls)
        try:
            answer = await self._ask(call, Acquire(call, ref, token))
        except asyncio.CancelledError:
            self.release(call)
            raise
        assert isinstance(answer, Acquired)
        return ProcessLease(self, answer)

    async def adapters(self) -> list[AdapterStatus]:
        call = next(self._calls)
        answer = await self._ask(call, ListAdapters(call))
        assert isinstance(answer, Adapters)
        return answer.adapters

    async def unload(self, name: str) -> bool:
        call = next(self._calls)
        answer = await self._ask(call, Unload(call, name))
        assert isinstance(answer, Unloaded)
        return answer.found

    def release(self, call: int) -> None:
        """Returns what `call` acquired, or gives up its wait."""
        self._exchange.send(Release(call))

    async def close(self, timeout: float = END_S) -> None:
        """Fails what is open and ends both processes, if need be with force. May be called again."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(timeout))
        await asyncio.shield(self._closing)

    async def _close(self, timeout: float) -> None:
        self._fail(EngineDead("the engine is shutting down"))
        children = (self._shard, self._exchange)
        for child in children:
            child.finish()
        await asyncio.gather(*(child.ended(timeout) for child in children))
        if self._burial is not None:
            await self._burial

    async def _ask(self, call: int, question: msgspec.Struct) -> Answer:
        if not self.alive:
            raise EngineDead(str(self.failure or "the engine is shutting down"))
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._answers[call] = answer
        try:
            self._exchange.send(question)
            return await answer
        finally:
            del self._answers[call]

    def _from_shard(self, message: ShardReady | Preloaded | Failed | Updates) -> None:
        if isinstance(message, Updates):
            self._stats = message.stats or self._stats
            self._streams.deliver(message.updates)
        elif isinstance(message, ShardReady):
            self._info, self._stats = message.info, message.stats
            self._exchange.send(Begin(message.layout, message.info.device))
        elif isinstance(message, Preloaded):
            if not self._started.done():
                self._started.set_result(None)
        else:
            self._not_started(from_wire(message.error))

    def _from_exchange(self, message: ExchangeReady | Failed | Refused | Answer) -> None:
        if isinstance(message, ExchangeReady):
            self._shard.send(Preload(message.preloaded))
        elif isinstance(message, Failed):
            self._not_started(from_wire(message.error))
        else:
            answer = self._answers.get(message.call)
            if answer is None or answer.done():
                return  # given up, and the exchange has been told so
            if isinstance(message, Refused):
                _refuse(answer, from_wire(message.error))
            else:
                answer.set_result(message)

    def _child_ended(self, child: Child[Any]) -> None:
        if self.alive:
            self.failure = EngineDead(f"the {child.role} process ended")
            self._fail(self.failure)
            self._burial = asyncio.create_task(self._bury(child))

    async def _bury(self, child: Child[Any]) -> None:
        code = await child.ended()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        logger.critical("the %s process ended: %s", child.role, how)
        self._not_started(EngineDead(f"the {child.role} process ended while starting: {how}"))

    def _not_started(self, error: LoraxError) -> None:
        self.closed.set()
        _refuse(self._started, error)

    def _fail(self, error: EngineDead) -> None:
        """Nothing more is served."""
        self.closed.set()
        self._streams.fail(error)
        for answer in self._answers.values():
            _refuse(answer, EngineDead(error.message))


def _refuse(future: asyncio.Future[T], error: LoraxError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # whoever waited may be gone; that is no error of its own
