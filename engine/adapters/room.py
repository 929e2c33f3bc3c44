"""Reservations in the host tier that wait, for a limited time, until leases end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine.adapters.tiers import HostImage, HostTier
from engine.adapters.turns import Turns
from engine.errors import AGAIN, RAISE_LIMIT, AdapterLoadFailed, AdapterTooLarge, Overloaded


class Room:
    """Reservations in one tier, on one event loop. One reservation at a time has its turn: all freed memory is for it
    until it is served or gives up, so small ones do not starve a large one. The next turn goes to the keys in turn, and
    within a key to the oldest reservation (`engine.adapters.turns`)."""

    def __init__(
        self, tier: HostTier, patience_s: float, recall: Callable[[int], None] = lambda size: None
    ) -> None:
        """`recall` asks the front to return unused leases; its argument is the number of bytes needed."""
        self.tier = tier
        self._recall = recall
        self._patience_s = patience_s
        self._turns = Turns(1)
        self._freed = asyncio.Event()
        self._closing = False

    async def reserve(self, name: str, num_bytes: int, key: str = "") -> int:
        """Reserves bytes for the image of `name` and returns their offset. `key`: of the tenant.

        Raises AdapterTooLarge if it exceeds the tier's capacity, Overloaded if leases fill the tier for longer than
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
                await self._turns.acquire(key)
                try:
                    return await self._reserve(num_bytes)
                finally:
                    self._turns.release()
        except TimeoutError:
            raise Overloaded(
                f"no host memory for {name}: adapters of open requests and other loads use all of it",
                field="adapter_id",
                hint="try again, or raise --host-cache-gb",
            ) from None

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
        self.freed()
        return image

    def abandon(self, offset: int) -> None:
        """Cancels a reservation."""
        self.tier.abandon(offset)
        self.freed()

    def release(self, image: HostImage) -> None:
        """Ends one lease."""
        self.tier.release(image)
        self.freed()

    def freed(self) -> None:
        """Wakes the reservation that has its turn, because memory may be free."""
        self._freed.set()

    def close(self) -> None:
        """Fails all waiting reservations."""
        self._closing = True
        self.freed()
