"""A tiny model with a tokenizer and two adapters on disk, and a server for the client."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Self

import pytest
import typer.main
import typer.testing
from aiohttp import web

from tests import tiny
from tests.server.fake import write_tokenizer

BUDGET = ("--cpu-memory-gb", "0.2", "--host-cache-gb", "0.05")


@pytest.fixture(scope="session", autouse=True)
def commands_are_built_once() -> Iterator[None]:
    """An app with every setting takes 50 ms to become commands; `CliRunner.invoke` would do it every time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and under `adapters` the adapters `one` and `two`."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.SMALL, "vocab_size", 400)
        model = tiny.make_model("llama", folder / "base")
    write_tokenizer(folder / "base")
    for seed, name in enumerate(("one", "two"), 1):
        tiny.make_adapter(model, folder / "adapters" / name, seed, rank=4 * seed).unload()
    return folder


def entry(name: str, **given: Any) -> dict[str, Any]:
    """An adapter as the server describes it."""
    fields: dict[str, Any] = {
        "id": name,
        "source": "hub",
        "revision": "abc",
        "digest": "d1",
        "state": "ready",
        "tier": "device",
        "pinned": False,
        "preloaded": False,
        "bytes": 3 << 20,
        "rank": 16,
        "ranks": [8, 16],
        "targets": ["q_proj", "v_proj"],
        "base_model": None,
        "merged": False,
        "requests": 2,
        "hits": 0,
        "last_used": None,
        "seconds": {"fetch": 0.5, "parse": 0.25},
        "error": None,
    }
    return fields | given


class FakeServer:
    """The routes of the client, in a separate thread. Keeps the requests."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.adapters: list[dict[str, Any]] = []  # entries of GET /adapters
        self.cache: dict[str, Any] = {}  # of GET /cache
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *failure: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/info", self._info),
                web.post("/generate", self._generate),
                web.post("/generate_stream", self._stream),
                web.get("/adapters", self._list),
                web.get("/adapters/{id:.+}", self._entry),
                web.post("/adapters/{what}", self._manage),
                web.get("/cache", self._cache),
            ]
        )
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"model_id": "fake"})

    async def _list(self, request: web.Request) -> web.Response:
        self._note(request)
        total = len(self.adapters) + 3
        return web.json_response({"adapters": self.adapters, "total": total})

    async def _entry(self, request: web.Request) -> web.Response:
        self._note(request)
        return self._found(request.match_info["id"])

    async def _manage(self, request: web.Request) -> web.Response:
        self._note(request)
        body = await self._read(request)
        status = 202 if request.match_info["what"] == "prefetch" else 200
        return self._found(body["adapter_id"], status)

    def _found(self, name: str, status: int = 200) -> web.Response:
        refusals = {
            "missing": (404, "adapter_not_found"),
            "base": (422, "validation"),
            "mine": (403, "forbidden"),
        }
        if name in refusals:
            code, kind = refusals[name]
            return web.json_response({"error": f"no {name}", "error_type": kind}, status=code)
        return web.json_response(entry(name), status=status)

    async def _cache(self, request: web.Request) -> web.Response:
        self._note(request)
        return web.json_response(self.cache)

    def _note(self, request: web.Request) -> None:
        self.paths.append(str(request.rel_url))
        self.headers.append(dict(request.headers))

    async def _read(self, request: web.Request) -> dict[str, Any]:
        body: dict[str, Any] = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        return body

    async def _generate(self, request: web.Request) -> web.Response:
        body = await self._read(request)
        if body["parameters"].get("adapter_id") == "secret":
            refusal = {"error": "not yours", "error_type": "adapter_forbidden"}
            return web.json_response(refusal, status=403)
        return web.json_response({"generated_text": "hello world", "details": None})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        body = await self._read(request)
        adapter = body["parameters"].get("adapter_id")
        if adapter == "missing":
            refusal = {"error": "no such adapter", "error_type": "adapter_not_found"}
            return web.json_response(refusal, status=404)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        words = ["hello", " world", "</s>"]
        for number, word in enumerate(words):
            last = number == len(words) - 1
            if adapter == "broken" and last:
                await self._send(response, {"error": "it broke", "error_type": "generation"})
                break
            event: dict[str, Any] = {"token": {"text": word, "special": last}}
            event["generated_text"] = f"hello world{adapter or ''}" if last else None
            event["details"] = {"finish_reason": "eos_token"} if last else None
            await self._send(response, event)
        return response

    @staticmethod
    async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(f": comment\n\ndata: {json.dumps(event)}\n\n".encode())


@pytest.fixture(scope="session")
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running
