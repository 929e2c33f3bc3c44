"""Reservations in the host tier that wait, for a limited time, until leases end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine.adapters.tier_shares import TierShares
from engine.adapters.tiers import HostImage, HostTier
from engine.adapters.turns import Turns
from engine.errors import AGAIN, RAISE_LIMIT, AdapterLoadFailed, AdapterTooLarge, Overloaded
from engine.messages import NO_TENANT, TenantRef


class Room:
    """Reservations in one tier, on one event loop. One reservation at a time has its turn: all freed memory is for it
    until it is served or gives up, so small ones do not starve a large one. The next turn goes to the tenants in turn,
    and within a tenant to the oldest reservation (`engine.adapters.turns`)."""

    def __init__(
        self, tier: HostTier, patience_s: float, recall: Callable[[int], None] = lambda size: None
    ) -> None:
        """`recall` asks the front to return unused leases; its argument is the number of bytes needed."""
        self.tier = tier
        self._recall = recall
        self._patience_s = patience_s
        self._turns = Turns(1)
        self._shares = TierShares(tier.capacity)
        self._reserved: dict[int, tuple[str, int]] = {}  # offset -> tenant and bytes
        self._freed = asyncio.Event()  # for the reservation that has its turn
        self._given_back = asyncio.Event()  # for tenants that may not take more
        self._closing = False

    async def reserve(self, name: str, num_bytes: int, tenant: TenantRef = NO_TENANT) -> int:
        """Reserves bytes for the image of `name` and returns their offset.

        A tenant that may not take so much more of the tier waits until others, or itself, have given some back. Raises
        AdapterTooLarge if it exceeds the tier's capacity, Overloaded if leases fill the tier for longer than
        `patience_s`.
        """
        if num_bytes > self.tier.capacity:
            raise AdapterTooLarge(
                f"{name} needs {num_bytes} bytes of host memory; the limit is {self.tier.capacity} bytes",
                field="adapter_id",
                hint=RAISE_LIMIT,
            )
        try:
            async with asyncio.timeout(self._patience_s):
                while (offset := await self._try(num_bytes, tenant)) is None:
                    await self._given_back.wait()
        except TimeoutError:
            raise Overloaded(
                f"no host memory for {name}: adapters of open requests and other loads use all of it",
                field="adapter_id",
                hint="try again, or raise --host-cache-gb",
            ) from None
        self._reserved[offset] = (tenant.name, num_bytes)
        self._shares.take(tenant.name, _reservation(offset), num_bytes)
        return offset

    async def _try(self, num_bytes: int, tenant: TenantRef) -> int | None:
        """Waits for the tenant's turn and for the bytes. None, at once or later: the tenant may not take them now."""

        def may_take() -> bool:
            self._given_back.clear()
            return self._closing or self._shares.may_take(tenant.name, tenant.share, num_bytes)

        if not may_take():
            return None
        await self._turns.acquire(tenant.name)
        try:
            return await self._reserve(num_bytes) if may_take() else None
        finally:
            self._turns.release()

    async def _reserve(self, num_bytes: int) -> int:
        """Waits until the bytes are free. The caller has its turn."""
        while not self._closing:
            self._freed.clear()
            offset = self.tier.reserve(num_bytes)
            if offset is not None:
                return offset
            self._recall(num_bytes)
            await self._freed.wait()
        raise AdapterLoadFailed("the server is shutting down", hint=AGAIN)

    def commit(self, offset: int, digest: bytes) -> HostImage:
        """Marks the image at a reserved offset as complete."""
        image = self.tier.commit(offset, digest)
        self._end_reservation(offset)
        return image

    def abandon(self, offset: int) -> None:
        """Cancels a reservation."""
        self.tier.abandon(offset)
        self._end_reservation(offset)

    def _end_reservation(self, offset: int) -> None:
        tenant, num_bytes = self._reserved.pop(offset)
        self._shares.give_back(tenant, _reservation(offset), num_bytes)
        self.freed()

    def lease(self, digest: bytes, tenant: str) -> HostImage | None:
        """See `HostTier.lease`."""
        image = self.tier.lease(digest)
        if image is not None:
            self._shares.take(tenant, digest, image.num_bytes)
        return image

    def hold(self, image: HostImage, tenant: str) -> None:
        """See `HostTier.hold`."""
        self.tier.hold(image)
        self._shares.take(tenant, image.digest, image.num_bytes)

    def release(self, image: HostImage, tenant: str | None = None) -> None:
        """Ends one lease. None: of no tenant."""
        self.tier.release(image)
        if tenant is not None:
            self._shares.give_back(tenant, image.digest, image.num_bytes)
        self.freed()

    def freed(self) -> None:
        """Wakes reservations, because memory may be free."""
        self._freed.set()
        self._given_back.set()

    def close(self) -> None:
        """Fails all waiting reservations."""
        self._closing = True
        self.freed()


def _reservation(offset: int) -> bytes:
    """Stands for the digest of an image that is being written."""
    return b"at %d" % offset
