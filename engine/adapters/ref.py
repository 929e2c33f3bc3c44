"""How a client names an adapter.

The tenant's token is never part of a reference: it says what a client may see, not what an adapter is. The content
digest that the exchange finds behind a reference is the adapter's identity from then on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from engine.errors import InvalidRequest

SourceName = Literal["demo", "local", "hub"]
CLIENT_SOURCES = (
    "hub",
    "local",
)  # what `adapter_source` may say; the demo's adapters are found by name
MAX_ID_LENGTH = 1024

_UNAVAILABLE = {
    "s3": "copy the adapter under a folder of --adapter-root and ask for it with adapter_source local",
    "pbase": "export the adapter to the hub, or under a folder of --adapter-root",
}


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter as a client names it.

    `ids` has more than one entry for adapters that are to be merged. `source` is None where the client named none:
    the registry then decides where to look.
    """

    ids: tuple[str, ...]
    source: SourceName | None = None
    revision: str | None = None

    @property
    def id(self) -> str:
        """The only id of an adapter that is not merged."""
        return self.ids[0]

    @property
    def name(self) -> str:
        """For people: `id`, or `id@revision`."""
        joined = "+".join(self.ids)
        return f"{joined}@{self.revision}" if self.revision else joined

    def at(self, source: SourceName) -> AdapterRef:
        """The same adapter in a definite source."""
        return replace(self, source=source)

    @classmethod
    def parse(cls, adapter_id: str, adapter_source: str | None = None) -> AdapterRef:
        """A reference from a request's `adapter_id` (`id` or `id@revision`) and `adapter_source`.

        Raises InvalidRequest that names the field.
        """
        name = adapter_id.strip()
        if not name:
            raise InvalidRequest(
                "adapter_id is empty", field="adapter_id", hint="leave it out for the base model"
            )
        if len(name) > MAX_ID_LENGTH or not name.isprintable():
            raise InvalidRequest(
                f"adapter_id must be at most {MAX_ID_LENGTH} printable characters",
                field="adapter_id",
            )
        head, mark, tail = name.rpartition("@")
        revision = tail if mark and head and tail and not head.endswith("/") else None
        return cls((head if revision else name,), parse_source(adapter_source), revision)


def parse_source(adapter_source: str | None) -> SourceName | None:
    """`adapter_source` of a request, in any case; None or empty: the client named none.

    Raises InvalidRequest for sources that this server does not have.
    """
    source = (adapter_source or "").strip().lower()
    if not source:
        return None
    if source in CLIENT_SOURCES:
        return "hub" if source == "hub" else "local"
    if source in _UNAVAILABLE:
        raise InvalidRequest(
            f"adapter_source {source!r} is not available on this server",
            field="adapter_source",
            hint=_UNAVAILABLE[source],
        )
    raise InvalidRequest(
        f"unknown adapter_source {adapter_source!r}",
        field="adapter_source",
        hint=f"use one of {', '.join(CLIENT_SOURCES)}",
    )


def refuse_merged(ref: AdapterRef) -> None:
    """Raises InvalidRequest for a reference to several adapters."""
    if len(ref.ids) > 1:
        raise InvalidRequest(
            f"{len(ref.ids)} adapters in one request cannot be merged by this server",
            field="merged_adapters",
            hint="merge them with PEFT's add_weighted_adapter, save the result and ask for that",
        )
