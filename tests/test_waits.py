"""What the processes of a server waited for, read from /proc."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tools.waits import PROC, Watch

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
