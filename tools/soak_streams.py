"""Hundreds of streams at once, of which some are left midway: nothing leaks, and the others are complete and right.

    python -m tools.soak_streams [--streams 512] [--seconds 60] [--json FILE]

The server is `lorax launch` on the demo model, with the base and its adapters in every batch. Each question is asked
alone first, at temperature 0 and not streamed. Then clients ask them in random order on four routes, streamed. A
quarter leave: before the answer begins, or after some of it. Every other answer must be the one that was given alone,
with its end and its usage. Before and after, what the processes hold is counted when nothing is open. A process beside
them asks for /health. Exits with 1 if anything is not so, or if the 99th percentile of /health is above
--health-p99-ms.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from engine.bench.quantiles import quantile
from tools.launched import DEMO, ROOT, launched
from tools.levels import files_of, memory_of, processes_of, threads_of
from tools.probe_health import HealthProbe
from tools.questions import ROUTES, Answer, Question

LEAVE = 0.25  # of the clients
GROWTH = 1.1  # of memory over the run, at most
SETTLE_S = 30.0
SHARES = (0.5, 0.9, 0.99, 1.0)
FAULTS_SHOWN = 20
CPU_MEMORY_GB = 0.5  # all of it is in use early, so that growth is a leak
SERVER = (
    *DEMO,
    *("--cpu-memory-gb", str(CPU_MEMORY_GB)),
    *("--max-concurrent-requests", "1024"),
    *("--num-threads", "1"),  # the clients need a core too
)


def questions(max_tokens: int) -> list[Question]:
    """The demo's prompts, to the base and every adapter on every route."""
    demo = json.loads((ROOT / "engine/demo/demo.json").read_text())
    prompts = [demo["base"]["prompt"], *(one["prompt"] for one in demo["adapters"].values())]
    models = [None, *demo["adapters"]]
    made = itertools.product(ROUTES, models, prompts)
    return [
        Question(route, model, prompt, max_tokens - index % 7)
        for index, (route, model, prompt) in enumerate(made)
    ]


async def alone(session: aiohttp.ClientSession, question: Question) -> Answer:
    """The answer, not streamed."""
    async with session.post(question.path(False), json=question.body(False)) as response:
        assert response.status == 200, await response.text()
        return question.whole(await response.json())


@dataclass
class Clients:
    """Streams at a server, and what came of them."""

    session: aiohttp.ClientSession
    expected: dict[Question, Answer]
    chosen: random.Random
    seen: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    tokens: int = 0  # of complete streams

    async def run(self, number: int, more: Callable[[], bool]) -> None:
        """`number` streams at once, each followed by another as long as there are `more`."""
        asked = list(self.expected)

        async def one_after_another() -> None:
            while more():
                await self._ask(self.chosen.choice(asked))

        await asyncio.gather(*(one_after_another() for _ in range(number)))

    async def _ask(self, question: Question) -> None:
        leaves, early = self.chosen.random() < LEAVE, self.chosen.random() < 0.3
        try:
            if leaves and early:
                async with asyncio.timeout(self.chosen.random()):
                    data = await self._read(question, None)
            else:
                data = await self._read(question, self.chosen.randint(1, 20) if leaves else None)
            if data is None:
                self.seen["left"] += 1
                return
            answer = question.streamed(data)
        except TimeoutError:
            self.seen["left early"] += 1
        except (ValueError, LookupError, aiohttp.ClientError) as error:
            self.seen["failed"] += 1
            self.faults.append(f"{question}: {error!r}")
        else:
            self.seen["complete"] += 1
            self.tokens += answer.output_tokens
            if answer != self.expected[question]:
                self.faults.append(f"{question}: {answer}, alone {self.expected[question]}")

    async def _read(self, question: Question, pieces: int | None) -> bytes | None:
        """The body of the stream; None if the client left after so many pieces of it."""
        async with self.session.post(question.path(True), json=question.body(True)) as response:
            if response.status != 200:
                raise ValueError(f"status {response.status}: {await response.text()}")
            data = bytearray()
            for count in itertools.count():
                if count == pieces:
                    response.close()
                    return None
                piece = await response.content.readany()
                if not piece:
                    return bytes(data)
                data += piece
        return None


@dataclass(frozen=True)
class Levels:
    """What a server holds when nothing is open."""

    session: aiohttp.ClientSession
    pid: int

    async def now(self) -> dict[str, object]:
        metrics = await self._get("/metrics?format=json")
        cache, info = await self._get("/cache"), await self._get("/info")
        adapters = (await self._get("/adapters"))["adapters"]
        processes = processes_of(self.pid)
        return {
            "waiting, running": (info["waiting"], info["running"]),
            "open requests": open_requests(metrics),
            "open requests of adapters": sum(one["requests"] for one in adapters),
            "KV blocks": value_of(metrics, "lorax_kv_blocks_used"),
            "adapters in use": cache["device"]["in_use"],
            "leased bytes": cache["host"]["leased_bytes"],
            "processes": len(processes),
            "descriptors": files_of(processes),
            "threads": threads_of(processes),
        }

    async def settled(self, wanted: Callable[[dict[str, object]], bool]) -> dict[str, object]:
        """The levels when they are what is wanted, or after a while."""
        deadline = time.monotonic() + SETTLE_S
        while not wanted(found := await self.now()) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        return found

    def memory(self) -> dict[str, int]:
        return memory_of(processes_of(self.pid))

    async def _get(self, path: str) -> Any:
        async with self.session.get(path) as response:
            return await response.json()


def value_of(metrics: dict[str, Any], name: str) -> float:
    """The sum of a metric over its labels."""
    samples = metrics.get(name, {"samples": []})["samples"]
    return sum(one["value"] for one in samples if not one["name"].endswith("_created"))


def open_requests(metrics: dict[str, Any]) -> float:
    """Requests that were counted, and neither succeeded nor failed."""
    ended = value_of(metrics, "lorax_request_success") + value_of(metrics, "lorax_request_failure")
    return value_of(metrics, "lorax_request_count") - ended


def is_idle(levels: dict[str, object]) -> bool:
    """Whether nothing is open."""
    open_now = levels["open requests"], levels["KV blocks"], levels["leased bytes"]
    return not any(open_now) and levels["waiting, running"] == (0, 0)


def more_than(number: int, seconds: float) -> Callable[[], bool]:
    """True for so many seconds, and until it was asked so many times."""
    numbers, end = itertools.count(), time.monotonic() + seconds
    return lambda: (next(numbers) < number) | (time.monotonic() < end)


async def soak(address: str, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of a run; `faults` is what was not as it must be."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(address, connector=connector, timeout=timeout) as session:
        asked = questions(args.max_tokens)
        expected = {one: await alone(session, one) for one in asked}
        levels, chosen = Levels(session, pid), random.Random(args.seed)
        await Clients(session, expected, chosen).run(args.streams, more_than(args.streams, 0))
        before, bytes_before = await levels.settled(is_idle), levels.memory()
        clients, load = Clients(session, expected, chosen), os.getloadavg()[0]
        probe, start = HealthProbe(address), time.perf_counter()
        await clients.run(args.streams, more_than(args.requests, args.seconds))
        seconds, (health, failed) = (
            time.perf_counter() - start,
            await asyncio.to_thread(probe.report),
        )
        after = await levels.settled(lambda found: found == before)
        bytes_after = levels.memory()
    faults = clients.faults + [f"/health: {one}" for one in failed]
    faults += [
        f"{what}: {before[what]} before, {after[what]} after"
        for what in before
        if before[what] != after[what]
    ]
    grown = sum(bytes_after.values()) / sum(bytes_before.values())
    if grown > GROWTH:
        faults.append(f"memory: {bytes_before} before, {bytes_after} after")
    return {
        "different answers": len({answer.text for answer in expected.values()}),
        "streams": dict(sorted(clients.seen.items())),
        "seconds": seconds,
        "tokens a second, of complete streams": clients.tokens / seconds,
        "/health answers": len(health),
        **{f"/health p{share * 100:g}, ms": 1e3 * quantile(health, share) for share in SHARES},
        "load average before, after": (load, os.getloadavg()[0]),
        "memory before, MB": {role: size / 1e6 for role, size in bytes_before.items()},
        "memory after / before": {
            role: bytes_after.get(role, 0) / size for role, size in bytes_before.items()
        },
        "idle": after,
        "faults": faults,
    }


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=512, help="at once")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=0, help="at least so many")
    parser.add_argument("--max-tokens", type=int, default=96, help="of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--health-p99-ms", type=float, default=100.0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(given)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """A server, and the soak of it."""
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "server.log"
        with launched(log, *SERVER) as (address, pid):
            found = asyncio.run(soak(address, pid, args))
        complaints = [line for line in log.read_text().splitlines() if "Traceback" in line]
    found["faults"] += [f"the server's log: {one}" for one in complaints]
    return found


def main() -> None:
    args = arguments()
    found = run(args)
    slow = found["/health p99, ms"] > args.health_p99_ms
    for what, value in found.items():
        if what != "faults":
            print(f"{what}: {value}")
    for fault in found["faults"][:FAULTS_SHOWN]:
        print(f"FAULT {fault}")
    if slow:
        print(f"FAULT the 99th percentile of /health is above {args.health_p99_ms:g} ms")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))
    sys.exit(int(slow or bool(found["faults"])))


if __name__ == "__main__":
    main()
