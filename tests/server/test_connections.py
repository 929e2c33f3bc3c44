"""Many connections, slow ones, silent ones, no descriptors: others are answered."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from aiohttp import web

from engine.server import app as server_app
from engine.server.connections import Connections, make_connections
from engine.server.text import Text
from tests.server.fake import FakeBackend
from tests.server.wire import Served, announce, get, post, served, until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Connections:
    """Room for ten connections."""
    found = Connections(10, headroom=2)
    monkeypatch.setattr(server_app, "make_connections", lambda _: found)
    return found


# -- deadlines


@pytest.mark.parametrize("trickle", [False, True])
@pytest.mark.parametrize("kept", [False, True])
async def test_headers_have_a_deadline(
    backend: FakeBackend, text: Text, trickle: bool, kept: bool
) -> None:
    """For all of them, not for each byte; on a connection that was kept open from the first byte."""
    async with served(backend, text, client_header_timeout_s=0.5) as server:
        wire = await server.connect()
        if kept:
            wire.send(get())
            assert (await wire.answer()).status == 200
            await asyncio.sleep(0.7)  # longer than headers may take, between two requests
        wire.send(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nA: ")
        asking = asyncio.create_task(wire.answer())
        while not asking.done():
            await asyncio.sleep(0.05)
            if trickle:
                wire.send(b"a")
        answer = asking.result()
        assert (answer.status, answer.kind) == (408, "request_timeout")
        assert answer.headers["connection"] == "close"
        assert "error" in answer.json and isinstance(answer.json["error"], dict)


async def test_a_silent_connection_is_closed(backend: FakeBackend, text: Text) -> None:
    async with served(backend, text, client_header_timeout_s=0.3) as server:
        wire = await server.connect()
        assert await wire.rest() == b""


async def test_an_answer_may_take_longer_than_headers(backend: FakeBackend, text: Text) -> None:
    """Also with the beginning of the next request behind it."""
    backend.first_delay = 1.0
    async with served(
        backend, text, client_header_timeout_s=0.2, client_body_timeout_s=0.2
    ) as server:
        wire = await server.connect(post() + b"GET /hea")
        assert (await wire.answer()).status == 200
        wire.send(b"lth HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await wire.answer()).status == 200


# -- room


async def test_the_longest_waiting_makes_room(
    backend: FakeBackend, text: Text, few: Connections
) -> None:
    async with served(backend, text) as server:
        backend.gate = asyncio.Event()
        asked = await server.connect(post())
        await until(lambda: backend.open)
        silent = await server.connect()
        half = await server.connect(b"GET /health HT")
        body = await server.connect(announce(100) + b"{")
        idle = await server.connect(get())
        assert (await idle.answer()).status == 200
        later = [await server.connect() for _ in range(5)]
        await until(lambda: few.num_open == 10)
        for closed in (silent, half, body):
            assert (await server.ask(get())).status == 200
            await until(lambda: few.num_open == 9)
            newest = await server.connect()
            await until(lambda: few.num_open == 10)
            assert not await closed.rest()
            later.append(newest)
        backend.gate.set()
        assert (await asked.answer()).status == 200


@pytest.mark.parametrize("data", [b"", b"G", announce(1000), announce(1000) + b"{"])
async def test_a_crowd_holds_nobody_up(
    backend: FakeBackend, text: Text, few: Connections, data: bytes
) -> None:
    async with served(backend, text) as server:
        for _ in range(50):
            await server.connect(data)
        for _ in range(5):
            assert (await server.ask(get())).status == 200
            assert (await server.ask(post())).status == 200
        assert few.num_open <= 10


async def test_answers_are_not_closed_for_room(
    backend: FakeBackend, text: Text, few: Connections
) -> None:
    """More open requests than connections should be: new ones wait until one is answered."""
    async with served(backend, text) as server:
        backend.gate = asyncio.Event()
        asked = []
        for number in range(12):
            asked.append(await server.connect(post()))
            await until(lambda number=number: len(backend.open) == number + 1)
        waiting = asyncio.create_task(server.ask(get()))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        backend.gate.set()
        assert [(await wire.answer()).status for wire in asked] == [200] * 12
        assert (await waiting).status == 200


def test_limits(caplog: pytest.LogCaptureFixture) -> None:
    """Of connections, by that of open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 0 < make_connections(1).limit < soft
    assert not caplog.records
    make_connections(soft)
    assert f"max_concurrent_requests is {soft}" in caplog.text


async def test_trouble_is_logged_once_a_minute(
    backend: FakeBackend, text: Text, few: Connections, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with served(backend, text) as server:
        for _ in range(60):
            await server.connect()
        assert (await server.ask(get())).status == 200
        assert (
            len(
                [
                    one
                    for one in caplog.records
                    if "closing the one that waited longest" in one.message
                ]
            )
            == 1
        )


# -- the whole program's limit of open files

PROGRAM = """
import asyncio, os, resource, sys, tempfile
from pathlib import Path
limit, hard, hog = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
from engine.config import EngineConfig, ServerConfig
from engine.logs import configure_logging
from engine.server.app import build_app, run
from engine.server.text import Text
from tests.server.fake import FakeBackend, write_tokenizer

def take_all():
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        print("taken", flush=True)
    asyncio.get_running_loop().call_later(hog, lambda: [os.close(one) for one in taken])

def started(address):
    print(address, flush=True)
    if hog:
        asyncio.get_running_loop().call_later(0.5, take_all)

async def main():
    text = Text(str(write_tokenizer(Path(tempfile.mkdtemp()))))
    config = EngineConfig(server=ServerConfig(hostname="127.0.0.1", port=0))
    configure_logging(config.server)
    await run(build_app(FakeBackend(text), text, config), started)

asyncio.run(main())
"""


@contextmanager
def program(limit: int, hog: float = 0.0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server in a process that may open `limit` files; `hog`: seconds for which it has none left."""
    command = [sys.executable, "-c", PROGRAM, str(limit), str(limit), str(hog)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            assert running.stdout is not None
            yield running, int(running.stdout.readline().rpartition(":")[2])
        finally:
            running.kill()


def ask(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(get(headers=b"Connection: close\r\n"))
        return client.recv(100)


def test_more_connections_than_files() -> None:
    """Of clients that send nothing, or a little: /health answers, and the log stays short."""
    with program(200) as (running, port), ExitStack() as clients:
        for number in range(400):
            client = clients.enter_context(socket.create_connection(("127.0.0.1", port), 20))
            client.sendall((b"", b"GET /", announce(1000))[number % 3])
            if number % 50 == 49:
                assert ask(port).startswith(b"HTTP/1.1 200")
        start = time.monotonic()
        assert ask(port).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - start < 10
        running.terminate()
        _, told = running.communicate(timeout=30)
        assert running.returncode == 0
        assert "allows only" in told and "closing the one that waited longest" in told
        complaints = [line for line in told.splitlines() if "request_log" not in line]
        assert sum(map(len, complaints)) < 4000


def test_no_descriptor_is_left() -> None:
    """For a while: then all are served that came meanwhile, and the log has a line."""
    with program(200, hog=1.0) as (running, port):
        assert running.stdout is not None
        assert running.stdout.readline() == "taken\n"
        assert ask(port).startswith(b"HTTP/1.1 200")
        running.terminate()
        _, told = running.communicate(timeout=30)
        assert running.returncode == 0
        assert told.count("cannot accept connections") == 1
        complaints = [line for line in told.splitlines() if "request_log" not in line]
        assert sum(map(len, complaints)) < 4000


def test_the_limit_is_raised() -> None:
    program = (
        "import resource as r; from engine.server.connections import raise_descriptor_limit as up\n"
        "hard = min(r.getrlimit(r.RLIMIT_NOFILE)[1], 300)\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (100, hard)); up(); print(r.getrlimit(r.RLIMIT_NOFILE) == (hard, hard))"
    )
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert told.stdout.strip() == "True", told.stderr


# -- the end


async def stop(server: Served) -> float:
    """Seconds that the end takes after SIGTERM."""
    start = time.monotonic()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(asyncio.shield(server.running), 30)
    return time.monotonic() - start


async def test_what_has_no_complete_request_does_not_delay_the_end(
    backend: FakeBackend, text: Text
) -> None:
    async with served(backend, text) as server:
        await server.connect()
        await server.connect(b"GET /he")
        await server.connect(announce(1000))
        await server.connect(announce(1000) + b"{")
        idle = await server.connect(get())
        assert (await idle.answer()).status == 200
        lingering = await server.connect(get(headers=b"Content-Length: 100\r\n"))
        assert (await lingering.answer()).status == 200
        await until(lambda: server.front.bodies.num_open == 2)
        assert await stop(server) < 10


async def test_complete_requests_are_answered_at_the_end(backend: FakeBackend, text: Text) -> None:
    async with served(backend, text) as server:
        backend.first_delay = 1.0
        asked = [await server.connect(post()) for _ in range(3)]
        await until(lambda: len(backend.open) == 3)
        await server.connect(announce(1000))
        stopping = asyncio.create_task(stop(server))
        assert [(await wire.answer()).status for wire in asked] == [200] * 3
        assert await stopping < 10


@pytest.mark.parametrize("state", ["stream", "waiting", "adapter"])
async def test_open_requests_are_cancelled_after_the_drain_time(
    backend: FakeBackend, text: Text, state: str
) -> None:
    """Whatever they wait for."""
    backend.answer = lambda request: [40] * 200
    backend.delay = 1.0
    backend.acquire_delay = 1000 if state == "adapter" else 0
    body = {"inputs": "x", "parameters": {"adapter_id": "lora"}}
    async with served(backend, text, drain_timeout_s=0.5) as server:
        path = b"/generate" if state == "waiting" else b"/generate_stream"
        await server.connect(post(path, json.dumps(body).encode()))
        await until(lambda: server.front.places.num_open)
        await asyncio.sleep(0.3)
        assert await stop(server) < 0.5 + 5
    backend.check_idle()


async def test_a_client_that_does_not_read_does_not_delay_the_end(
    backend: FakeBackend, text: Text
) -> None:
    async def flood(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(1 << 16))

    routes = [web.get("/flood", flood)]
    async with served(backend, text, {"stall_s": 1000.0}, routes, drain_timeout_s=0.5) as server:
        wire = await server.connect(get(b"/flood"))
        transport = wire.writer.transport
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()
        await asyncio.sleep(0.5)
        assert await stop(server) < 0.5 + 5
