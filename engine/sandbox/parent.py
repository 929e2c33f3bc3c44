"""The parent: starts a child for one task, watches its time and memory, and cleans up after it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.sandbox.call import EXIT_MEMORY, READY, Call, Limits

Pause = Callable[[], None]  # called repeatedly while a caller waits; may raise

POLL_S = 0.05
START_S = 120.0  # for its imports, on a slow machine
MAX_ANSWER = 1 << 16  # bytes of stdout
_STDERR_BYTES = 1 << 12  # last bytes of it that are kept
_PAGE = os.sysconf("SC_PAGE_SIZE")

# The child has the import path of its parent. Arguments: descriptor of the call, id of the parent, import path.
_BOOT = """\
import sys
call, parent = map(int, sys.argv[1:3])
sys.path[:] = sys.argv[3:]
from engine.sandbox.child import main
main(call, parent)
"""

# Limits the children of this process, for all callers together: they share its processors.
_TURNS = threading.BoundedSemaphore(max(1, len(os.sched_getaffinity(0)) // 4))


class SandboxError(Exception):
    """A task that gave no answer."""


class LimitReached(SandboxError):
    """The task exceeded its limit of "cpu", "wall" or "memory"."""

    def __init__(self, limit: str, text: str) -> None:
        super().__init__(text)
        self.limit = limit


class Crashed(SandboxError):
    """The child failed. `signal`: the signal that ended it; 0: it exited."""

    def __init__(self, text: str, signal: int = 0) -> None:
        super().__init__(text)
        self.signal = signal


class CannotRun(SandboxError):
    """A failure of the machine: the child cannot start, or another process killed it."""


def run(
    task: str,
    descriptors: Mapping[str, int],
    arguments: Mapping[str, Any],
    limits: Limits,
    pause: Pause = lambda: None,
) -> dict[str, Any]:
    """Runs a task (the name of its module) in a new child and returns its answer. Blocks, so call it from a thread.

    The child inherits only `descriptors`. `pause` is called about every POLL_S; if it raises, the child is killed. Few
    children run at a time; waiting for a turn does not count as time of the task. Raises SandboxError.
    """
    call = msgspec.json.encode(Call(task, dict(descriptors), dict(arguments), limits))
    pause()
    while not _TURNS.acquire(timeout=POLL_S):
        pause()
    try:
        child = _start(call, descriptors.values())
        with child:
            return child.answer(limits, pause)
    finally:
        _TURNS.release()


def _start(call: bytes, fds: Any) -> _Child:
    return _Child(spawn(call, fds, subprocess.PIPE))


def spawn(call: bytes, fds: Any, output: int) -> subprocess.Popen[bytes]:
    """A process that runs a call, which is encoded. `output`: as in Popen, of stdout and stderr. Raises CannotRun."""
    try:
        with _inherited(call) as call_fd:
            path = [entry or os.getcwd() for entry in sys.path]
            boot = [sys.executable, "-I", "-c", _BOOT, str(call_fd), str(os.getpid()), *path]
            return subprocess.Popen(
                boot,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(call_fd, *fds),
                env=_environment(),
                start_new_session=True,
            )
    except OSError as error:
        raise CannotRun(f"cannot start a process: {error.strerror}") from None


@contextlib.contextmanager
def _inherited(data: bytes) -> Iterator[int]:
    """An unnamed file that holds `data`."""
    with contextlib.ExitStack() as stack:
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("lorax-call")
            stack.callback(os.close, fd)
        else:
            fd = stack.enter_context(tempfile.TemporaryFile()).fileno()
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd


def _environment() -> dict[str, str]:
    """No proxies, tokens or settings, but the time zone; one thread and one heap, so that address space is the memory
    of the task."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ}
    return kept | {
        "PATH": os.defpath,
        "LC_ALL": "C.UTF-8",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


class _Child:
    """A running child. A context manager that ends the process and closes its pipes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None and process.stderr is not None
        self._process = process
        self._out, self._err = process.stdout, process.stderr
        self._output, self._errors = bytearray(), bytearray()
        self._poll = select.poll()
        for pipe in (self._out, self._err):
            os.set_blocking(pipe.fileno(), False)
            self._poll.register(pipe.fileno(), select.POLLIN)
        self._open = {self._out.fileno(), self._err.fileno()}

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *error: object) -> None:
        self._kill()
        self._process.wait()
        self._out.close()
        self._err.close()

    def answer(self, limits: Limits, pause: Pause) -> dict[str, Any]:
        """Waits for the answer. Raises SandboxError, or what `pause` raises."""
        deadline, base = time.monotonic() + START_S, None
        while not self._ended():
            self._read(POLL_S)
            pause()
            if base is None and (base := self._ready()) is not None:
                deadline = time.monotonic() + limits.wall_s
            if base is not None and self._resident() > base + limits.memory_bytes:
                raise _memory_reached(limits)
            if time.monotonic() > deadline:
                if base is None:
                    raise CannotRun(f"a process did not start in {START_S:g} s")
                raise LimitReached("wall", f"takes longer than {limits.wall_s:g} s")
            if len(self._output) > MAX_ANSWER:
                raise Crashed(f"its answer has more than {MAX_ANSWER} bytes")
        self._kill()  # and the processes that it started
        code = self._process.wait()
        while len(self._output) <= MAX_ANSWER and self._read(0):
            pass
        return self._outcome(code, limits)

    def _outcome(self, code: int, limits: Limits) -> dict[str, Any]:
        if code == EXIT_MEMORY:
            raise _memory_reached(limits)
        if code == -signal.SIGXCPU:
            raise LimitReached("cpu", f"takes more than {limits.cpu_s} s of processor time")
        if code == -signal.SIGKILL:
            raise CannotRun("the process was killed; the machine may be out of memory")
        if self._ready() is None:
            raise CannotRun(f"a process did not start: {self._last_error(code)}")
        if code < 0:
            raise Crashed(f"the process died of {_signal_name(-code)}", -code)
        if code:
            raise Crashed(self._last_error(code))
        try:
            return msgspec.json.decode(self._output.partition(b"\n")[2], type=dict[str, Any])
        except msgspec.MsgspecError:
            raise Crashed("its answer cannot be read") from None

    def _ended(self) -> bool:
        """Whether it has ended. Does not reap it, so that its group id stays reserved."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, flags) is not None

    def _kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self, timeout: float) -> bool:
        """Reads its pipes, after waiting up to `timeout` seconds for data. False: there was none."""
        if not self._open:
            time.sleep(timeout / 10)
            return False
        found = False
        for fd, _ in self._poll.poll(timeout * 1000):
            data = os.read(fd, 1 << 16)
            found = True
            if not data:
                self._poll.unregister(fd)
                self._open.discard(fd)
            elif fd == self._out.fileno():
                self._output += data
            else:
                self._errors = (self._errors + data)[-_STDERR_BYTES:]
        return found

    def _ready(self) -> int | None:
        """Resident bytes when the task began; None before."""
        line, end, _ = self._output.partition(b"\n")
        return int(line.removeprefix(READY)) if end and line.startswith(READY) else None

    def _resident(self) -> int:
        try:
            return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * _PAGE
        except (OSError, IndexError):
            return 0

    def _last_error(self, code: int) -> str:
        lines = self._errors.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {code}"


def _memory_reached(limits: Limits) -> LimitReached:
    return LimitReached("memory", f"needs more than {limits.memory_bytes >> 20} MiB of memory")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
