"""Many random requests at a server, and what is left behind: memory, tasks, files, blocks, rows, leases.

    python -m tools.soak [--requests 20000] [--json FILE]

The server is the real one (front here, engine and exchange in their processes) on a tiny random model, with 200
adapters of random ranks and targets that neither the arena nor the host tier can hold together. Clients come over HTTP:
plain and streamed, native and OpenAI, cancelled midway, with bad parameters, with adapters that do not exist or do
not fit. Resident memory after the last request is compared with that after request 5,000 for each process. Exits with
1 if it grew by more than 2 %, or if anything else is not as it was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from aiohttp import web

from engine.config import AdapterConfig, EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig
from engine.models import adapter_layout
from engine.process import ProcessBackend
from engine.server.app import build_app
from engine.server.text import Text
from tools.adapters import write_adapter
from tools.levels import files_of, memory_of, threads_of
from tools.tiny import prompt, write_model

ADAPTERS = 200
CLIENTS = 24
WARM_UP = 50  # requests
GROWTH = 0.02  # of memory, that counts as none
EARLY = 5000  # of 20,000: the share of the run after which memory must not grow
TARGETS = [["q_proj", "v_proj"], ["gate_proj", "down_proj"], ["o_proj"], None]


def write_adapters(folder: Path, model: ModelConfig) -> None:
    layout, _, _ = adapter_layout(model)
    chosen = random.Random(0)
    for i in range(ADAPTERS):
        rank = chosen.choice([2, 4, 8, 16, 32])
        write_adapter(folder / f"a{i}", layout, rank, seed=i, targets=TARGETS[i % len(TARGETS)])
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{}")
    (folder / "broken" / "adapter_model.safetensors").write_bytes(b"nothing")


def request(chosen: random.Random) -> tuple[str, dict[str, object], str]:
    """(route, body, what kind of request it is)."""
    parameters: dict[str, object] = {"max_new_tokens": chosen.randint(1, 16)}
    if chosen.random() < 0.7:
        # Popular ones and a long tail.
        parameters["adapter_id"] = f"a{min(int(chosen.expovariate(1 / 40)), ADAPTERS - 1)}"
        parameters["adapter_source"] = "local"
    if chosen.random() < 0.3:
        parameters |= {"temperature": 0.8, "top_p": 0.9, "seed": chosen.randrange(1 << 60)}
    if chosen.random() < 0.1:
        parameters |= {"details": True, "decoder_input_details": True}
    text, kind = prompt(chosen), chosen.random()
    if kind < 0.05:
        return "/generate", {"inputs": text, "parameters": parameters | {"top_p": 7}}, "bad"
    if kind < 0.10:
        unknown = {"adapter_id": chosen.choice(["nowhere", "broken", "../etc"])}
        parameters |= unknown | {"adapter_source": "local"}
        return "/generate", {"inputs": text, "parameters": parameters}, "bad"
    if kind < 0.40:
        parameters.pop("decoder_input_details", None)
        return "/generate_stream", {"inputs": text, "parameters": parameters}, "stream"
    if kind < 0.55:
        parameters.pop("decoder_input_details", None)
        parameters |= {"max_new_tokens": 100, "ignore_eos_token": True}
        return "/generate_stream", {"inputs": text, "parameters": parameters}, "cancelled"
    if kind < 0.75:
        model = parameters.get("adapter_id", "base")
        body = {"model": model, "prompt": text, "max_tokens": 8, "stream": kind < 0.65}
        return "/v1/completions", body | {"adapter_source": "local"}, "openai"
    return "/generate", {"inputs": text, "parameters": parameters}, "plain"


async def send(session: aiohttp.ClientSession, seed: int, seen: Counter[str]) -> None:
    chosen = random.Random(seed)
    route, body, kind = request(chosen)
    async with session.post(route, json=body) as response:
        if kind == "cancelled":
            for _ in range(chosen.randint(0, 6)):
                await response.content.readline()
            response.close()
        else:
            await response.read()
        seen[f"{kind} {response.status}"] += 1


class Levels:
    """What the server holds now."""

    def __init__(self, backend: ProcessBackend) -> None:
        self.backend = backend
        processes = {"front": None, **backend.pids}
        self.processes = {role: psutil.Process(pid) for role, pid in processes.items()}

    def memory(self) -> dict[str, int]:
        """Bytes of resident memory of each process."""
        return memory_of(self.processes)

    async def idle(self) -> dict[str, object]:
        """Everything that must be as it was when nothing is open. Waits for the last cancellations first."""
        for _ in range(100):
            await asyncio.sleep(0.1)
            stats = self.backend.stats
            leases = sum(adapter.leases for adapter in await self.backend.adapters())
            if not (stats.waiting or stats.running or leases):
                break
        return {
            "tasks": len(asyncio.all_tasks()),
            **{f"files of {role}": count for role, count in files_of(self.processes).items()},
            "threads of shard": threads_of(self.processes)["shard"],
            "blocks in use": stats.total_blocks - stats.free_blocks,
            "rows in use": stats.running,
            "slots in use": stats.in_use,
            "leases": leases,
        }


def settings(folder: Path) -> EngineConfig:
    """Far too little room: 200 adapters share 2 MiB of arena and 8 MiB of host tier, 16 rows share 50 blocks."""
    return EngineConfig(
        model=ModelConfig(model_id=str(folder / "model"), dtype="float32", load_format="dummy"),
        adapters=AdapterConfig(
            adapter_root=(str(folder),),
            adapter_memory_fraction=0.2,
            adapter_cycle_time_s=0.1,
            host_cache_gb=8 / 1024,
        ),
        scheduler=SchedulerConfig(
            max_batch_size=16, max_total_tokens=200, max_batch_total_tokens=800
        ),
        memory=MemoryConfig(cpu_memory_gb=12 / 1024),
    )


@asynccontextmanager
async def serving(config: EngineConfig) -> AsyncIterator[tuple[ProcessBackend, str]]:
    """The server, and its address."""
    backend = await ProcessBackend.start(config)
    text = Text(config.model.model_id)
    runner = web.AppRunner(build_app(backend, text, config), handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield backend, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
        text.close()
        await backend.close()


async def run_all(
    address: str, count: int, levels: Levels, seen: Counter[str]
) -> dict[str, dict[str, int]]:
    """Sends `count` requests; memory after the early share of them and after the last."""
    numbers, memory = iter(range(count)), {}

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            await send(session, number, seen)
            if "early" not in memory and seen.total() >= count * EARLY / 20_000:
                memory["early"] = levels.memory()

    async with aiohttp.ClientSession(address) as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
        return {**memory, "last": levels.memory()}


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    write_model(folder / "model")
    config = settings(folder)
    write_adapters(folder, config.model)
    seen = Counter[str]()
    async with serving(config) as (backend, address):
        levels = Levels(backend)
        await run_all(address, WARM_UP, levels, Counter())
        before = await levels.idle()
        start = time.perf_counter()
        memory = await run_all(address, args.requests, levels, seen)
        seconds = time.perf_counter() - start
        after, stats = await levels.idle(), backend.stats
    early, last = memory["early"], memory["last"]
    return {
        "requests": dict(sorted(seen.items())),
        "requests a second": args.requests / seconds,
        "placements": stats.placements,
        "evictions": stats.evictions,
        "preemptions": stats.preemptions,
        "memory early, MB": {role: size / 1e6 for role, size in early.items()},
        "memory last / early": {role: last[role] / early[role] for role in early},
        "memory last / early, all": sum(last.values()) / sum(early.values()),
        "idle before": before,
        "idle after": after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = asyncio.run(measure(args, Path(name)))
    for what, value in found.items():
        print(f"{what}: {value}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))
    grown = found["memory last / early, all"] > 1 + GROWTH
    sys.exit(int(grown or found["idle before"] != found["idle after"]))


if __name__ == "__main__":
    main()
