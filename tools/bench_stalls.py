"""Do running streams feel it when somebody's cold adapter is fetched and parsed? Both in one run, turn by turn.

    python -m tools.bench_stalls [--rounds 5] [--json FILE]

Streams decode without pause on a CPU engine of SmolLM2-135M's shape. In every second window another request names an
adapter that nobody has used: its source answers after five seconds, its 300 MB are parsed, staged and placed, and its
first token comes. The gaps between the streams' tokens in those windows are compared with the gaps in the others,
which are as long.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.adapters.exchange import Exchange
from engine.adapters.ref import AdapterRef
from engine.adapters.registry import make_sources
from engine.adapters.sources import AdapterFiles, Source, Version
from engine.adapters.tiers import HostRegion
from engine.config import AdapterConfig, EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig
from engine.errors import LoraxError, from_wire
from engine.messages import Request, SamplingParams, Update
from engine.models import adapter_layout
from engine.ops.layout import ShardLayout
from engine.process import Parts, ProcessBackend
from tools.adapters import write_adapter
from tools.bench_peft import smollm2_135m

DELAY_S = 5.0
RANK = 256  # of all seven projections: 312 MB in float32


class Delayed:
    """A source that takes its time."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def fetch(self, version: Version, token: str | None, progress: Any) -> AdapterFiles:
        time.sleep(DELAY_S)
        return self._source.fetch(version, token, progress)


def slow_exchange(
    config: EngineConfig, layout: ShardLayout, region: HostRegion, **more: Any
) -> Exchange:
    """The exchange's process builds this one (see `Parts`)."""
    sources = make_sources(config, region.size * 8)
    slow = {name: Delayed(source) for name, source in sources.items()}
    return Exchange(config, layout, region, sources=slow, **more)


class Stream:
    """One request, whose gaps between tokens are noted."""

    def __init__(self, gaps: list[tuple[float, float]]) -> None:
        self._gaps = gaps
        self._last = 0.0
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, backend: ProcessBackend, request: Request) -> None:
        """To its end."""
        backend.submit(request, self)
        await self._end

    def take(self, update: Update) -> None:
        now = time.perf_counter()
        if self._last and update.tokens:
            self._gaps.append((now, now - self._last))
        self._last = now
        if update.error is not None:
            self._end.set_exception(from_wire(update.error))
        elif update.finish is not None:
            self._end.set_result(None)

    def on_engine_lost(self, error: LoraxError) -> None:
        if not self._end.done():  # it was cancelled
            self._end.set_exception(error)


class Streams:
    """Requests that never end, and the times of their tokens."""

    def __init__(self, backend: ProcessBackend, count: int, tokens: int = 3000) -> None:
        self.backend, self._tokens = backend, tokens
        self.gaps: list[tuple[float, float]] = []  # (when, seconds since the token before)
        self.tasks = [asyncio.create_task(self._run(i)) for i in range(count)]

    async def _run(self, number: int) -> None:
        for turn in range(1_000_000):
            request = Request(
                f"s{number}-{turn}", [5 + number] * 16, SamplingParams(), self._tokens, []
            )
            await Stream(self.gaps).run(self.backend, request)

    def p(self, share: float, windows: list[tuple[float, float]]) -> float:
        inside = sorted(g for at, g in self.gaps if any(a <= at <= b for a, b in windows))
        return inside[min(len(inside) - 1, int(share * len(inside)))]


def copy_adapter(source: Path, target: Path, alpha: int) -> None:
    """A copy with a scale of its own, so that it is another adapter."""
    shutil.copytree(source, target)
    config = target / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": alpha}))


async def cold_request(backend: ProcessBackend, name: str) -> None:
    """From the name of an unknown adapter to its first token."""
    lease = await backend.acquire(AdapterRef((name,), "local"), None)
    request = Request(
        id=f"cold-{name}",
        tokens=[7] * 16,
        sampling=SamplingParams(),
        max_new_tokens=1,
        eos_token_ids=[],
        adapter=lease.image,
    )
    await Stream([]).run(backend, request)
    lease.release()


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    smollm2_135m().save_pretrained(folder / "model")
    model = ModelConfig(model_id=str(folder / "model"), dtype="float32", load_format="dummy")
    layout, _, _ = adapter_layout(model)
    num_bytes = write_adapter(folder / "cold", layout, RANK, seed=0)
    config = EngineConfig(
        model=model,
        adapters=AdapterConfig(
            adapter_root=(str(folder),), adapter_memory_fraction=0.5, host_cache_gb=1.0
        ),
        scheduler=SchedulerConfig(max_total_tokens=4096),
        memory=MemoryConfig(cpu_memory_gb=2.0),
    )
    backend = await ProcessBackend.start(config, Parts(exchange="tools.bench_stalls:slow_exchange"))
    streams = Streams(backend, args.streams)
    await asyncio.sleep(10)
    quiet: list[tuple[float, float]] = []
    loading: list[tuple[float, float]] = []
    stages: dict[str, float] = {}
    for turn in range(args.rounds):
        start = time.perf_counter()
        copy_adapter(folder / "cold", folder / f"cold{turn}", alpha=turn + 1)
        begin = time.perf_counter()
        await cold_request(backend, f"cold{turn}")
        end = time.perf_counter()
        loading.append((begin, end))
        status = [s for s in await backend.adapters() if s.name == f"cold{turn}"]
        stages = status[0].seconds if status else {}
        await backend.unload(f"cold{turn}")
        await asyncio.sleep(1.0)
        begin = time.perf_counter()
        await asyncio.sleep(end - start)
        quiet.append((begin, time.perf_counter()))
    for task in streams.tasks:
        task.cancel()
    await asyncio.gather(*streams.tasks, return_exceptions=True)
    await backend.close()
    found = {
        "adapter, MB": num_bytes / 1e6,
        "cold request to first token, s": sum(b - a for a, b in loading) / len(loading),
        **{f"last {stage}, s": seconds for stage, seconds in stages.items()},
        "tokens in loading windows": sum(
            1 for at, _ in streams.gaps if any(a <= at <= b for a, b in loading)
        ),
    }
    for share in (0.5, 0.9, 0.99):
        name = f"p{share * 100:g} gap, ms"
        found[f"{name}, quiet"] = streams.p(share, quiet) * 1e3
        found[f"{name}, loading"] = streams.p(share, loading) * 1e3
        found[f"{name}, ratio"] = streams.p(share, loading) / streams.p(share, quiet)
    return found


def report(found: dict[str, float], file: Path | None) -> None:
    """Prints the figures, and writes them as JSON into `file`."""
    for what, value in found.items():
        print(f"{what:40} {value:10.2f}")
    if file:
        file.write_text(json.dumps(found, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = asyncio.run(measure(args, Path(name)))
    report(found, args.json)


if __name__ == "__main__":
    main()
