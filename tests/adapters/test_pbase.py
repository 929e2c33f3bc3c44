"""Adapters of Predibase, against a fake of its API and a real S3 API server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine.adapters import pbase as module
from engine.adapters.disk_cache import FOLDER, DiskCache
from engine.adapters.pbase import PbaseSource
from engine.adapters.ref import AdapterRef
from engine.adapters.s3 import S3Source
from engine.errors import AdapterError, AdapterForbidden, AdapterLoadFailed, AdapterNotFound

if TYPE_CHECKING:
    from tests.adapters.fake_s3 import FakeS3

WEIGHTS = "adapter_model.safetensors"


PROGRAM = """
import sys
from pathlib import Path
from engine.adapters.disk_cache import DiskCache
from engine.adapters.pbase import PbaseSource
from engine.adapters.ref import AdapterRef
from engine.adapters.s3 import S3Source
below = S3Source(DiskCache(Path(sys.argv[1])), endpoint=sys.argv[2], part_bytes=500)
source = PbaseSource(below, sys.argv[3], bucket="loras")
version = source.resolve(AdapterRef.parse("pirat/3"), "alice")
source.fetch(version, "alice", lambda done, total: print(done, flush=True))
"""


class FakeApi:
    """Answers by path: a status and a body. Only the token `alice` is valid."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.requests: Counter[str] = Counter()
        self.failures = 0  # answers with status 503 first
        self.delay_s = 0.0  # between two bytes
        self.redirect: str | None = None
        api = self

        class Handler(BaseHTTPRequestHandler):
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
            status = 503
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


@pytest.fixture
def api() -> Iterator[FakeApi]:
    server = FakeApi()
    server.has("/v2/repos/pirat/version/3", status="completed", adapterPath="team/a")
    server.has("/v1/models/version/name/old?version=1", uuid="u", bestRunID="r")
    yield server
    server.stop()


@pytest.fixture
def source(api: FakeApi, s3: FakeS3, tmp_path: Path) -> PbaseSource:
    below = S3Source(DiskCache(tmp_path), endpoint=s3.url, attempts=1)
    return PbaseSource(below, api.url, bucket="loras", attempts=2, backoff_s=0.01)


def load(source: PbaseSource, name: str, token: str | None = "alice") -> bytes:
    version = source.resolve(AdapterRef.parse(name), token)
    assert version.source == "pbase"
    with source.fetch(version, token, lambda done, total: None) as files:
        return files.weights.read()


def test_by_both_interfaces(api: FakeApi, source: PbaseSource, s3: FakeS3, saved: Path) -> None:
    s3.put_folder("u/r/artifacts/model/model_weights", saved / "c")
    assert load(source, "pirat/3") == (saved / "a" / WEIGHTS).read_bytes()
    assert load(source, "old/1") == (saved / "c" / WEIGHTS).read_bytes()
    api.has("/v2/repos/url/version/1", status="TRAINING", adapterPath="s3://loras/team/a-b/")
    assert load(source, "url/1") == (saved / "b" / WEIGHTS).read_bytes()
    api.has("/v2/repos/a%3Fb/version/1", status="completed", adapterPath="team/a")
    assert load(source, "a?b/1")
    api.failures = 1
    assert load(source, "pirat/3")


def test_each_tenant_by_its_own_token(api: FakeApi, source: PbaseSource, s3: FakeS3) -> None:
    """A tenant cannot use an adapter that only another tenant may read."""
    load(source, "pirat/3")
    before = s3.requests.total()
    for token in ("bob", None):
        with pytest.raises(AdapterForbidden) as caught:
            load(source, "pirat/3", token)
        assert caught.value.field == "api_token"
    assert s3.requests.total() == before
    assert source.tenant("alice") != source.tenant("bob")
    version = source.resolve(AdapterRef.parse("pirat/3"), "alice")
    assert version.salt == source.tenant("alice")


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (200, b'{"status": "queued"}', AdapterLoadFailed, "not trained yet"),
        (200, b'{"status": "completed"}', AdapterLoadFailed, "no files"),
        (200, b'{"adapterPath": ["x"]}', AdapterLoadFailed, "not a path"),
        (200, b'{"adapterPath": "team/none"}', AdapterNotFound, "there is no s3://loras/team/none"),
        (200, b"[]", AdapterLoadFailed, "not a JSON object"),
        (200, b"[" * 100_000, AdapterLoadFailed, "not a JSON object"),
        (200, b" " * (2 << 20), AdapterLoadFailed, "more than 1048576 bytes"),
        (404, b"", AdapterNotFound, "there is no x/1 at Predibase"),
        (403, b"", AdapterForbidden, "refused the api_token"),
        (400, b"", AdapterLoadFailed, "status 400"),
        (500, b"", AdapterLoadFailed, "status 500"),
    ],
)
def test_faults(
    api: FakeApi,
    source: PbaseSource,
    status: int,
    body: bytes,
    kind: type[AdapterError],
    words: str,
) -> None:
    api.answers["/v2/repos/x/version/1"] = (status, body)
    with pytest.raises(kind, match=words) as caught:
        load(source, "x/1")
    assert caught.value.hint or caught.value.field
    assert api.requests["/v2/repos/x/version/1"] == (2 if status == 500 else 1)
    assert load(source, "pirat/3")


def test_slow(api: FakeApi, source: PbaseSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "API_SECONDS", 0.3)
    api.delay_s = 0.1
    started = time.monotonic()
    with pytest.raises(AdapterLoadFailed, match="too slowly"):
        load(source, "pirat/3")
    assert time.monotonic() - started < 3


def test_the_token_goes_nowhere_else(api: FakeApi, source: PbaseSource) -> None:
    api.redirect = "http://localhost:1/"
    with pytest.raises(AdapterLoadFailed, match="a redirect leads to localhost"):
        load(source, "pirat/3")


def test_no_server_and_bad_names(api: FakeApi, source: PbaseSource) -> None:
    for name in ("a/b/c", "/3", "none/1", "none"):
        with pytest.raises(AdapterNotFound):
            load(source, name)
    api.stop()
    with pytest.raises(AdapterLoadFailed) as caught:
        load(source, "pirat/3")
    assert "--predibase-gateway-endpoint" in (caught.value.hint or "")


def test_killed_during_the_download(
    api: FakeApi, source: PbaseSource, s3: FakeS3, saved: Path, tmp_path: Path
) -> None:
    s3.delay_s = 0.1
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), s3.url, api.url],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
    )
    assert program.stdout is not None
    for _ in range(3):
        assert program.stdout.readline().strip(), "it ended before it was killed"
    program.kill()
    program.wait()
    program.stdout.close()
    left = tmp_path / FOLDER
    assert len(list(left.glob("*.tmp"))) == 1
    s3.delay_s = 0.0
    assert load(source, "pirat/3") == (saved / "a" / WEIGHTS).read_bytes()
    assert not list(left.glob("*.tmp"))
