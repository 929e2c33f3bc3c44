"""The places for open requests (--max-concurrent-requests), shared by tenants."""

from __future__ import annotations

from collections import Counter

from engine.errors import Overloaded
from engine.server.keys import Tenant

RESERVED = 10  # a tenth of the places is for tenants that hold less than their share


class Places:
    """A tenant may hold most places while others need few. The last tenth only goes to tenants below their share."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.num_open = 0
        self._held: Counter[str] = Counter()  # by tenant

    def take(self, tenant: Tenant | None) -> None:
        """Takes a place until `leave`. Raises Overloaded."""
        if self.num_open >= self.most:
            raise Overloaded(
                f"{self.most} requests are open, which is the limit",
                hint="try again, or start the server with a larger --max-concurrent-requests",
            )
        if tenant is not None:
            self._check_share(tenant)
            self._held[tenant.name] += 1
        self.num_open += 1

    def leave(self, tenant: Tenant | None) -> None:
        """Returns a place."""
        self.num_open -= 1
        if tenant is not None:
            self._held[tenant.name] -= 1
            if not self._held[tenant.name]:
                del self._held[tenant.name]

    def _check_share(self, tenant: Tenant) -> None:
        held = self._held[tenant.name]
        share = self.most * tenant.share
        if self.num_open >= self.most - self.most // RESERVED and held >= share:
            raise Overloaded(
                f"the server is nearly full, and this tenant has {held} open requests, its share is {share:.0f}",
                hint="try again when some have ended",
            )
