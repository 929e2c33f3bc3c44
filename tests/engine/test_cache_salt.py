"""The prefix cache of a real engine: `cached_tokens` tells of prompts with the same salt only."""

from __future__ import annotations

from pathlib import Path

from aiohttp.test_utils import TestClient

from engine.config import EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig, ServerConfig
from engine.process import LocalBackend
from engine.server.app import build_app
from engine.server.text import Text
from tests.server.conftest import OwnServer
from tools.tiny import WORDS, write_model

PROMPT = " ".join(WORDS[:100])


async def test_cached_tokens(tmp_path: Path) -> None:
    """By tenant and by `cache_salt`: the first of each finds nothing, the second its own."""
    write_model(tmp_path / "model")
    keys = tmp_path / "keys.yaml"
    keys.write_text("[{name: a, key: a1}, {name: a, key: a2}, {name: b, key: b1}]")
    config = EngineConfig(
        model=ModelConfig(model_id=str(tmp_path / "model"), dtype="float32", load_format="dummy"),
        scheduler=SchedulerConfig(max_total_tokens=200),
        memory=MemoryConfig(cpu_memory_gb=0.05, num_threads=1),
        server=ServerConfig(api_keys_file=str(keys), prefix_cache_per_tenant=True),
    )
    text, backend = Text(str(tmp_path / "model")), await LocalBackend.start(config)
    client: TestClient = TestClient(OwnServer(build_app(backend, text, config)))
    await client.start_server()

    async def cached(key: str, salt: str | None) -> int:
        body = {"prompt": PROMPT, "max_tokens": 1} | ({"cache_salt": salt} if salt else {})
        response = await client.post("/v1/completions", json=body, headers={"x-api-key": key})
        return int((await response.json())["usage"]["prompt_tokens_details"]["cached_tokens"])

    try:
        alone = [(key, salt) for key in ("a1", "b1") for salt in (None, "x", "y")]
        assert [await cached(*who) for who in alone] == [0] * 6
        found = {await cached(*who) for who in alone}
        assert len(found) == 1 and min(found) > 50
        assert await cached("a2", None) == min(found), "another key of the tenant"
    finally:
        await client.close()
        await backend.close()
        text.close()
