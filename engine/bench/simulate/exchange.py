"""The exchange in virtual time: the real host tier, and loads that take a while.

Loads start in the order of their requests, at most `loads` at a time, each once the tier has room for it. Images that
open requests lease stay in place, so a load may wait for the end of requests. Requests for one adapter share one load.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf

from engine.adapters.tiers import HostImage, HostTier
from engine.bench_options import Pace
from engine.messages import AdapterImageRef


@dataclass(slots=True, eq=False)
class _Load:
    image: AdapterImageRef
    waiting: list[str] = field(default_factory=list)
    offset: int = 0  # in the tier, once it has started


class SimulatedExchange:
    """Leases of images, for the ids of requests."""

    def __init__(self, host_bytes: int, pace: Pace) -> None:
        self.tier = HostTier(host_bytes)
        self.num_loads = 0
        self.num_evictions = 0
        self._pace = pace
        self._loads: dict[bytes, _Load] = {}
        self._queue: deque[_Load] = deque()
        self._running: list[tuple[float, int, _Load]] = []  # heap of (end, number, load)

    def acquire(self, image: AdapterImageRef, id: str, now: float) -> HostImage | None:
        """The image's lease; None: `take_loaded` gives it to the request `id` later."""
        leased = self.tier.lease(image.digest)
        if leased is not None:
            return leased
        load = self._loads.get(image.digest)
        if load is None:
            load = self._loads[image.digest] = _Load(image)
            self._queue.append(load)
            self._start(now)
        load.waiting.append(id)
        return None

    def release(self, leased: HostImage, now: float) -> None:
        """Ends a lease."""
        self.tier.release(leased)
        self._start(now)

    @property
    def next_end(self) -> float:
        """When the next load ends, in seconds."""
        return self._running[0][0] if self._running else inf

    def take_loaded(self, now: float) -> list[tuple[str, HostImage]]:
        """The ids of the requests whose images have been loaded by `now`, with their leases."""
        found: list[tuple[str, HostImage]] = []
        while self._running and self._running[0][0] <= now:
            end, _, load = heappop(self._running)
            del self._loads[load.image.digest]
            self.tier.commit(load.offset, load.image.digest)
            for id in load.waiting:
                leased = self.tier.lease(load.image.digest)
                assert leased is not None, "it was committed just now"
                found.append((id, leased))
            self._start(end)
        return found

    def _start(self, now: float) -> None:
        """Starts the loads for which there is a worker and room."""
        while self._queue and len(self._running) < self._pace.loads:
            load, before = self._queue[0], len(self.tier)
            offset = self.tier.reserve(load.image.data_bytes)
            if offset is None:
                return
            self._queue.popleft()
            self.num_evictions += before - len(self.tier)
            self.num_loads += 1
            load.offset = offset
            seconds = self._pace.load_s + load.image.data_bytes / (self._pace.load_gb_s * 1e9)
            heappush(self._running, (now + seconds, self.num_loads, load))
