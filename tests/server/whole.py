"""The real server on a tiny model: the front in this process, the engine and the exchange in processes of their own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from engine.config import (
    AdapterConfig,
    EngineConfig,
    MemoryConfig,
    ModelConfig,
    SchedulerConfig,
    ServerConfig,
)
from engine.models import adapter_layout
from engine.ops.layout import ShardLayout
from engine.process import Parts, ProcessBackend
from engine.process.watch import Watch
from engine.server.app import build_app
from engine.server.text import Text
from tools.adapters import write_adapter
from tools.tiny import write_model

CONTEXT = 8192
RANK = 4
TARGETS = ["q_proj", "v_proj"]
LARGE_RANK, LARGE_BYTES = 32, 262_656  # an adapter of all linears, and its image
SCALE = 0.3  # of the adapters' values, so that each changes the text


@dataclass
class Stream:
    """A request whose tokens arrive while others are served."""

    tokens: list[int] = field(default_factory=list)
    error: str | None = None
    ended: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self, response: aiohttp.ClientResponse) -> None:
        """Reads all events."""
        async for line in response.content:
            if line.startswith(b"data:"):
                event = json.loads(line[5:])
                if "error" in event:
                    self.error = event["error"]
                else:
                    self.tokens.append(event["token"]["id"])
                self._news.set()
        self.ended = True
        self._news.set()

    async def reach(self, count: int) -> None:
        """Waits for so many tokens, or the end."""
        while len(self.tokens) < count and not self.ended:
            self._news.clear()
            await self._news.wait()


@dataclass
class Whole:
    """A running server. `folder` is its adapter root."""

    folder: Path
    layout: ShardLayout
    backend: ProcessBackend
    session: aiohttp.ClientSession

    def write(self, name: str, seed: int, **given: Any) -> Path:
        """A good adapter below the root."""
        options: dict[str, Any] = {"rank": RANK, "targets": TARGETS, "scale": SCALE} | given
        write_adapter(self.folder / name, self.layout, seed=seed, **options)
        return self.folder / name

    def write_large(self, name: str) -> Path:
        """A good adapter whose image has LARGE_BYTES."""
        return self.write(name, 0, rank=LARGE_RANK, targets=None)

    async def ask(
        self, adapter: str | None, source: str | None = None, tokens: int = 4, **parameters: Any
    ) -> tuple[int, dict[str, Any]]:
        """Status and body of a request that is not streamed."""
        async with self.session.post(
            "/generate", json=_body(adapter, source, tokens, parameters)
        ) as response:
            return response.status, await response.json()

    async def tokens_of(self, adapter: str | None, count: int) -> list[int]:
        """The tokens of a request that is served."""
        status, body = await self.ask(adapter, tokens=count, details=True)
        assert status == 200, body
        return [token["id"] for token in body["details"]["tokens"]]

    @asynccontextmanager
    async def stream(self, adapter: str | None, tokens: int) -> AsyncIterator[Stream]:
        """A running request, from its first token on. Leaving the block ends it."""
        stream = Stream()
        async with self.session.post(
            "/generate_stream", json=_body(adapter, None, tokens, {})
        ) as response:
            reading = asyncio.create_task(stream.read(response))
            try:
                await stream.reach(1)
                yield stream
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
                response.close()

    async def idle(self, pins: int = 0) -> None:
        """Waits until the engine has dropped every request and every lease but those of pins was released."""
        async with asyncio.timeout(60):
            while True:
                stats = self.backend.stats
                leases = sum(adapter.leases for adapter in await self.backend.adapters())
                if not (stats.waiting or stats.running or stats.in_use or leases > pins):
                    return
                await asyncio.sleep(0.02)


def _body(
    adapter: str | None, source: str | None, tokens: int, parameters: dict[str, Any]
) -> dict[str, Any]:
    chosen: dict[str, Any] = {"max_new_tokens": tokens, "ignore_eos_token": True} | parameters
    if adapter is not None:
        chosen["adapter_id"] = adapter
    if source is not None:
        chosen["adapter_source"] = source
    return {"inputs": "word1 word2 word3", "parameters": chosen}


@asynccontextmanager
async def serving(
    folder: Path,
    parts: Parts | None = None,
    watch: Watch | None = None,
    server: ServerConfig | None = None,
    **adapters: Any,
) -> AsyncIterator[Whole]:
    """A server with its model, adapters and caches in `folder`. `adapters`: settings of AdapterConfig."""
    write_model(folder / "model", max_position_embeddings=CONTEXT)
    root = folder / "adapters"
    root.mkdir()
    model = ModelConfig(
        model_id=str(folder / "model"),
        dtype="float32",
        load_format="dummy",
        huggingface_hub_cache=str(folder / "cache"),
    )
    config = EngineConfig(
        model=model,
        adapters=AdapterConfig(adapter_source="local", adapter_root=(str(root),), **adapters),
        scheduler=SchedulerConfig(max_total_tokens=CONTEXT),
        memory=MemoryConfig(cpu_memory_gb=0.05, num_threads=1),
        server=server or ServerConfig(),
    )
    layout, _, _ = adapter_layout(model)
    backend = await ProcessBackend.start(config, parts, watch)
    text = Text(config.model.model_id)
    runner = web.AppRunner(build_app(backend, text, config), handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(address, connector=connector) as session:
            yield Whole(root, layout, backend, session)
    finally:
        await runner.cleanup()
        text.close()
        await backend.close()
