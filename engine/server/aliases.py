"""Aliases: names that stand for adapters. A client keeps its name while the operator swaps what it means.

A swap is one assignment, so each request sees the adapter before it or the one after it. Requests that run keep the
version that they began with. The adapter is loaded before the swap: an alias never leads to an adapter that failed.
Aliases are kept in the front's memory; `--adapter-alias` sets them at start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from engine.adapters.ref import MAX_ID_LENGTH, AdapterRef
from engine.errors import AdapterNotFound, ConfigError, InvalidRequest

MAX_ALIASES = 4096


@dataclass(frozen=True, slots=True)
class Alias:
    """What a name stands for."""

    name: str
    target: AdapterRef
    digest: str = ""  # of the adapter when it was set, in hex; empty: set at start, not loaded yet


@dataclass(slots=True)
class Aliases:
    """The table of one server. `reserved`: names of the base model, which cannot be aliases."""

    reserved: frozenset[str] = frozenset()
    _table: dict[str, Alias] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Alias]:
        return iter(sorted(self._table.values(), key=lambda alias: alias.name))

    def __contains__(self, name: str) -> bool:
        return name in self._table

    def get(self, name: str) -> Alias:
        """Raises AdapterNotFound."""
        if name not in self._table:
            raise AdapterNotFound(
                f"there is no alias {name!r}",
                field="name",
                hint="GET /adapters/aliases lists them",
            )
        return self._table[name]

    def resolve(self, ref: AdapterRef) -> AdapterRef:
        """The adapter that a reference means. A reference with a source or a revision is never an alias."""
        if ref.source is None and ref.revision is None and ref.name in self._table:
            return self._table[ref.name].target
        return ref

    def check(self, name: str, target: AdapterRef) -> None:
        """Raises InvalidRequest if this alias cannot be set."""
        if not name or len(name) > MAX_ID_LENGTH or not name.isprintable() or "@" in name:
            raise InvalidRequest(
                f"an alias must be 1 to {MAX_ID_LENGTH} printable characters without @",
                field="name",
            )
        if name in self.reserved:
            raise InvalidRequest(f"{name!r} names the base model", field="name", hint="use another")
        if self.resolve(target) != target or target.name == name:
            raise InvalidRequest(
                f"{target.name!r} is an alias itself",
                field="adapter_id",
                hint="name the adapter that it stands for",
            )
        if name not in self._table and len(self._table) >= MAX_ALIASES:
            raise InvalidRequest(
                f"there are {MAX_ALIASES} aliases, which is the limit",
                field="name",
                hint="remove one with DELETE /adapters/aliases/{name}",
            )

    def put(self, alias: Alias) -> Alias | None:
        """Sets an alias and returns the one that it replaces. Raises as `check`."""
        self.check(alias.name, alias.target)
        before = self._table.get(alias.name)
        self._table[alias.name] = alias
        return before

    def remove(self, name: str) -> Alias:
        """Raises AdapterNotFound."""
        alias = self.get(name)
        del self._table[name]
        return alias

    def set_all(self, settings: Iterable[str]) -> None:
        """Sets the aliases of `--adapter-alias`, each as name=adapter. Raises ConfigError."""
        for setting in settings:
            name, mark, target = setting.partition("=")
            try:
                if not mark:
                    raise InvalidRequest("an alias is written name=adapter")
                self.put(Alias(name.strip(), AdapterRef.parse(target)))
            except InvalidRequest as error:
                raise ConfigError(
                    f"--adapter-alias {setting!r}: {error.message}",
                    field="adapter_alias",
                    hint=error.hint or "write name=adapter, for example prod=org/adapter@v2",
                ) from None
