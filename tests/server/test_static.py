"""A server with --merge-adapter-weights: one model, by its id or by the adapter's; every other name is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp.test_utils import TestClient
from msgspec.structs import replace
from transformers import AutoConfig, AutoModelForCausalLM

from engine.config import AdapterConfig, EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig
from engine.messages import AdapterText, MergedAdapter
from engine.models import adapter_layout
from engine.process import LocalBackend, ProcessBackend
from engine.server.app import build_app
from engine.server.text import Text
from tests.engine_info import INFO
from tests.server.conftest import OwnServer
from tests.server.fake import FakeBackend, Start
from tools.adapters import write_adapter
from tools.tiny import write_model

MERGED = MergedAdapter("s3://loras/sql@abc", "s3", "s3://", "loras/sql", "abc123")
CONFIG = EngineConfig(adapters=AdapterConfig(adapter_id=MERGED.name, merge_adapter_weights=True))


@pytest.fixture
async def client(start: Start, backend: FakeBackend) -> TestClient:
    backend.info = replace(INFO, merged_adapter=MERGED)
    return await start(config=CONFIG)


async def ask(
    client: TestClient, adapter: str | None, source: str | None = None, **more: Any
) -> tuple[int, Any, Any]:
    """Status, body and headers."""
    given = {"adapter_id": adapter, "adapter_source": source, "max_new_tokens": 2, **more}
    async with client.post("/generate", json={"inputs": "x", "parameters": given}) as response:
        return response.status, await response.json(), response.headers


@pytest.mark.parametrize(
    ("adapter", "source"),
    [
        (None, None),
        ("s3://loras/sql@abc", None),
        ("s3://loras/sql@abc123", None),
        ("s3://loras/sql@abc", "S3"),
        ("loras/sql@abc123", "s3"),
    ],
)
async def test_the_adapter_is_the_model(
    client: TestClient, backend: FakeBackend, adapter: str | None, source: str | None
) -> None:
    """No adapter is acquired, and the answer says which one it has."""
    status, _, headers = await ask(client, adapter, source)
    assert status == 200
    assert headers["x-adapter-id"] == (adapter or MERGED.name)
    assert headers["x-adapter-source"] == "s3" and headers["x-model-id"] == INFO.model_id
    assert not backend.acquired
    (request,) = backend.requests
    assert request.adapter is None and request.cache_salt == b""
    metrics = await (await client.get("/metrics")).text()
    assert re.search(r'adapter="(s3://)?loras/sql@abc(123)?"', metrics)


async def test_the_id_of_the_base_model_is_the_model(
    client: TestClient, backend: FakeBackend
) -> None:
    for name in (INFO.model_id, MERGED.name):
        body = {"model": name, "prompt": "x", "max_tokens": 1}
        async with client.post("/v1/completions", json=body) as response:
            assert response.status == 200
            assert ("x-adapter-id" in response.headers) == (name == MERGED.name)
    assert [request.adapter for request in backend.requests] == [None, None]


@pytest.mark.parametrize(
    ("adapter", "source"),
    [
        ("base", None),
        ("__base_model__", None),
        ("other", None),
        ("s3://loras/sql", None),
        ("s3://loras/sql@def", None),
        ("s3://loras/sql@abc", "hub"),
        ("loras/sql@abc", None),
        ("loras/sql@abc", "hub"),
    ],
)
async def test_other_names_are_refused(
    client: TestClient, backend: FakeBackend, adapter: str, source: str | None
) -> None:
    status, body, _ = await ask(client, adapter, source)
    assert (status, body["error_type"], body["field"]) == (404, "adapter_not_found", "adapter_id")
    assert f"{adapter!r} is not served" in body["error"] and repr(MERGED.name) in body["error"]
    assert "start the server without --merge-adapter-weights" in body["error"]
    openai = {"model": adapter, "prompt": "x", "max_tokens": 1}
    if source is None:
        async with client.post("/v1/completions", json=openai) as response:
            error = (await response.json())["error"]
        assert (response.status, error["code"]) == (404, "model_not_found")
    assert not backend.acquired and not backend.requests


async def test_merges_and_aliases_are_refused(client: TestClient, backend: FakeBackend) -> None:
    merge = {"ids": [MERGED.name], "weights": [1.0]}
    status, body, _ = await ask(client, None, merged_adapters=merge)
    assert status == 404 and "is not served" in body["error"]
    alias = {"adapter_id": MERGED.name}
    async with client.put("/adapters/aliases/prod", json=alias) as response:
        body = await response.json()
    assert response.status == 422 and MERGED.name in body["error"]
    assert "without --merge-adapter-weights" in body["error"]
    assert not backend.acquired


async def test_lists(client: TestClient, backend: FakeBackend) -> None:
    listed = (await (await client.get("/v1/models")).json())["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [
        (INFO.model_id, None),
        (MERGED.name, INFO.model_id),
    ]
    for name, status in ((INFO.model_id, 200), (MERGED.name, 200), ("base", 404)):
        assert (await client.get(f"/v1/models/{name}")).status == status
    info = await (await client.get("/info")).json()
    assert info["merged_adapter"] == {
        "name": MERGED.name,
        "source": "s3",
        "revision": "abc123",
    }


async def test_its_text_is_the_models(start: Start, backend: FakeBackend) -> None:
    """Its chat template, for every request."""
    own = AdapterText(b"own", template="word1 {{ messages[0].content }}")
    backend.info = replace(INFO, merged_adapter=replace(MERGED, text=own))
    client = await start(config=CONFIG)
    prompts = []
    for name in (INFO.model_id, MERGED.name):
        body = {"model": name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        assert (await client.post("/v1/chat/completions", json=body)).status == 200
        prompts.append(backend.requests[-1].tokens)
    assert prompts == [await backend.text.encode("word1 x", special=False)] * 2


@pytest.mark.parametrize("kind", [ProcessBackend, LocalBackend])
async def test_the_whole(kind: Any, tmp_path: Path) -> None:
    """A checkpoint, an adapter, processes: the text of the merged model is that of the adapter, and not the base's."""
    folder, root = tmp_path / "model", tmp_path / "adapters"
    write_model(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    base = ModelConfig(model_id=str(folder), dtype="float32")
    layout, _, _ = adapter_layout(base)
    write_adapter(root / "one", layout, rank=4, seed=1, scale=0.2)
    texts: dict[bool, list[str]] = {}
    for merges in (False, True):
        adapters = AdapterConfig(
            adapter_id="one" if merges else None,
            merge_adapter_weights=merges,
            adapter_source="local",
            adapter_root=(str(root),),
            host_cache_gb=0.01,
        )
        config = EngineConfig(
            base,
            adapters,
            SchedulerConfig(max_total_tokens=64),
            MemoryConfig(cpu_memory_gb=0.05, num_threads=1),
        )
        backend = await kind.start(config)
        text = Text(str(folder))
        client: TestClient = TestClient(OwnServer(build_app(backend, text, config)))
        try:
            await client.start_server()
            found = [await ask(client, name, max_new_tokens=8) for name in ("one", None)]
            assert [status for status, _, _ in found] == [200, 200]
            texts[merges] = [body["generated_text"] for _, body, _ in found]
            status, body, _ = await ask(client, "two")
            assert status == 404 and ("'one' is merged" in body["error"]) == merges
            merge = {"ids": ["one"], "weights": [0.5]}
            assert (await ask(client, None, merged_adapters=merge))[0] == (404 if merges else 200)
            assert not merges or not await backend.adapters()
        finally:
            await client.close()
            text.close()
            await backend.close()
    assert texts[True] == [texts[False][0]] * 2
    assert texts[False][0] != texts[False][1]
