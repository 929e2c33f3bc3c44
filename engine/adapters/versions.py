"""Which version a name means now: asked once for all who want to know, and again when the answer has aged."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from engine.adapters.ref import AdapterRef
from engine.adapters.registry import Registry
from engine.adapters.sources import Version
from engine.errors import AdapterLoadFailed, LoraxError, from_wire

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
V = TypeVar("V")

MAX_RESOLVED = 4096  # names whose version is remembered
REFRESH_PATIENCE_S = 1.0  # for a source to confirm what was known a moment ago
STALE_FACTOR = (
    10  # so many times its time-to-live, what was known may serve while the source is slow or away
)

# asks the source of a reference, in a thread
Resolve = Callable[[AdapterRef, str | None], Awaitable[Version]]


class Lru(Generic[K, V]):
    """A dictionary that forgets what was unused for longest."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._items: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: K) -> V | None:
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: K, value: V) -> None:
        self._items[key] = value
        self._items.move_to_end(key)
        if len(self._items) > self.limit:
            self._items.popitem(last=False)

    def pop(self, key: K) -> V | None:
        """Forgets a key."""
        return self._items.pop(key, None)

    def values(self) -> list[V]:
        """What is remembered, the least recently used first."""
        return list(self._items.values())

    def drop_if(self, test: Callable[[K], bool]) -> None:
        """Forgets the keys for which `test` holds."""
        for key in [key for key in self._items if test(key)]:
            del self._items[key]


@dataclass(frozen=True, slots=True)
class _Known:
    version: Version
    asked: float  # time.monotonic()


Key = tuple[AdapterRef, tuple[bytes, ...]]  # with what the caller's token means to each source


class Versions:
    """The versions behind references, by tenant: being told one is being allowed to have it.

    An answer serves for the source's `ttl_s`. Then it is asked for again; while the source is slow or cannot be
    reached, the old answer serves on, for STALE_FACTOR times as long. A refusal counts at once.
    """

    def __init__(self, registry: Registry, resolve: Resolve) -> None:
        self._registry = registry
        self._resolve = resolve
        self._known: Lru[Key, _Known] = Lru(MAX_RESOLVED)
        self._asking: dict[Key, asyncio.Task[Version]] = {}

    def __len__(self) -> int:
        return len(self._known)

    async def get(
        self, ref: AdapterRef, token: str | None, fresh: bool = False
    ) -> tuple[Version, float]:
        """The version for this tenant, and for how many seconds that needs no other question.

        `fresh`: as the source says now. Raises as `Registry.resolve`.
        """
        sources = self._registry.sources
        candidates = self._registry.candidates(ref)
        key = (ref, tuple(sources[one.source].tenant(token) for one in candidates if one.source))
        known = None if fresh else self._known.get(key)
        age = time.monotonic() - known.asked if known else 0.0
        ttl = sources[known.version.source].ttl_s if known else 0.0
        if known is not None and age <= ttl:
            return known.version, ttl - age
        task = self._asking.get(key)
        if task is None:
            task = self._asking[key] = asyncio.create_task(self._ask(key, token))
            task.add_done_callback(lambda task: self._asked(key, task))
        if known is None or age > STALE_FACTOR * ttl:
            return self._just_told(await share(task))
        try:
            async with asyncio.timeout(REFRESH_PATIENCE_S):
                return self._just_told(await share(task))
        except (TimeoutError, AdapterLoadFailed):
            return known.version, 0.0

    def _just_told(self, version: Version) -> tuple[Version, float]:
        return version, self._registry.sources[version.source].ttl_s

    def forget(self, name: str) -> None:
        """The next request for this name asks its source."""
        self._known.drop_if(lambda key: key[0].name == name)

    async def close(self) -> None:
        """Gives up the questions under way."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, key: Key, token: str | None) -> Version:
        asked = time.monotonic()
        version = await self._registry.resolve(key[0], lambda one: self._resolve(one, token))
        self._known.put(key, _Known(version, asked))
        return version

    def _asked(self, key: Key, task: asyncio.Task[Version]) -> None:
        del self._asking[key]
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, AdapterLoadFailed):
            self._known.pop(key)


def _look_at(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


async def share(task: asyncio.Task[T]) -> T:
    """The result of a task that others wait for too; its failure as an error of one's own.

    A failure that nobody waits for any more is nobody's, not the loop's to complain of.
    """
    task.add_done_callback(_look_at)
    try:
        return await asyncio.shield(task)
    except LoraxError as error:
        raise from_wire(error.to_wire()) from None
    except asyncio.CancelledError:
        if task.cancelled():
            raise AdapterLoadFailed("the server is shutting down") from None
        raise
