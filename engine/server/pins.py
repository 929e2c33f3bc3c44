"""Pinned adapters: in host memory and on the device until they are unpinned or unloaded.

A pin holds a lease, so it outlives a restart of the exchange. It stays with the version that it was made for, also when
the adapter's name means another one later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field

from engine.adapters.ref import AdapterRef
from engine.adapters.versions import share
from engine.backend import Lease
from engine.config import MIB
from engine.errors import AdapterTooLarge, InvalidRequest
from engine.messages import AdapterImageRef, AdapterStatus, is_meant
from engine.server.generation import Generator
from engine.server.loads import Loads
from engine.server.parameters import Parameters

MAX_PINS = 256
MAX_SHARE = 0.75  # of host memory; the rest is for other adapters
REPORT_S = 2.0  # wait for the engine to report the adapter
LOOK_S = 0.01

Key = tuple[bytes, str, str]  # tenant, name, source


@dataclass(slots=True)
class Pins:
    """The pins of one server. `first_token` starts a prompt."""

    generator: Generator
    loads: Loads
    first_token: int
    _pins: dict[Key, Lease] = field(default_factory=dict)
    _tasks: set[asyncio.Task[AdapterImageRef]] = field(default_factory=set)

    async def pin(self, ref: AdapterRef, token: str | None) -> AdapterImageRef:
        """Loads an adapter, keeps it, and brings it to the device. Goes on if the caller leaves.

        Raises as `Backend.acquire`, and InvalidRequest or AdapterTooLarge for more pins than allowed. Then nothing is
        pinned.
        """
        task = asyncio.create_task(self._pin(ref, token))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await share(task)

    def unpin(
        self, name: str, source: str | None, tenants: Collection[bytes]
    ) -> list[AdapterImageRef]:
        """Ends the pins that a name means to these tenants; returns their images."""
        leases = dict(self._pins)
        gone = [
            key for key, lease in leases.items() if is_meant(lease.image, name, source, tenants)
        ]
        for key in gone:
            self._remove(key, leases[key])
        return [leases[key].image for key in gone]

    def holds(self, digest: bytes) -> bool:
        """Whether an adapter with these contents is pinned."""
        return any(lease.image.digest == digest for lease in self._pins.values())

    def is_pinned(self, status: AdapterStatus) -> bool:
        lease = self._pins.get((status.tenant, status.name, status.source))
        return lease is not None and lease.image.digest == status.digest

    @property
    def num_bytes(self) -> int:
        """Of different images."""
        images = {lease.image.digest: lease.image for lease in self._pins.values()}
        return sum(image.data_bytes for image in images.values())

    def __len__(self) -> int:
        return len(self._pins)

    async def close(self) -> None:
        """Ends all pins, and those that are being made."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for key, lease in list(self._pins.items()):
            self._remove(key, lease)

    async def _pin(self, ref: AdapterRef, token: str | None) -> AdapterImageRef:
        with self.loads.admitted():
            lease = await self.generator.backend.acquire(ref, token)
            image = lease.image
            key = (image.tenant, image.name, image.source)
            try:
                self._check(key, image)
            except BaseException:
                lease.release()
                raise
            before = self._pins.get(key)
            self._pins[key] = lease
            self.generator.backend.pin(image.digest, True)
            if before is not None:
                self._ended(before)
            try:
                await self._place(ref, token, image.digest)
            except BaseException:
                self._remove(key, lease)
                raise
            return image

    def _check(self, key: Key, image: AdapterImageRef) -> None:
        """Raises InvalidRequest or AdapterTooLarge if there would be too many pins."""
        if key not in self._pins and len(self._pins) >= MAX_PINS:
            raise InvalidRequest(
                f"{MAX_PINS} adapters are pinned, which is the limit",
                field="adapter_id",
                hint='unpin one: POST /adapters/pin with "pinned": false',
            )
        others = {one.image.digest: one.image for at, one in self._pins.items() if at != key}
        others[image.digest] = image
        total = sum(one.data_bytes for one in others.values())
        most = int(self.generator.backend.info.host_bytes * MAX_SHARE)
        if total > most:
            raise AdapterTooLarge(
                f"pinned adapters would have {total / MIB:.1f} MiB; the limit is {most / MIB:.1f} MiB, "
                f"{MAX_SHARE:.0%} of host memory for adapters",
                field="adapter_id",
                hint="unpin others, or raise --host-cache-gb",
            )

    async def _place(self, ref: AdapterRef, token: str | None, digest: bytes) -> None:
        """Brings the adapter to the device: generates a token. Then waits until the engine has reported it."""
        parameters = Parameters(adapter=ref, api_token=token, max_new_tokens=1)
        async with self.generator.open([[self.first_token]], parameters) as generation:
            while await generation.next() is not None:
                pass
        with suppress(TimeoutError):
            async with asyncio.timeout(REPORT_S):
                while digest not in self.generator.use.resident:
                    await asyncio.sleep(LOOK_S)

    def _remove(self, key: Key, lease: Lease) -> None:
        """Ends a pin, unless another has taken its place."""
        if self._pins.get(key) is lease:
            del self._pins[key]
            self._ended(lease)

    def _ended(self, lease: Lease) -> None:
        digest = lease.image.digest
        if not self.holds(digest):
            self.generator.backend.pin(digest, False)
        lease.release()
