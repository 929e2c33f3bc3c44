"""Children do not know what only the front needs."""

from __future__ import annotations

import pytest

from engine.config import AdapterConfig, EngineConfig, ModelConfig, ServerConfig
from engine.process import ProcessBackend
from engine.process.private import for_shard
from tests.process.fakes import leases_of, parts


async def test_children_know_no_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(
        model=ModelConfig(model_id="echo", hub_token="of-the-hub"),
        adapters=AdapterConfig(host_cache_gb=0.001, predibase_api_token="of-predibase"),
        server=ServerConfig(api_key=("sk-flag",), api_keys_file="/secret/keys", log_level="error"),
    )
    monkeypatch.setenv("LORAX_API_KEY", "sk-variable")
    monkeypatch.setenv("API_KEYS_FILE", "/secret/keys")
    monkeypatch.setenv("OTHER", "is inherited")
    backend = await ProcessBackend.start(config, parts("TellingEngine", "TellingExchange"))
    try:
        shard = backend.info.model_id
        (exchange,) = set(await leases_of(backend)) - {"waiting"}
    finally:
        await backend.close()
    for known in (shard, exchange):
        assert "sk-" not in known and "/secret/keys" not in known
        assert "of-the-hub" in known and "is inherited" in known and '"log_level":"error"' in known
    assert "of-predibase" in exchange and "of-predibase" not in shard


def test_the_shard_reads_the_adapter_that_it_merges() -> None:
    adapters = AdapterConfig(predibase_api_token="of-predibase", merge_adapter_weights=True)
    config = for_shard(EngineConfig(adapters=adapters, server=ServerConfig(api_key=("sk-flag",))))
    assert config.adapters == adapters and config.server == ServerConfig()
