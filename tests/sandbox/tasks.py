"""A task that does what a sandbox must stand."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def prepare() -> None:
    pass


def run(descriptors: dict[str, int], arguments: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = globals()[arguments["what"]](descriptors, **arguments)
    return answer


def echo(descriptors: dict[str, int], what: str, **given: Any) -> dict[str, Any]:
    return given


def length(descriptors: dict[str, int], what: str, text: str) -> dict[str, Any]:
    return {"length": len(text)}


def state(descriptors: dict[str, int], what: str) -> dict[str, Any]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kinds = ("AS", "CPU", "FSIZE", "CORE", "NOFILE")
    return {
        "open": sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in _open_fds()),
        "environment": sorted(os.environ),
        "no_new_privs": status["NoNewPrivs"].strip(),
        "nice": os.nice(0),
        "session": os.getsid(0) == os.getpid(),
        "limits": {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in kinds},
        "torch": "torch" in sys.modules,
    }


def _open_fds() -> list[int]:
    """All of them, however high; the one that lists them is closed by then."""
    return [
        fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{fd}")
    ]


def spin(descriptors: dict[str, int], what: str) -> dict[str, Any]:
    while True:
        pass


def hash_for_ever(descriptors: dict[str, int], what: str) -> dict[str, Any]:
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    return {"hash": hash(nested)}


def sleep(descriptors: dict[str, int], what: str) -> dict[str, Any]:
    time.sleep(1000)
    return {}


def allocate(descriptors: dict[str, int], what: str) -> dict[str, Any]:
    return {"bytes": len(bytearray(6 << 30))}


def swallow(descriptors: dict[str, int], what: str) -> dict[str, Any]:
    held = []
    while True:
        held.append(b"x" * (1 << 20))


def flood(descriptors: dict[str, int], what: str, fd: int) -> dict[str, Any]:
    for _ in range(10_000):
        os.write(fd, b"x" * (1 << 14))
    return {}


def fill(descriptors: dict[str, int], what: str) -> dict[str, Any]:
    try:
        while True:
            os.write(descriptors["target"], b"x" * (1 << 20))
    except OSError as error:
        return {"failed": error.strerror}


def die(descriptors: dict[str, int], what: str, number: int) -> dict[str, Any]:
    os.kill(os.getpid(), number)
    return {}


def fail(descriptors: dict[str, int], what: str) -> dict[str, Any]:
    raise RuntimeError("no such luck")


def nonsense(descriptors: dict[str, int], what: str) -> dict[str, Any]:
    os.write(1, b"nonsense")
    return {}


def leave_a_child(descriptors: dict[str, int], what: str) -> dict[str, Any]:
    pid = os.fork()
    if not pid:
        time.sleep(1000)
    return {"pid": pid}


def exit_at_once(descriptors: dict[str, int], what: str) -> dict[str, Any]:
    os._exit(3)
