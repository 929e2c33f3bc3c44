"""The exchange's process: answers the front's calls, one task each, and keeps adapters until they are released."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import msgspec

from engine.adapters.tiers import HostRegion
from engine.errors import AGAIN, AdapterLoadFailed, LoraxError
from engine.ops.layout import ShardLayout
from engine.process import child
from engine.process.collector import freeze_gc
from engine.process.parts import Exchange, ExchangeLease, load
from engine.process.pipe import Pipe
from engine.process.pipe_messages import (
    Acquire,
    Acquired,
    Adapters,
    AskTiers,
    Begin,
    ExchangeReady,
    ListAdapters,
    Ping,
    Pong,
    Recall,
    Refused,
    Release,
    Setup,
    Tiers,
    ToExchange,
    Unload,
    Unloaded,
)

Call = Acquire | ListAdapters | Unload | AskTiers

MAX_STUCK = 64  # threads that a hung file system may hold before a new process takes over
POLL_S = 1.0  # between two checks of them
STUCK_EXIT = 24
M_ARENA_MAX = -8  # mallopt(3)
ARENAS = 2

logger = logging.getLogger(__name__)


def main(socket_fd: int, region_fd: int) -> int:
    """Runs until the front ends the pipe; returns the exit code."""
    end, setup = child.connect("exchange", socket_fd)
    try:
        import torch

        from engine.runner.pinning import populate

        torch.set_num_threads(1)  # the cores are the engine's
        use_few_heaps()
        factory = load(setup.parts.exchange)
    except Exception as error:
        return child.report_failure(end, "exchange", error)

    def build(layout: ShardLayout, device: str, recall: Callable[[int], None]) -> Exchange:
        region = HostRegion.attach(region_fd)
        if device != "cpu":  # the shard pins the region, so its pages are there for the mapping
            host = torch.frombuffer(region.view, dtype=torch.uint8)
            threading.Thread(target=populate, args=(host,), daemon=True).start()
        exchange: Exchange = factory(setup.config, layout, region, device=device, recall=recall)
        return exchange

    # Not asyncio.run: it would wait for the threads of abandoned loads.
    return asyncio.new_event_loop().run_until_complete(Service(build).run(end))


def use_few_heaps() -> None:
    """Limits the heaps of glibc, which would keep the freed memory of each loading thread in its own heap."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)


def return_free_memory() -> None:
    """Returns freed memory to the system. glibc alone returns only the end of a heap.

    Reference cycles are collected first: few objects may hold tens of MB of an adapter's files.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def lower_priority() -> None:
    """Lowers the priority of this thread and of those that it starts: the engine computes on all cores.

    A niceness of 9 leaves it about a tenth of two cores that the engine keeps busy: enough for a flood of small
    adapters. Large images are written at a lower priority still (`engine.adapters.loader`). Measured in
    docs/notebook/cold-adapters.md.
    """
    os.nice(9)
    if sys.platform == "linux":
        with suppress(PermissionError):  # a sandbox may forbid it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class Service:
    """Serves one exchange over a pipe."""

    def __init__(
        self, build: Callable[[ShardLayout, str, Callable[[int], None]], Exchange]
    ) -> None:
        self._build = build
        self._exchange: Exchange | None = None
        self._pipe: Pipe[Setup | Begin | Ping | Release | Call] = Pipe(
            ToExchange, self._take, self._end
        )
        self._ended = asyncio.Event()
        self._starting: asyncio.Task[None] | None = None
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._leases: dict[int, ExchangeLease] = {}
        self._released: set[int] = set()  # calls that ended before their images were adopted
        self._answered = False  # a call since free memory was returned
        self._exit_code = 0

    async def run(self, end: socket.socket) -> int:
        """Serves until the pipe ends; returns the exit code."""
        await self._pipe.connect(end)
        await self._wait_for_end()
        tasks = [*self._calls.values(), *filter(None, (self._starting,))]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for lease in self._leases.values():
            lease.release()
        if self._exchange is not None:
            await self._exchange.close()
        return self._exit_code

    async def _wait_for_end(self) -> None:
        """Waits until the front ends the pipe. Exits if too many threads are stuck: only that frees them."""
        while not self._ended.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._ended.wait()
            if self._answered:
                self._answered = False
                await asyncio.to_thread(return_free_memory)
            stuck = self._exchange.abandoned if self._exchange is not None else 0
            if stuck > MAX_STUCK:
                logger.critical("%d loads are stuck; a new process takes over", stuck)
                os._exit(STUCK_EXIT)

    def _end(self) -> None:
        self._ended.set()

    def _take(self, message: Setup | Begin | Ping | Release | Call) -> None:
        if isinstance(message, Ping):
            self._pipe.send(Pong(message.number))
        elif isinstance(message, Begin):
            self._starting = asyncio.create_task(self._begin(message))
        elif isinstance(message, Release):
            self._release(message.call)
        elif not isinstance(message, Setup):
            task = asyncio.create_task(self._answer(message))
            self._calls[message.call] = task
            task.add_done_callback(lambda _: self._calls.pop(message.call))

    async def _begin(self, message: Begin) -> None:
        try:
            if message.device == "cpu":
                lower_priority()
            layout = msgspec.msgpack.decode(message.layout, type=ShardLayout)
            self._exchange = self._build(
                layout, message.device, lambda num_bytes: self._pipe.send(Recall(num_bytes))
            )
            freeze_gc()
            if message.restarted:
                self._leases |= self._exchange.adopt(message.preloaded, message.held)
                for call in self._released:
                    self._release(call)
            else:
                await self._exchange.start()
        except Exception as error:
            answer, self._exit_code = child.start_failure("exchange", error)
            self._pipe.send(answer)
        else:
            self._pipe.send(ExchangeReady(self._exchange.preloaded))

    def _release(self, call: int) -> None:
        if call in self._leases:
            self._leases.pop(call).release()
        elif call in self._calls:
            self._calls[call].cancel()
        elif self._exchange is None:
            self._released.add(call)

    async def _answer(self, call: Call) -> None:
        self._answered = True
        try:
            self._pipe.send(await self._ask(call))
        except Exception as error:
            if not isinstance(error, LoraxError):
                logger.exception("a call failed")
                error = AdapterLoadFailed(f"the adapter could not be loaded: {error!r}", hint=AGAIN)
            self._pipe.send(Refused(call.call, error.to_wire()))

    async def _ask(self, call: Call) -> msgspec.Struct:
        assert self._exchange is not None, "the front calls after ExchangeReady"
        if isinstance(call, ListAdapters):
            return Adapters(call.call, await self._exchange.adapters())
        if isinstance(call, Unload):
            digests = await self._exchange.unload(call.name, call.source, call.tenants)
            return Unloaded(call.call, digests)
        if isinstance(call, AskTiers):
            return Tiers(call.call, await self._exchange.tiers(call.idle))
        lease = await self._exchange.acquire(call.ref, call.token, call.tenant)
        self._leases[call.call] = lease
        held = lease.image, lease.cache_salt, lease.fresh_s, lease.text
        return Acquired(call.call, *held, tier=lease.tier)
