"""Reservations in the host tier that wait, for a limited time, until leases end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from engine.adapters.tiers import HostImage, HostTier
from engine.errors import AGAIN, RAISE_LIMIT, AdapterLoadFailed, AdapterTooLarge, Overloaded


class Room:
    """Reservations in one tier, on one event loop, first come, first served: freed memory goes to the oldest
    reservation, so small ones do not starve a large one."""

    def __init__(
        self, tier: HostTier, patience_s: float, recall: Callable[[int], None] = lambda size: None
    ) -> None:
        """`recall` asks the front to return unused leases; its argument is the number of bytes needed."""
        self.tier = tier
        self._recall = recall
        self._patience_s = patience_s
        self._freed = asyncio.Event()  # replaced whenever it is set
        self._waiting: deque[object] = deque()  # oldest first
        self._closing = False

    async def reserve(self, name: str, num_bytes: int) -> int:
        """Reserves bytes for the image of `name` and returns their offset.

        Raises AdapterTooLarge if it exceeds the tier's capacity, Overloaded if leases fill the tier for longer than
        `patience_s`.
        """
        if num_bytes > self.tier.capacity:
            raise AdapterTooLarge(
                f"{name} needs {num_bytes} bytes of host memory; the limit is {self.tier.capacity} bytes",
                field="adapter_id",
                hint=RAISE_LIMIT,
            )
        turn = object()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._patience_s):
                while True:
                    freed = self._freed
                    if self._waiting[0] is turn:
                        offset = self.tier.reserve(num_bytes)
                        if offset is not None:
                            return offset
                        self._recall(num_bytes)
                    await freed.wait()
                    if self._closing:
                        raise AdapterLoadFailed("the server is shutting down", hint=AGAIN)
        except TimeoutError:
            raise Overloaded(
                f"no host memory for {name}: adapters of open requests and other loads use all of it",
                field="adapter_id",
                hint="try again, or raise --host-cache-gb",
            ) from None
        finally:
            self._waiting.remove(turn)
            self.freed()  # wakes the next reservation

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
        """Wakes all waiting reservations, because memory may be free."""
        self._freed.set()
        self._freed = asyncio.Event()

    def close(self) -> None:
        """Fails all waiting reservations."""
        self._closing = True
        self.freed()
