"""The messages between front, exchange and shard: msgpack, one tagged union per direction.

The first message to a child is `Setup`; its first answer is `ShardReady`, `ExchangeReady` or `Failed`. A *call* is the
front's number for one question to the exchange; an acquired adapter is held under the number of its call.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from engine.adapters.ref import AdapterRef
from engine.config import EngineConfig
from engine.messages import (
    NO_TENANT,
    AdapterImageRef,
    AdapterStatus,
    AdapterText,
    EngineInfo,
    EngineStats,
    Request,
    TenantRef,
    Tier,
    TierStats,
    Update,
)
from engine.process.parts import Parts


class Setup(Struct, frozen=True, tag=True):
    """The configuration of a child, and the parts to build."""

    config: EngineConfig
    parts: Parts


class Submit(Struct, frozen=True, tag=True):
    request: Request


class Cancel(Struct, frozen=True, tag=True):
    id: str


class Pin(Struct, frozen=True, tag=True):
    digest: bytes
    pinned: bool


class Drop(Struct, frozen=True, tag=True):
    digest: bytes


class Preload(Struct, frozen=True, tag=True):
    """Place these adapters and keep them on the device. Comes once, before any request."""

    images: list[AdapterImageRef]


class Begin(Struct, frozen=True, tag=True):
    """The exchange may start, with the layout of the shard.

    After a restart, images that the previous process left in the region stay in place: `held`, by call, and
    `preloaded`.
    """

    layout: bytes  # as in ShardReady
    device: str
    restarted: bool = False
    held: dict[int, AdapterImageRef] = {}
    preloaded: list[AdapterImageRef] = []


class Ping(Struct, frozen=True, tag=True):
    """Is the loop alive? Answered with Pong of the same number."""

    number: int


class Acquire(Struct, frozen=True, tag=True):
    call: int
    ref: AdapterRef
    token: str | None
    tenant: TenantRef = NO_TENANT


class Release(Struct, frozen=True, tag=True):
    """Ends a call: cancels a wait, or returns a lease."""

    call: int


class ListAdapters(Struct, frozen=True, tag=True):
    call: int


class Unload(Struct, frozen=True, tag=True):
    call: int
    name: str
    source: str | None  # None: any
    tenants: list[bytes] | None  # None: all


class AskTiers(Struct, frozen=True, tag=True):
    call: int
    idle: dict[bytes, int]  # digest -> leases that no request uses


class Failed(Struct, frozen=True, tag=True):
    """The child could not start; `error` is LoraxError.to_wire()."""

    error: dict[str, Any]


class ShardReady(Struct, frozen=True, tag=True):
    info: EngineInfo
    layout: bytes  # ShardLayout in msgpack; the front passes it on without decoding it
    stats: EngineStats


class Preloaded(Struct, frozen=True, tag=True):
    """The answer to Preload if all adapters fit. Else the answer is `Failed`."""


class Updates(Struct, frozen=True, tag=True):
    """All updates of one turn of the engine."""

    updates: list[Update]
    stats: EngineStats | None = None


class ExchangeReady(Struct, frozen=True, tag=True):
    preloaded: list[AdapterImageRef]


class Acquired(Struct, frozen=True, tag=True):
    call: int
    image: AdapterImageRef
    cache_salt: bytes
    fresh_s: float = 0.0  # seconds until version and permission must be checked again
    text: AdapterText | None = None  # None: the base model's
    tier: Tier = "host"  # where the adapter was


class Recall(Struct, frozen=True, tag=True):
    """The host tier is full: the front returns unused leases until they free `num_bytes`."""

    num_bytes: int


class Pong(Struct, frozen=True, tag=True):
    number: int


class Adapters(Struct, frozen=True, tag=True):
    call: int
    adapters: list[AdapterStatus]


class Unloaded(Struct, frozen=True, tag=True):
    call: int
    digests: list[bytes]


class Tiers(Struct, frozen=True, tag=True):
    call: int
    stats: TierStats


class Refused(Struct, frozen=True, tag=True):
    call: int
    error: dict[str, Any]  # LoraxError.to_wire()


ToEngine = Submit | Cancel | Pin | Drop
ToShard = Setup | Preload | ToEngine
FromShard = ShardReady | Preloaded | Failed | Updates
ToExchange = Setup | Begin | Ping | Acquire | Release | ListAdapters | Unload | AskTiers
FromExchange = (
    ExchangeReady | Failed | Pong | Recall | Acquired | Adapters | Unloaded | Tiers | Refused
)
