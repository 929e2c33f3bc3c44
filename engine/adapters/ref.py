"""How a client names an adapter.

A reference never contains the tenant's token: the token says what a client may see, not what an adapter is. Once the
exchange has loaded an adapter, its content digest identifies it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.errors import InvalidRequest

MAX_ID_LENGTH = 1024  # characters
MAX_SOURCE_LENGTH = 64


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter as a client names it.

    `ids` has more than one entry for adapters to merge. `source` is the name of a source, which need not
    exist: the registry checks it. It is None if the client named none; the registry then decides where to look.
    """

    ids: tuple[str, ...]
    source: str | None = None
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

    def at(self, source: str, prefix: str = "") -> AdapterRef:
        """The same adapter in one source, its id without the source's prefix."""
        return replace(self, source=source, ids=tuple(id.removeprefix(prefix) for id in self.ids))

    @classmethod
    def parse(cls, adapter_id: str, adapter_source: str | None = None) -> AdapterRef:
        """A reference from a request's `adapter_id` (`id` or `id@revision`) and `adapter_source` (in any case).

        Raises InvalidRequest that names the field.
        """
        name = adapter_id.strip()
        if not name:
            raise InvalidRequest(
                "adapter_id is empty", field="adapter_id", hint="leave it out for the base model"
            )
        _check_text(name, "adapter_id", MAX_ID_LENGTH)
        source = (adapter_source or "").strip().lower()
        _check_text(source, "adapter_source", MAX_SOURCE_LENGTH)
        head, mark, tail = name.rpartition("@")
        revision = tail if mark and head and tail and not head.endswith("/") else None
        return cls((head if revision else name,), source or None, revision)


def _check_text(text: str, field: str, limit: int) -> None:
    if len(text) > limit or not text.isprintable():
        raise InvalidRequest(f"{field} must be at most {limit} printable characters", field=field)


def refuse_merged(ref: AdapterRef) -> None:
    """Raises InvalidRequest for a reference to several adapters."""
    if len(ref.ids) > 1:
        raise InvalidRequest(
            f"this server cannot merge the {len(ref.ids)} adapters of a request",
            field="merged_adapters",
            hint="merge them with PEFT's add_weighted_adapter, save the result and request that",
        )
