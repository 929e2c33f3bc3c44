"""Do running streams feel it when new grammars are compiled? Turns of each kind, one after another.

    python -m tools.time_grammars [--streams 64] [--schemas 200] [--rounds 5] [--json FILE]

Streams decode without pause in the engine's process on the demo model. In a turn of *grammars*, as many requests of
one token come at once, each with a JSON schema that nobody has sent before: checked in this process, as the front
does, then compiled in the engine's. In a turn of *requests* the same requests come without a grammar. The gaps between
the streams' tokens are compared with those of *quiet* turns, which are as long as those of grammars. The goal: with
grammars, the 99th percentile is at most 1.5 times the quiet one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from engine.bench.quantiles import quantile
from engine.config import EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig
from engine.grammar import of_json_schema
from engine.messages import Request, SamplingParams
from engine.process import ProcessBackend
from engine.server.grammars import Checks
from tests.engine.schemas import schema
from tools.bench_stalls import Stream, Streams, report

GOAL = 1.5
KINDS = ("quiet", "requests", "grammars")
REST_S = 0.5  # between two turns
WARM_S = 3.0


def new_grammars() -> Iterator[str]:
    """Grammars of random schemas, each once."""
    seen: set[str] = set()
    seed = 0
    while True:
        grammar = of_json_schema(schema(random.Random(seed)))
        seed += 1
        if grammar not in seen:
            seen.add(grammar)
            yield grammar


class Turns:
    """Turns of every kind beside the streams, and when they were."""

    def __init__(self, backend: ProcessBackend, eos: int) -> None:
        self.windows: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        self._backend, self._eos = backend, eos
        self._checks = Checks()
        self._number = 0

    async def take(self, kind: str, grammars: list[str], seconds: float) -> float:
        """Seconds of the turn; a quiet one takes `seconds`."""
        begin = time.perf_counter()
        if kind == "quiet":
            await asyncio.sleep(seconds)
        else:
            await asyncio.gather(*map(self._ask, grammars))
        end = time.perf_counter()
        self.windows[kind].append((begin, end))
        return end - begin

    async def _ask(self, grammar: str) -> None:
        if grammar:
            await self._checks.check(grammar, "response_format")
        self._number += 1
        request = Request(
            id=f"r{self._number}",
            tokens=[5, 6, 7, 8],
            sampling=SamplingParams(),
            max_new_tokens=1,
            eos_token_ids=[self._eos],
            grammar=grammar,
        )
        await Stream([]).run(self._backend, request)


async def measure(args: argparse.Namespace) -> dict[str, float]:
    config = EngineConfig(
        model=ModelConfig(),
        scheduler=SchedulerConfig(max_batch_size=args.streams + 16),
        memory=MemoryConfig(cpu_memory_gb=1.0, num_threads=args.threads),
    )
    backend = await ProcessBackend.start(config)
    grammars = new_grammars()
    streams = Streams(backend, args.streams, args.tokens)
    turns = Turns(backend, eos=2)
    await asyncio.sleep(WARM_S)
    await turns.take("grammars", [next(grammars)], 0)  # the tokenizer of the grammars is loaded
    turns.windows["grammars"].clear()
    load, took = os.getloadavg()[0], 2.0
    for _ in range(args.rounds):
        for kind in KINDS:
            asked = [next(grammars) if kind == "grammars" else "" for _ in range(args.schemas)]
            await asyncio.sleep(REST_S)
            seconds = await turns.take(kind, asked, took)
            took = seconds if kind == "grammars" else took
    for task in streams.tasks:
        task.cancel()
    await asyncio.gather(*streams.tasks, return_exceptions=True)
    await backend.close()
    return figures(streams, turns, load)


def figures(streams: Streams, turns: Turns, load: float) -> dict[str, float]:
    found = {"load average": load}
    for kind, windows in turns.windows.items():
        found[f"{kind}: seconds of a turn"] = statistics.median(b - a for a, b in windows)
        for share in (0.5, 0.9, 0.99):
            found[f"{kind}: p{share * 100:g} gap, ms"] = 1e3 * streams.p(share, windows)
    each = {kind: [streams.p(0.99, [one]) for one in turns.windows[kind]] for kind in KINDS}
    for kind in KINDS[1:]:
        ratios = [a / b for a, b in zip(each[kind], each["quiet"], strict=True)]
        found[f"{kind}: p99 / quiet, all turns"] = (
            found[f"{kind}: p99 gap, ms"] / found["quiet: p99 gap, ms"]
        )
        found[f"{kind}: p99 / quiet, median of rounds"] = quantile(sorted(ratios), 0.5)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--schemas", type=int, default=200, help="new ones in each turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--tokens", type=int, default=900, help="of a stream, before it begins anew"
    )
    parser.add_argument("--threads", type=int, help="of the engine; unset: one per core")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = asyncio.run(measure(args))
    report(found, args.json)
    sys.exit(int(found["grammars: p99 / quiet, median of rounds"] > GOAL))


if __name__ == "__main__":
    main()
