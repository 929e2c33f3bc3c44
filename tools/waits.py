"""How long a server's processes ran and waited for a core: whether a stall was theirs or the machine's. Linux.

schedstat of proc(5): nanoseconds on a core, nanoseconds runnable without one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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
