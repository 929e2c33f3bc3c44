"""A hub that sends without end, slowly, or what no hub sends: its own request fails, in bounded time and memory."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from engine.adapters import hub as module
from engine.adapters.hub import HubSource
from engine.adapters.ref import AdapterRef
from engine.errors import AdapterError, AdapterLoadFailed, AdapterTooLarge
from tests.adapters.conftest import contents
from tests.adapters.fake_hub import FakeHub, Repo

Manner = Callable[[BaseHTTPRequestHandler], None]
SENT = 1 << 28  # by who sends without end


class BadHub(FakeHub):
    """Answers requests whose path begins or ends so by a manner of their own."""

    manner: Manner
    where = "api/"
    sent = 0

    def _answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.strip("/")
        if body and (path.startswith(self.where) or path.endswith(self.where)):
            request.close_connection = True
            try:
                self.manner(request)
            except OSError:
                return
        else:
            super()._answer(request, body)

    def begin(self, request: BaseHTTPRequestHandler, **headers: str) -> None:
        request.send_response(200)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Connection", "close")
        request.end_headers()

    def endless(self, request: BaseHTTPRequestHandler) -> None:
        self.begin(request, X_Repo_Commit="a" * 40, ETag='"x"')
        while self.sent < SENT:
            request.wfile.write(b" " * (1 << 16))
            self.sent += 1 << 16

    def drip(self, request: BaseHTTPRequestHandler) -> None:
        self.begin(request, X_Repo_Commit="a" * 40, ETag='"x"')
        for _ in range(600):
            request.wfile.write(b" ")
            time.sleep(0.05)

    def bomb(self, request: BaseHTTPRequestHandler) -> None:
        self.begin(request, Content_Encoding="gzip")
        packed = gzip.compress(b" " * SENT)
        assert len(packed) > 1 << 17
        request.wfile.write(packed)

    def deep(self, request: BaseHTTPRequestHandler) -> None:
        self.begin(request)
        request.wfile.write(b"[" * 100_000)

    def foreign(self, request: BaseHTTPRequestHandler) -> None:
        self.begin(request)
        request.wfile.write(json.dumps({"siblings": 5, "gated": []}).encode())


@pytest.fixture
def bad(saved: Path) -> Iterator[BadHub]:
    with BadHub() as server:
        repo = Repo()
        repo.commit(contents(saved / "a"))
        server.repos["org/public"] = repo
        yield server


def ask(bad: BadHub, cache: Path) -> None:
    source = HubSource(None, cache, endpoint=bad.url, attempts=2, backoff_s=0.01, max_seconds=0.5)
    version = source.resolve(AdapterRef.parse("org/public"), None)
    source.fetch(version, None, lambda done, total: None).close()


@pytest.mark.parametrize("where", ["api/", "adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("manner", ["endless", "drip"])
def test_answers_are_bounded(
    bad: BadHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manner: str, where: str
) -> None:
    monkeypatch.setattr(module, "API_SECONDS", 0.5)
    bad.manner, bad.where = getattr(bad, manner), where
    error = AdapterTooLarge if manner == "endless" and where != "api/" else AdapterLoadFailed
    with pytest.raises(error, match="the limit is" if manner == "endless" else "took too long"):
        ask(bad, tmp_path)
    assert bad.sent < SENT
    left = [
        path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1 << 24
    ]
    assert not left
    bad.where = "nowhere"
    ask(bad, tmp_path)


@pytest.mark.parametrize("manner", ["bomb", "deep", "foreign"])
def test_answers_that_are_no_hubs(bad: BadHub, tmp_path: Path, manner: str) -> None:
    bad.manner = getattr(bad, manner)
    with pytest.raises(AdapterError) as caught:
        ask(bad, tmp_path)
    assert caught.value.status == 424
    bad.where = "nowhere"
    ask(bad, tmp_path)
