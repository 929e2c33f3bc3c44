"""What processes hold: memory, descriptors, threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

EXCHANGE, SHARD, FRONT = "lorax-exchange", "lorax-shard", "front"


def processes_of(pid: int) -> dict[str, psutil.Process]:
    """A server's processes by role; a child without a role of its own is named after its parent."""
    found: dict[str, psutil.Process] = {}
    with suppress(psutil.Error):
        found[FRONT] = psutil.Process(pid)
        for child in found[FRONT].children(recursive=True):
            with suppress(psutil.Error, OSError):
                name = _role_of(child)
                found[name if name not in found else f"{name} {child.pid}"] = child
    return found


def _role_of(process: psutil.Process) -> str:
    comm = Path(f"/proc/{process.pid}/comm").read_text().strip()
    if comm in (EXCHANGE, SHARD):
        return comm
    parent = process.parent()
    if parent is None or parent.pid == os.getpid():
        return FRONT
    above = Path(f"/proc/{parent.pid}/comm").read_text().strip()
    return f"child of {above if above.startswith('lorax-') else FRONT}"


def memory_of(processes: Mapping[str, psutil.Process]) -> dict[str, int]:
    """Bytes of resident memory by role; processes that have ended are left out."""
    return _each(processes, lambda process: process.memory_info().rss)


def files_of(processes: Mapping[str, psutil.Process]) -> dict[str, int]:
    """Open descriptors by role."""
    return _each(processes, lambda process: process.num_fds())


def threads_of(processes: Mapping[str, psutil.Process]) -> dict[str, int]:
    """Threads by role."""
    return _each(processes, lambda process: process.num_threads())


def _each(
    processes: Mapping[str, psutil.Process], measure: Callable[[psutil.Process], int]
) -> dict[str, int]:
    found = {}
    for role, process in processes.items():
        try:
            found[role] = measure(process)
        except psutil.Error:  # it has ended
            continue
    return found
