"""Engines and exchanges without models and files, loaded by name in child processes."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from engine.adapters.ref import AdapterRef
from engine.adapters.tiers import HostRegion
from engine.config import AdapterConfig, EngineConfig, ModelConfig
from engine.errors import AdapterNotFound, InvalidRequest, LoraxError, ModelError, from_wire
from engine.messages import (
    AdapterImageRef,
    AdapterStatus,
    AdapterText,
    EngineStats,
    Request,
    SamplingParams,
    TenantRef,
    Tier,
    TierCounts,
    TierStats,
    TokenOutput,
    Update,
    Usage,
)
from engine.ops.layout import ShardLayout
from engine.ops.targets import Group, ModelTargets, Target
from engine.process import LocalBackend, Parts, ProcessBackend
from tests.engine_info import INFO

REFUSED, POISON, DEADLY, SLOW = (
    900_001,
    900_002,
    900_003,
    900_004,
)  # first tokens of special prompts
CONFIG = EngineConfig(ModelConfig(model_id="echo"), AdapterConfig(host_cache_gb=0.001))
LAYOUT = ShardLayout(
    ModelTargets(2, (Group("qkv", 8, (Target("q_proj", "q", 8),)),), ()), "float32"
)

AnyBackend = ProcessBackend | LocalBackend


def request(id: str, tokens: list[int], max_new_tokens: int | None = None) -> Request:
    count = len(tokens) if max_new_tokens is None else max_new_tokens
    return Request(id, tokens, SamplingParams(), count, [])


def parts(engine: str = "EchoEngine", exchange: str = "NameExchange") -> Parts:
    return Parts(f"{__name__}:{engine}", f"{__name__}:{exchange}")


class Inbox:
    """A reader that keeps its news."""

    def __init__(self) -> None:
        self._news: asyncio.Queue[Update | LoraxError] = asyncio.Queue()

    def take(self, update: Update) -> None:
        self._news.put_nowait(update)

    def on_engine_lost(self, error: LoraxError) -> None:
        self._news.put_nowait(error)

    async def next(self) -> Update:
        """Raises what ended the request."""
        update = await self._news.get()
        if isinstance(update, LoraxError):
            raise update
        if update.error is not None:
            raise from_wire(update.error)
        return update


async def updates_of(backend: AnyBackend, request: Request) -> AsyncIterator[Update]:
    """The news of a request. Closing early cancels it, and waits until the engine has let go of it."""
    inbox = Inbox()
    backend.submit(request, inbox)
    ended = False
    try:
        while not ended:
            update = await inbox.next()
            ended = update.finish is not None
            yield update
    except LoraxError:
        ended = True
        raise
    finally:
        if not ended:
            backend.cancel(request.id)
            while (await inbox.next()).finish is None:
                pass


async def tokens_of(backend: AnyBackend, request: Request) -> list[int]:
    updates = updates_of(backend, request)
    return [output.token async for update in updates for output in update.tokens]


async def leases_of(backend: AnyBackend) -> dict[str, int]:
    """Adapter -> leases; `waiting` counts acquisitions that wait."""
    return {adapter.name: adapter.leases for adapter in await backend.adapters()}


async def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


class EchoEngine:
    """Says the prompt again, one token a step, over and over; ROWS requests at a time."""

    ROWS = 64
    SLOW_S = 0.01  # of a step that holds a slow request

    def __init__(self, config: EngineConfig, region: HostRegion) -> None:
        region.view[:8] = b"from eng"
        self._region = region
        self._waiting: list[Request] = []
        self._running: dict[str, Request] = {}
        self._said: dict[str, int] = {}
        self._cancelled: list[str] = []
        self._steps = 0
        self._pinned: set[bytes] = set()
        self._resident: dict[bytes, str] = {}
        self.layout = LAYOUT
        self.info = replace(
            INFO,
            model_id=config.model.model_id,
            model_type="echo",
            vocab_size=1_000_000,
            max_input_length=4096,
            max_total_tokens=4096,
            max_batch_total_tokens=65536,
            max_batch_size=self.ROWS,
            max_step_tokens=512,
            host_bytes=region.size,
            memory_plan=[("all", 1)],
        )

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            waiting=len(self._waiting),
            running=len(self._running),
            steps=self._steps,
            resident=[(name, digest, 1024) for digest, name in self._resident.items()],
            arena_used=1024 * len(self._resident),
        )

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._cancelled)

    def preload(self, image: AdapterImageRef) -> None:
        raise AssertionError("nothing is preloaded")

    def pin(self, digest: bytes, pinned: bool) -> None:
        (self._pinned.add if pinned else self._pinned.discard)(digest)

    def drop(self, digest: bytes) -> None:
        self._resident.pop(digest, None)

    def submit(self, request: Request) -> None:
        if request.tokens[:1] == [REFUSED]:
            raise InvalidRequest("no such token", field="tokens", hint="another one")
        if (image := request.adapter) is not None:  # those that are not pinned leave for it
            kept = {one: name for one, name in self._resident.items() if one in self._pinned}
            self._resident = kept | {image.digest: image.name}
        self._waiting.append(request)

    def cancel(self, id: str) -> None:
        if id in self._running or any(waiting.id == id for waiting in self._waiting):
            self._cancelled.append(id)

    def step(self) -> list[Update]:
        assert gc.isenabled(), "the process was ready"
        self._steps += 1
        updates = []
        for id in self._cancelled:
            self._waiting = [waiting for waiting in self._waiting if waiting.id != id]
            self._running.pop(id, None)
            updates.append(Update(id, [], finish="cancelled", usage=Usage(0, 0, 0)))
        self._cancelled.clear()
        while self._waiting and len(self._running) < self.ROWS:
            admitted = self._waiting.pop(0)
            self._running[admitted.id] = admitted
            self._said[admitted.id] = 0
        if any(running.tokens[0] == SLOW for running in self._running.values()):
            time.sleep(self.SLOW_S)
        for running in list(self._running.values()):
            updates.append(self._say(running))
        return updates

    def _say(self, request: Request) -> Update:
        if request.tokens[0] == POISON:
            raise ValueError("a poisoned request")
        said = self._said[request.id]
        self._said[request.id] = said + 1
        outputs = [TokenOutput(request.tokens[said % len(request.tokens)], -0.5)]
        if said + 1 < request.max_new_tokens:
            return Update(request.id, outputs)
        del self._running[request.id]
        usage = Usage(len(request.tokens), 0, said + 1)
        return Update(request.id, outputs, finish="length", usage=usage)

    def fail(self, error: LoraxError) -> list[Update]:
        updates = [Update(id, [], error=error.to_wire()) for id in self._running]
        self._running.clear()
        return updates

    def close(self) -> None:
        self._region.close()


def known(config: EngineConfig) -> str:
    """All that a process knows of the settings."""
    return msgspec.json.encode([config, dict(os.environ)]).decode()


class TellingEngine(EchoEngine):
    """Its model's id is what its process knows."""

    def __init__(self, config: EngineConfig, region: HostRegion) -> None:
        super().__init__(config, region)
        self.info = replace(self.info, model_id=known(config))


class BrokenEngine(EchoEngine):
    """Every step fails."""

    def step(self) -> list[Update]:
        raise RuntimeError("broken for good")


class MissingModel:
    def __init__(self, config: EngineConfig, region: HostRegion) -> None:
        raise ModelError(f"no model {config.model.model_id}", hint="another one")


class ClumsyEngine:
    def __init__(self, config: EngineConfig, region: HostRegion) -> None:
        raise ZeroDivisionError("clumsy")


class DyingEngine:
    def __init__(self, config: EngineConfig, region: HostRegion) -> None:
        os._exit(7)


class HangingEngine:
    def __init__(self, config: EngineConfig, region: HostRegion) -> None:
        time.sleep(600)


def digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


@dataclass
class NameLease:
    exchange: NameExchange
    image: AdapterImageRef
    cache_salt: bytes

    held: bool = True
    fresh_s: float = 0.0
    text: AdapterText | None = None
    tier: Tier = "host"

    def release(self) -> None:
        self.exchange.leases[self.image.name] -= self.held
        self.held = False


class NameExchange:
    """An adapter is its name. `missing` is not found, `slow` never comes, `clumsy` fails unforeseen."""

    def __init__(
        self,
        config: EngineConfig,
        layout: ShardLayout,
        region: HostRegion,
        device: str,
        recall: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        assert layout == LAYOUT and bytes(region.view[:8]) == b"from eng"
        self.leases: dict[str, int] = {}
        self.waiting = 0
        self.counts = TierCounts()
        self._offsets = itertools.count(0, 256)
        self._region = region

    @property
    def preloaded(self) -> list[AdapterImageRef]:
        return []

    @property
    def abandoned(self) -> int:
        return 0

    async def start(self) -> None:
        await asyncio.sleep(0)

    def adopt(
        self, preloaded: Iterable[AdapterImageRef], held: Mapping[int, AdapterImageRef]
    ) -> dict[int, NameLease]:
        for image in held.values():
            self.leases[image.name] = self.leases.get(image.name, 0) + 1
        return {call: NameLease(self, image, b"") for call, image in held.items()}

    async def acquire(self, ref: AdapterRef, token: str | None, tenant: TenantRef) -> NameLease:
        assert gc.isenabled(), "the process was ready"
        if ref.id == "missing":
            raise AdapterNotFound("no such adapter", field="adapter_id")
        if ref.id == "clumsy":
            raise ZeroDivisionError("clumsy")
        if ref.id == "slow":
            self.waiting += 1
            try:
                await asyncio.sleep(600)
            finally:
                self.waiting -= 1
        await asyncio.sleep(0)
        is_new = ref.id not in self.leases
        self.counts.loads += is_new
        self.counts.host_hits += not is_new
        self.leases[ref.id] = self.leases.get(ref.id, 0) + 1
        image = AdapterImageRef(digest(ref.id), next(self._offsets), 1024, 8, ref.id)
        tier: Tier = "source" if is_new else "host"
        salt = f"{token or ''}{tenant.name}".encode()
        return NameLease(self, image, salt, tier=tier)

    async def adapters(self) -> list[AdapterStatus]:
        leases = self.leases | {"waiting": self.waiting}
        return [
            AdapterStatus(name, "local", digest(name), "ready", 1024, 8, [], None, count, {})
            for name, count in leases.items()
        ]

    async def unload(
        self, name: str, source: str | None = None, tenants: Collection[bytes] | None = None
    ) -> list[bytes]:
        known = source in (None, "local") and (tenants is None or b"" in tenants)
        if not known or self.leases.pop(name, None) is None:
            return []
        return [digest(name)]

    async def tiers(self, idle: Mapping[bytes, int]) -> TierStats:
        counted = {digest(name): leases for name, leases in self.leases.items()}
        used = [one for one, leases in counted.items() if leases > idle.get(one, 0)]
        return TierStats(
            host_capacity=self._region.size,
            host_used=1024 * len(counted),
            host_leased=1024 * len(used),
            host_images=len(counted),
            counts=replace(self.counts),
        )

    async def close(self) -> None:
        assert not any(self.leases.values()) and not self.waiting
        self._region.close()


class ClumsyExchange(NameExchange):
    async def start(self) -> None:
        raise ZeroDivisionError("clumsy")


class TellingExchange(NameExchange):
    """Its only adapter is what its process knows."""

    def __init__(self, config: EngineConfig, *given: Any, **more: Any) -> None:
        super().__init__(config, *given, **more)
        self.leases[known(config)] = 0


class SlowStartExchange(NameExchange):
    """Starts once; the next one never does."""

    def __init__(self, config: EngineConfig, *given: Any, **more: Any) -> None:
        super().__init__(config, *given, **more)
        marker = Path(config.model.model_id)
        if marker.exists():
            time.sleep(600)
        marker.touch()
