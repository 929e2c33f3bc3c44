"""The exchange: from an adapter's name to its image in host memory. No request waits for another request's adapter.

One event loop owns it. Blocking work (the hub, the disk, parsing, hashing) runs in threads with a deadline
(`engine.adapters.loader`). Requests for the same version, or for the same merge of the same versions, share one load.
All of them get its failure, and the next request tries again; but what is incompatible is refused again without reading
its files. An image stays in place while a *lease* on it is held.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.adapters.disk_usage import DiskUsage
from engine.adapters.hub import HubSource
from engine.adapters.lease import Lease
from engine.adapters.loader import AdapterState, Loader
from engine.adapters.ref import AdapterRef
from engine.adapters.registry import Registry, default_source, disk_cache, make_sources
from engine.adapters.resolved import Key, Resolved, resolve
from engine.adapters.room import Room
from engine.adapters.sources import Source, Version
from engine.adapters.statuses import count_load, listed, status_of, tier_stats
from engine.adapters.tiers import HostImage, HostRegion, HostTier
from engine.adapters.versions import Lru, Versions, share
from engine.checkpoint import cache_folder
from engine.config import EngineConfig
from engine.errors import (
    AGAIN,
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterTooLarge,
    LoraxError,
    from_wire,
)
from engine.lora.image import ImageSize
from engine.messages import (
    NO_TENANT,
    AdapterImageRef,
    AdapterStatus,
    TenantRef,
    Tier,
    TierCounts,
    TierStats,
    is_meant,
)
from engine.ops.extension import cpu_function
from engine.ops.extension import load as load_library
from engine.ops.layout import ShardLayout
from engine.sandbox import Converter

ADOPTED = "adopted"  # first of a key, before name and digest
MAX_EVICTED = 1024  # evicted adapters that are remembered
CHEAP_TTL_S = 1.0  # sources with at most this `ttl_s` are asked again after a refusal
MAX_FAILED = 256  # failed adapters that are remembered
ROOM_PATIENCE_S = 30.0  # longest wait for leases to end when they fill the host tier
FILE_FACTOR = 8  # limit of a file, in sizes of the host tier: float64, and a copy of the embedding

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _SharedLoad:
    """One load in progress. It holds a lease until every waiting request has taken its own."""

    task: asyncio.Task[HostImage]
    waiters: int = 0
    image: HostImage | None = None


class Exchange:
    """See the module. `start` loads the preloaded adapters; `close` ends all work."""

    def __init__(
        self,
        config: EngineConfig,
        layout: ShardLayout,
        region: HostRegion,
        *,
        device: str = "cpu",
        sources: Mapping[str, Source] | None = None,
        room_patience_s: float = ROOM_PATIENCE_S,
        recall: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """`device`: the engine's. `sources`: by name; None makes those of the configuration. `recall` asks the front to
        return unused leases that hold this many bytes. Raises ConfigError if a setting names an unknown source."""
        self._config = config
        self._layout = layout
        self.tier = HostTier(region.size)
        max_file_bytes, self._downloads = FILE_FACTOR * region.size, disk_cache(config)
        if sources is None:
            sources = make_sources(config, max_file_bytes, self._downloads)
        self._disk = DiskUsage(self._downloads)
        self._counts = TierCounts()
        self._registry = Registry(sources, default_source(config.adapters, sources))
        self._room = Room(self.tier, room_patience_s, recall)
        self._loader = Loader(
            config,
            layout,
            region,
            sources=sources,
            room=self._room,
            device=device,
            converter=Converter(
                cache_folder(config.model.huggingface_hub_cache),
                max_file_bytes,
                kept=self._downloads.grew,
            ),
        )
        self._versions = Versions(self._registry, self._resolve)
        self._adapters: OrderedDict[Key, AdapterState] = OrderedDict()
        self._failed: Lru[Key, AdapterState] = Lru(MAX_FAILED)
        self._loads: dict[Key, _SharedLoad] = {}
        self._preloaded: list[Lease] = []
        self._listed = [
            (name, source.name) for source in sources.values() for name in source.names()
        ]
        if cpu_function("lorax_cpu_write_matrices") is None:
            reason = load_library().reason or "the compiled CPU library is out of date"
            logger.warning("adapters load several times slower without compiled code: %s", reason)

    async def start(self) -> None:
        """Loads the adapters of --preloaded-adapter-ids and --adapter-id and keeps them in host memory.

        They are looked up like a request's adapter, but --adapter-source is the default source. An adapter that is
        merged into the base model is not loaded here. Raises AdapterError.
        """
        config = self._config.adapters
        if config.merge_adapter_weights:
            return
        names = dict.fromkeys((*config.preloaded_adapter_ids, *filter(None, (config.adapter_id,))))
        registry = Registry(self._registry.sources, config.adapter_source)

        async def load(name: str) -> Lease:
            ref = AdapterRef.parse(name)
            version = await registry.resolve(ref, lambda one: self._resolve(one, None, ""))
            self._registry.register(ref, version.source)
            return await self.acquire(ref, None)

        self._preloaded += await asyncio.gather(*map(load, names))

    @property
    def preloaded(self) -> list[AdapterImageRef]:
        """The adapters that `start` loaded; the engine keeps them on the device."""
        return list({lease.image.digest: lease.image for lease in self._preloaded}.values())

    async def acquire(
        self, ref: AdapterRef, token: str | None = None, tenant: TenantRef = NO_TENANT
    ) -> Lease:
        """A lease on the adapter's image in host memory. `token`: for private adapters. A load that several
        tenants share is its first tenant's.

        Raises InvalidRequest, AdapterError, or Overloaded if leased images fill the host tier for too long.
        """
        get = partial(self._versions.get, token=token, tenant=tenant.name)
        what, fresh_s = await resolve(ref, get)
        try:
            adapter, image, tier = await self._lease(ref, what, token, tenant)
        except (AdapterLoadFailed, AdapterNotFound, AdapterIncompatible) as error:
            # The known version may be out of date: a file was replaced, a commit deleted.
            ttl_s = max(self._registry.sources[one.source].ttl_s for one in what.versions)
            if isinstance(error, AdapterIncompatible) and ttl_s > CHEAP_TTL_S:
                raise  # the source would be asked for every request
            newest, fresh_s = await resolve(ref, partial(get, fresh=True))
            if newest == what:
                raise
            what = newest
            adapter, image, tier = await self._lease(ref, what, token, tenant)
        assert adapter.size is not None
        adapter.unconfirmed = any(version.unconfirmed for version in what.versions)
        return Lease(
            AdapterImageRef(
                digest=image.digest,
                offset=image.offset,
                data_bytes=adapter.size.data_bytes,
                stacked_rank=adapter.size.stacked_rank,
                name=ref.name,
                source=what.source,
                merged=ref.recipe is not None,
                vocab=adapter.size.vocab,
                tenant=adapter.tenant,
            ),
            what.salt,
            lambda: self._room.release(image, tenant.name),
            fresh_s,
            adapter.text,
            tier,
        )

    def adopt(
        self, preloaded: Iterable[AdapterImageRef], held: Mapping[int, AdapterImageRef]
    ) -> dict[int, Lease]:
        """Leases images that the previous exchange left in the region; returns a lease per call.

        An adopted image is found by its digest only: a request for its adapter reads the files again.
        """

        def lease(ref: AdapterImageRef) -> Lease:
            record_bytes = self._layout.record_bytes
            size = ImageSize(record_bytes, ref.data_bytes, ref.stacked_rank, ref.vocab)
            image = self.tier.adopt(ref.digest, ref.offset, size.total)
            state = AdapterState(ref.name, ref.source, "ready", ref.digest, size, merged=ref.merged)
            state.tenant = ref.tenant
            self._adapters.setdefault((ADOPTED, ref.name, ref.digest.hex()), state)
            return Lease(ref, b"", lambda: self._room.release(image))

        for ref in preloaded:
            self._preloaded.append(lease(ref))
            self._registry.register(AdapterRef.parse(ref.name), ref.source)
        return {call: lease(ref) for call, ref in held.items()}

    @property
    def abandoned(self) -> int:
        """Threads that are stuck in a file system or a source."""
        return self._loader.abandoned

    async def _lease(
        self, ref: AdapterRef, what: Resolved, token: str | None, tenant: TenantRef
    ) -> tuple[AdapterState, HostImage, Tier]:
        """The adapter, its image, leased, and where it was. If it is not in host memory, starts a load or waits for one
        in progress."""
        key = what.key
        adapter = self._adapters.get(key)
        if adapter is not None and adapter.digest is not None:
            image = self._room.lease(adapter.digest, tenant.name)
            if image is not None:
                self._adapters.move_to_end(key)
                self._counts.host_hits += 1
                return adapter, image, "host"
        load = self._loads.get(key)
        if load is None:
            self._refuse_again(key)
            adapter = AdapterState(ref.name, what.source, merged=ref.recipe is not None)
            adapter.tenant = self._tenant(what)
            adapter.revision = what.versions[0].revision if ref.recipe is None else None
            sources = self._registry.sources
            adapter.remote = any(sources[one.source].downloads for one in what.versions)
            self._remember(key, adapter)
            task = asyncio.create_task(self._load(key, adapter, what, token, tenant))
            load = self._loads[key] = _SharedLoad(task)
        adapter = self._adapters[key]
        load.waiters += 1
        try:
            image = await share(load.task)
            self._room.hold(image, tenant.name)
            return adapter, image, adapter.found_in
        finally:
            load.waiters -= 1
            self._release_load(load)

    def _tenant(self, what: Resolved) -> bytes:
        """Digest of the token whose holder may see the adapter; empty if the server's own token may read it."""
        sources = self._registry.sources
        own = [one.salt for one in what.versions if one.salt != sources[one.source].tenant(None)]
        return what.salt if any(own) else b""

    async def _resolve(self, ref: AdapterRef, token: str | None, tenant: str) -> Version:
        assert ref.source is not None, "the registry has chosen"
        source = self._registry.sources[ref.source]
        return await self._loader.call(ref.source, tenant, source.resolve, ref, token)

    async def adapters(self) -> list[AdapterStatus]:
        """Adapters that are in host memory, loading, or failed a short time ago; then those that left host memory, and
        the listed others. Of those that left, only the newest version."""
        folders = (await self._disk.read()).folders
        leases = {image.digest: image.leases for image in self.tier}
        preloaded = {(lease.image.name, lease.image.source) for lease in self._preloaded}
        known = (*self._failed.values(), *self._adapters.values())
        newest = {(one.name, one.source, one.tenant): one for one in known}
        found = [
            status_of(
                adapter,
                leases.get(adapter.digest or b""),
                preloaded=(adapter.name, adapter.source) in preloaded,
                on_disk=adapter.remote and self._is_on_disk(adapter, folders),
            )
            for adapter in known
            if adapter.state != "ready"
            or adapter.digest in leases
            or newest[adapter.name, adapter.source, adapter.tenant] is adapter
        ]
        names = {status.name for status in found if not status.merged}
        return found + [listed(*one) for one in self._listed if one[0] not in names]

    def _is_on_disk(self, adapter: AdapterState, downloads: Set[Path]) -> bool:
        """Whether its files were there when the disk was last read. The hub's cache is never cleared by us."""
        folder = adapter.folder
        return folder is not None and (folder in downloads or adapter.source == HubSource.name)

    async def tiers(self, idle: Mapping[bytes, int]) -> TierStats:
        """Host memory and disk, and what happened since the start. `idle`: digest -> leases that no request uses."""
        disk = await self._disk.read()
        return tier_stats(self.tier, idle, disk, self._downloads.num_removed, self._counts)

    async def unload(
        self, name: str, source: str | None = None, tenants: Collection[bytes] | None = None
    ) -> list[bytes]:
        """Forgets every version of an adapter, preloaded or not. Its memory is free when its last lease ends.

        Returns the digests of those that were in host memory. A load in progress continues. See `Backend.unload`.
        """
        gone = [
            key
            for key, adapter in self._adapters.items()
            if key not in self._loads and is_meant(adapter, name, source, tenants)
        ]
        digests = {self._adapters.pop(key).digest for key in gone}
        found = [digest for digest in digests if digest is not None and digest in self.tier]
        for digest in digests - {adapter.digest for adapter in self._adapters.values()}:
            if digest is not None:
                self.tier.drop(digest)
        self._versions.forget(name)
        for lease in [one for one in self._preloaded if is_meant(one.image, name, source, tenants)]:
            self._preloaded.remove(lease)
            lease.release()
        self._room.freed()
        return found

    async def close(self) -> None:
        """Ends all loads. Leases may still be released afterwards."""
        self._loader.stop()
        for key, load in self._loads.items():
            if self._adapters[key].state == "fetching":
                load.task.cancel()
        self._room.close()
        tasks = [load.task for load in self._loads.values()]
        await self._versions.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._disk.close()
        await self._loader.close()

    def _release_load(self, load: _SharedLoad) -> None:
        """Releases the load's own lease once it is complete and no request waits for it."""
        if not load.waiters and load.image is not None:
            image, load.image = load.image, None
            self._room.release(image)

    async def _load(
        self, key: Key, adapter: AdapterState, what: Resolved, token: str | None, tenant: TenantRef
    ) -> HostImage:
        """Loads one version, or one merge. A failure of any kind becomes this adapter's status, and no other's."""
        try:
            image = await self._loader.load(adapter, what, token, tenant)
        except Exception as error:
            if not isinstance(error, LoraxError):
                logger.exception("adapter %s failed to load", adapter.name)
                error = AdapterLoadFailed(
                    f"{adapter.name} could not be loaded: {error!r}", hint=AGAIN
                )
            adapter.state, adapter.error = "failed", error.to_wire()
            self._counts.failed_loads += 1
            self._failed.put(key, self._adapters.pop(key))
            del self._loads[key]
            raise error from None
        count_load(self._counts, adapter)
        leased = self.tier.lease(image.digest)
        assert leased is not None, "nothing ran since it was committed"
        load = self._loads.pop(key)
        load.image = leased
        self._release_load(load)
        return leased

    def _refuse_again(self, key: Key) -> None:
        """Raises the earlier error if this version was refused as incompatible or too large."""
        failed = self._failed.get(key)
        if failed is None or failed.error is None:
            return
        error = from_wire(failed.error)
        if isinstance(error, AdapterIncompatible | AdapterTooLarge):
            raise error

    def _remember(self, key: Key, adapter: AdapterState) -> None:
        """Adds an adapter that is about to load; forgets the least recently used evicted ones."""
        self._failed.pop(key)
        for adopted in [one for one in self._adapters if one[:2] == (ADOPTED, adapter.name)]:
            del self._adapters[adopted]
        self._adapters[key] = adapter
        self._adapters.move_to_end(key)
        excess = len(self._adapters) - MAX_EVICTED - len(self.tier) - len(self._loads)
        if excess > 0:
            idle = (old for old in self._adapters if old != key and old not in self._loads)
            for old in list(itertools.islice(idle, excess)):
                del self._adapters[old]
