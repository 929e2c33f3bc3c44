"""The exchange: from an adapter's name to its image in host memory, and nobody waits for somebody else's adapter.

One event loop owns it; whatever blocks (the hub, the disk, parsing, hashing) runs in small pools of threads.
Each version of an adapter is loaded once however many requests want it (*flight*); a failure reaches all who wait
for it and is then forgotten, so the next request tries again. An image stays where it is while somebody holds a
*lease* on it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from engine.adapters.fetching import Fetcher
from engine.adapters.lease import Lease
from engine.adapters.ref import AdapterRef, SourceName
from engine.adapters.registry import Registry, make_sources
from engine.adapters.room import Room
from engine.adapters.sources import DemoSource, Source, Version
from engine.adapters.tiers import HostImage, HostRegion, HostTier
from engine.adapters.versions import Lru, Versions, share
from engine.checkpoint import cache_folder
from engine.config import EngineConfig
from engine.errors import (
    AdapterLoadFailed,
    AdapterNotFound,
    LoraxError,
)
from engine.files import OpenFile
from engine.lora.formats import load_peft
from engine.lora.image import ImageSize, image_size, write_image
from engine.lora.report import AdapterReport, count_targets, inspect
from engine.lora.weights import LoraWeights
from engine.messages import AdapterImageRef, AdapterStatus
from engine.ops.extension import cpu_function
from engine.ops.extension import load as load_library
from engine.ops.layout import AdapterLayout

__all__ = ["AdapterReport", "Exchange", "Lease", "inspect"]

T = TypeVar("T")

PARSE_THREADS = 2  # they compute, on cores that an engine on the CPU wants
MAX_PARSE_THREADS = 8  # beside an engine on a GPU, which leaves most cores alone
MAX_EVICTED = 1024  # adapters that are no longer in host memory and still remembered
MAX_FAILED = 256  # adapters whose last load failed
ROOM_PATIENCE_S = 30.0  # for leases to end, when they fill the host tier
FILE_FACTOR = 8  # a file may be so many times the host tier: float64, and a copy of the embedding

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Adapter:
    """What is known of one version of one adapter."""

    name: str
    source: str
    state: Literal["fetching", "parsing", "ready", "failed"] = "fetching"
    digest: bytes | None = None
    size: ImageSize | None = None
    targets: list[str] = field(default_factory=list)
    base_model: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    error: dict[str, Any] | None = None


@dataclass(slots=True)
class _Flight:
    """One load under way. It holds a lease until everybody who waited has taken a lease of their own."""

    task: asyncio.Task[HostImage]
    waiters: int = 0
    image: HostImage | None = None


class Exchange:
    """See the module. `start` loads what is preloaded; `close` ends it."""

    def __init__(
        self,
        config: EngineConfig,
        layout: AdapterLayout,
        region: HostRegion,
        *,
        device: str = "cpu",
        sources: dict[SourceName, Source] | None = None,
        room_patience_s: float = ROOM_PATIENCE_S,
    ) -> None:
        """`device`: where the engine computes."""
        self._config = config
        self._layout = layout
        self._region = region
        self.tier = HostTier(region.size)
        if sources is None:
            sources = make_sources(config, FILE_FACTOR * region.size)
        adapters = config.adapters
        self._registry = Registry(
            sources, adapters.default_adapter_source or adapters.adapter_source
        )
        self._room = Room(self.tier, room_patience_s)
        cache = cache_folder(config.model.huggingface_hub_cache)
        self._fetcher = Fetcher(sources, cache, self._pause, FILE_FACTOR * region.size)
        self._parsers = ThreadPoolExecutor(parse_threads(device), "adapter-parse")
        self._versions = Versions(self._registry, self._fetcher.resolve)
        self._adapters: OrderedDict[Hashable, _Adapter] = OrderedDict()
        self._failed: Lru[Hashable, _Adapter] = Lru(MAX_FAILED)
        self._flights: dict[Hashable, _Flight] = {}
        self._preloaded: list[Lease] = []
        demo = self._registry.sources.get("demo")
        self._shipped = demo.names() if isinstance(demo, DemoSource) else []
        self._closing = False
        if cpu_function("lorax_cpu_write_matrices") is None:
            reason = load_library().reason or "the compiled CPU library is out of date"
            logger.warning("adapters load several times slower than they could: %s", reason)

    async def start(self) -> None:
        """Loads the adapters of --preloaded-adapter-ids and --adapter-id and keeps them in host memory.

        They are looked for where a request's are, but for the last place, which --adapter-source says. Raises
        AdapterError.
        """
        config = self._config.adapters
        names = dict.fromkeys((*config.preloaded_adapter_ids, *filter(None, (config.adapter_id,))))
        registry = Registry(self._registry.sources, config.adapter_source)

        async def load(name: str) -> Lease:
            ref = AdapterRef.parse(name)
            version = await registry.resolve(ref, lambda one: self._fetcher.resolve(one, None))
            ref = ref.at(version.source)
            lease = await self.acquire(ref, None)
            self._registry.register(ref)
            return lease

        self._preloaded += await asyncio.gather(*map(load, names))

    @property
    def preloaded(self) -> list[AdapterImageRef]:
        """What `start` loaded: the engine is to keep them on the device."""
        return list({lease.image.digest: lease.image for lease in self._preloaded}.values())

    async def acquire(self, ref: AdapterRef, token: str | None = None) -> Lease:
        """The adapter's image in host memory, held there. `token`: the tenant's own, for private adapters.

        Raises InvalidRequest, AdapterError or, if leased images fill the host tier for too long, Overloaded.
        """
        version = await self._versions.get(ref, token)
        try:
            adapter, image = await self._leased(ref, version, token)
        except (AdapterLoadFailed, AdapterNotFound):
            # What was known of it may have been out of date: a file replaced, a commit gone.
            newest = await self._versions.get(ref, token, fresh=True)
            if newest == version:
                raise
            version = newest
            adapter, image = await self._leased(ref, version, token)
        assert adapter.size is not None
        return Lease(
            AdapterImageRef(
                image.digest,
                image.offset,
                adapter.size.data_bytes,
                adapter.size.max_rank,
                ref.name,
                version.source,
            ),
            version.salt,
            lambda: self._room.release(image),
        )

    async def _leased(
        self, ref: AdapterRef, version: Version, token: str | None
    ) -> tuple[_Adapter, HostImage]:
        """The adapter and its image, leased; from the tier, or loaded first."""
        key = (version.source, version.id, version.revision, version.cache)
        adapter = self._adapters.get(key)
        if adapter is not None and adapter.digest is not None:
            image = self.tier.lease(adapter.digest)
            if image is not None:
                self._adapters.move_to_end(key)
                return adapter, image
        return await self._loaded(key, ref, version, token)

    async def adapters(self) -> list[AdapterStatus]:
        """Adapters in host memory, on their way there, or refused a short time ago; then the demo's others."""
        leases = {image.digest: image.leases for image in self.tier}
        found = [
            AdapterStatus(
                name=adapter.name,
                source=adapter.source,
                digest=adapter.digest,
                state=adapter.state,
                data_bytes=adapter.size.data_bytes if adapter.size else 0,
                max_rank=adapter.size.max_rank if adapter.size else 0,
                targets=adapter.targets,
                base_model=adapter.base_model,
                leases=leases.get(adapter.digest or b"", 0),
                seconds=dict(adapter.seconds),
                error=adapter.error,
            )
            for adapter in (*self._failed.values(), *self._adapters.values())
            if adapter.state != "ready" or adapter.digest in leases
        ]
        known = {status.name for status in found}
        return found + [
            AdapterStatus(name, "demo", None, "listed", 0, 0, [], None, 0, {})
            for name in self._shipped
            if name not in known
        ]

    async def unload(self, name: str) -> bool:
        """Forgets every version of an adapter, preloaded or not; its memory is free once nobody uses it.

        False if there is none of that name. A load under way goes on.
        """
        gone = [
            key
            for key, adapter in self._adapters.items()
            if adapter.name == name and key not in self._flights
        ]
        digests = {self._adapters.pop(key).digest for key in gone}
        found = any(digest is not None and digest in self.tier for digest in digests)
        for digest in digests - {adapter.digest for adapter in self._adapters.values()}:
            if digest is not None:
                self.tier.drop(digest)
        self._versions.forget(name)
        for lease in [lease for lease in self._preloaded if lease.image.name == name]:
            self._preloaded.remove(lease)
            lease.release()
        self._room.freed()
        return found

    async def close(self) -> None:
        """Ends what is under way. Leases that are still held may be released afterwards."""
        self._closing = True
        for key, flight in self._flights.items():
            if self._adapters[key].state == "fetching":
                flight.task.cancel()
        self._room.close()
        tasks = [flight.task for flight in self._flights.values()]
        await self._versions.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fetcher.close()
        self._parsers.shutdown(wait=True, cancel_futures=True)

    async def _loaded(
        self, key: Hashable, ref: AdapterRef, version: Version, token: str | None
    ) -> tuple[_Adapter, HostImage]:
        """The adapter and its image, leased; loads it, or waits for whoever does."""
        flight = self._flights.get(key)
        if flight is None:
            adapter = _Adapter(ref.name, version.source)
            self._remember(key, adapter)
            task = asyncio.create_task(self._fly(key, adapter, version, token))
            flight = self._flights[key] = _Flight(task)
        adapter = self._adapters[key]
        flight.waiters += 1
        try:
            image = await share(flight.task)
            self.tier.hold(image)
            return adapter, image
        finally:
            flight.waiters -= 1
            self._land(flight)

    def _land(self, flight: _Flight) -> None:
        if not flight.waiters and flight.image is not None:
            image, flight.image = flight.image, None
            self._room.release(image)

    async def _fly(
        self, key: Hashable, adapter: _Adapter, version: Version, token: str | None
    ) -> HostImage:
        """One load; the only place where its failure becomes one adapter's status."""
        try:
            image = await self._load(adapter, version, token)
        except Exception as error:
            if not isinstance(error, LoraxError):
                logger.exception("loading %s failed", adapter.name)
                error = AdapterLoadFailed(f"{adapter.name} could not be loaded: {error!r}")
            adapter.state, adapter.error = "failed", error.to_wire()
            self._failed.put(key, self._adapters.pop(key))
            del self._flights[key]
            raise error from None
        leased = self.tier.lease(image.digest)
        assert leased is not None, "nothing ran since it was committed"
        flight = self._flights.pop(key)
        flight.image = leased
        self._land(flight)
        return leased

    async def _load(self, adapter: _Adapter, version: Version, token: str | None) -> HostImage:
        started = time.perf_counter()
        with await self._fetcher.fetch(version, token) as files:
            adapter.seconds["fetch"] = time.perf_counter() - started
            adapter.state = "parsing"  # `close` waits for its end: threads read the files
            with await self._fetcher.readable(files.weights) as weights:
                return await self._parse(adapter, version, token, files.config, weights)

    async def _parse(
        self,
        adapter: _Adapter,
        version: Version,
        token: str | None,
        config: OpenFile,
        weights_file: OpenFile,
    ) -> HostImage:
        clock = time.perf_counter
        started = clock()
        weights = await self._run(self._parsers, self._open, config, weights_file)
        config.close()  # an adapter that waits for room holds one descriptor
        try:
            adapter.size = image_size(weights, self._layout)
            opened = clock() - started
            offset = await self._room.reserve(adapter.name, adapter.size.total)
            started = clock() - opened
            view = self._region.view[offset : offset + adapter.size.total]
            try:
                digest = await self._run(
                    self._parsers, write_image, weights, self._layout, view, self._pause
                )
                # Files that were replaced meanwhile are another version: an old configuration may have met new
                # weights.
                (await self._fetcher.fetch(version, token)).close()
            except BaseException:
                self._room.abandon(offset)
                raise
        finally:
            weights.close()
        image = self.tier.commit(offset, digest)
        self._room.freed()
        adapter.digest, adapter.state = digest, "ready"
        adapter.targets = list(count_targets(weights, self._layout))
        adapter.base_model = weights.base_model
        adapter.seconds["parse"] = clock() - started
        for note in weights.notes:
            logger.info("%s: %s", adapter.name, note)
        return image

    def _open(self, config: OpenFile, weights: OpenFile) -> LoraWeights:
        model = self._config.model.model_id.partition("@")[0]
        return load_peft(
            config,
            weights,
            self._layout,
            max_rank=self._config.adapters.max_adapter_rank,
            base_model=model,
        )

    def _pause(self) -> None:
        """Between two pieces of work in a thread."""
        if self._closing:
            raise AdapterLoadFailed("the server is shutting down")

    def _remember(self, key: Hashable, adapter: _Adapter) -> None:
        """Notes an adapter that is going to be loaded; forgets those that were not asked for for longest."""
        self._failed.pop(key)
        self._adapters[key] = adapter
        self._adapters.move_to_end(key)
        excess = len(self._adapters) - MAX_EVICTED - len(self.tier) - len(self._flights)
        if excess > 0:
            idle = (old for old in self._adapters if old != key and old not in self._flights)
            for old in list(itertools.islice(idle, excess)):
                del self._adapters[old]

    async def _run(self, pool: ThreadPoolExecutor, call: Callable[..., T], *given: Any) -> T:
        if self._closing:
            raise AdapterLoadFailed("the server is shutting down")
        return await asyncio.get_running_loop().run_in_executor(pool, call, *given)


def parse_threads(device: str) -> int:
    """How many adapters are parsed at a time."""
    if device == "cpu":
        return PARSE_THREADS
    return max(PARSE_THREADS, min(MAX_PARSE_THREADS, len(os.sched_getaffinity(0)) // 2))
