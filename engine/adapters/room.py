"""Room in the host tier for who must wait for it: until leases end, but not for ever."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from engine.adapters.tiers import HostImage, HostTier
from engine.errors import AdapterLoadFailed, AdapterTooLarge, Overloaded


class Room:
    """Reservations in a tier, on one event loop, in the order in which they were asked for: what is freed is kept for
    the oldest that waits, so that small ones do not starve a large one."""

    def __init__(
        self, tier: HostTier, patience_s: float, recall: Callable[[int], None] = lambda size: None
    ) -> None:
        """`recall` asks for leases that nobody uses, when they are in the way of so many bytes."""
        self.tier = tier
        self._recall = recall
        self._patience_s = patience_s
        self._freed = asyncio.Event()  # replaced whenever it is set
        self._waiting: deque[object] = deque()  # the oldest first
        self._closing = False

    async def reserve(self, name: str, num_bytes: int) -> int:
        """Offset of so many bytes for the image of `name`.

        Raises AdapterTooLarge if the tier could never hold it, Overloaded if leases fill it for longer than
        `patience_s`.
        """
        if num_bytes > self.tier.capacity:
            raise AdapterTooLarge(
                f"{name} takes {num_bytes} bytes of host memory, there are {self.tier.capacity}",
                field="adapter_id",
                hint="raise --host-cache-gb",
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
                        raise AdapterLoadFailed("the server is shutting down")
        except TimeoutError:
            raise Overloaded(
                f"no host memory for {name}: open requests use all of it",
                field="adapter_id",
                hint="try again, or raise --host-cache-gb",
            ) from None
        finally:
            self._waiting.remove(turn)
            self.freed()  # the next one's turn

    def commit(self, offset: int, digest: bytes) -> HostImage:
        """The image at a reserved offset is complete."""
        image = self.tier.commit(offset, digest)
        self.freed()
        return image

    def abandon(self, offset: int) -> None:
        """Gives a reservation back."""
        self.tier.abandon(offset)
        self.freed()

    def release(self, image: HostImage) -> None:
        """Ends one lease."""
        self.tier.release(image)
        self.freed()

    def freed(self) -> None:
        """Something may have become free: whoever waits looks again."""
        self._freed.set()
        self._freed = asyncio.Event()

    def close(self) -> None:
        """Whoever waits gives up."""
        self._closing = True
        self.freed()
