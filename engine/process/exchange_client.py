"""The front's client of the exchange: questions, leases, and a watch that restarts the process.

A heartbeat detects a process that stopped. It is killed and reaped before the next process maps the region. The front
sends the next process the list of held images: they stay in place, so running requests continue. Open questions are
sent again. During the restart, recently granted adapters are still served. Requests for other adapters wait for the
new process, or fail after `Watch.patience_s`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import msgspec

from engine.adapters.ref import AdapterRef
from engine.errors import AdapterLoadFailed, EngineDead, LoraxError, Overloaded, from_wire
from engine.messages import (
    NO_TENANT,
    AdapterImageRef,
    AdapterStatus,
    TenantRef,
    TierStats,
    is_meant,
)
from engine.process.grants import GrantLease, Grants, Key
from engine.process.pipe_messages import (
    Acquire,
    Acquired,
    Adapters,
    AskTiers,
    Begin,
    ExchangeReady,
    Failed,
    FromExchange,
    ListAdapters,
    Ping,
    Pong,
    Recall,
    Refused,
    Release,
    Setup,
    Tiers,
    Unload,
    Unloaded,
)
from engine.process.questions import Answer, Questions
from engine.process.spawn import END_S, Child
from engine.process.suspects import Suspects
from engine.process.tally import Tally
from engine.process.watch import Starting, Watch

FromChild = ExchangeReady | Failed | Pong | Recall | Refused | Answer

logger = logging.getLogger(__name__)


class ExchangeClient:
    """One exchange, over all restarts of its process. `on_lost` is called once, when it is given up."""

    def __init__(
        self,
        region_fd: int,
        setup: Setup,
        on_ready: Callable[[list[AdapterImageRef]], None],
        on_lost: Callable[[LoraxError], None],
        watch: Watch,
    ) -> None:
        """`on_ready` receives the preloaded images, once."""
        self.restarts = 0
        self._region_fd = region_fd
        self._setup = setup
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._watch = watch
        self._child = self._new_child()
        self._begin: Begin | None = None
        self._begin_sent = False  # to this process
        self._ready = False  # this process answers questions
        self._away = asyncio.Event()
        self._away_since: float | None = None
        self._pings, self._pongs = 0, 0
        self._questions = Questions(self._send_if_ready)
        self._calls = itertools.count(1)
        self._grants = Grants(self._release)
        self._preloaded: list[AdapterImageRef] = []
        self._listed: list[AdapterStatus] = []
        self._tally = Tally()
        self._ends: deque[float] = deque(maxlen=watch.max_ends)
        self._suspects = Suspects(watch.max_deaths, watch.window_s)
        self._failure: LoraxError | None = None  # why the exchange was given up
        self._watching: asyncio.Task[None] | None = None

    # -- the process

    def _new_child(self) -> Child[FromChild]:
        self._ended = asyncio.Event()
        return Child("exchange", FromExchange, self._take, self._ended.set)

    async def start(self) -> None:
        """Starts the process; it waits for `begin`."""
        await self._child.start(self._region_fd, self._setup)
        self._watching = asyncio.create_task(self._run())

    def begin(self, layout: bytes, device: str) -> None:
        """Starts the exchange with the layout of the shard."""
        self._begin = Begin(layout, device)
        self._send_begin()

    @property
    def pid(self) -> int | None:
        return self._child.pid

    @property
    def is_away(self) -> bool:
        """Whether the exchange is silent or restarting."""
        return self._away.is_set()

    def fail(self, error: LoraxError) -> None:
        """Fails open questions and all later ones with `error`."""
        self._failure = self._failure or error
        self._questions.fail(error)

    async def close(self, timeout: float = END_S) -> None:
        """Ends the process. A silent one is killed at once."""
        self.fail(EngineDead("the engine is shutting down"))
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})
        self._child.finish()
        await self._child.ended(0 if self.is_away else timeout)

    async def _run(self) -> None:
        """Watches the process, and restarts it when it ends."""
        try:
            while True:
                await self._watch_process()
                if self._failure is not None:
                    return
                if not self._ready and not self.restarts:
                    code = await self._child.ended(0)
                    raise EngineDead(
                        f"the exchange process ended while starting: {exit_text(code)}"
                    )
                await self._restart()
        except Exception as error:
            if not isinstance(error, LoraxError):
                logger.critical("the watch of the exchange failed", exc_info=error)
                error = EngineDead(f"the exchange cannot be watched: {error!r}")
            logger.critical("%s", error.message)
            self.fail(error)
            self._on_lost(error)

    async def _watch_process(self) -> None:
        """Returns when the process has ended or must be killed."""
        watch, starting = self._watch, Starting(self._watch)
        self._pings = self._pongs = 0
        while not self._ended.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(watch.tick_s):
                    await self._ended.wait()
            self._fail_overdue_questions()
            if not self._ready:
                if self.restarts and starting.hangs(self._child.cpu_seconds):
                    return
                continue
            missed = self._pings - self._pongs
            if missed >= watch.dead_ticks:
                silent = missed * watch.tick_s
                logger.error("the exchange has not answered for %.0f s; killing it", silent)
                return
            if missed >= watch.away_ticks:
                self._set_away()
            self._pings += 1
            self._child.send(Ping(self._pings))

    async def _restart(self) -> None:
        """Reaps the process and starts the next. Raises EngineDead after too many restarts."""
        watch, now = self._watch, time.monotonic()
        self._set_away()
        if self._ready:  # a process that was still starting had no questions
            self._suspect_loading()
        self._ready = self._begin_sent = False
        self._tally.restarted()
        code = await self._child.ended(0, reap_s=None)
        self._ends.append(now)
        if len(self._ends) == watch.max_ends and now - self._ends[0] < watch.window_s:
            raise EngineDead(
                f"the exchange process ended {watch.max_ends} times within {watch.window_s:.0f} s,"
                f" last: {exit_text(code)}",
                hint="see its last lines in the log",
            )
        logger.error("the exchange process ended: %s; starting another", exit_text(code))
        self.restarts += 1
        while True:
            self._child = self._new_child()
            try:
                await self._child.start(self._region_fd, self._setup)
                break
            except OSError as error:  # no descriptors or memory at the moment
                logger.error("the exchange cannot be started: %s; trying again", error)
                await asyncio.sleep(watch.tick_s)
        self._send_begin()

    def _send_begin(self) -> None:
        if self._begin is None or self._begin_sent:
            return
        self._begin_sent = True
        begin = self._begin
        if self.restarts:
            held = self._grants.held()
            begin = msgspec.structs.replace(
                begin, restarted=True, held=held, preloaded=self._preloaded
            )
        self._child.send(begin)

    def _set_away(self) -> None:
        if not self.is_away:
            self._away.set()
            self._away_since = time.monotonic()

    def _clear_away(self) -> None:
        self._away.clear()
        self._away_since = None

    # -- messages from the process

    def _take(self, message: FromChild) -> None:
        if isinstance(message, Pong):
            self._pongs = message.number
            if self._ready and self._pings - self._pongs < self._watch.away_ticks:
                self._clear_away()
        elif isinstance(message, ExchangeReady):
            self._handle_ready(message)
        elif isinstance(message, Recall):
            self._grants.recall(message.num_bytes)
        elif isinstance(message, Failed):
            error = from_wire(message.error)
            if not self.restarts:
                self.fail(error)
                self._on_lost(error)
            else:
                logger.error("the new exchange could not start: %s", error)
        else:
            self._questions.answered(message)

    def _handle_ready(self, message: ExchangeReady) -> None:
        if self.restarts:
            away = time.monotonic() - (self._away_since or time.monotonic())
            kept = len(self._grants) + len(self._preloaded)
            logger.warning("the exchange is back after %.1f s; %d images stayed", away, kept)
        else:
            self._preloaded = message.preloaded
            self._on_ready(message.preloaded)
        self._ready = True
        self._clear_away()
        self._questions.ask_again()

    # -- calls

    async def acquire(
        self, ref: AdapterRef, token: str | None, tenant: TenantRef = NO_TENANT
    ) -> GrantLease:
        """See `Backend.acquire`. While the exchange is away, recent grants are granted again."""
        self._raise_if_lost()
        key = (ref, token)
        grant = self._grants.get(key)
        if grant is not None and (grant.is_fresh or (self.is_away and grant.serves_outage)):
            return self._grants.lease(grant)
        try:
            self._suspects.check(ref)
            return await self._acquired(key, tenant)
        except AdapterLoadFailed:
            # The source or the exchange fails. A recent grant still serves.
            grant = self._grants.get(key)
            if grant is None or not grant.serves_outage:
                raise
            return self._grants.lease(grant)

    async def _acquired(self, key: Key, tenant: TenantRef) -> GrantLease:
        """Asks the exchange. If it goes away meanwhile, an adapter that was granted before does not wait."""
        call = next(self._calls)
        asking = asyncio.ensure_future(self._questions.ask(Acquire(call, *key, tenant)))
        try:
            if self._grants.get(key) is not None and await self._goes_away_before(asking):
                grant = self._grants.get(key)
                if grant is not None and grant.serves_outage:
                    self._abandon(call, asking)
                    return self._grants.lease(grant)
            answer = await asyncio.shield(asking)
        except asyncio.CancelledError:
            self._abandon(call, asking)
            raise
        except (AdapterLoadFailed, EngineDead, Overloaded):
            raise
        except LoraxError:
            self._grants.refused(key)
            raise
        assert isinstance(answer, Acquired)
        return self._grants.add(key, answer)

    async def adapters(self) -> list[AdapterStatus]:
        """The exchange's list; while it is away, the last one. Leases are counted by request."""
        answer = await self._asked(ListAdapters(next(self._calls)))
        if isinstance(answer, Adapters):
            self._listed = answer.adapters
        return self._grants.with_users(self._listed)

    async def unload(
        self, name: str, source: str | None = None, tenants: Collection[bytes] | None = None
    ) -> list[bytes]:
        """See `Backend.unload`."""
        self._raise_if_lost()
        self._grants.forget(name, source, tenants)
        self._preloaded = [
            image for image in self._preloaded if not is_meant(image, name, source, tenants)
        ]
        seen = None if tenants is None else list(tenants)
        answer = await self._questions.ask(Unload(next(self._calls), name, source, seen))
        assert isinstance(answer, Unloaded)
        return answer.digests

    async def tiers(self) -> TierStats:
        """See `Backend.tiers`."""
        answer = await self._asked(AskTiers(next(self._calls), self._grants.idle()))
        if isinstance(answer, Tiers):
            self._tally.read(answer.stats)
        return self._tally.stats

    async def _asked(self, message: ListAdapters | AskTiers) -> Answer | None:
        """The answer; None if the exchange goes away first."""
        self._raise_if_lost()
        asking = asyncio.ensure_future(self._questions.ask(message))
        try:
            return None if await self._goes_away_before(asking) else await asking
        finally:
            asking.cancel()

    def _send_if_ready(self, message: msgspec.Struct) -> None:
        """Earlier questions are sent when the process is ready."""
        if self._ready:
            self._child.send(message)

    async def _goes_away_before(self, asking: asyncio.Future[Any]) -> bool:
        """Waits for the answer or until the exchange goes away. True if it went away first."""
        away = asyncio.ensure_future(self._away.wait())
        try:
            await asyncio.wait({asking, away}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            away.cancel()
        return not asking.done()

    def _abandon(self, call: int, asking: asyncio.Future[Any]) -> None:
        """Drops the question, and returns the image if it was acquired."""
        asking.cancel()
        self._release(call)

    def _release(self, call: int) -> None:
        self._child.send(Release(call))

    def _raise_if_lost(self) -> None:
        if self._failure is not None:
            raise from_wire(self._failure.to_wire())

    # -- limits of waiting, and suspected adapters

    def _fail_overdue_questions(self) -> None:
        """Fails questions that have waited too long for an exchange that is away."""
        if self._away_since is None:
            return
        since, now = self._away_since, time.monotonic()
        error = AdapterLoadFailed(
            f"the adapter exchange has been away for {now - since:.0f} s",
            hint="try again later; the base model and adapters in use are served",
        )
        if now - since > self._watch.patience_s:
            self._questions.fail(error, before=now - self._watch.patience_s)

    def _suspect_loading(self) -> None:
        """Refuses adapters whose loads ended the exchange too often. Other questions are sent again."""
        self._suspects.record_end(message.ref for message in self._questions.acquiring())
        for message in self._questions.acquiring():
            try:
                self._suspects.check(message.ref)
            except LoraxError as error:
                self._questions.answered(Refused(message.call, error.to_wire()))


def exit_text(code: int) -> str:
    """How a process ended, for messages."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
