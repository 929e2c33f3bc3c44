"""Adapters of Predibase, against a fake of its API and a real S3 API server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine.adapters import pbase as module
from engine.adapters.disk_cache import DiskCache
from engine.adapters.pbase import PbaseSource
from engine.adapters.ref import AdapterRef
from engine.adapters.s3 import S3Source
from engine.errors import AdapterError, AdapterForbidden, AdapterLoadFailed, AdapterNotFound
from tests.adapters.fake_pbase import FakeApi

if TYPE_CHECKING:
    from tests.adapters.fake_s3 import FakeS3

WEIGHTS = "adapter_model.safetensors"


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
