"""Predibase's API as far as its documentation shows it, in a thread."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeApi:
    """Answers by path: a status and a body. Only the token `alice` is valid."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.requests: Counter[str] = Counter()
        self.failures = 0  # answers with the status `failure` first
        self.failure = 503
        self.delay_s = 0.0  # between two bytes
        self.redirect: str | None = None
        api = self

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # else small answers wait 40 ms

            def do_GET(self) -> None:
                api._answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def has(self, path: str, **fields: object) -> None:
        self.answers[path] = (200, json.dumps(fields).encode())

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests[request.path] += 1
        status, body = self.answers.get(request.path, (404, b"{}"))
        if request.headers.get("Authorization") != "Bearer alice":
            status, body = 401, b"{}"
        if self.failures:
            self.failures -= 1
            status = self.failure
        if self.redirect:
            status = 302
        try:
            request.send_response(status)
            if self.redirect:
                request.send_header("Location", self.redirect)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            for start in range(0, len(body), 1 if self.delay_s else len(body) or 1):
                request.wfile.write(body[start : start + 1] if self.delay_s else body)
                time.sleep(self.delay_s)
        except OSError:
            pass
