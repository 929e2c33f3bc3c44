"""What processes hold: memory, descriptors, threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import psutil


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
