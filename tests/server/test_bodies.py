"""Bodies that come slowly, never, or as more than they seem: what they hold, whom they hold up, how they end."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib

import pytest

from engine.server.protocol import BUFFER
from engine.server.text import Text
from tests.server.fake import FakeBackend
from tests.server.wire import HEAD, HELLO, announce, get, post, served, until

PATHS = [b"/generate", b"/generate_stream", b"/", b"/tokenize", b"/v1/completions"]
CHUNKED = b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
BUDGET = {"max_body_bytes": 100_000, "body_budget": 250_000}


def padded(length: int) -> bytes:
    """A request's body of exactly `length` bytes."""
    return HELLO[:-1] + b" " * (length - len(HELLO)) + b"}"


@pytest.mark.parametrize("path", PATHS)
async def test_bodies_that_never_come_take_no_place(
    backend: FakeBackend, text: Text, path: bytes
) -> None:
    async with served(backend, text, max_concurrent_requests=2) as server:
        for _ in range(10):
            await server.connect(announce(100, path))
            await server.connect(announce(100, path) + HELLO)
            await server.connect(b"POST " + path + CHUNKED + b"5\r\nabc")
        await until(lambda: server.front.bodies.num_open == 30)
        assert server.front.places.num_open == 0
        for other in PATHS:
            status, _ = await (await server.connect(post(other))).head()
            assert status == 200


async def test_a_body_gives_its_memory_back(backend: FakeBackend, text: Text) -> None:
    """Whatever becomes of it: answered, refused, too large, given up."""
    async with served(backend, text, {"max_body_bytes": 5000}) as server:
        bodies = server.front.bodies
        assert (await server.ask(post(body=padded(4000)))).status == 200
        assert (await server.ask(post(body=b"x" * 4000))).status == 400
        assert (await server.ask(post(body=b"x" * 6000))).status == 413
        chunk = b"%x\r\n%s\r\n" % (6000, b"x" * 6000)
        assert (await server.ask(b"POST /generate" + CHUNKED + chunk)).status == 413
        wire = await server.connect(announce(4000) + b"x" * 3000)
        await until(lambda: bodies.num_bytes == 3000)
        wire.close()
        await until(lambda: not bodies.num_open)
        assert bodies.num_bytes == 0


@pytest.mark.parametrize("packed", [False, True])
async def test_a_used_up_budget_pauses(backend: FakeBackend, text: Text, packed: bool) -> None:
    """The answers are those of a server with room for all, the oldest first; and small bodies pass."""
    body = gzip.compress(padded(90_000)) if packed else padded(90_000)
    headers = b"Content-Encoding: gzip\r\n" if packed else b""
    async with served(backend, text, BUDGET) as server:
        bodies = server.front.bodies
        await server.connect(announce(1000))  # older than all, and never sent
        wires = [await server.connect(announce(len(body), headers=headers)) for _ in range(8)]
        await until(lambda: bodies.num_open == 9)
        for wire in wires:
            wire.send(body[:-10])
        await until(lambda: bodies.num_held == 7)
        # Each may have one packet on its way when it is paused.
        assert bodies.limit <= bodies.num_bytes <= bodies.budget + 8 * 3 * BUFFER
        bodies.own = 1000  # so that an ordinary request has less
        assert (await server.ask(post())).status == 200
        assert bodies.num_held == 7
        for wire in reversed(wires):
            wire.send(body[-10:])
        assert [(await wire.answer()).status for wire in wires] == [200] * 8
        assert bodies.num_bytes == bodies.num_held == 0


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
async def test_a_bomb(backend: FakeBackend, text: Text, encoding: bytes) -> None:
    """Is refused at the limit of a body, and meanwhile others are answered."""
    pack = zlib.compressobj(9, wbits=31 if encoding == b"gzip" else 15)
    data = b"".join(pack.compress(bytes(1 << 20)) for _ in range(400)) + pack.flush()
    assert len(data) < 1 << 20
    async with served(backend, text) as server:
        bodies, longest = server.front.bodies, 0.0
        wires = [
            await server.connect(
                post(body=data, headers=b"Content-Encoding: " + encoding + b"\r\n")
            )
            for _ in range(4)
        ]
        asking = [asyncio.create_task(wire.answer()) for wire in wires]
        loop = asyncio.get_running_loop()
        most = 0
        while not all(task.done() for task in asking):
            start = loop.time()
            await asyncio.sleep(0)
            longest = max(longest, loop.time() - start)
            most = max(most, bodies.num_bytes)
        assert [task.result().kind for task in asking] == ["request_too_large"] * 4
        assert longest < 1
        assert most <= 4 * (bodies.most + (1 << 18))
        assert (await server.ask(get())).status == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("trickle", [False, True])
async def test_a_body_has_a_deadline(
    backend: FakeBackend, text: Text, path: bytes, trickle: bool
) -> None:
    """For all of it, not for each byte."""
    async with served(backend, text, client_body_timeout_s=0.5) as server:
        wire = await server.connect(announce(1000, path))
        asking = asyncio.create_task(wire.answer())
        while not asking.done():
            await asyncio.sleep(0.05)
            if trickle:
                wire.send(b" ")
        answer = asking.result()
        assert (answer.status, answer.kind) == (408, "request_timeout")
        assert answer.headers["connection"] == "close"
        assert isinstance(answer.json["error"], dict) == path.startswith(b"/v1/")
        await until(lambda: not server.front.bodies.num_open)


async def test_a_paused_body_has_a_deadline(backend: FakeBackend, text: Text) -> None:
    async with served(backend, text, BUDGET, client_body_timeout_s=1.0) as server:
        wires = [await server.connect(announce(90_000) + b" " * 80_000) for _ in range(6)]
        await until(lambda: server.front.bodies.num_held)
        assert {(await wire.answer()).status for wire in wires} == {408}


async def test_a_slow_body_makes_room(backend: FakeBackend, text: Text) -> None:
    """For those that wait for memory; without them it may take its time."""
    async with served(backend, text, BUDGET) as server:
        bodies = server.front.bodies
        bodies.slow_s = 0.3
        slow = [await server.connect(announce(90_000) + b" " * 70_000) for _ in range(2)]
        await until(lambda: bodies.num_bytes == 140_000)
        await asyncio.sleep(0.5)
        assert bodies.num_open == 2
        quick = await server.connect(announce(90_000))
        await until(lambda: bodies.num_open == 3)
        quick.send(padded(90_000))
        assert (await quick.answer()).status == 200
        answer = await slow[0].answer()
        assert answer.status == 408
        assert "others waited for memory" in json.dumps(answer.json)


async def test_continue_is_sent_when_the_body_is_wanted(backend: FakeBackend, text: Text) -> None:
    async with served(backend, text) as server:
        expecting = b"Expect: 100-continue\r\n"
        wire = await server.connect(announce(len(HELLO), headers=expecting))
        assert (await wire.head())[0] == 100
        wire.send(HELLO)
        assert (await wire.answer()).status == 200
        for path, length, status in ((b"/no", 10, 404), (b"/generate", 1 << 40, 413)):
            assert (await server.ask(announce(length, path, expecting))).status == status
        wire = await server.connect(b"POST /no" + HEAD + b"Content-Length: 0\r\n\r\n")
        assert (await wire.answer()).status == 404
