"""`lorax launch` as a process of its own, for tools and tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
LINES_KEPT = 40  # of the server's log, for when it does not start
START_S = 600.0
END_S = 60.0
DEMO = ("--model-id", "demo")


def lorax(*arguments: str) -> list[str]:
    """The command line of the program."""
    return [sys.executable, "-m", "lorax_cli", *arguments]


@contextmanager
def launched(log: Path, *flags: str) -> Iterator[tuple[str, int]]:
    """(address, process id) of a server on a free port that has generated its first token.

    `log` gets its output. Raises RuntimeError with the end of the log if it does not start.
    """
    command = lorax("launch", "--hostname", "127.0.0.1", "--port", "0", *flags)
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        while (found := re.search(r"listening on (http://\S+)", log.read_text())) is None:
            if server.poll() is not None:
                tail = "\n".join(log.read_text().splitlines()[-LINES_KEPT:])
                raise RuntimeError(f"the server ended with {server.returncode}:\n{tail}")
            time.sleep(0.05)
        with urlopen(f"{found[1]}/startup", timeout=START_S) as answer:
            assert answer.status == 200
        yield found[1], server.pid
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(END_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
