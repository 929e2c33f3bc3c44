"""How long `GET /health` takes: a process of its own asks every 50 ms, each time on a new connection.

python -m tools.probe_health http://127.0.0.1:3000     # until its standard input ends
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

PERIOD_S = 0.05
TIMEOUT_S = 30.0


class HealthProbe:
    """Asks from the constructor to `report`."""

    def __init__(self, address: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.probe_health", address],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def report(self) -> tuple[list[float], list[str]]:
        """(seconds of every answer, in order of length; what was no answer of 200)."""
        out, _ = self._process.communicate()
        seconds, failed = json.loads(out)
        return sorted(seconds), failed


def ask(address: str) -> None:
    """Raises OSError or HTTPException unless the answer is 200."""
    connection = HTTPConnection(urlsplit(address).netloc, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        response.read()
        if response.status != 200:
            raise HTTPException(f"status {response.status}")
    finally:
        connection.close()


def repeat(address: str) -> tuple[list[float], list[str]]:
    """Asks until the standard input ends, once at least."""
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    seconds: list[float] = []
    failed: list[str] = []
    while not ended.wait(PERIOD_S) or not seconds:
        start = time.perf_counter()
        try:
            ask(address)
        except (OSError, HTTPException) as error:
            failed.append(repr(error))
        seconds.append(time.perf_counter() - start)
    return seconds, failed


if __name__ == "__main__":
    print(json.dumps(repeat(sys.argv[1])))
