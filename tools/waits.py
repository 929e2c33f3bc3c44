"""How long a server's processes ran and waited for a core: whether a stall was theirs or the machine's. Linux.

schedstat of proc(5): nanoseconds on a core, nanoseconds runnable without one. In a virtual machine that is not all: a
core may be slow for a while and nobody be told. So a process beside them does the same work again and again (`Probe`),
and what it takes at times beyond its usual is the machine's doing.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.bench.quantiles import Times

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")  # of /proc/stat, a second


@dataclass(frozen=True, slots=True)
class Usage:
    """Since they began: seconds of a process's main thread, and page faults of all threads."""

    name: str  # of the main thread
    ran: float
    waited: float
    faults: int  # major and minor

    def since(self, earlier: Usage) -> Usage:
        return Usage(
            self.name,
            self.ran - earlier.ran,
            self.waited - earlier.waited,
            self.faults - earlier.faults,
        )


def fields(pid: int) -> list[str]:
    """Of /proc/[pid]/stat, from the state on."""
    return (PROC / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()


def family(pid: int) -> Iterator[int]:
    """The process, then its children in the order of their ids."""
    yield pid
    for other in sorted(int(path.name) for path in PROC.iterdir() if path.name.isdigit()):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            if int(fields(other)[1]) == pid:
                yield other


def usage(pid: int) -> Usage:
    folder, stat = PROC / str(pid), fields(pid)
    ran, waited, _ = map(int, (folder / "schedstat").read_text().split())
    name = (folder / "comm").read_text().strip()
    return Usage(name, ran / 1e9, waited / 1e9, int(stat[7]) + int(stat[9]))


def stolen() -> float:
    """Seconds of all cores that a hypervisor gave to others."""
    return int((PROC / "stat").read_text().split("\n", 1)[0].split()[8]) / TICKS


class Watch:
    """What a process and its children did from the constructor to `report`; nothing of one that ended meanwhile."""

    def __init__(self, pid: int) -> None:
        self.before = {one: usage(one) for one in family(pid)}
        self.stolen = stolen()

    def report(self) -> dict[str, float]:
        """Figures by what they are of, for a summary."""
        found: dict[str, float] = {"stolen from all cores, ms": 1e3 * (stolen() - self.stolen)}
        for index, (pid, before) in enumerate(self.before.items()):
            with suppress(FileNotFoundError, ProcessLookupError):
                here = usage(pid).since(before)
                name = here.name if index else "front"
                name = f"{name} {pid}" if f"{name}: ran, s" in found else name
                found[f"{name}: ran, s"] = here.ran
                found[f"{name}: waited for a core, ms"] = 1e3 * here.waited
                found[f"{name}: page faults"] = float(here.faults)
        return found


class Probe:
    """A process of fixed work, about a millisecond of it every 10, from the constructor to `report`."""

    PERIOD_S = 0.01
    ROUNDS = 60

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.waits"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def report(self) -> dict[str, float]:
        out, _ = self._process.communicate()
        took = Times.of(json.loads(out))
        assert took is not None, "there is one turn at least"
        return {
            "fixed work beside, p50, ms": took.p50,
            "fixed work beside, p99 / p50": took.p99 / took.p50,
            "fixed work beside, longest / p50": took.max / took.p50,
        }

    @classmethod
    def work(cls, end: socket.socket, other: socket.socket) -> None:
        """A little of all that a front does: objects, JSON, sockets."""
        for index in range(cls.ROUNDS):
            end.send(json.dumps({"choices": [{"index": index, "text": "word"}]}).encode())
            json.loads(other.recv(1 << 12))

    @classmethod
    def repeat(cls) -> list[float]:
        """Seconds of every turn, until the standard input ends."""
        ended = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
        took: list[float] = []
        end, other = socket.socketpair()
        with end, other:
            due = time.perf_counter()
            while not ended.is_set() or not took:
                begin = time.perf_counter()
                cls.work(end, other)
                took.append(time.perf_counter() - begin)
                due += cls.PERIOD_S
                time.sleep(max(0.0, due - time.perf_counter()))
        return took


if __name__ == "__main__":
    print(json.dumps(Probe.repeat()))
