"""The child: confines itself, runs one task, writes the answer to stdout and ends.

A task is a module (see `engine.sandbox.tasks`) with two functions: `prepare()` imports what it needs, and
`run(descriptors, arguments)` returns the answer, in JSON's types. The limits hold from `run` on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
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
    """Never returns. `parent`: the id of the parent; the child ends with it."""
    code = 1
    try:
        _tie_to_parent(parent)
        with open(call_fd, "rb") as file:
            call = msgspec.json.decode(file.read(), type=Call)
        task = importlib.import_module(call.task)
        gc.disable()  # imports leave no garbage; torch's are quicker by a tenth of a second
        task.prepare()
        gc.freeze()
        gc.enable()
        _limit(call.limits)
        _write(READY + f"{_memory_bytes()[1]}\n".encode())
        _write(msgspec.json.encode(task.run(call.descriptors, call.arguments)))
        code = 0
    except MemoryError:
        code = EXIT_MEMORY
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # ends threads of the task, and saves the second that torch takes to exit


def _tie_to_parent(parent: int) -> None:
    """Ends with the parent, gains no privileges, runs at low priority, and is killed first without memory."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before PR_SET_PDEATHSIG
    os.nice(NICE)


def _limit(limits: Limits) -> None:
    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_NOFILE, MAX_FILES)
    _set_limit(resource.RLIMIT_FSIZE, limits.file_bytes)
    _set_limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + limits.cpu_s)
    if virtual := _memory_bytes()[0]:
        _set_limit(resource.RLIMIT_AS, virtual + limits.memory_bytes)


def _set_limit(kind: int, value: int) -> None:
    """Sets a limit. The hard limit of processor time is higher, so that the signal of the soft limit comes first."""
    hard = resource.getrlimit(kind)[1]
    top = value + 5 if kind == resource.RLIMIT_CPU else value
    if hard != resource.RLIM_INFINITY:
        value, top = min(value, hard), min(top, hard)
    resource.setrlimit(kind, (value, top))


def _memory_bytes() -> tuple[int, int]:
    """Bytes of address space and resident memory; zeros if unknown."""
    try:
        virtual, resident = Path("/proc/self/statm").read_text().split()[:2]
    except OSError:
        return 0, 0
    return int(virtual) * _PAGE, int(resident) * _PAGE


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(_STDOUT, data) :]
