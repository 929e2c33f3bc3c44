"""The current version of each name. Concurrent requests share one `resolve`; its answer expires after `ttl_s`."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from engine.adapters.ref import AdapterRef
from engine.adapters.registry import Registry
from engine.adapters.sources import Version
from engine.errors import AGAIN, AdapterLoadFailed, LoraxError, from_wire

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
V = TypeVar("V")

MAX_RESOLVED = 4096  # names whose version is remembered
REFRESH_PATIENCE_S = 1.0  # wait for a source to confirm an expired version before it is used again
STALE_FACTOR = (
    10  # multiple of `ttl_s` for which an expired version may serve if the source is slow
)

# (reference, token, tenant): calls `resolve` of the reference's source, in a thread.
Resolve = Callable[[AdapterRef, str | None, str], Awaitable[Version]]


class Lru(Generic[K, V]):
    """A dictionary of limited size that drops the least recently used entry."""

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
        """Removes a key and returns its value, if any."""
        return self._items.pop(key, None)

    def values(self) -> list[V]:
        """All values, the least recently used first."""
        return list(self._items.values())

    def drop_if(self, test: Callable[[K], bool]) -> None:
        """Removes the keys for which `test` is true."""
        for key in [key for key in self._items if test(key)]:
            del self._items[key]


@dataclass(frozen=True, slots=True)
class _Known:
    version: Version
    asked: float  # time.monotonic()


Key = tuple[AdapterRef, tuple[bytes, ...]]  # the reference, and the tenant at each source


class Versions:
    """The versions of references, by tenant: a tenant that has a version is allowed to use the adapter.

    A version is valid for the source's `ttl_s`, then it is resolved again. While the source is slow or unreachable,
    the old version serves for up to STALE_FACTOR times as long. A refusal takes effect at once.
    """

    def __init__(self, registry: Registry, resolve: Resolve) -> None:
        self._registry = registry
        self._resolve = resolve
        self._known: Lru[Key, _Known] = Lru(MAX_RESOLVED)
        self._asking: dict[Key, asyncio.Task[Version]] = {}

    def __len__(self) -> int:
        return len(self._known)

    async def get(
        self, ref: AdapterRef, token: str | None, tenant: str = "", fresh: bool = False
    ) -> tuple[Version, float]:
        """The version for the holder of the token, and the seconds for which it is valid.

        `tenant`: whose call of the source it is. `fresh`: resolve it now. Raises as `Registry.resolve`.
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
            task = self._asking[key] = asyncio.create_task(self._ask(key, token, tenant))
            task.add_done_callback(lambda task: self._asked(key, task))
        if known is None or age > STALE_FACTOR * ttl:
            return self._with_ttl(await share(task))
        try:
            async with asyncio.timeout(REFRESH_PATIENCE_S):
                return self._with_ttl(await share(task))
        except (TimeoutError, AdapterLoadFailed):
            return replace(known.version, unconfirmed=True), 0.0

    def _with_ttl(self, version: Version) -> tuple[Version, float]:
        return version, self._registry.sources[version.source].ttl_s

    def forget(self, name: str) -> None:
        """Drops a name: its next request resolves it."""
        self._known.drop_if(lambda key: key[0].name == name)

    async def close(self) -> None:
        """Cancels every `resolve` in progress."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, key: Key, token: str | None, tenant: str) -> Version:
        asked = time.monotonic()
        version = await self._registry.resolve(
            key[0], lambda one: self._resolve(one, token, tenant)
        )
        self._known.put(key, _Known(version, asked))
        return version

    def _asked(self, key: Key, task: asyncio.Task[Version]) -> None:
        del self._asking[key]
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, AdapterLoadFailed):
            self._known.pop(key)


def _retrieve(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


async def share(task: asyncio.Task[T]) -> T:
    """The result of a task that other callers wait for too. Each caller gets its own copy of an error.

    The error is marked retrieved, so asyncio does not log it if every caller has gone.
    """
    task.add_done_callback(_retrieve)
    try:
        return await asyncio.shield(task)
    except LoraxError as error:
        raise from_wire(error.to_wire()) from None
    except asyncio.CancelledError:
        if task.cancelled():
            raise AdapterLoadFailed("the server is shutting down", hint=AGAIN) from None
        raise
