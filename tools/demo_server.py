"""A server of the demo model as a process of its own, for tools that talk to it from outside."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "engine" / "demo"
START_S, END_S = 120.0, 30.0
FLAGS = {
    "--model-id": str(DEMO / "base"),
    "--adapter-source": "local",
    "--hostname": "127.0.0.1",
    "--port": "0",
    "--num-threads": "1",
    "--cpu-memory-gb": "0.5",
    "--host-cache-gb": "0.25",
    "--max-total-tokens": "512",
    "--max-n": "4",
}


class Running:
    """The process. `log`: what it wrote."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log
        self.url = ""

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def complaints(self) -> list[str]:
        """Lines of the log about faults of the server."""
        marks = (" ERROR ", " CRITICAL ", "Traceback", "Fatal Python error", "panicked at")
        return [line for line in self.log.read_text().splitlines() if any(m in line for m in marks)]

    def _find(self) -> None:
        """Waits until it listens. Raises RuntimeError if it does not."""
        deadline = time.monotonic() + START_S
        while not (found := re.search(r"listening on (http://\S+)", self.log.read_text())):
            if not self.alive or time.monotonic() > deadline:
                raise RuntimeError(f"the server does not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)
        self.url = found[1]


@contextmanager
def demo_server(
    adapters: dict[str, str] | None = None, flags: dict[str, str] | None = None
) -> Iterator[Running]:
    """Serves the demo model. `adapters`: name -> adapter of the demo; None: under their own names. `flags` are added to
    FLAGS, or replace theirs."""
    names = adapters or {one.name: one.name for one in (DEMO / "adapters").iterdir()}
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        root, log = Path(folder) / "adapters", Path(folder) / "log"
        for name, original in names.items():
            shutil.copytree(DEMO / "adapters" / original, root / name)
        every = FLAGS | (flags or {}) | {"--adapter-root": str(root)}
        given = [part for pair in every.items() for part in pair]
        command = [sys.executable, "-m", "lorax_cli", "launch", *given]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        running = Running(process, log)
        try:
            running._find()
            yield running
        finally:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
