"""Connections that end, servers that are full, streams that are slow, and the end of it all."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from typing import Any

import openai as sdk
import pytest
from aiohttp import ClientSession, ClientTimeout, web
from aiohttp.test_utils import TestClient, TestServer
from openai import AsyncOpenAI

from engine.config import EngineConfig, ServerConfig
from engine.errors import EngineDead
from engine.logs import LIBRARIES, configure_logging
from engine.server.app import build_app, run
from engine.server.front import FRONT
from engine.server.text import Text
from tests.server.fake import FakeBackend, Json, Start, events_of

ADAPTER: Json = {"inputs": "x", "parameters": {"adapter_id": "lora"}}
CASES: list[tuple[str, Json]] = [
    ("/generate", ADAPTER),
    ("/generate_stream", ADAPTER),
    ("/v1/completions", {"prompt": "x", "model": "lora"}),
    ("/v1/completions", {"prompt": "x", "model": "lora", "stream": True, "n": 2}),
]


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize(("path", "body"), CASES)
@pytest.mark.parametrize("when", ["adapter", "first", "middle"])
async def test_a_client_that_goes_away(
    client: TestClient, backend: FakeBackend, path: str, body: Json, when: str
) -> None:
    """The engine's work is cancelled and the lease is given back, whatever was going on."""
    backend.acquire_delay = 10 if when == "adapter" else 0
    backend.first_delay = 10 if when == "first" else 0
    backend.delay = 0.01
    backend.answer = lambda request: [40] * 200
    asking = asyncio.create_task(client.post(path, json=body))
    if when == "adapter":
        await until(lambda: backend.waiting_acquires)
    else:
        await until(lambda: backend.open)
    if when == "middle":
        await asyncio.sleep(0.05)
    if asking.done():
        asking.result().close()
    asking.cancel()
    await until(lambda: not client.app[FRONT].places.num_open)
    backend.check_idle()
    assert len(backend.cancelled) == len(backend.requests)
    assert bool(backend.requests) == (when != "adapter")
    text = await (await client.get("/metrics")).text()
    assert 'lorax_request_failure{err="dropped"} 1.0' in text


async def test_a_reader_that_stops_reading(client: TestClient, backend: FakeBackend) -> None:
    """It costs its own stream only, and not the adapter."""
    backend.answer = lambda request: [40] * 200
    path = client.make_url("/generate_stream")
    reader, writer = await asyncio.open_connection(path.host, path.port)
    body = json.dumps(ADAPTER).encode()
    head = f"POST {path.path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await until(lambda: backend.leases and backend.leases[0].num_released)
    response = await client.post("/generate", json={"inputs": "x"})
    assert response.status == 200
    writer.close()
    await writer.wait_closed()


async def test_a_full_server_says_so_at_once(start: Start, backend: FakeBackend) -> None:
    client = await start({"max_concurrent_requests": 2})
    backend.gate = asyncio.Event()
    asking = [asyncio.create_task(client.post("/generate", json={"inputs": "x"})) for _ in "ab"]
    await until(lambda: len(backend.open) == 2)
    for path in ("/generate", "/generate_stream"):
        response = await client.post(path, json={"inputs": "x"})
        assert response.status == 429
        assert response.headers["Retry-After"] == "1"
        assert (await response.json())["error_type"] == "overloaded"
    openai = AsyncOpenAI(base_url=str(client.make_url("/v1")), api_key="k", max_retries=0)
    with pytest.raises(sdk.RateLimitError) as caught:
        await openai.completions.create(model="", prompt="x", stream=True)
    assert caught.value.response.headers["Retry-After"] == "1"
    await openai.close()
    for path in ("/health", "/info", "/metrics", "/v1/models"):
        assert (await client.get(path)).status == 200
    backend.gate.set()
    assert [(await one).status for one in asking] == [200, 200]
    assert (await client.post("/generate", json={"inputs": "x"})).status == 200


async def test_a_stream_that_is_behind_gets_many_events_in_one_write(
    client: TestClient, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aiohttp import web

    writes: list[bytes] = []
    write = web.StreamResponse.write

    async def slow(self: web.StreamResponse, data: bytes) -> None:
        writes.append(bytes(data))
        await write(self, data)
        await asyncio.sleep(0.03)

    monkeypatch.setattr(web.StreamResponse, "write", slow)
    backend.answer = lambda request: [40] * 60
    response = await client.post("/generate_stream", json={"inputs": "x"})
    assert len(events_of(await response.read())) == 61
    assert len(writes) < 10


LOCAL = EngineConfig(server=ServerConfig(hostname="127.0.0.1", port=0))


async def test_stopping_lets_open_requests_finish(backend: FakeBackend, text: Text) -> None:
    backend.say("one two")
    backend.delay = 0.3
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(run(build_app(backend, text, LOCAL), address.set_result))
    url = await asyncio.wait_for(address, 5)
    async with (
        ClientSession(timeout=ClientTimeout(10)) as session,
        ClientSession(timeout=ClientTimeout(10)) as new,
    ):
        response = await session.post(f"{url}/generate_stream", json={"inputs": "x"})
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        refused = [await new.get(f"{url}/health"), await new.post(f"{url}/generate", json={})]
        assert [one.status for one in refused] == [503, 503]
        assert (await refused[1].json())["error_type"] == "shutting_down"
        events = events_of(await response.read())
        assert json.loads(events[-1])["generated_text"] == "one two"
        await asyncio.wait_for(running, 5)
    backend.check_idle()


async def test_a_second_signal_ends_open_requests(backend: FakeBackend, text: Text) -> None:
    """One that would take a quarter of an hour; `run` returns as it does after a first signal."""
    backend.answer = lambda request: [40] * 900
    backend.delay = 1.0
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(run(build_app(backend, text, LOCAL), address.set_result))
    url = await asyncio.wait_for(address, 5)
    async with ClientSession(timeout=ClientTimeout(10)) as session:
        await session.post(f"{url}/generate_stream", json={"inputs": "x"})
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.2)
        assert not running.done()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(running, 5)


async def test_a_dead_engine_ends_the_server(backend: FakeBackend, text: Text) -> None:
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(run(build_app(backend, text, LOCAL), address.set_result))
    await asyncio.wait_for(address, 5)
    backend.alive = False
    with pytest.raises(EngineDead):
        await asyncio.wait_for(running, 5)


async def test_a_port_that_is_taken(backend: FakeBackend, text: Text, client: TestClient) -> None:
    server = ServerConfig(hostname="127.0.0.1", port=client.port or 0)
    with pytest.raises(OSError):
        await run(build_app(backend, text, EngineConfig(server=server)))


async def test_logs(capsys: pytest.CaptureFixture[str], start: Start) -> None:
    loggers = [logging.getLogger(name) for name in ("engine", *LIBRARIES)]
    before = [(one, one.handlers[:], one.level, one.propagate) for one in loggers]
    try:
        configure_logging(ServerConfig(json_output=True, log_level="debug"))
        client = await start()
        await client.get("/health")
        (line,) = capsys.readouterr().err.splitlines()
        found = json.loads(line)
        assert found["level"] == "DEBUG" and "GET /health 200" in found["message"]
        assert found["timestamp"].endswith("+00:00")
        assert found["process"] == f"front[{os.getpid()}]"
        configure_logging(ServerConfig(log_level="info"))
        await client.get("/health")
        loggers[0].info("hello")
        assert f"INFO front[{os.getpid()}] engine: hello" in capsys.readouterr().err
        configure_logging(ServerConfig(json_output=True))
        for name in ("asyncio", "aiohttp.server"):
            logging.getLogger(name).info("of no interest")
            logging.getLogger(name).error("name \udce9")
            (line,) = capsys.readouterr().err.splitlines()
            assert (json.loads(line)["target"], json.loads(line)["message"]) == (
                name,
                "name \\udce9",
            )
    finally:
        for one, handlers, level, propagate in before:
            one.handlers[:], one.propagate = handlers, propagate
            one.setLevel(level)


async def test_the_server_waits_until_the_engine_lets_go(
    backend: FakeBackend, text: Text, config: EngineConfig
) -> None:
    """Of what ended at a stop sequence, and was answered before."""
    backend.say("one two three")
    backend.let_go = 0.2
    client = TestClient(TestServer(build_app(backend, text, config)))
    await client.start_server()
    body = {"inputs": "x", "parameters": {"stop": ["two"]}}
    assert (await client.post("/generate", json=body)).status == 200
    assert backend.open
    await client.close()
    assert not backend.open


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel counts")
async def test_a_client_that_does_not_read(backend: FakeBackend, text: Text) -> None:
    """It loses its connection, and with it its place; one that reads is left alone."""
    app = build_app(backend, text, EngineConfig(), stall_s=0.3)
    flooding: set[int] = set()

    async def flood(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        flooding.add(id(request))
        try:
            while True:
                await response.write(bytes(1 << 16))
        finally:
            flooding.remove(id(request))

    app.router.add_get("/flood", flood)
    async with TestServer(app, handler_cancellation=True) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        silent = socket.create_connection(("127.0.0.1", int(server.port or 0)))
        with silent:
            for end in (writer.get_extra_info("socket"), silent):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            silent.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
            writer.write(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")

            async def read() -> None:
                while await reader.read(1 << 16):
                    await asyncio.sleep(0.001)

            reading = asyncio.create_task(read())
            await until(lambda: len(flooding) == 2)
            await until(lambda: len(flooding) == 1)
            await asyncio.sleep(0.6)
            assert len(flooding) == 1 and not reading.done()
            reading.cancel()
        writer.close()
        await until(lambda: not flooding)
