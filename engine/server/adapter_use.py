"""How adapters are used: requests and the time of the last, by adapter, and the tier where each request found it.

The front counts, because it serves most requests without a question to the exchange.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from dataclasses import dataclass

from engine.adapters.ref import AdapterRef
from engine.backend import Backend, Lease
from engine.messages import AdapterStatus, EngineStats, Tier
from engine.metrics import Metrics

MAX_USED = 4096  # adapters that are remembered


@dataclass(slots=True)
class Use:
    """The requests for one version of an adapter."""

    hits: int = 0
    last_used: float | None = None  # time.time()


Key = tuple[bytes, str, str, bytes]  # tenant, name, source, digest


class AdapterUse:
    """Counts of the most recently used adapters, and of all by tier."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self.by_tier: Counter[Tier] = Counter()
        self._backend = backend
        self._metrics = metrics
        self._used: OrderedDict[Key, Use] = OrderedDict()  # least recently used first
        self._stats: EngineStats | None = None  # those of `_resident`
        self._resident: frozenset[bytes] = frozenset()

    def count(self, adapter: AdapterRef | None, lease: Lease | None) -> None:
        """A request begins, with the adapter that it named and its lease. None: the base model.

        Metrics are open to everybody, so they name no private adapter.
        """
        if (
            adapter is None or lease is None
        ):  # None and an adapter: it is merged into the base model
            self._metrics.adapter("base" if adapter is None else adapter.name)
            return
        image = lease.image
        tier: Tier = "device" if image.digest in self.resident else lease.tier
        self._metrics.adapter("private" if image.tenant else adapter.name)
        self._metrics.hit(tier)
        self.by_tier[tier] += 1
        key = (image.tenant, image.name, image.source, image.digest)
        use = self._used.setdefault(key, Use())
        use.hits += 1
        use.last_used = time.time()
        self._used.move_to_end(key)
        if len(self._used) > MAX_USED:
            self._used.popitem(last=False)

    def of(self, status: AdapterStatus) -> Use:
        """The requests for an adapter of the exchange's list."""
        key = (status.tenant, status.name, status.source, status.digest or b"")
        return self._used.get(key, Use())

    @property
    def resident(self) -> frozenset[bytes]:
        """Digests of the adapters on the device, by the newest stats."""
        stats = self._backend.stats
        if stats is not self._stats:
            self._resident = frozenset(digest for _, digest, _ in stats.resident)
            self._stats = stats
        return self._resident
