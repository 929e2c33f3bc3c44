"""Who may take more of the host tier.

A tenant's adapters stay in the tier while its requests are open. A tenant with many requests could thus fill the tier
and keep all others out. So a tenant that holds its share may take more only while a quarter of the tier is left.
"""

from __future__ import annotations

from collections import Counter

RESERVED = 0.25  # of the tier, for tenants that hold less than their share


class TierShares:
    """Bytes held by tenant: of leased images and of loads under way. An image counts for each tenant that leases it."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._bytes: Counter[str] = Counter()  # by tenant
        self._leases: Counter[tuple[str, bytes]] = Counter()  # by tenant and digest

    def may_take(self, tenant: str, share: float, num_bytes: int) -> bool:
        """Whether a tenant may take `num_bytes` more. `share`: its part of the tier, from 0 to 1."""
        if self._bytes[tenant] + num_bytes <= share * self._capacity or share >= 1:
            return True
        if not self._bytes:  # else an image above both limits could never be loaded
            return True
        return self._bytes.total() + num_bytes <= (1 - RESERVED) * self._capacity

    def take(self, tenant: str, digest: bytes, num_bytes: int) -> None:
        """The tenant holds the image once more."""
        self._leases[tenant, digest] += 1
        if self._leases[tenant, digest] == 1:
            self._bytes[tenant] += num_bytes

    def give_back(self, tenant: str, digest: bytes, num_bytes: int) -> None:
        """The opposite of `take`."""
        self._leases[tenant, digest] -= 1
        if not self._leases[tenant, digest]:
            del self._leases[tenant, digest]
            self._bytes[tenant] -= num_bytes
            if not self._bytes[tenant]:
                del self._bytes[tenant]
