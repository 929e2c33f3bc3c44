"""What the exchange tells: an entry for each adapter that it knows, levels and counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from engine.adapters.disk_cache import Usage
from engine.adapters.tiers import HostTier
from engine.messages import AdapterStatus, TierCounts, TierStats

if TYPE_CHECKING:
    from engine.adapters.loader import AdapterState


def status_of(
    adapter: AdapterState, leases: int | None, *, preloaded: bool, on_disk: bool
) -> AdapterStatus:
    """`leases` None: the adapter is not in host memory."""
    state = "listed" if adapter.state == "ready" and leases is None else adapter.state
    return AdapterStatus(
        name=adapter.name,
        source=adapter.source,
        digest=adapter.digest,
        state=state,
        data_bytes=adapter.size.data_bytes if adapter.size else 0,
        stacked_rank=adapter.size.stacked_rank if adapter.size else 0,
        targets=adapter.targets,
        base_model=adapter.base_model,
        leases=leases or 0,
        seconds=dict(adapter.seconds),
        error=adapter.error,
        tenant=adapter.tenant,
        merged=adapter.merged,
        unconfirmed=adapter.unconfirmed,
        revision=adapter.revision,
        ranks=adapter.ranks,
        preloaded=preloaded,
        on_disk=on_disk,
    )


def listed(name: str, source: str) -> AdapterStatus:
    """An adapter that its source names and that no request has named yet."""
    return AdapterStatus(name, source, digest=None, state="listed")


def count_load(counts: TierCounts, adapter: AdapterState) -> None:
    """Counts a load that has ended well."""
    assert adapter.size is not None
    counts.loads += 1
    counts.loaded_bytes += adapter.size.data_bytes
    counts.disk_hits += adapter.found_in == "disk"
    counts.disk_misses += adapter.downloaded
    for stage, seconds in adapter.seconds.items():
        counts.seconds[stage] = counts.seconds.get(stage, 0.0) + seconds


def tier_stats(
    host: HostTier,
    idle: Mapping[bytes, int],
    disk: Usage,
    num_removed: int,
    counts: TierCounts,
) -> TierStats:
    """`idle`: digest -> leases that no request uses. `num_removed`: of the disk's entries."""
    return TierStats(
        host_capacity=host.capacity,
        host_used=host.used,
        host_leased=host.leased(idle),
        host_images=len(host),
        disk_capacity=disk.capacity,
        disk_used=disk.num_bytes,
        disk_entries=disk.num_entries,
        counts=msgspec.structs.replace(
            counts,
            host_evictions=host.num_evictions,
            disk_evictions=num_removed,
            seconds=dict(counts.seconds),
        ),
    )
