"""The program under attack: `lorax launch` as a process of its own, and what its processes hold."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil

from tools.levels import EXCHANGE, files_of, memory_of, processes_of, threads_of

ROOT = Path(__file__).resolve().parent.parent.parent
START_S = 120.0
PR_SET_PDEATHSIG = 1
SAMPLE_S = 0.2
SOFT_FILES = 1024  # descriptors that a shell gives a program
HOST_CACHE_GB = 0.25
DRAIN_S = 90.0  # where the program has no flag for it
PREFERRED = {
    "--client-header-timeout-s": "5",
    "--client-body-timeout-s": "5",
    "--drain-timeout-s": "5",
    "--adapter-load-timeout-s": "20",
}


@cache
def launch_help() -> str:
    """Every flag that this version has."""
    run = [sys.executable, "-m", "lorax_cli", "launch", "--help"]
    wide = os.environ | {"COLUMNS": "400", "TERM": "dumb"}
    return subprocess.run(run, cwd=ROOT, env=wide, capture_output=True, text=True).stdout


def preferred() -> list[str]:
    """Short time limits, as far as there are flags for them."""
    given = launch_help()
    return [part for flag, value in PREFERRED.items() if flag in given for part in (flag, value)]


def drain_s() -> float:
    """Seconds that open requests get when the server ends."""
    return float(PREFERRED["--drain-timeout-s"]) if "--drain-timeout-s" in preferred() else DRAIN_S


@dataclass
class Server:
    """One run of the program. `folder` holds `model`, `adapters` and its logs."""

    folder: Path
    hub: str
    max_concurrent: int
    name: str = "server"
    address: str = ""

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    async def start(self) -> None:
        """Returns once it listens; raises RuntimeError if it does not."""
        flags = {
            "--model-id": self.folder / "model",
            "--load-format": "dummy",
            "--dtype": "float32",
            "--adapter-root": self.folder / "adapters",
            "--host-cache-gb": HOST_CACHE_GB,
            "--cpu-memory-gb": 0.6,
            "--max-total-tokens": 8192,
            "--max-batch-size": 256,
            "--max-concurrent-requests": self.max_concurrent,
            "--num-threads": 1,
            "--hostname": "127.0.0.1",
            "--port": 0,
        }
        given = [str(part) for pair in flags.items() for part in pair]
        environment = os.environ | {
            "HF_ENDPOINT": self.hub,
            "HF_HUB_CACHE": str(self.folder / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

        libc = ctypes.CDLL(None)

        def limits() -> None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with this program
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(SOFT_FILES, hard), hard))
            with suppress(OSError):  # where memory runs out, it goes first
                Path("/proc/self/oom_score_adj").write_text("1000")

        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lorax_cli", "launch", *given, *preferred()],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=limits,
            )
        deadline = time.monotonic() + START_S
        while not (found := re.search(r"listening on http://(\S+)", self.log.read_text())):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server does not start:\n{self.log.read_text()[-3000:]}")
            await asyncio.sleep(0.1)
        self.address = found[1]

    @property
    def where(self) -> tuple[str, int]:
        host, port = self.address.rsplit(":", 1)
        return host, int(port)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def processes(self) -> dict[str, psutil.Process]:
        """The program's processes by role; a child without a role of its own is named after its parent."""
        return processes_of(self.process.pid)

    def exchange(self) -> psutil.Process | None:
        """The exchange's process, if there is one that runs or is stopped."""
        for role, process in self.processes().items():
            if role == EXCHANGE and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    async def end(self, timeout: float) -> float:
        """Sends SIGTERM; seconds until no process of the program is left, infinite if one had to be killed."""
        processes = list(self.processes().values())
        start = time.monotonic()
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        while time.monotonic() - start < timeout:
            if not self.alive and not any(map(_runs, processes)):
                return time.monotonic() - start
            await asyncio.sleep(0.05)
        self.kill()
        return float("inf")

    def kill(self) -> None:
        """Ends the program's process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@dataclass
class Peak:
    """Resident memory of one role over a run."""

    limit: float
    peak: int = 0
    above_since: float | None = None
    longest_above_s: float = 0.0


@dataclass
class Watch:
    """Samples the memory of a server's processes in a thread. A context manager, once the server is idle."""

    server: Server
    peaks: dict[str, Peak] = field(default_factory=dict)

    def __enter__(self) -> Watch:
        self._idle = memory_of(self.server.processes())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            now = time.monotonic()
            present = memory_of(self.server.processes())
            for role, size in present.items():
                self._sample(re.sub(r" \d+$", "", role), size, now)
            for role, peak in self.peaks.items():
                if role not in present:
                    peak.above_since = None

    def _sample(self, role: str, size: int, now: float) -> None:
        idle = self._idle.get(role, self._idle.get(EXCHANGE, 0))
        peak = self.peaks.setdefault(role, Peak(1.5 * idle + HOST_CACHE_GB * (1 << 30)))
        peak.peak = max(peak.peak, size)
        if size <= peak.limit:
            peak.above_since = None
            return
        if peak.above_since is None:
            peak.above_since = now
        peak.longest_above_s = max(peak.longest_above_s, now - peak.above_since)


def levels(server: Server) -> dict[str, dict[str, int]]:
    """Descriptors and threads by role, and the number of processes."""
    processes = server.processes()
    return {
        "descriptors": files_of(processes),
        "threads": threads_of(processes),
        "processes": {"all": len(processes)},
    }
