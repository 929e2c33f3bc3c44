"""The client against a server: events, answers, and every failure as a typed error."""

from __future__ import annotations

import pytest

from engine.errors import (
    AdapterForbidden,
    AdapterNotFound,
    EngineDead,
    GenerationError,
    LoraxError,
    error_classes,
)
from lorax_cli.client import Client, error_from
from tests.cli.conftest import FakeServer

CLOSED = "http://127.0.0.1:9"


async def test_answers(server: FakeServer) -> None:
    async with Client(server.url + "/", token="mine") as client:
        assert await client.health()
        assert await client.info() == {"model_id": "fake"}
        answer = await client.generate("Hi", {"max_new_tokens": 3})
    assert answer["generated_text"] == "hello world"
    assert server.bodies[-1] == {"inputs": "Hi", "parameters": {"max_new_tokens": 3}}
    assert server.headers[-1]["Authorization"] == "Bearer mine"
    async with Client(server.url, token="mine", api_key="key") as client:
        await client.generate("Hi", {})
    assert server.headers[-1]["Authorization"] == "Bearer key"
    assert server.headers[-1]["x-adapter-token"] == "mine"


async def test_stream(server: FakeServer) -> None:
    async with Client(server.url) as client:
        events = [event async for event in client.stream("Hi", {})]
    assert [event.text for event in events] == ["hello", " world", "</s>"]
    assert events[-1].special and events[-1].generated_text == "hello world"
    assert events[-1].details == {"finish_reason": "eos_token"}
    assert "Authorization" not in server.headers[-1]


async def test_typed_errors(server: FakeServer) -> None:
    async with Client(server.url) as client:
        with pytest.raises(AdapterForbidden, match="not yours"):
            await client.generate("Hi", {"adapter_id": "secret"})
        with pytest.raises(AdapterNotFound, match="no such adapter"):
            [event async for event in client.stream("Hi", {"adapter_id": "missing"})]
        got = []
        with pytest.raises(GenerationError, match="it broke"):
            async for event in client.stream("Hi", {"adapter_id": "broken"}):
                got.append(event.text)
        assert got == ["hello", " world"]


async def test_no_server_there() -> None:
    async with Client(CLOSED) as client:
        assert not await client.health()
        with pytest.raises(EngineDead, match=CLOSED):
            await client.info()
    async with Client("nonsense") as client:
        with pytest.raises(EngineDead, match="nonsense"):
            await client.info()


@pytest.mark.parametrize("cls", error_classes().values(), ids=lambda cls: cls.__name__)
def test_error_types_are_distinct(cls: type[LoraxError]) -> None:
    body = {"error": "x", "error_type": cls.error_type}
    assert type(error_from(body, cls.status, "url")) is cls
    openai = {"error": {"message": "x", "type": cls.error_type}}
    assert type(error_from(openai, cls.status, "url")) is cls


def test_unknown_errors() -> None:
    assert "502" in error_from(None, 502, "url").message
    assert "502" in error_from({"message": "x"}, 502, "url").message
