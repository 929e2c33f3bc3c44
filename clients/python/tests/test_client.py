"""What both clients send, and how they treat connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from clients.python.tests.conftest import Ask
from lorax import AsyncClient, Client, MergedAdapters
from lorax import client as client_module
from lorax.errors import ServerTimeoutError, ServerUnreachableError, ValidationError
from lorax.types import ResponseFormat

ANSWER = [{"generated_text": "so"}]


class Recorder:
    """Answers every request alike, and keeps it."""

    def __init__(self, answer: Any = ANSWER, failures: list[Exception] | None = None) -> None:
        self.answer = answer
        self.failures = failures or []
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.failures:
            raise self.failures.pop()
        return httpx.Response(200, json=self.answer)

    @property
    def body(self) -> Any:
        return json.loads(self.requests[-1].content)


async def test_a_request(asking: Callable[..., Ask]) -> None:
    recorder = Recorder()
    ask = asking(recorder, headers={"X-One": "1"}, cookies={"session": "s"}, api_key="sk-1")
    response = await ask(
        lambda client: client.generate(
            "Hi", "org/a@v2", temperature=0.5, stop_sequences=["\n"], priority=-1
        )
    )
    assert response.generated_text == "so"
    request = recorder.requests[0]
    assert (request.method, str(request.url)) == ("POST", "http://lorax")
    assert request.headers["authorization"] == "Bearer sk-1"
    assert request.headers["x-one"] == "1" and request.headers["cookie"] == "session=s"
    assert recorder.body == {
        "inputs": "Hi",
        "stream": False,
        "parameters": {
            "adapter_id": "org/a@v2",
            "do_sample": False,
            "ignore_eos_token": False,
            "return_full_text": False,
            "stop": ["\n"],
            "temperature": 0.5,
            "watermark": False,
            "details": True,
            "decoder_input_details": False,
            "priority": -1,
        },
    }


async def test_merged_adapters_and_formats(asking: Callable[..., Ask]) -> None:
    """A schema is sent as it is, with its nulls."""
    recorder = Recorder()
    ask = asking(recorder)
    merged = MergedAdapters(ids=["a", "b"], weights=[0.5, 0.5])
    schema = {"enum": [None, "x"], "const": None}
    await ask(
        lambda client: client.generate(
            "x", merged_adapters=merged, response_format={"type": "json_object", "schema": schema}
        )
    )
    parameters = recorder.body["parameters"]
    assert parameters["merged_adapters"] == {"ids": ["a", "b"], "weights": [0.5, 0.5]}
    assert parameters["response_format"] == {"type": "json_object", "schema": schema}
    for given in (ResponseFormat(type="text"), {"type": "regex", "regex": "a+"}):
        await ask(lambda client, given=given: client.generate("x", response_format=given))
        sent = recorder.body["parameters"]["response_format"]
        assert sent == ({"type": "text"} if isinstance(given, ResponseFormat) else given)


async def test_embeddings_and_classes(asking: Callable[..., Ask]) -> None:
    recorder = Recorder({"embeddings": [0.5, 1.0]})
    ask = asking(recorder)
    assert (await ask(lambda client: client.embed("x"))).embeddings == [0.5, 1.0]
    assert recorder.body == {"inputs": "x", "parameters": {}}
    await ask(lambda client: client.embed("x", adapter_id="a", api_token="t"))
    assert recorder.body["parameters"] == {"adapter_id": "a", "api_token": "t"}
    entity = {"entity_group": "PER", "score": 0.9, "word": "ann", "start": 0, "end": 3}
    recorder.answer = [entity]
    assert (await ask(lambda client: client.classify("Ann"))).entities == [entity]
    recorder.answer = [[entity], []]
    found = await ask(lambda client: client.classify_batch(["Ann", "x"]))
    assert [one.entities for one in found] == [[entity], []]
    assert recorder.body == {"inputs": ["Ann", "x"]}
    assert [request.url.path for request in recorder.requests] == [
        "/embed",
        "/embed",
        "/classify",
        "/classify_batch",
    ]


@pytest.mark.parametrize("base", ["http://h/path", "http://h/path/"])
def test_a_base_url_with_a_path(base: str) -> None:
    """A prompt goes to the base URL itself, as with lorax-client: gateways count on it."""
    recorder = Recorder()
    client = Client(base, session=httpx.Client(transport=httpx.MockTransport(recorder)))
    client.generate("x")
    client.health()
    assert [str(request.url) for request in recorder.requests] == [base, "http://h/path/health"]


@pytest.mark.parametrize("base", ["", "h:3000", "ftp://h", "http://", "http://h:port"])
def test_a_wrong_base_url(base: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValidationError, match="base_url"):
            kind(base)


def test_a_session_of_another_library() -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValidationError, match="session"):
            kind("http://h", session=object())


async def test_secrets_stay_out_of_texts(asking: Callable[..., Ask]) -> None:
    error = httpx.ReadError("broken")
    transport = httpx.MockTransport(Recorder(failures=[error]))
    client = Client(
        "http://user:pass-1@h", session=httpx.Client(transport=transport), api_key="sk-1"
    )
    with pytest.raises(ServerUnreachableError) as caught:
        client.generate("x", api_token="t-1")
    parameters = repr(client_module.calls.Parameters(api_token="t-1", cache_salt="salt-1"))
    for text in (str(caught.value), repr(client), parameters):
        assert not any(secret in text for secret in ("pass-1", "sk-1", "t-1", "salt-1"))


@pytest.mark.parametrize("secret", ["sk-1\n", "sk-1\x00"])
async def test_keys_that_cannot_be_sent(counted: tuple[str, list[Any]], secret: str) -> None:
    url, _ = counted
    for options in ({"api_key": secret}, {"headers": {"x-api-key": secret}}):
        async with AsyncClient(url, **options) as client:
            for call in (client.generate("x"), anext(client.generate_stream("x"))):
                with pytest.raises(ValidationError, match="cannot be sent") as caught:
                    await call
                assert "sk-1" not in str(caught.value)
                assert caught.value.__suppress_context__


async def test_numbers_that_cannot_be_sent(asking: Callable[..., Ask]) -> None:
    merged = MergedAdapters(ids=["a"], weights=[float("nan")])
    with pytest.raises(ValidationError, match="cannot be sent"):
        await asking(Recorder())(lambda client: client.generate("x", merged_adapters=merged))


# -- connections


async def test_connecting_is_tried_again(
    asking: Callable[..., Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RETRY_SECONDS", 0.001)
    for failures, tries in ((2, 3), (3, 3), (0, 1)):
        recorder = Recorder(failures=[httpx.ConnectError("refused")] * failures)
        ask = asking(recorder)
        if failures < 3:
            assert (await ask(lambda client: client.generate("x"))).generated_text == "so"
        else:
            with pytest.raises(ServerUnreachableError, match="refused"):
                await ask(lambda client: client.generate("x"))
        assert len(recorder.requests) == tries


@pytest.mark.parametrize("error", [httpx.ReadError("reset"), httpx.ReadTimeout("slow")])
async def test_what_was_sent_is_not_sent_again(
    asking: Callable[..., Ask], error: Exception
) -> None:
    recorder = Recorder(failures=[error])
    kind = (
        ServerTimeoutError if isinstance(error, httpx.TimeoutException) else ServerUnreachableError
    )
    with pytest.raises(kind):
        await asking(recorder)(lambda client: client.generate("x"))
    assert len(recorder.requests) == 1


@pytest.mark.parametrize(("timeout", "connect"), [(60, 10), (3, 3), (None, 10)])
async def test_timeouts(asking: Callable[..., Ask], timeout: float | None, connect: float) -> None:
    recorder = Recorder()
    await asking(recorder, timeout=timeout)(lambda client: client.generate("x"))
    sent = recorder.requests[0].extensions["timeout"]
    assert (sent["connect"], sent["read"]) == (connect, timeout)


@pytest.fixture
async def silent() -> AsyncIterator[str]:
    """The address of a server that takes requests and never answers."""
    released = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await released.wait()
        writer.close()

    server = await asyncio.start_server(wait, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    released.set()
    server.close()
    await server.wait_closed()


async def test_a_silent_server(silent: str) -> None:
    async with AsyncClient(silent, timeout=0.5) as client:
        with pytest.raises(ServerTimeoutError, match=r"sent nothing for 0\.5 s"):
            await client.generate("x")
        with pytest.raises(ServerTimeoutError):
            await anext(client.generate_stream("x"))
    with Client(silent, timeout=0.5) as client:
        with pytest.raises(ServerTimeoutError):
            await asyncio.to_thread(client.generate, "x")
        assert not await asyncio.to_thread(client.health)


async def test_nobody_listens() -> None:
    async with AsyncClient("http://127.0.0.1:1", max_session_retries=0) as client:
        with pytest.raises(ServerUnreachableError, match="failed"):
            await client.info()
        assert not await client.health()


@pytest.fixture
async def counted() -> AsyncIterator[tuple[str, list[Any]]]:
    """A server, and the connections that it has seen."""
    seen: list[Any] = []

    async def answer(request: web.Request) -> web.Response:
        if request.transport not in seen:
            seen.append(request.transport)
        return web.json_response(ANSWER)

    app = web.Application()
    app.router.add_post("/", answer)
    async with TestServer(app) as server:
        yield str(server.make_url("/")), seen


async def test_connections_are_kept(counted: tuple[str, list[Any]]) -> None:
    url, seen = counted
    async with AsyncClient(url) as client:
        for _ in range(5):
            await client.generate("x")
    assert len(seen) == 1
    with Client(url) as client:
        for _ in range(5):
            await asyncio.to_thread(client.generate, "x")
    assert len(seen) == 2


async def test_one_client_in_several_event_loops(counted: tuple[str, list[Any]]) -> None:
    url, seen = counted
    client = AsyncClient(url)

    async def once() -> str:
        async with client:
            return (await client.generate("x")).generated_text

    for _ in range(3):
        assert await asyncio.to_thread(asyncio.run, once()) == "so"
    assert len(seen) == 3


async def test_a_closed_client(counted: tuple[str, list[Any]]) -> None:
    url, _ = counted
    async with AsyncClient(url) as client:
        await client.generate("x")
    with pytest.raises(RuntimeError, match="closed"):
        await client.generate("x")
    with Client(url) as other:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        other.generate("x")


def test_a_given_session_stays_open() -> None:
    session = httpx.Client(transport=httpx.MockTransport(Recorder()))
    with Client("http://h", session=session):
        pass
    assert not session.is_closed
    session.close()
