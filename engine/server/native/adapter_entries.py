"""The list of adapters: what the exchange, the engine and the front know of each."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from engine.adapters.ref import AdapterRef
from engine.errors import AdapterNotFound, from_wire
from engine.logs import printable
from engine.messages import AdapterImageRef, AdapterStatus, Tier, is_meant
from engine.server.front import Front
from engine.server.native.schemas import AdapterEntry, AdapterProblem

PRIVATE = "private"  # the engine's name for adapters of one tenant
# Of several versions, the one that a name means is the first of these.
STATES = ("ready", "parsing", "fetching", "failed", "listed")


async def entries(front: Front, tenants: Collection[bytes]) -> list[AdapterEntry]:
    """All adapters that these tenants may see, by id."""
    every = await front.backend.adapters()
    statuses = [one for one in every if one.tenant in tenants]
    known = {one.name for one in statuses}
    for one in front.prefetches.statuses():
        if one.tenant in tenants and one.name not in known:
            statuses.append(one)
    found = [_entry(front, one) for one in statuses]
    listed = {one.digest for one in every}
    for name, digest, num_bytes in front.backend.stats.resident:
        if digest not in listed and name != PRIVATE:  # unloaded, but a request still uses it
            found.append(_entry(front, _status(name, "", digest, num_bytes)))
    return sorted(found, key=lambda one: (one.id, one.source, STATES.index(one.state)))


async def entry_of(front: Front, ref: AdapterRef, tenants: Collection[bytes]) -> AdapterEntry:
    """The adapter that a reference means. Raises AdapterNotFound."""
    found = [
        one
        for one in await entries(front, tenants)
        if one.id == ref.name and ref.source in (None, one.source)
    ]
    if not found:
        raise AdapterNotFound(
            f"the server does not know the adapter {ref.name!r}",
            field="adapter_id",
            hint="GET /adapters lists those that it knows; a request or POST /adapters/load loads one",
        )
    return min(found, key=lambda one: STATES.index(one.state))


async def loaded_entry(front: Front, image: AdapterImageRef) -> AdapterEntry:
    """The entry of an adapter that was in host memory a moment ago."""
    for status in await front.backend.adapters():
        same = status.digest == image.digest and status.source == image.source
        if same and is_meant(status, image.name, None, (image.tenant,)):
            return _entry(front, status)
    return _entry(front, _status(image.name, image.source, image.digest, image.data_bytes))


def _entry(front: Front, status: AdapterStatus) -> AdapterEntry:
    use, pinned = front.generator.use.of(status), front.pins.is_pinned(status)
    return AdapterEntry(
        id=status.name,
        source=status.source,
        revision=status.revision,
        digest=status.digest.hex() if status.digest else None,
        state=status.state,
        tier=_tier(front, status),
        pinned=pinned,
        preloaded=status.preloaded,
        bytes=status.data_bytes,
        rank=max(status.ranks, default=None),
        ranks=status.ranks,
        targets=status.targets,
        base_model=status.base_model,
        merged=status.merged,
        requests=max(0, status.leases - pinned - status.preloaded),
        hits=use.hits,
        last_used=_iso(use.last_used),
        seconds=status.seconds,
        error=_problem(status.error) if status.error else None,
    )


def _tier(front: Front, status: AdapterStatus) -> Tier:
    if status.digest is not None and status.digest in front.generator.use.resident:
        return "device"
    if status.state == "ready":
        return "host"
    return "disk" if status.on_disk else "source"


def _problem(wire: dict[str, Any]) -> AdapterProblem:
    error = from_wire(wire)
    return AdapterProblem(error.error_type, printable(error.message), error.field, error.hint)


def _iso(seconds: float | None) -> str | None:
    """A wall clock time as ISO 8601 in UTC."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _status(name: str, source: str, digest: bytes, num_bytes: int) -> AdapterStatus:
    """What is known without the exchange."""
    return AdapterStatus(name, source, digest, state="listed", data_bytes=num_bytes)
