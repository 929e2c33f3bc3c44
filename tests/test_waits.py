"""What the processes of a server waited for, read from /proc."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tools.waits import PROC, Probe, Watch

pytestmark = pytest.mark.skipif(not (PROC / "self" / "schedstat").exists(), reason="Linux tells")
WORK = "sum(range(10**7)); print(flush=True); input()"  # says when it has done some, then waits


@contextmanager
def worker() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", WORK]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            yield child
        finally:
            child.kill()


def ran(watch: Watch) -> dict[str, float]:
    ending = ": ran, s"
    found = watch.report().items()
    return {name.removesuffix(ending): value for name, value in found if name.endswith(ending)}


def test_a_process_and_its_children_are_told_apart() -> None:
    with worker() as first, worker() as second:
        watch = Watch(os.getpid())
        for child in (first, second):
            assert child.stdout is not None and child.stdout.readline()
        found = ran(watch)
        assert "front" in found and len(found) >= 3, "two of one name are two"
        assert sum(value > 0 for name, value in found.items() if name != "front") >= 2
    assert len(ran(watch)) == len(found) - 2, "those that ended are left out"


def test_the_probe_repeats_its_work_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """And tells of the turns that took longer than the others."""
    slow = Probe.ROUNDS * 20
    turns = iter([*[Probe.ROUNDS] * 30, slow, *[Probe.ROUNDS] * 10_000])
    work = Probe.work

    def uneven(end: socket.socket, other: socket.socket) -> None:
        monkeypatch.setattr(Probe, "ROUNDS", next(turns))
        work(end, other)

    reading, writing = os.pipe()
    with open(reading) as stdin, monkeypatch.context() as patch:
        patch.setattr(Probe, "work", uneven)
        patch.setattr(Probe, "PERIOD_S", 0.0)
        patch.setattr(sys, "stdin", stdin)
        end = threading.Timer(1.0, os.close, [writing])
        end.start()
        took = Probe.repeat()
    assert len(took) > 31
    assert took[30] > 5 * statistics.median(took)


def test_the_probes_process_reports() -> None:
    probe = Probe()
    time.sleep(0.3)
    found = list(probe.report().values())
    assert found[0] > 0 and 1 <= found[1] <= found[2]
