"""An exchange that stops at a chosen moment, so that it can be killed there.

A trap is a file `armed MOMENT` in a folder. The first thread that comes to the moment renames it to `caught MOMENT` and
waits to be killed; the others go on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.adapters import loader
from engine.adapters.exchange import Exchange
from engine.adapters.hub import HubSource
from engine.adapters.lease import Lease
from engine.adapters.ref import AdapterRef
from engine.adapters.registry import make_sources
from engine.adapters.sources import AdapterFiles, Progress, Source, Version
from engine.adapters.tiers import HostRegion
from engine.config import EngineConfig
from engine.lora import image
from engine.messages import NO_TENANT, AdapterImageRef, TenantRef
from engine.ops.layout import ShardLayout
from engine.sandbox import convert

TRAPS, HUB = "LORAX_TEST_TRAPS", "LORAX_TEST_TRAPS_HUB"  # the folder, and the hub's address


class Traps:
    """The traps of a folder, on both sides."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def arm(self, moment: str) -> None:
        (self.folder / f"armed {moment}").touch()

    def has_caught(self, moment: str) -> bool:
        """Whether a thread waits there. The trap is gone then."""
        try:
            (self.folder / f"caught {moment}").unlink()
        except FileNotFoundError:
            return False
        return True

    def reach(self, moment: str) -> None:
        """Waits for ever if the trap is armed."""
        try:
            os.rename(self.folder / f"armed {moment}", self.folder / f"caught {moment}")
        except FileNotFoundError:
            return
        while True:
            time.sleep(60)


class TrappedSource:
    """A source with traps before its calls."""

    def __init__(self, source: Source, traps: Traps) -> None:
        self._source, self._traps = source, traps
        self._fetched: set[Version] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        self._traps.reach("resolve")
        return self._source.resolve(ref, token)

    def fetch(self, version: Version, token: str | None, progress: Progress) -> AdapterFiles:
        self._traps.reach("second fetch" if version in self._fetched else "fetch")
        self._fetched.add(version)
        return self._source.fetch(version, token, progress)


class TrappedExchange(Exchange):
    """Traps before the answer, and before images of the last process are adopted."""

    traps: Traps

    async def acquire(
        self, ref: AdapterRef, token: str | None = None, tenant: TenantRef = NO_TENANT
    ) -> Lease:
        lease = await super().acquire(ref, token, tenant)
        self.traps.reach("answer")
        return lease

    def adopt(
        self, preloaded: Iterable[AdapterImageRef], held: Mapping[int, AdapterImageRef]
    ) -> dict[int, Lease]:
        self.traps.reach("adopt")
        return super().adopt(preloaded, held)


def trapped_exchange(
    config: EngineConfig, layout: ShardLayout, region: HostRegion, **more: Any
) -> Exchange:
    """Runs in the exchange's process (see `engine.process.Parts`)."""
    traps = Traps(Path(os.environ[TRAPS]))
    cache = config.model.huggingface_hub_cache
    sources = make_sources(config) | {"hub": HubSource("operator", cache, endpoint=os.environ[HUB])}
    image.CHUNK_BYTES = 1 << 10  # so that an image is written in several pieces
    before(convert, "run", lambda: traps.reach("conversion"))
    write = loader.write_image

    def write_image(*given: Any, pause: Callable[[], None], **options: Any) -> bytes:
        def pause_there() -> None:
            traps.reach("half an image")
            pause()

        return write(*given, pause=pause_there, **options)

    loader.write_image = write_image  # type: ignore[assignment]
    trapped: dict[str, Any] = {
        name: TrappedSource(source, traps) for name, source in sources.items()
    }
    exchange = TrappedExchange(config, layout, region, sources=trapped, **more)
    exchange.traps = traps
    return exchange


def before(module: Any, name: str, action: Callable[[], None]) -> None:
    """Makes a function of a module begin with an action."""
    call = getattr(module, name)

    def wrapped(*given: Any, **options: Any) -> Any:
        action()
        return call(*given, **options)

    setattr(module, name, wrapped)
