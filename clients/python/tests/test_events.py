"""Streams, whatever the network makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from clients.python.tests.conftest import Ask, Chunks
from lorax.errors import (
    AdapterNotFoundError,
    EngineDeadError,
    IncompleteGenerationError,
    ServerUnreachableError,
    UnknownError,
)
from lorax.events import EventReader

# LF, CRLF and CR; comments; several lines of data; U+2028, which is no end of a line; a character of four bytes.
RAW = (
    b"\xef\xbb\xbfdata: one\n\n"
    b": keep-alive\n\n"
    b"event: x\r\ndata:two\r\ndata: 2\r\n\r\n"
    b"data: a\rdata: b\r\r"
    b"id: 3\ndata\n\n\n\n" + "data: \u2028\x85 😀 data:\n\n".encode() + b"data: never ended\n"
)
EVENTS = [b"one", b"two\n2", b"a\nb", b"", "\u2028\x85 😀 data:".encode()]


def read(*pieces: bytes) -> list[bytes]:
    reader = EventReader()
    return [data for piece in pieces for data in reader.feed(piece)]


def test_every_split_gives_the_same_events() -> None:
    assert read(RAW) == EVENTS
    assert read(*[RAW[at : at + 1] for at in range(len(RAW))]) == EVENTS
    for at in range(len(RAW)):
        for length in range(4):
            assert read(RAW[:at], b"", RAW[at : at + length], RAW[at + length :]) == EVENTS


@pytest.mark.parametrize("piece", [b"data: 123456789", b"data: 1234\n", b"x" * 9])
def test_the_size_of_an_event_is_bounded(piece: bytes) -> None:
    reader = EventReader(max_event=8 + len(b"data: "))
    assert list(reader.feed(b"data: 1\n\n" * 20)) == [b"1"] * 20
    with pytest.raises(IncompleteGenerationError, match="14 bytes"):
        for _ in range(4):
            list(reader.feed(piece))


# -- through the clients


def event(text: str, whole: str | None = None) -> bytes:
    token = {"id": 5, "text": text, "logprob": -0.5, "special": False}
    answer = {"token": token, "generated_text": whole, "details": None}
    return b"data:" + json.dumps(answer, ensure_ascii=False).encode() + b"\n\n"


STREAM = event("Grüße\u2028") + event("😀") + event("!", "Grüße\u2028😀!")


def streamed(asking: Callable[..., Ask], *pieces: bytes | Exception) -> Any:
    ask = asking(lambda request: httpx.Response(200, stream=Chunks(*pieces)))
    return ask(lambda client: client.generate_stream("x"))


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_a_stream(asking: Callable[..., Ask], size: int) -> None:
    pieces = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    parts = await streamed(asking, *pieces, b"data: [DONE]\n\n")
    assert [part.token.text for part in parts] == ["Grüße\u2028", "😀", "!"]
    assert [part.generated_text for part in parts] == [None, None, "Grüße\u2028😀!"]


@pytest.mark.parametrize("rest", [b"", b"data: [DONE]\n\n", event("!", "!")[:-2]])
async def test_a_stream_that_ends_early(asking: Callable[..., Ask], rest: bytes) -> None:
    with pytest.raises(IncompleteGenerationError):
        await streamed(asking, event("a"), rest)


async def test_an_error_in_a_stream(asking: Callable[..., Ask]) -> None:
    failure = b'data:{"error":"the engine died","error_type":"engine_dead"}\n\n'
    with pytest.raises(EngineDeadError, match="the engine died"):
        await streamed(asking, event("a"), failure)


async def test_an_error_instead_of_a_stream(asking: Callable[..., Ask]) -> None:
    body = {"error": "no adapter 'x'", "error_type": "adapter_not_found", "field": "adapter_id"}
    ask = asking(lambda request: httpx.Response(404, json=body))
    with pytest.raises(AdapterNotFoundError) as caught:
        await ask(lambda client: client.generate_stream("x", adapter_id="x"))
    assert (caught.value.status, caught.value.field) == (404, "adapter_id")


async def test_a_broken_connection(asking: Callable[..., Ask]) -> None:
    with pytest.raises(ServerUnreachableError, match="reset"):
        await streamed(asking, event("a"), httpx.ReadError("connection reset"))


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"token": 1}', b"\xff"])
async def test_an_event_that_is_no_answer(asking: Callable[..., Ask], data: bytes) -> None:
    """The connection is closed: its rest is of no use."""
    body = Chunks(b"data: " + data + b"\n\n", event("a", "a"))
    ask = asking(lambda request: httpx.Response(200, stream=body))
    with pytest.raises(UnknownError, match="not an answer"):
        await ask(lambda client: client.generate_stream("x"))
    assert body.closed
