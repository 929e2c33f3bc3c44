"""The exchange is killed at chosen moments under load: no stream feels it, and each waiting request is answered.

Three kills by default; `make soak-exchange` has twenty, each moment twice and more.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from engine.process import Parts
from engine.process.watch import Watch
from tests.server.traps import HUB, TRAPS, Traps
from tests.server.whole import LARGE_BYTES, Whole, serving
from tools.attack.hub import HostileHub
from tools.attack.pickles import BIN, SAFE

KILLS = int(os.environ.get("LORAX_KILLS", "3"))
MOMENTS = (
    *("half an image", "adopt", "download", "answer", "second fetch", "nothing"),
    *("resolve", "conversion", "fetch"),
)
RESIDENT = (None, "r0", "r1")
STREAMED = 400  # tokens of each of the endless chains of streams
MEMORY_SLACK = 40 << 20


class HoldingHub(HostileHub):
    """Stops in the middle of the next weights, once `hold` was called, until `go`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._holding = False
        self.held, self._go = threading.Event(), threading.Event()

    def hold(self) -> None:
        self._holding = True
        self.held.clear()
        self._go.clear()

    def go(self) -> None:
        self._go.set()

    def _answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        request.protocol_version = "HTTP/1.0"  # no connection is kept open
        request.close_connection = True
        if self._holding and body and request.path.endswith(SAFE):
            self._holding = False
            write = request.wfile.write

            def write_half(data: Any) -> int:
                request.wfile.write = write  # type: ignore[method-assign]
                if len(data) < 1000:  # the headers
                    request.wfile.write = write_half  # type: ignore[method-assign]
                    return write(data)
                write(data[: len(data) // 2])
                self.held.set()
                self._go.wait(60)
                return write(data[len(data) // 2 :])

            request.wfile.write = write_half  # type: ignore[method-assign]
        super()._answer(request, body)


@dataclass
class Question:
    """A request for a new adapter: how many kills it saw, and its answer."""

    adapter: str
    source: str | None
    kills: int
    answer: asyncio.Task[tuple[int, dict[str, Any]]]


@dataclass
class Load:
    """Streams without end, and requests for new adapters."""

    server: Whole
    hub: HoldingHub
    traps: Traps
    alone: dict[str | None, list[int]] = field(default_factory=dict)
    kills: int = 0
    streams: Counter[str | None] = field(default_factory=Counter)  # complete ones
    questions: list[Question] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def stream(self, adapter: str | None) -> None:
        """One stream after another; each must be what it is alone."""
        while True:
            async with self.server.stream(adapter, STREAMED) as stream:
                await stream.reach(STREAMED)
                assert stream.error is None and stream.tokens == self.alone[adapter]
            self.streams[adapter] += 1

    def ask(self, where: str = "") -> None:
        """Asks for a new adapter: of the hub, a pickle, or in a folder."""
        name = f"c{next(self._numbers)}"
        folder = self.server.write(name, 100 + len(self.questions))
        if where == "pickle":
            torch.save(load_file(folder / SAFE), folder / BIN)
            (folder / SAFE).unlink()
        adapter, source = (f"files/{name}", "hub") if where == "hub" else (name, None)
        asking = asyncio.create_task(self.server.ask(adapter, source, tokens=8))
        self.questions.append(Question(adapter, source, self.kills, asking))

    async def kill(self, moment: str) -> None:
        """Kills the exchange at a moment of its work."""
        if moment == "adopt":  # in the middle of a restart
            self.traps.arm(moment)
            self._strike()
        elif moment == "download":
            self.hub.hold()
        elif moment != "nothing":
            self.traps.arm(moment)
        self.ask("hub" if moment == "download" else "")
        self.ask("pickle" if moment == "conversion" else "")
        if moment == "download":
            await until(self.hub.held.is_set)
        elif moment != "nothing":
            await until(lambda: self.traps.has_caught(moment))
        self._strike()
        self.hub.go()
        self.ask()
        restarts = self.server.backend.exchange_restarts
        await until(lambda: self.server.backend.exchange_restarts > restarts)
        self.ask("hub")
        await until(lambda: not self.server.backend.exchange_away)

    def _strike(self) -> None:
        pid = self.server.backend.pids["exchange"]
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        self.kills += 1
        for question in self.questions:
            question.kills += not question.answer.done()

    async def check_answers(self) -> None:
        """All were answered as they are alone; those that saw two kills may be refused for a while."""
        for question in self.questions:
            status, body = await question.answer
            if status == 200:
                again = await self.server.ask(question.adapter, question.source, tokens=8)
                assert again == (200, body)
            else:
                assert (status, body["error_type"]) == (424, "adapter_load_failed"), body
                assert "ended 2 times while it loaded" in body["error"] and question.kills >= 2
                assert "try again in" in body["error"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.01)


def levels(server: Whole) -> dict[str, object]:
    """Descriptors, children and shared memory of each process, and unfinished files: what must be as before."""
    front = psutil.Process()
    processes = {"front": front} | {
        role: psutil.Process(pid) for role, pid in server.backend.pids.items()
    }
    cache = server.folder.parent / "cache"
    return {
        "descriptors": {role: process.num_fds() for role, process in processes.items()},
        "children": {role: len(process.children()) for role, process in processes.items()},
        "unfinished": [path for path in cache.rglob("*") if path.suffix in (".incomplete", ".tmp")],
        "shared memory": {
            role: Counter(re.findall(r"/memfd:\S+|/dev/shm/\S+|/SYSV\S+", maps_of(process.pid)))
            for role, process in processes.items()
        },
    }


def maps_of(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def memory(server: Whole) -> dict[str, int]:
    pids = {"front": os.getpid(), **server.backend.pids}
    return {role: psutil.Process(pid).memory_info().rss for role, pid in pids.items()}


@pytest.fixture
async def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Load]:
    with HoldingHub(tmp_path / "adapters") as hub:
        monkeypatch.setenv(HUB, hub.url)
        monkeypatch.setenv(TRAPS, str(tmp_path))
        async with serving(
            tmp_path,
            Parts(exchange="tests.server.traps:trapped_exchange"),
            Watch(max_ends=1000),
            host_cache_gb=LARGE_BYTES / (1 << 30),
        ) as server:
            yield Load(server, hub, Traps(tmp_path))


async def settled(server: Whole, measure: Callable[[], Any], wanted: Any) -> Any:
    """The measure when it has become what is wanted, or after a while."""
    for _ in range(500):
        if (found := measure()) == wanted:
            break
        await asyncio.sleep(0.02)
    return found


async def test_killed_under_load(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")
    server = load.server
    server.write_large("large")
    server.write("warm", 2)
    for number, adapter in enumerate(RESIDENT):
        if adapter:
            server.write(adapter, 10 + number)
        load.alone[adapter] = await server.tokens_of(adapter, STREAMED)
    status, body = await server.ask("files/warm", "hub")
    assert status == 200, body
    await server.idle()
    before, bytes_before = levels(server), memory(server)
    streams = [asyncio.create_task(load.stream(adapter)) for adapter in RESIDENT]
    moments = itertools.cycle(MOMENTS)
    while load.kills < KILLS:
        await load.kill(next(moments))
        assert not any(stream.done() for stream in streams), streams
    await asyncio.gather(*(question.answer for question in load.questions))
    done = load.streams.copy()
    await until(lambda: all(load.streams[one] > done[one] for one in RESIDENT) or _any(streams))
    for stream in streams:
        assert not stream.done(), stream
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    await load.check_answers()
    await server.idle()
    assert len(await server.tokens_of("large", 3)) == 3, "the host tier has room for it"
    assert await settled(server, lambda: levels(server), before) == before
    for role, size in memory(server).items():
        assert size < bytes_before[role] * 1.3 + MEMORY_SLACK, role
    assert server.backend.exchange_restarts == load.kills >= KILLS


def _any(tasks: list[asyncio.Task[None]]) -> bool:
    return any(task.done() for task in tasks)
