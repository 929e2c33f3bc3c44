"""What a reference means now: the version of an adapter, or those of every part of a merge."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

from engine.adapters.ref import AdapterRef
from engine.adapters.sources import Version
from engine.lora.recipe import Recipe, naming

T = TypeVar("T")

Key = tuple[str, ...]  # equal keys: equal bytes


@dataclass(frozen=True, slots=True)
class Resolved:
    """The exact versions that a reference means."""

    names: tuple[str, ...]  # of the parts, for messages
    versions: tuple[Version, ...]
    recipe: Recipe | None = None  # None: a single adapter

    @property
    def key(self) -> Key:
        """Identifies the content. Merges of the same versions by the same recipe have the same key."""
        parts = [
            field
            for one in self.versions
            for field in (one.source, one.id, one.revision, one.cache)
        ]
        return (*parts, *(self.recipe.key if self.recipe else ()))

    @property
    def source(self) -> str:
        """The names of the sources, without repetitions."""
        return ",".join(dict.fromkeys(one.source for one in self.versions))

    @property
    def salt(self) -> bytes:
        """The tenant's cache salt. Empty if every part is public; a private part makes a merge private."""
        salts = [one.salt for one in self.versions]
        if len(salts) == 1 or not any(salts):
            return salts[0]
        state = hashlib.blake2b(digest_size=16)
        for salt in salts:
            state.update(len(salt).to_bytes(4, "little") + salt)
        return state.digest()

    def naming(self, name: str) -> AbstractContextManager[None]:
        """Errors of the block name this part, if it is one of a merge."""
        return nullcontext() if self.recipe is None else naming(name)


async def resolve(
    ref: AdapterRef, ask: Callable[[AdapterRef], Awaitable[tuple[Version, float]]]
) -> tuple[Resolved, float]:
    """What a reference means, and the seconds for which that is valid. `ask` resolves a single adapter.

    Raises as `ask`; the error names the part of a merge.
    """

    async def one(part: AdapterRef) -> tuple[Version, float]:
        with nullcontext() if ref.recipe is None else naming(part.name):
            return await ask(part)

    found = await all_of(one(part) for part in ref.parts)
    versions, fresh_s = zip(*found, strict=True)
    return Resolved(tuple(part.name for part in ref.parts), versions, ref.recipe), min(fresh_s)


async def all_of(calls: Iterable[Awaitable[T]]) -> list[T]:
    """All results, in order. When every call has ended, raises the first error, if any."""
    found: list[T] = []
    for one in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(one, BaseException):
            raise one
        found.append(one)
    return found
