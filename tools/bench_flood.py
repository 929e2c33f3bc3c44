"""A cold flood: many requests for as many new adapters at once, from a source whose every call is slow.

    python -m tools.bench_flood [--adapters 100] [--call-s 2] [--streams 4] [--json FILE]

Prints the time until the last request has its first token, the limit that the source sets (the calls of one load, in as
many rounds as the parallel loads need), and the rate of running streams before and during the flood. The engine is a
model of SmolLM2-135M's shape with random weights.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.adapters.exchange import Exchange
from engine.adapters.loader import FETCH_THREADS
from engine.adapters.ref import AdapterRef
from engine.adapters.registry import make_sources
from engine.adapters.sources import AdapterFiles, Source, Version
from engine.adapters.tiers import HostRegion
from engine.config import AdapterConfig, EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig
from engine.models import adapter_layout
from engine.ops.layout import ShardLayout
from engine.process import Parts, ProcessBackend
from tools.adapters import write_adapter
from tools.bench_peft import smollm2_135m
from tools.bench_stalls import Streams, cold_request, copy_adapter, report

CALLS = "LORAX_BENCH_CALL_S"  # the exchange's process reads it
RANK = 4
ALLOWANCE = 1.3  # times the limit of the source


class Slow:
    """A source whose every call takes CALLS seconds more."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._call_s = float(os.environ[CALLS])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        time.sleep(self._call_s)
        return self._source.resolve(ref, token)

    def fetch(self, version: Version, token: str | None, progress: Any) -> AdapterFiles:
        time.sleep(self._call_s)
        return self._source.fetch(version, token, progress)


def slow_exchange(
    config: EngineConfig, layout: ShardLayout, region: HostRegion, **more: Any
) -> Exchange:
    """The exchange's process builds this one (see `Parts`)."""
    sources = make_sources(config, region.size * 8)
    slow = {name: Slow(source) for name, source in sources.items()}
    return Exchange(config, layout, region, sources=slow, **more)


def rate(streams: Streams, begin: float, end: float) -> float:
    """Tokens per second of all streams in a window."""
    return sum(begin <= at <= end for at, _ in streams.gaps) / (end - begin)


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    smollm2_135m().save_pretrained(folder / "model")
    model = ModelConfig(model_id=str(folder / "model"), dtype="float32", load_format="dummy")
    layout, _, _ = adapter_layout(model)
    num_bytes = write_adapter(folder / "a0", layout, RANK, seed=0)
    for number in range(1, args.adapters):
        copy_adapter(folder / "a0", folder / f"a{number}", alpha=number + 1)
    config = EngineConfig(
        model=model,
        adapters=AdapterConfig(
            adapter_root=(str(folder),), adapter_memory_fraction=0.5, host_cache_gb=2.0
        ),
        scheduler=SchedulerConfig(max_total_tokens=4096),
        memory=MemoryConfig(cpu_memory_gb=4.0),
    )
    os.environ[CALLS] = str(args.call_s)
    backend = await ProcessBackend.start(config, Parts(exchange="tools.bench_flood:slow_exchange"))
    streams = Streams(backend, args.streams)
    await asyncio.sleep(5)
    quiet = time.perf_counter()
    await asyncio.sleep(args.quiet_s)
    begin = time.perf_counter()
    await asyncio.gather(*(cold_request(backend, f"a{n}") for n in range(args.adapters)))
    end = time.perf_counter()
    for task in streams.tasks:
        task.cancel()
    await asyncio.gather(*streams.tasks, return_exceptions=True)
    before, during = rate(streams, quiet, begin), rate(streams, begin, end)
    await backend.close()
    calls = (
        3  # resolve, fetch, and a second fetch that sees whether the files were replaced meanwhile
    )
    limit = calls * args.call_s * math.ceil(args.adapters / FETCH_THREADS)
    return {
        "adapters": args.adapters,
        "adapter, MB": num_bytes / 1e6,
        "last first token, s": end - begin,
        "limit of the source, s": limit,
        "allowed, s": ALLOWANCE * limit,
        "streams before, tokens/s": before,
        "streams during, tokens/s": during,
        "share kept": during / before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--call-s", type=float, default=2.0)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--quiet-s", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = asyncio.run(measure(args, Path(name)))
    report(found, args.json)


if __name__ == "__main__":
    main()
