"""Adapters by name without an exchange: for commands, and for the adapter that is merged into the base model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from engine.adapters.ref import AdapterRef
from engine.adapters.registry import Registry, default_source, make_sources
from engine.adapters.sources import AdapterFiles, Progress, Source, Version
from engine.config import EngineConfig


@dataclass(frozen=True, slots=True)
class Found:
    """An adapter's source and version."""

    ref: AdapterRef  # in its source
    source: Source
    version: Version

    def fetch(self, progress: Progress = lambda done, total: None) -> AdapterFiles:
        """The files, open. Downloads missing ones. Raises AdapterError."""
        return self.source.fetch(self.version, None, progress)


def finder(config: EngineConfig, default: str | None = None) -> Callable[[str], Found]:
    """Finds adapters by name, as a server with this configuration does. Blocks, outside of an event loop.

    `default`: the source of names that have none; None: that of requests. Raises ConfigError.
    """
    sources = make_sources(config)
    registry = Registry(sources, default or default_source(config.adapters, sources))

    async def resolve(name: str) -> Found:
        asked: list[AdapterRef] = []

        async def ask(ref: AdapterRef) -> Version:
            assert ref.source is not None, "the registry resolves with one source at a time"
            asked.append(ref)
            return sources[ref.source].resolve(ref, None)

        version = await registry.resolve(AdapterRef.parse(name), ask)
        return Found(asked[-1], sources[version.source], version)

    return lambda name: asyncio.run(resolve(name))
