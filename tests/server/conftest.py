from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.web import AppRunner
from openai import AsyncOpenAI

from engine.config import EngineConfig, ServerConfig
from engine.server.app import build_app, runner_of
from engine.server.front import FRONT
from engine.server.text import Text
from tests.server.fake import FakeBackend, Start, write_sentencepiece, write_tokenizer


class OwnServer(TestServer):
    """aiohttp's test server on our protocol."""

    async def _make_runner(self, **options: object) -> AppRunner:
        return runner_of(self.app, **options)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def text(folder: Path) -> Iterator[Text]:
    made = Text(str(folder))
    yield made
    made.close()


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Text]:
    made = Text(str(write_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))))
    yield made
    made.close()


@pytest.fixture
def backend(text: Text) -> FakeBackend:
    return FakeBackend(text)


@pytest.fixture
def config() -> EngineConfig:
    return EngineConfig(server=ServerConfig(max_best_of=4))


@pytest.fixture
async def start(backend: FakeBackend, text: Text, config: EngineConfig) -> AsyncIterator[Start]:
    """Starts a server on the backend; at the end nothing may be left of any request."""
    before = asyncio.all_tasks()
    clients: list[TestClient] = []

    async def make(
        server: dict[str, object] | None = None, config: EngineConfig = config, **options: object
    ) -> TestClient:
        chosen = dataclasses.replace(config.server, **(server or {}))
        app = build_app(backend, text, dataclasses.replace(config, server=chosen), **options)
        client: TestClient = TestClient(OwnServer(app))
        await client.start_server()
        clients.append(client)
        return client

    yield make
    async with asyncio.timeout(5):
        while any(client.app[FRONT].places.num_open for client in clients) or backend.open:
            await asyncio.sleep(0.005)
    backend.check_idle()
    for client in clients:
        await client.close()
    own = {asyncio.current_task()}
    async with asyncio.timeout(5):  # the client closes its streams in tasks of its own
        while asyncio.all_tasks() - before - own:
            await asyncio.sleep(0.005)


@pytest.fixture
async def client(start: Start) -> TestClient:
    return await start()


@pytest.fixture
async def openai(client: TestClient) -> AsyncIterator[AsyncOpenAI]:
    made = AsyncOpenAI(base_url=str(client.make_url("/v1")), api_key="EMPTY", max_retries=0)
    yield made
    await made.close()
