"""What a child process need not know: API keys, which only the front checks, and the tokens that it has no use for."""

from __future__ import annotations

import os
from dataclasses import replace

from engine.config import EngineConfig
from engine.settings import settings

FRONT_ONLY = ("api_key", "api_keys_file")  # settings


def for_exchange(config: EngineConfig) -> EngineConfig:
    """The configuration that the exchange receives."""
    return replace(config, server=replace(config.server, api_key=(), api_keys_file=None))


def for_shard(config: EngineConfig) -> EngineConfig:
    """The configuration that the shard receives. It needs the token of a source only for the adapter that it merges."""
    config = for_exchange(config)
    if config.adapters.merge_adapter_weights:
        return config
    return replace(config, adapters=replace(config.adapters, predibase_api_token=None))


def environment() -> dict[str, str]:
    """The environment variables that a child inherits."""
    private = {name for one in settings() if one.name in FRONT_ONLY for name in one.environment}
    return {name: value for name, value in os.environ.items() if name not in private}
