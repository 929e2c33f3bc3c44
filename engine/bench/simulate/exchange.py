"""The exchange in virtual time: the real host tier, and loads that take a while.

At most `loads` loads run at a time, each once the tier has room for it. Tenants take turns to start one; a tenant's own
start in the order of their requests, and only while the tenant may take more of the tier. Images that open requests
lease stay in place, so a load may wait for the end of requests. Requests for one adapter share one load.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf

from engine.adapters.tier_shares import TierShares
from engine.adapters.tiers import HostImage, HostTier
from engine.bench_options import Pace, Tenancy
from engine.messages import AdapterImageRef, aligned


@dataclass(slots=True, eq=False)
class SimulatedLease:
    """One request's use of an image."""

    image: HostImage
    tenant: str


@dataclass(slots=True, eq=False)
class _Load:
    image: AdapterImageRef
    tenant: str  # of the request that started it
    waiting: list[tuple[str, str]] = field(default_factory=list)  # ids and tenants of requests
    offset: int = 0  # in the tier, once it has started


class SimulatedExchange:
    """Leases of images, for the ids of requests."""

    def __init__(self, host_bytes: int, pace: Pace, tenancy: Tenancy) -> None:
        self.tier = HostTier(host_bytes)
        self.num_loads = 0
        self.num_evictions = 0
        self._pace = pace
        self._tenancy = tenancy
        self._shares = TierShares(host_bytes)
        self._loads: dict[bytes, _Load] = {}
        self._queues: dict[str, deque[_Load]] = {}  # by tenant, in the order of their turns
        self._running: list[tuple[float, int, _Load]] = []  # heap of (end, number, load)

    def acquire(
        self, image: AdapterImageRef, id: str, tenant: str, now: float
    ) -> SimulatedLease | None:
        """The image's lease; None: `take_loaded` gives it to the request `id` later."""
        leased = self.tier.lease(image.digest)
        if leased is not None:
            return self._leased(leased, tenant)
        load = self._loads.get(image.digest)
        if load is None:
            load = self._loads[image.digest] = _Load(image, tenant)
            self._queues.setdefault(tenant, deque()).append(load)
            self._start(now)
        load.waiting.append((id, tenant))
        return None

    def _leased(self, image: HostImage, tenant: str) -> SimulatedLease:
        self._shares.take(tenant, image.digest, image.num_bytes)
        return SimulatedLease(image, tenant)

    def release(self, lease: SimulatedLease, now: float) -> None:
        """Ends a lease."""
        self.tier.release(lease.image)
        self._shares.give_back(lease.tenant, lease.image.digest, lease.image.num_bytes)
        self._start(now)

    @property
    def next_end(self) -> float:
        """When the next load ends, in seconds."""
        return self._running[0][0] if self._running else inf

    def take_loaded(self, now: float) -> list[tuple[str, SimulatedLease]]:
        """The ids of the requests whose images have been loaded by `now`, with their leases."""
        found: list[tuple[str, SimulatedLease]] = []
        while self._running and self._running[0][0] <= now:
            end, _, load = heappop(self._running)
            del self._loads[load.image.digest]
            self.tier.commit(load.offset, load.image.digest)
            for id, tenant in load.waiting:
                leased = self.tier.lease(load.image.digest)
                assert leased is not None, "it was committed just now"
                found.append((id, self._leased(leased, tenant)))
            self._shares.give_back(load.tenant, load.image.digest, aligned(load.image.data_bytes))
            self._start(end)
        return found

    def _start(self, now: float) -> None:
        """Starts the loads for which there is a worker and room."""
        while self._queues and len(self._running) < self._pace.loads:
            tenant = next(filter(self._may_load, self._queues), None)
            if tenant is None:
                return
            load, before = self._queues[tenant][0], len(self.tier)
            offset = self.tier.reserve(load.image.data_bytes)
            if offset is None:
                return
            queue = self._queues.pop(tenant)
            queue.popleft()
            if queue:
                self._queues[tenant] = queue  # the others' turns come first
            self._shares.take(tenant, load.image.digest, aligned(load.image.data_bytes))
            self.num_evictions += before - len(self.tier)
            self.num_loads += 1
            load.offset = offset
            seconds = self._pace.load_s + load.image.data_bytes / (self._pace.load_gb_s * 1e9)
            heappush(self._running, (now + seconds, self.num_loads, load))

    def _may_load(self, tenant: str) -> bool:
        size = self._queues[tenant][0].image.data_bytes
        return self._shares.may_take(tenant, self._tenancy.share(int(tenant)), aligned(size))
