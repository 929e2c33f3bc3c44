"""What a fake server does to a body: it stops in its middle until the test goes on, or changes a byte."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler

PATIENCE_S = 100.0  # for a test that has failed


class Halt:
    """While `where` is set, GETs whose path contains it get half a body: then `reached` is set."""

    def __init__(self) -> None:
        self.where = ""
        self.reached = threading.Event()
        self._released = threading.Event()

    def write(self, request: BaseHTTPRequestHandler, body: bytes) -> bool:
        """Writes half of the body and waits, if this request is to stop. The headers have been sent."""
        if not self.where or self.where not in request.path or request.command != "GET":
            return False
        request.close_connection = True
        request.wfile.write(body[: len(body) // 2])
        request.wfile.flush()
        self.reached.set()
        self._released.wait(PATIENCE_S)
        return True

    def release(self) -> None:
        """Ends the stopped answers; later ones are whole."""
        self.where = ""
        self._released.set()


def flipped(body: bytes) -> bytes:
    """The body with another byte in its middle."""
    middle = len(body) // 2
    return (
        body[:middle] + bytes(byte ^ 1 for byte in body[middle : middle + 1]) + body[middle + 1 :]
    )
