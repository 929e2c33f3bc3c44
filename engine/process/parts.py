"""The classes that processes run, by name: a child imports them, and a test can replace them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from engine.adapters.ref import AdapterRef
from engine.backend import Lease
from engine.errors import LoraxError
from engine.messages import (
    AdapterImageRef,
    AdapterStatus,
    EngineInfo,
    EngineStats,
    Request,
    TenantRef,
    TierStats,
    Update,
)

if TYPE_CHECKING:  # the front does not import torch
    from engine.ops.layout import ShardLayout


@dataclass(frozen=True, slots=True)
class Parts:
    """Each is `module:name` of a callable."""

    engine: str = "engine.engine:Engine"  # (config, region)
    exchange: str = (
        "engine.adapters.exchange:Exchange"  # (config, layout, region, device=, recall=)
    )


def load(factory: str) -> Callable[..., Any]:
    """The object that `module:name` names."""
    module, _, name = factory.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


class Engine(Protocol):
    """The methods of `engine.engine.Engine` that are used here."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def layout(self) -> ShardLayout: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def has_work(self) -> bool: ...
    def preload(self, image: AdapterImageRef) -> None: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, id: str) -> None: ...
    def pin(self, digest: bytes, pinned: bool) -> None: ...
    def drop(self, digest: bytes) -> None: ...
    def step(self) -> list[Update]: ...
    def fail(self, error: LoraxError) -> list[Update]: ...
    def close(self) -> None: ...


class ExchangeLease(Lease, Protocol):
    """A lease, with the seconds until version and permission must be checked again."""

    @property
    def fresh_s(self) -> float: ...


class Exchange(Protocol):
    """The methods of `engine.adapters.exchange.Exchange` that are used here."""

    @property
    def preloaded(self) -> list[AdapterImageRef]: ...
    @property
    def abandoned(self) -> int: ...
    async def start(self) -> None: ...
    def adopt(
        self, preloaded: Iterable[AdapterImageRef], held: Mapping[int, AdapterImageRef]
    ) -> Mapping[int, ExchangeLease]: ...
    async def acquire(
        self, ref: AdapterRef, token: str | None, tenant: TenantRef
    ) -> ExchangeLease: ...
    async def adapters(self) -> list[AdapterStatus]: ...
    async def unload(
        self, name: str, source: str | None = ..., tenants: Collection[bytes] | None = ...
    ) -> list[bytes]: ...
    async def tiers(self, idle: Mapping[bytes, int]) -> TierStats: ...
    async def close(self) -> None: ...
