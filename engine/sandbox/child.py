"""The child: confines itself, does one task, writes the answer to stdout, ends.

A task is a module (see `engine.sandbox.tasks`) with two functions: `prepare()` imports what it needs, and
`run(descriptors, arguments)` returns the answer, of JSON's types. The limits hold from `run` on.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import msgspec

from engine.sandbox.call import EXIT_MEMORY, READY, Call, Limits

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
NICE = 10
MAX_FILES = 64
_PAGE = os.sysconf("SC_PAGE_SIZE")
_STDOUT = 1


def main(call_fd: int, parent: int) -> None:
    """Never returns. `parent`: the process whose end is this one's end."""
    code = 1
    try:
        _tie_to_parent(parent)
        with open(call_fd, "rb") as file:
            call = msgspec.json.decode(file.read(), type=Call)
        task = importlib.import_module(call.task)
        task.prepare()
        _limit(call.limits)
        _write(READY + f"{_memory()[1]}\n".encode())
        _write(msgspec.json.encode(task.run(call.descriptors, call.arguments)))
        code = 0
    except MemoryError:
        code = EXIT_MEMORY
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # whatever the task left behind; taking torch down would take a second


def _tie_to_parent(parent: int) -> None:
    """Ends with the parent, gains no rights, and gives way to whoever needs the processor or the memory."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    if os.getppid() != parent:
        os._exit(1)  # it ended before it could be asked to take this process with it
    os.nice(NICE)


def _limit(limits: Limits) -> None:
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, MAX_FILES)
    _lower(resource.RLIMIT_FSIZE, limits.file_bytes)
    _lower(resource.RLIMIT_CPU, math.ceil(time.process_time()) + limits.cpu_s)
    if virtual := _memory()[0]:
        _lower(resource.RLIMIT_AS, virtual + limits.memory_bytes)


def _lower(kind: int, value: int) -> None:
    """Sets a limit; the hard one of the processor's time stays above, so that the soft one's signal comes first."""
    hard = resource.getrlimit(kind)[1]
    top = value + 5 if kind == resource.RLIMIT_CPU else value
    if hard != resource.RLIM_INFINITY:
        value, top = min(value, hard), min(top, hard)
    resource.setrlimit(kind, (value, top))


def _memory() -> tuple[int, int]:
    """Bytes of address space and resident; zeros where the system does not say."""
    try:
        virtual, resident = Path("/proc/self/statm").read_text().split()[:2]
    except OSError:
        return 0, 0
    return int(virtual) * _PAGE, int(resident) * _PAGE


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(_STDOUT, data) :]
