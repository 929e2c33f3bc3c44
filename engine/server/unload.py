"""Unloads adapters from host memory and from the device."""

from __future__ import annotations

from collections.abc import Collection

from engine.adapters.ref import AdapterRef
from engine.errors import AdapterNotFound
from engine.messages import is_meant
from engine.server.front import Front


async def unload(front: Front, ref: AdapterRef, tenants: Collection[bytes]) -> list[bytes]:
    """Later requests load the adapter again. Its memory is free when the requests that use it have ended.

    `tenants`: those whose adapters the client may see. Returns the digests. Raises AdapterNotFound if it is not loaded.
    """
    backend, named = front.backend, (ref.name, ref.source, tenants)
    on_device = front.generator.use.resident
    known = [one.digest for one in await backend.adapters() if is_meant(one, *named)]
    gone = {digest for digest in known if digest is not None and digest in on_device}
    gone |= set(await backend.unload(*named))
    gone |= {image.digest for image in front.pins.unpin(*named)}
    if not gone:
        raise AdapterNotFound(
            f"the adapter {ref.name!r} is not loaded",
            field="adapter_id",
            hint="GET /adapters lists those that are",
        )
    for digest in gone:
        if not front.pins.holds(digest):
            backend.drop(digest)
    return sorted(gone)
