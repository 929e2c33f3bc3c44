"""A cold flood: many requests for as many new adapters at once, from a source whose every call is slow.

    python -m tools.bench_flood [--adapters 100] [--call-s 2] [--streams 4] [--json FILE]

Prints the time until the last request has its first token, and its ratio to the limit that the source sets: the calls
of one load, which are counted, in as many rounds as the parallel calls need. Prints the rate of running streams during
the flood, and its share of the mean rate before and after: texts grow and become slower, so either alone would mislead.
The engine is a model of SmolLM2-135M's shape with random weights. Exits with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

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

CALL_S = "LORAX_BENCH_CALL_S"  # the exchange's process reads these two
COUNT = "LORAX_BENCH_COUNT"  # a file that grows by a byte with each call
RANK = 4
MAX_RATIO = 1.3  # of the flood's time to the limit of the source
MIN_SHARE = {"cpu": 0.75, "cuda": 0.9}  # of the streams' rate
SETTLE_S = 5.0
RATIO, SHARE = "ratio of the time to the limit", "share of the rate kept"


class Slow:
    """A source whose every call takes CALL_S seconds more and is counted."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._call_s = float(os.environ[CALL_S])
        self._count = os.open(os.environ[COUNT], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def _wait(self) -> None:
        os.write(self._count, b".")
        time.sleep(self._call_s)

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        self._wait()
        return self._source.resolve(ref, token)

    def fetch(self, version: Version, token: str | None, progress: Any) -> AdapterFiles:
        self._wait()
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


def settings(folder: Path, args: argparse.Namespace) -> EngineConfig:
    """Writes the model and the adapters: one is loaded before the flood, to count its calls."""
    smollm2_135m().save_pretrained(folder / "model")
    model = ModelConfig(model_id=str(folder / "model"), dtype=args.dtype, load_format="dummy")
    layout, _, _ = adapter_layout(model)
    write_adapter(folder / "first", layout, RANK, seed=0)
    for number in range(args.adapters):
        copy_adapter(folder / "first", folder / f"a{number}", alpha=number + 1)
    return EngineConfig(
        model=model,
        adapters=AdapterConfig(
            adapter_root=(str(folder),), adapter_memory_fraction=0.5, host_cache_gb=2.0
        ),
        scheduler=SchedulerConfig(max_total_tokens=4096),
        memory=MemoryConfig(cpu_memory_gb=4.0),
    )


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    config, count = settings(folder, args), folder / "calls"
    os.environ[CALL_S], os.environ[COUNT] = str(args.call_s), str(count)
    backend = await ProcessBackend.start(config, Parts(exchange="tools.bench_flood:slow_exchange"))
    await cold_request(backend, "first")
    calls = count.stat().st_size
    streams = Streams(backend, args.streams)
    quiet: list[float] = []

    async def measure_quiet() -> None:
        await asyncio.sleep(SETTLE_S)
        begin = time.perf_counter()
        await asyncio.sleep(args.quiet_s)
        quiet.append(rate(streams, begin, time.perf_counter()))

    await measure_quiet()
    exchange = psutil.Process(backend.pids["exchange"])
    begin, busy = time.perf_counter(), sum(exchange.cpu_times()[:2])
    await asyncio.gather(*(cold_request(backend, f"a{n}") for n in range(args.adapters)))
    end, busy = time.perf_counter(), sum(exchange.cpu_times()[:2]) - busy
    calls_of_flood = count.stat().st_size - calls
    await measure_quiet()
    for task in streams.tasks:
        task.cancel()
    await asyncio.gather(*streams.tasks, return_exceptions=True)
    await backend.close()
    limit = calls * args.call_s * math.ceil(args.adapters / FETCH_THREADS)
    during = rate(streams, begin, end)
    return {
        "adapters": args.adapters,
        "calls of one load": calls,
        "calls of the flood, for each load": calls_of_flood / args.adapters,
        "processor time of each load, s": busy / args.adapters,
        "parallel calls": FETCH_THREADS,
        "limit of the source, s": limit,
        "last first token, s": end - begin,
        RATIO: (end - begin) / limit,
        "ratio, at most": MAX_RATIO,
        "streams before, tokens/s": quiet[0],
        "streams during, tokens/s": during,
        "streams after, tokens/s": quiet[1],
        SHARE: 2 * during / sum(quiet),
        "share, at least": MIN_SHARE[backend.info.device],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--call-s", type=float, default=2.0)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--quiet-s", type=float, default=20.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = asyncio.run(measure(args, Path(name)))
    report(found, args.json)
    missed = found[RATIO] > found["ratio, at most"] or found[SHARE] < found["share, at least"]
    sys.exit(int(missed))


if __name__ == "__main__":
    main()
