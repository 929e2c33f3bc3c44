"""The exchange: from an adapter's name to its image in host memory, and nobody waits for somebody else's adapter.

One event loop owns it; whatever blocks (the hub, the disk, parsing, hashing) runs in threads with a deadline
(`engine.adapters.loader`). Each version of an adapter is loaded once however many requests want it (*flight*). A
failure reaches all who wait for it and is then forgotten, so the next request tries again; but a version that cannot
be served is refused again without a look at its files. An image stays where it is while somebody holds a *lease* on it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from engine.adapters.lease import Lease
from engine.adapters.loader import AdapterState, Loader
from engine.adapters.ref import AdapterRef, SourceName
from engine.adapters.registry import Registry, make_sources
from engine.adapters.room import Room
from engine.adapters.sources import DemoSource, Source, Version
from engine.adapters.tiers import HostImage, HostRegion, HostTier
from engine.adapters.versions import Lru, Versions, share
from engine.config import EngineConfig
from engine.errors import (
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterTooLarge,
    LoraxError,
    from_wire,
)
from engine.lora.image import ImageSize
from engine.messages import AdapterImageRef, AdapterStatus
from engine.ops.extension import cpu_function
from engine.ops.extension import load as load_library
from engine.ops.layout import AdapterLayout

Key = tuple[str, ...]  # source, id, revision and cache of a version; or ADOPTED, name and digest

ADOPTED = "adopted"
MAX_EVICTED = 1024  # adapters that are no longer in host memory and still remembered
MAX_FAILED = 256  # adapters whose last load failed
ROOM_PATIENCE_S = 30.0  # for leases to end, when they fill the host tier
FILE_FACTOR = 8  # a file may be so many times the host tier: float64, and a copy of the embedding

logger = logging.getLogger(__name__)


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
        recall: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """`device`: where the engine computes. `recall` asks whoever holds leases for those that nobody uses."""
        self._config = config
        self._layout = layout
        self.tier = HostTier(region.size)
        max_file_bytes = FILE_FACTOR * region.size
        if sources is None:
            sources = make_sources(config, max_file_bytes)
        adapters = config.adapters
        self._registry = Registry(
            sources, adapters.default_adapter_source or adapters.adapter_source
        )
        self._room = Room(self.tier, room_patience_s, recall)
        self._loader = Loader(config, layout, region, sources, self._room, device, max_file_bytes)
        self._versions = Versions(self._registry, self._resolve)
        self._adapters: OrderedDict[Key, AdapterState] = OrderedDict()
        self._failed: Lru[Key, AdapterState] = Lru(MAX_FAILED)
        self._flights: dict[Key, _Flight] = {}
        self._preloaded: list[Lease] = []
        demo = self._registry.sources.get("demo")
        self._shipped = demo.names() if isinstance(demo, DemoSource) else []
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
            version = await registry.resolve(ref, lambda one: self._resolve(one, None))
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
        version, fresh_s = await self._versions.get(ref, token)
        try:
            adapter, image = await self._leased(ref, version, token)
        except (AdapterLoadFailed, AdapterNotFound):
            # What was known of it may have been out of date: a file replaced, a commit gone.
            newest, fresh_s = await self._versions.get(ref, token, fresh=True)
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
            fresh_s,
        )

    def adopt(
        self, preloaded: Iterable[AdapterImageRef], held: Mapping[int, AdapterImageRef]
    ) -> dict[int, Lease]:
        """Keeps in place what an exchange before this one left in the region; call -> lease.

        An image is found by its digest only: whoever asks for its adapter has the files read again.
        """

        def lease(ref: AdapterImageRef) -> Lease:
            size = ImageSize(self._layout.record_bytes, ref.data_bytes, ref.max_rank)
            image = self.tier.adopt(ref.digest, ref.offset, size.total)
            state = AdapterState(ref.name, ref.source, "ready", ref.digest, size)
            self._adapters.setdefault((ADOPTED, ref.name, ref.digest.hex()), state)
            return Lease(ref, b"", lambda: self._room.release(image))

        for ref in preloaded:
            self._preloaded.append(lease(ref))
            source = next(name for name in self._registry.sources if name == ref.source)
            self._registry.register(AdapterRef.parse(ref.name).at(source))
        return {call: lease(ref) for call, ref in held.items()}

    @property
    def abandoned(self) -> int:
        """Threads that are stuck in a file system or a source."""
        return self._loader.abandoned

    async def _leased(
        self, ref: AdapterRef, version: Version, token: str | None
    ) -> tuple[AdapterState, HostImage]:
        """The adapter and its image, leased; from the tier, or loaded first."""
        key = (version.source, version.id, version.revision, version.cache)
        adapter = self._adapters.get(key)
        if adapter is not None and adapter.digest is not None:
            image = self.tier.lease(adapter.digest)
            if image is not None:
                self._adapters.move_to_end(key)
                return adapter, image
        return await self._loaded(key, ref, version, token)

    async def _resolve(self, ref: AdapterRef, token: str | None) -> Version:
        assert ref.source is not None, "the registry has chosen"
        source = self._registry.sources[ref.source]
        return await self._loader.call(ref.source, source.resolve, ref, token)

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
        self._loader.stop()
        for key, flight in self._flights.items():
            if self._adapters[key].state == "fetching":
                flight.task.cancel()
        self._room.close()
        tasks = [flight.task for flight in self._flights.values()]
        await self._versions.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loader.close()

    async def _loaded(
        self, key: Key, ref: AdapterRef, version: Version, token: str | None
    ) -> tuple[AdapterState, HostImage]:
        """The adapter and its image, leased; loads it, or waits for whoever does."""
        flight = self._flights.get(key)
        if flight is None:
            self._refuse_again(key)
            adapter = AdapterState(ref.name, version.source)
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
        self, key: Key, adapter: AdapterState, version: Version, token: str | None
    ) -> HostImage:
        """One load; the only place where its failure becomes one adapter's status."""
        try:
            image = await self._loader.load(adapter, version, token)
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

    def _refuse_again(self, key: Key) -> None:
        """Raises what this very version was refused with: its files would say the same again."""
        failed = self._failed.get(key)
        if failed is None or failed.error is None:
            return
        error = from_wire(failed.error)
        if isinstance(error, AdapterIncompatible | AdapterTooLarge):
            raise error

    def _remember(self, key: Key, adapter: AdapterState) -> None:
        """Notes an adapter that is going to be loaded; forgets those that were not asked for for longest."""
        self._failed.pop(key)
        for adopted in [one for one in self._adapters if one[:2] == (ADOPTED, adapter.name)]:
            del self._adapters[adopted]
        self._adapters[key] = adapter
        self._adapters.move_to_end(key)
        excess = len(self._adapters) - MAX_EVICTED - len(self.tier) - len(self._flights)
        if excess > 0:
            idle = (old for old in self._adapters if old != key and old not in self._flights)
            for old in list(itertools.islice(idle, excess)):
                del self._adapters[old]
