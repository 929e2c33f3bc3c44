"""Requests that are not valid HTTP, or hardly: the status, the shape, the log. Never a 500, never a library's name."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator

import pytest

from engine.config import ServerConfig
from engine.logs import LIBRARIES, configure_logging
from engine.server.responses import SERVER
from engine.server.text import Text
from tests.server.fake import FakeBackend
from tests.server.wire import HEAD, HELLO, Served, announce, get, post, served

CLOSE = b"Connection: close\r\n"
CHUNKED = b"POST /generate" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKED_V1 = CHUNKED.replace(b"/generate", b"/v1/completions")
LONG = b"a" * 9000

BAD = 400, "malformed_request"
CASES: dict[str, tuple[list[bytes], int, str]] = {
    "control character": ([get(headers=b"Authorization: Bearer se\x01cret\r\n")], *BAD),
    "control character, OpenAI": (
        [post(b"/v1/completions", headers=b"Authorization: Bearer se\x01cret\r\n")],
        *BAD,
    ),
    "no colon": ([get(headers=b"secret\r\n")], *BAD),
    "space before the name": ([get(headers=b" secret: a\r\n")], *BAD),
    "no host": ([b"GET /health HTTP/1.1\r\n\r\n"], *BAD),
    "two hosts": ([get(headers=b"Host: secret\r\n")], *BAD),
    "length below 0": ([announce(-1)], *BAD),
    "length that is no number": ([get(headers=b"Content-Length: secret\r\n")], *BAD),
    "length beyond 64 bits": ([announce(10**30)], *BAD),
    "length beyond the limit": ([announce(10**12)], 413, "request_too_large"),
    "two lengths": ([post(headers=b"Content-Length: 3\r\n")], *BAD),
    "length and chunked": ([post(headers=b"Transfer-Encoding: chunked\r\n")], *BAD),
    "unknown coding": ([get(headers=b"Transfer-Encoding: secret\r\n")], *BAD),
    "bad chunk": ([CHUNKED + b"secret\r\n\r\n"], *BAD),
    "bad chunk later": ([CHUNKED, b"secret\r\n\r\n"], *BAD),
    "bad end of a chunk": ([CHUNKED_V1, b"3\r\nabcsecret\r\n"], *BAD),
    "unknown method": ([get().replace(b"GET", b"SECRET")], 501, "unknown_method"),
    "CONNECT": ([b"CONNECT secret:80" + HEAD + b"\r\n"], 501, "unknown_method"),
    "wrong method": ([get().replace(b"GET", b"DELETE")], 405, "method_not_allowed"),
    "HTTP/0.9": ([b"GET /health\r\n\r\n"], 505, "unsupported_version"),
    "HTTP/2": ([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], 505, "unsupported_version"),
    "HTTP/2.0": ([get().replace(b"/1.1", b"/2.0")], 505, "unsupported_version"),
    "HTTP/7": ([get().replace(b"/1.1", b"/7.3")], 505, "unsupported_version"),
    "garbage": ([b"\x00\x01secret\xff\r\n\r\n"], *BAD),
    "words": ([b"secret words\r\n\r\n"], *BAD),
    "TLS": ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200))], *BAD),
    "long header": ([get(b"/v1/models", b"A: " + LONG + b"\r\n")], 431, "headers_too_large"),
    "long header in parts": (
        [b"GET /health" + HEAD + b"A: ", LONG, b"\r\n\r\n"],
        431,
        "headers_too_large",
    ),
    "many headers": ([get(headers=b"A: b\r\n" * 200)], 431, "headers_too_large"),
    "much of headers": (
        [get(headers=(b"A: " + LONG[:8000] + b"\r\n") * 100)],
        431,
        "headers_too_large",
    ),
    "long URL": ([get(b"/" + LONG)], 414, "url_too_long"),
    "long URL that goes on": ([b"GET /v1/" + LONG], 414, "url_too_long"),
    "URL of bytes": ([get(b"/se\xffcret")], *BAD),
    "URL of no path": ([get(b"secret")], *BAD),
    "route of bytes": ([get(b"/a%ff%0aFAKE")], 404, "not_found"),
    "expectation": ([post(headers=b"Expect: \xe9\r\n")], 417, "expectation_failed"),
    "expectation, no route": ([post(b"/no", headers=b"Expect: \xe9\r\n")], 417, "expectation_failed"),
    "expectation, OpenAI": (
        [post(b"/v1/completions", headers=b"Expect: secret\r\n")],
        417,
        "expectation_failed",
    ),
    "encoding": ([post(headers=b"Content-Encoding: secret\r\n")], 415, "unsupported_encoding"),
    "encoding that is not installed": (
        [post(b"/v1/completions", headers=b"Content-Encoding: br\r\n")],
        415,
        "unsupported_encoding",
    ),
    "not gzip": ([post(headers=b"Content-Encoding: gzip\r\n")], *BAD),
    "old websocket": ([get(headers=b"Sec-WebSocket-Key1: secret\r\n")], *BAD),
    "more than its length": ([post(headers=CLOSE) + b"secret\r\n\r\n"], *BAD),
}  # fmt: skip


def of_request(line: dict[str, str]) -> bool:
    """Whether it is the one line that every request gets."""
    return line["target"] == "engine.server.request_log" and line["level"] == "INFO"


@pytest.fixture
async def server(backend: FakeBackend, text: Text) -> AsyncIterator[Served]:
    async with served(backend, text) as found:
        yield found


@pytest.fixture
def unchanged() -> Iterator[None]:
    """The loggers, afterwards."""
    loggers = [logging.getLogger(name) for name in ("engine", *LIBRARIES)]
    before = [(one, one.handlers[:], one.level, one.propagate) for one in loggers]
    yield
    for one, handlers, level, propagate in before:
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


def log_all() -> None:
    """As the program would, in JSON, at the lowest level."""
    configure_logging(ServerConfig(json_output=True, log_level="debug"))


@pytest.mark.parametrize("name", CASES)
async def test_not_quite_http(
    server: Served, unchanged: None, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    log_all()
    parts, status, kind = CASES[name]
    wire = await server.connect()
    for part in parts:
        wire.send(part)
        await asyncio.sleep(0.02)
    answer = await wire.answer()
    assert (answer.status, answer.kind) == (status, kind)
    assert answer.headers["server"] == SERVER
    assert answer.headers["content-type"].startswith("application/json")
    assert isinstance(answer.json["error"], dict) == any(b"/v1/" in part for part in parts)
    assert (await server.ask(get())).status == 200
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {line["level"] for line in lines if not of_request(line)} <= {"DEBUG"}
    assert len([line for line in lines if f" {status} " in line["message"]]) <= 2
    told = "".join(line["message"] for line in lines).lower()
    assert "secret" not in told and "aiohttp" not in told


GOOD: dict[str, tuple[list[bytes], int]] = {
    "expectation": ([announce(len(HELLO), headers=b"Expect: 100-continue\r\n"), HELLO], 200),
    "empty expectation": ([post(headers=b"Expect: \r\n")], 200),
    "expectation in HTTP/1.0": (
        [post(headers=b"Expect: \xe9\r\n").replace(b"/1.1", b"/1.0")],
        200,
    ),
    "HTTP/1.0": ([b"GET /health HTTP/1.0\r\n\r\n"], 200),
    "upgrade": ([get(headers=b"Connection: Upgrade\r\nUpgrade: websocket\r\n")], 200),
    "upgrade with a body": (
        [post(headers=b"Connection: Upgrade\r\nUpgrade: websocket\r\n")],
        200,
    ),
    "upgrade to h2c": ([get(headers=b"Connection: Upgrade\r\nUpgrade: h2c\r\n")], 200),
    "preflight of bytes": (
        [
            b"OPTIONS /generate"
            + HEAD
            + b"Origin: \xe9\r\nAccess-Control-Request-Method: POST\r\n"
            + b"Access-Control-Request-Headers: \xe9\r\n\r\n"
        ],
        403,
    ),
    "headers of bytes": ([get(headers=b"Origin: \xe9\r\nCookie: \xe9\r\nAccept: \xe9\r\n")], 200),
    "type of bytes": ([post(headers=b"Content-Type: \xe9; charset=\xe9\r\n")], 200),
    "token of bytes": ([post(headers=b"Authorization: Bearer \xe9\r\n")], 422),
    "host of bytes": ([get().replace(b"Host: x", b"Host: \xe9")], 200),
    "slow": ([post()[at : at + 20] for at in range(0, len(post()), 20)], 200),
    "chunked": ([CHUNKED, b"%x\r\n" % len(HELLO), HELLO, b"\r\n0\r\n\r\n"], 200),
    "a body that nobody reads": ([get(headers=b"Content-Length: 1000\r\n")], 200),
}


@pytest.mark.parametrize("name", GOOD)
async def test_unusual_but_valid(
    server: Served, unchanged: None, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    log_all()
    parts, status = GOOD[name]
    wire = await server.connect()
    for part in parts:
        wire.send(part)
        await asyncio.sleep(0.02)
    found, headers = await wire.head()
    if found == 100:
        found, headers = await wire.head()
    assert (found, headers["server"]) == (status, SERVER)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {line["level"] for line in lines if not of_request(line)} <= {"DEBUG"}


async def test_requests_in_one_packet(server: Served) -> None:
    """Are answered in order, each as if it had come alone."""
    alone = [await server.ask(one) for one in (get(), get(b"/no"), get(b"/info"))]
    wire = await server.connect(get() + get(b"/no") + get(b"/info"))
    together = [await wire.answer() for _ in alone]
    assert [one.body for one in together] == [one.body for one in alone]
    assert [one.status for one in together] == [200, 404, 200]


async def test_garbage_behind_a_request(server: Served, backend: FakeBackend) -> None:
    """The request is answered, then the garbage."""
    backend.gate = asyncio.Event()
    wire = await server.connect(post())
    while not backend.open:
        await asyncio.sleep(0.005)
    wire.send(b"garbage\r\n\r\n")
    await asyncio.sleep(0.05)
    backend.gate.set()
    assert (await wire.answer()).status == 200
    assert (await wire.answer()).status == 400
    assert await wire.rest() == b""


async def test_an_early_answer_is_not_lost(server: Served) -> None:
    """The client still sends a body that nobody wants, and reads afterwards."""
    wire = await server.connect(announce(8 << 20, b"/nowhere"))
    try:
        for _ in range(128):
            wire.send(bytes(1 << 16))
            await wire.writer.drain()
    except ConnectionError:
        pytest.fail("closed before the answer could be read")
    answer = await wire.answer()
    assert (answer.status, answer.headers["connection"]) == (404, "close")
