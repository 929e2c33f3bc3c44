"""As much of the hub's HTTP interface as fetching an adapter needs, in a thread of this process."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

from tests.adapters.halt import Halt, flipped


@dataclass
class Repo:
    """One repository: files by commit, commits by branch."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)  # tokens

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit at the head of a branch; returns its hash."""
        content = repr((sorted(files.items()), len(self.commits))).encode()
        name = hashlib.sha1(content).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name


class FakeHub:
    """A server on a free port. `requests` counts (method, path); `delay_s` is spent in each answer's making."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: Counter[str] = Counter()
        self.delay_s = 0.0
        self.broken = 0  # so many answers have the status `broken_status`
        self.broken_status = 503
        self.stopped = False
        self.halt = Halt()
        self.corrupt = 0  # so many bodies of weights have another byte
        self.tokens = {"alice", "bob", "operator"}  # valid ones
        self.tokens_seen: set[str] = set()  # of all requests; empty: without one
        hub = self

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # else small answers wait 40 ms
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on nobody answers. May be called again."""
        self.stopped = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def count(self, text: str) -> int:
        """Requests whose line holds `text`."""
        return sum(number for line, number in self.requests.items() if text in line)

    def _answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        if self.stopped:
            request.close_connection = True  # a connection that was kept open
            return
        path = unquote(urlsplit(request.path).path).strip("/")
        with self._lock:
            self.requests[f"{request.command} {path}"] += 1
            broken = self.broken > 0
            self.broken -= broken
        time.sleep(self.delay_s)
        if broken:
            return _send(request, self.broken_status, b"", body)
        given = request.headers.get("Authorization", "")
        token = given.removeprefix("Bearer ")
        self.tokens_seen.add(token)
        if token and token not in self.tokens:
            message = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return _send(request, 401, b"{}", body, message)
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        repo = self.repos.get(name)
        if repo is None or (repo.private and token not in repo.readers):
            status = 404 if token else 401
            return _send(request, status, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        closed = repo.gated and token not in repo.readers
        if api and rest == ["auth-check"]:
            code = {"X-Error-Code": "GatedRepo"} if closed else {}
            return _send(request, 403 if closed else 200, b"{}", body, code)
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return _send(request, 404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        files = repo.commits[commit]
        if api:
            info = {
                "id": name,
                "sha": commit,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "siblings": [{"rfilename": key, "size": len(data)} for key, data in files.items()],
            }
            return _send(request, 200, json.dumps(info).encode(), body)
        if closed:
            return _send(request, 403, b"", body, {"X-Error-Code": "GatedRepo"})
        wanted = "/".join(rest[2:])
        headers = {"X-Repo-Commit": commit}
        if wanted not in files:
            return _send(request, 404, b"", body, headers | {"X-Error-Code": "EntryNotFound"})
        data = files[wanted]
        headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        if body and self.corrupt and "adapter_model" in wanted:
            self.corrupt -= 1
            data = flipped(data)
        _send(request, 200, data, body, headers, self.halt)


def _send(
    request: BaseHTTPRequestHandler,
    status: int,
    data: bytes,
    body: bool,
    headers: dict[str, str] | None = None,
    halt: Halt | None = None,
) -> None:
    request.send_response(status)
    for key, value in (headers or {}).items():
        request.send_header(key, value)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    if body and not (halt and halt.write(request, data)):
        request.wfile.write(data)
