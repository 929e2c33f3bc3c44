"""A web server with TLS, in a thread."""

from __future__ import annotations

import ssl
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from tests.adapters.halt import Halt

# Of 127.0.0.1 and localhost, made for these tests.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBkjCCATegAwIBAgIUdG6sM4qGYInBAGY6lCl5+FikNG8wCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMzAxMTIyNTJaGA8yMTI2MTEwNjExMjI1
MlowDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABHn3
RaIGei7A+ba1T4IVbBFpAy5pEHAcAgfQ1Yp4V6tsZ92kNZKZr6RkZgDJ0EGAz7RF
jNNOyhGEY5P8cPMgaqGjbzBtMB0GA1UdDgQWBBT7j1Dstw8MXx5JQ9dVk1Y0pNv5
gjAfBgNVHSMEGDAWgBT7j1Dstw8MXx5JQ9dVk1Y0pNv5gjAPBgNVHRMBAf8EBTAD
AQH/MBoGA1UdEQQTMBGHBH8AAAGCCWxvY2FsaG9zdDAKBggqhkjOPQQDAgNJADBG
AiEAqrjSRgq1TjBOkkt3p/2gGx2kLWpUCQ+GsvZ7vqMOteoCIQCFBAMD0ybzBOWb
C2RN9uoPCEy/i5h6yKs9lRHyZcXIaQ==
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg3Kql0u3xtBlTJvN8
4lE6UB9oI0TYdJBw4VvfBFo1KSWhRANCAAR590WiBnouwPm2tU+CFWwRaQMuaRBw
HAIH0NWKeFerbGfdpDWSma+kZGYAydBBgM+0RYzTTsoRhGOT/HDzIGqh
-----END PRIVATE KEY-----
"""


class WebServer:
    """Files by path. `status`, `cut` and `location` spoil the answers to requests whose method is `where`."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.where = "GET"
        self.status = 0
        self.broken = 0  # answers to spoil
        self.cut = False
        self.location: str | None = None
        self.headers = True
        self.halt = Halt()
        server = self

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # else small answers wait 40 ms

            def do_GET(self) -> None:
                server._answer(self)

            def do_HEAD(self) -> None:
                server._answer(self)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, address: object) -> None:
                pass

        self.certificate = folder / "certificate.pem"
        self.certificate.write_text(CERTIFICATE + KEY)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.host = f"127.0.0.1:{self.port}"
        self.context = ssl.create_default_context(cadata=CERTIFICATE)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def put(self, key: str, files: dict[str, bytes]) -> None:
        self.files |= {f"/{key}/{name}": data for name, data in files.items()}

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests[f"{request.command} {request.path}"] += 1
        assert "Authorization" not in request.headers
        is_spoiled = self.broken > 0 and request.command == self.where
        self.broken -= is_spoiled
        data = self.files.get(unquote(request.path))
        status = 404 if data is None else 200
        data = data or b""
        if is_spoiled and self.status:
            status = self.status
        request.send_response(status)
        if is_spoiled and self.location:
            request.send_header("Location", self.location)
        if self.headers:
            request.send_header("ETag", f'"{hash(data)}"')
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command == "GET" and not self.halt.write(request, data):
            request.wfile.write(data[: len(data) // 2] if is_spoiled and self.cut else data)
