"""Reports of requests to the operator's server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from engine.server import request_reports
from engine.server.front import FRONT
from engine.server.text import Text
from tests.server.fake import FakeBackend, Start


class Receiver:
    """Refuses the first `failures` reports."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.failures = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def take(self, request: web.Request) -> web.Response:
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            return web.Response(status=500)
        self.reports.append(await request.json())
        return web.Response()


@pytest.fixture
async def receiver() -> AsyncIterator[tuple[Receiver, str]]:
    made, app = Receiver(), web.Application()
    app.router.add_post("/log", made.take)
    server = TestServer(app)
    await server.start_server()
    yield made, str(server.make_url("/log"))
    made.gate.set()
    await server.close()


async def test_every_answer_is_reported(
    start: Start,
    backend: FakeBackend,
    text: Text,
    receiver: tuple[Receiver, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request_reports, "PAUSE_S", 0.001)
    made, url = receiver
    made.failures = 2
    client = await start({"request_logger_url": url})
    asked = {
        "inputs": "Hello",
        "parameters": {"adapter_id": "me/lora", "api_token": "s3cret", "details": True},
    }
    first = await client.post("/generate", json=asked, headers={"x-predibase-tenant": "acme"})
    said = await first.json()
    asked = {"prompt": ["a", "b"], "model": "base", "max_tokens": 3, "stream": True}
    await (await client.post("/v1/completions", json=asked)).read()
    await client.post("/generate", json={"inputs": ""})  # refused: not reported
    await client.close()
    one, two = made.reports
    prompts = [text.written(request.tokens) for request in backend.requests]
    assert one == {
        "tokens": said["details"]["generated_tokens"],
        "adapter_id": "me/lora",
        "input": prompts[0],
        "output": said["generated_text"],
        "api_token": None,
        "model_id": client.app[FRONT].backend.info.model_id,
        "tenant": "acme",
    }
    assert (two["input"], two["tokens"], two["tenant"]) == (prompts[1:], 6, "")
    assert len(two["output"]) == 2


async def test_a_receiver_that_is_slow_delays_nobody(
    start: Start, receiver: tuple[Receiver, str], caplog: pytest.LogCaptureFixture
) -> None:
    made, url = receiver
    made.gate.clear()
    client = await start({"request_logger_url": url})
    most = request_reports.MAX_WAITING
    for _ in range(most + 5):
        assert (await client.post("/generate", json={"inputs": "x"})).status == 200
    assert f"{most} reports of requests wait" in caplog.text
    made.gate.set()
    await client.close()
    assert most <= len(made.reports) <= most + 1


async def test_a_receiver_that_is_gone(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_reports, "PAUSE_S", 0.001)
    client = await start({"request_logger_url": "http://127.0.0.1:9/log"})
    assert (await client.post("/generate", json={"inputs": "x"})).status == 200
    await client.close()
    assert "could not be sent" in caplog.text
