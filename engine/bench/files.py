"""Adapters from files through the exchange: from a request to its first token, in an idle engine."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from engine.adapters.exchange import Exchange
from engine.adapters.ref import AdapterRef
from engine.adapters.tiers import HostRegion
from engine.bench.adapters import Folders
from engine.bench.report import Loaded
from engine.bench.timing import wall
from engine.bench.workload import Workload
from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import AdapterImageRef, Request

Ask = Callable[[AdapterImageRef], list[Request]]  # one request with an adapter, for one token


def load_files(
    engine: Engine, config: EngineConfig, region: HostRegion, workload: Workload, ask: Ask
) -> Loaded:
    """Writes the workload's `files` adapters of its first rank and asks for one after the other.

    The exchange takes the whole region over: what lay there is lost.
    """
    with tempfile.TemporaryDirectory(prefix="lorax-bench-") as name:
        root = Path(name)
        rank = workload.ranks[0][0]
        folders = Folders(engine.layout, rank, workload.targets, workload.seed + 1)
        for number in range(workload.files):
            folders.write(root / f"a{number}", number)
        adapters = replace(
            config.adapters, adapter_root=(name,), adapter_id=None, preloaded_adapter_ids=()
        )
        config = replace(config, adapters=adapters)
        return asyncio.run(_load(engine, config, region, workload.files, ask))


async def _load(
    engine: Engine, config: EngineConfig, region: HostRegion, number: int, ask: Ask
) -> Loaded:
    exchange = Exchange(config, engine.layout, region)
    staged: list[float] = []
    first_token: list[float] = []
    warm: list[float] = []
    size = 0
    try:
        for index in range(number):
            start = time.perf_counter()
            with await exchange.acquire(AdapterRef((f"a{index}",), "local")) as lease:
                staged.append(time.perf_counter() - start)
                wall(engine, ask(lease.image))
                first_token.append(time.perf_counter() - start)
                warm.append(wall(engine, ask(lease.image)))
                size = lease.image.data_bytes
    finally:
        await exchange.close()
    typical = statistics.median(staged)
    return Loaded(
        adapters=number,
        bytes_each=size,
        first_token_ms=statistics.median(first_token) * 1000,
        warm_first_token_ms=statistics.median(warm) * 1000,
        staged_ms=typical * 1000,
        bytes_per_s=size / typical,
    )
