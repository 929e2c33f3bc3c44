"""What crosses the pipes between front, exchange and shard: msgpack, one tagged union per direction.

The first frame to a child says what it is; its first answer is `Ready...` or `Failed`. A *call* is the front's number
for one question to the exchange; an acquired adapter is held under the number of its call.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from engine.adapters.ref import AdapterRef
from engine.config import EngineConfig
from engine.messages import (
    AdapterImageRef,
    AdapterStatus,
    EngineInfo,
    EngineStats,
    Request,
    Update,
)
from engine.process.parts import Parts


class Setup(Struct, frozen=True, tag=True):
    """What a child is to build; `parts` says what from."""

    config: EngineConfig
    parts: Parts


class Submit(Struct, frozen=True, tag=True):
    request: Request


class Cancel(Struct, frozen=True, tag=True):
    id: str


class Preload(Struct, frozen=True, tag=True):
    """Place these adapters and keep them on the device. Comes once, before any request."""

    images: list[AdapterImageRef]


class Begin(Struct, frozen=True, tag=True):
    """The exchange may start: the shard has told what adapters must fit.

    After a restart, what the one before left in the region for others stays in place: `held` by its call, and what
    was `preloaded`.
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


class Release(Struct, frozen=True, tag=True):
    """Nobody wants anything more of this call: a wait is given up, a lease is returned."""

    call: int


class ListAdapters(Struct, frozen=True, tag=True):
    call: int


class Unload(Struct, frozen=True, tag=True):
    call: int
    name: str


class Failed(Struct, frozen=True, tag=True):
    """The child could not start; `error` is LoraxError.to_wire()."""

    error: dict[str, Any]


class ShardReady(Struct, frozen=True, tag=True):
    info: EngineInfo
    layout: (
        bytes  # ShardLayout in msgpack: the front, which does without torch, passes it on unread
    )
    stats: EngineStats


class Preloaded(Struct, frozen=True, tag=True):
    """The answer to Preload, if they all fit; else `Failed`."""


class Updates(Struct, frozen=True, tag=True):
    """All news of one turn of the engine."""

    updates: list[Update]
    stats: EngineStats | None = None


class ExchangeReady(Struct, frozen=True, tag=True):
    preloaded: list[AdapterImageRef]


class Acquired(Struct, frozen=True, tag=True):
    call: int
    image: AdapterImageRef
    cache_salt: bytes
    fresh_s: float = 0.0  # seconds for which the version counts as the newest, and the caller as allowed to have it


class Recall(Struct, frozen=True, tag=True):
    """The host tier is full: leases that no request uses are to be given back, until they make `num_bytes`."""

    num_bytes: int


class Pong(Struct, frozen=True, tag=True):
    number: int


class Adapters(Struct, frozen=True, tag=True):
    call: int
    adapters: list[AdapterStatus]


class Unloaded(Struct, frozen=True, tag=True):
    call: int
    found: bool


class Refused(Struct, frozen=True, tag=True):
    call: int
    error: dict[str, Any]  # LoraxError.to_wire()


ToShard = Setup | Submit | Cancel | Preload
FromShard = ShardReady | Preloaded | Failed | Updates
ToExchange = Setup | Begin | Ping | Acquire | Release | ListAdapters | Unload
FromExchange = ExchangeReady | Failed | Pong | Recall | Acquired | Adapters | Unloaded | Refused
