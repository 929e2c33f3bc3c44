"""As much of WebHDFS as reading files needs, in a thread: a store that fsspec reaches over the network."""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from tests.adapters.halt import Halt

PREFIX = "/webhdfs/v1"


class FakeHdfs:
    """`files` by path. `requests` counts (operation, path)."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.halt = Halt()
        self.status = 0  # of every answer, if not 0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # else small answers wait 40 ms

            def do_GET(self) -> None:
                fake._answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        path, query = unquote(parts.path).removeprefix(PREFIX), parse_qs(parts.query)
        operation = query["op"][0].upper()
        is_redirect = operation == "OPEN" and "location" not in query
        self.requests[f"{operation} {path}"] += not is_redirect
        status, body = 200, b""
        below = path.rstrip("/") + "/"
        inside = {one.removeprefix(below) for one in self.files if one.startswith(below)}
        if self.status:
            refusal = {"exception": "AccessControlException", "message": "no"}
            status, body = self.status, json.dumps({"RemoteException": refusal}).encode()
            body = body if status == 403 else b""
        elif path not in self.files and not inside:
            missing = {"exception": "FileNotFoundException", "message": path}
            status, body = 404, json.dumps({"RemoteException": missing}).encode()
        elif operation == "GETFILESTATUS":
            body = json.dumps({"FileStatus": self._status(path)}).encode()
        elif operation == "LISTSTATUS":
            names = sorted({name.partition("/")[0] for name in inside})
            found = [self._status(below + name) | {"pathSuffix": name} for name in names]
            body = json.dumps({"FileStatuses": {"FileStatus": found}}).encode()
        elif is_redirect:  # the name node sends the client to a data node
            status = 307
        else:
            start = int(query.get("offset", ["0"])[0])
            end = start + int(query.get("length", [str(len(self.files[path]))])[0])
            body = self.files[path][start:end]
        request.send_response(status)
        if status == 307:
            where = f"http://127.0.0.1:{self.port}{request.path}&location=here"
            request.send_header("Location", where)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if operation != "OPEN" or status == 307 or not self.halt.write(request, body):
            request.wfile.write(body)

    def _status(self, path: str) -> dict[str, object]:
        data = self.files.get(path)
        kind = "DIRECTORY" if data is None else "FILE"
        return {"type": kind, "length": len(data or b""), "modificationTime": hash(data)}
