"""The one adapter of a server with --merge-adapter-weights. It is in the weights of the base model: requests that name
it, or nothing, run without an adapter. Every other name is refused."""

from __future__ import annotations

from engine.adapters.ref import AdapterRef
from engine.backend import Backend, Lease
from engine.errors import AdapterNotFound
from engine.messages import AdapterText, MergedAdapter
from engine.server.keys import Tenant, ref_of

UNMERGED = "start the server without --merge-adapter-weights"


async def acquire(
    backend: Backend, ref: AdapterRef, token: str | None, tenant: Tenant | None
) -> Lease | None:
    """The adapter of a request; None if it is merged into the base model. Raises as `Backend.acquire`."""
    merged = backend.info.merged_adapter
    if merged is None:
        return await backend.acquire(ref, token, ref_of(tenant))
    if not _means(ref, merged):
        raise not_served(ref.name, merged.name)
    return None


def own_text(backend: Backend, lease: Lease | None) -> AdapterText | None:
    """The text of a request's adapter; None: the base model's."""
    if lease is not None:
        return lease.text
    merged = backend.info.merged_adapter
    return None if merged is None else merged.text


def not_served(name: str, merged: str, field: str = "adapter_id") -> AdapterNotFound:
    """The error for a name that means another model than the merged one."""
    return AdapterNotFound(
        f"{name!r} is not served: the adapter {merged!r} is merged into the base model, and this server has no other"
        " model",
        field=field,
        hint=f"leave the name out, or {UNMERGED}",
    )


def _means(ref: AdapterRef, merged: MergedAdapter) -> bool:
    """Whether a reference means the merged adapter: by its id or that in its source, in the same version."""
    named = AdapterRef.parse(merged.name)
    ids = {named.id, merged.prefix + merged.id}
    if ref.source is not None:
        ids.add(merged.id)
    return (
        ref.recipe is None
        and ref.id in ids
        and ref.source in (None, merged.source)
        and ref.revision in (named.revision, merged.revision)
    )
