"""How a client names an adapter.

A reference never contains the tenant's token: the token says what a client may see, not what an adapter is. Once the
exchange has loaded an adapter, its content digest identifies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.errors import InvalidRequest
from engine.lora.recipe import FIELD, Recipe, check_count

MAX_ID_LENGTH = 1024  # characters
MAX_SOURCE_LENGTH = 64
MAX_MERGED_LENGTH = 4096  # of all ids of a merge; they are sent back in a header


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter as a client names it: one, or several with the recipe to merge them.

    `source` is the name of a source, which need not exist: the registry checks it. It is None if the client named
    none; the registry then decides where to look. The ids of a merge may contain `@revision`; one id cannot.
    """

    ids: tuple[str, ...]
    source: str | None = None
    revision: str | None = None
    recipe: Recipe | None = None  # None: a single adapter

    @property
    def id(self) -> str:
        """The only id of an adapter that is not merged."""
        return self.ids[0]

    @property
    def name(self) -> str:
        """For people: `id`, `id@revision`, or the ids of a merge with commas."""
        joined = ",".join(self.ids)
        return f"{joined}@{self.revision}" if self.revision else joined

    @property
    def parts(self) -> tuple[AdapterRef, ...]:
        """The adapters to merge, in order; or itself."""
        if self.recipe is None:
            return (self,)
        return tuple(AdapterRef.parse(id, self.source) for id in self.ids)

    def at(self, source: str, prefix: str = "") -> AdapterRef:
        """The same adapter in one source, its id without the source's prefix."""
        return replace(self, source=source, ids=tuple(id.removeprefix(prefix) for id in self.ids))

    @classmethod
    def parse(
        cls, adapter_id: str, adapter_source: str | None = None, field: str = "adapter_id"
    ) -> AdapterRef:
        """A reference from a request's `adapter_id` (`id` or `id@revision`) and `adapter_source` (in any case).

        `field`: the name of the id in the request. Raises InvalidRequest that names the field.
        """
        name = adapter_id.strip()
        if not name:
            raise InvalidRequest(
                f"{field} is empty", field=field, hint="leave it out for the base model"
            )
        _check_text(name, field, MAX_ID_LENGTH)
        source = (adapter_source or "").strip().lower()
        _check_text(source, "adapter_source", MAX_SOURCE_LENGTH)
        head, mark, tail = name.rpartition("@")
        revision = tail if mark and head and tail and not head.endswith("/") else None
        return cls((head if revision else name,), source or None, revision)

    @classmethod
    def merged(
        cls, ids: Sequence[str], recipe: Recipe, adapter_source: str | None = None
    ) -> AdapterRef:
        """A reference to several adapters of one source, merged. Raises InvalidRequest that names the field."""
        check_count(ids, recipe.weights)
        parts = [
            cls.parse(id, adapter_source, f"{FIELD}.ids[{number}]") for number, id in enumerate(ids)
        ]
        names = tuple(part.name for part in parts)
        _check_text(",".join(names), f"{FIELD}.ids", MAX_MERGED_LENGTH)
        return cls(names, parts[0].source, recipe=recipe)


def _check_text(text: str, field: str, limit: int) -> None:
    if len(text) > limit or not text.isprintable():
        raise InvalidRequest(f"{field} must be at most {limit} printable characters", field=field)
