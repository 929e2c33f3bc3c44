"""Child processes: started with two inherited descriptors, ended through their pipe, killed if that takes too long."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from engine.process.pipe import Pipe
from engine.process.private import environment

T = TypeVar("T")

END_S = 10.0  # a child that takes longer to end is killed
REAP_S = 1.0  # longest wait for a killed child
_POLL_S = 0.01
_STDERR = 2

# The child has the import path of its parent. Arguments: role, descriptors of pipe and host region, import path.
# Its imports leave no garbage, so nothing is collected before `freeze_gc`: it is ready a fifth of a second earlier.
# Only the front handles signals: terminals and supervisors send them to the whole group, where they would end children.
_BOOT = """\
import gc, os, signal, sys
gc.disable()
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.path[:] = sys.argv[4:]
from importlib import import_module
code = import_module(f"engine.process.{sys.argv[1]}_process").main(int(sys.argv[2]), int(sys.argv[3]))
os._exit(code)  # ending an interpreter with torch takes a second
"""

logger = logging.getLogger(__name__)


class Child(Generic[T]):
    """One child and this process's end of its pipe. `on_end` is called once when the pipe ends."""

    def __init__(
        self,
        role: str,
        kind: Any,
        on_message: Callable[[T], None],
        on_end: Callable[[], None],
    ) -> None:
        self.role = role
        self._pipe: Pipe[T] = Pipe(kind, on_message, self._pipe_ended)
        self._on_end = on_end
        self._pipe_end = asyncio.Event()
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self, region_fd: int, setup: msgspec.Struct) -> None:
        """Starts the process in the loop's thread: Linux ends a child with the thread that started it."""
        ours, theirs = socket.socketpair()
        with theirs:
            await self._pipe.connect(ours)
            fds = (theirs.fileno(), region_fd)
            path = [entry or os.getcwd() for entry in sys.path]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, self.role, *map(str, fds), *path],
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,  # stdout is for the data of commands
                pass_fds=fds,
                env=environment(),
            )
        self._pipe.send(setup)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def cpu_seconds(self) -> float | None:
        """Processor time of the process; None if the system does not report it."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            return None

    def send(self, message: msgspec.Struct) -> None:
        self._pipe.send(message)

    def finish(self) -> None:
        """Asks the child to end."""
        self._pipe.finish()

    async def ended(self, timeout: float = END_S, reap_s: float | None = REAP_S) -> int:
        """Waits `timeout` seconds for the child to end, then kills it. Returns its exit code (negative: a signal).

        `reap_s`: longest wait for a killed child, whose end the kernel may delay; None: no limit.
        """
        process = self._process
        if process is None:
            self._pipe.close()
            return 0
        try:
            if not await _wait_for(lambda: process.poll() is not None, timeout):
                if timeout > 0:
                    logger.warning("the %s does not end; killing it", self.role)
                process.kill()
                if not await _wait_for(lambda: process.poll() is not None, reap_s):
                    logger.error("the %s was killed but still exists", self.role)
        finally:
            if process.poll() is None:
                process.kill()
            self._pipe.close()
        await self._pipe_end.wait()
        return -signal.SIGKILL if process.returncode is None else process.returncode

    def _pipe_ended(self) -> None:
        self._pipe_end.set()
        self._on_end()


async def _wait_for(condition: Callable[[], bool], timeout: float | None) -> bool:
    """Waits for a condition; False if it does not hold within `timeout` seconds (None: no limit)."""
    deadline = time.monotonic() + (math.inf if timeout is None else timeout)
    while not condition():
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(_POLL_S)
    return True
