"""One face for the fakes of every source over a network, so that a test can hold for all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine.adapters.disk_cache import DiskCache
from engine.adapters.https import HttpsSource
from engine.adapters.hub import HubSource
from engine.adapters.pbase import PbaseSource
from engine.adapters.ref import AdapterRef
from engine.adapters.s3 import S3Source
from engine.adapters.schemes import SchemeSource
from engine.adapters.sources import Source, Version
from tests.adapters.fake_hdfs import FakeHdfs
from tests.adapters.fake_hub import FakeHub, Repo
from tests.adapters.fake_pbase import FakeApi
from tests.adapters.fake_web import WebServer
from tests.adapters.halt import Halt

STORES = ["hub", "s3", "pbase", "https", "webhdfs"]
FAST: dict[str, Any] = {"attempts": 2, "backoff_s": 0.01}


@dataclass
class Store:
    """One source with its server."""

    id: str  # of the adapter that `put` writes, without a prefix
    prefix: str
    put: Callable[[Mapping[str, bytes]], None]  # replaces the adapter's files
    source: Callable[..., Source]  # from the folder of downloads and further arguments
    requests: Callable[[], Mapping[str, int]]
    halt: Halt
    fail: Callable[[int], None]  # every request gets this status from now on; 0: no more
    corrupt: Callable[[int], None] | None = None  # so many answers with weights have another byte
    flags: list[str] = field(default_factory=list)  # of the commands

    def resolve(self, source: Source, revision: str = "") -> Version:
        return source.resolve(AdapterRef((self.id,), source.name, revision or None), None)

    def load(self, source: Source, version: Version | None = None) -> list[bytes]:
        """Configuration, weights, shards, tokenizer and chat template."""
        version = version or self.resolve(source)
        with source.fetch(version, None, lambda done, total: None) as files:
            every = (files.config, files.weights, *files.shards, *files.texts)
            return [file.read() for file in every]

    def downloads(self, name: str) -> int:
        """Requests for the contents of files whose name contains this."""
        found = {line: number for line, number in self.requests().items() if name in line}
        no_contents = ("HEAD ", "GETFILESTATUS ", "list-type")
        return sum(n for line, n in found.items() if not any(one in line for one in no_contents))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path there."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@contextmanager
def store(kind: str, get: Callable[[str], Any], patch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The store of a source. `get`: the fixture of a name."""
    yield from {"hub": _hub, "s3": _s3, "pbase": _pbase, "https": _https, "webhdfs": _webhdfs}[
        kind
    ](get, patch)


def _hub(get: Callable[[str], Any], patch: pytest.MonkeyPatch) -> Iterator[Store]:
    hub: FakeHub = get("hub")
    patch.setenv("HF_ENDPOINT", hub.url)
    repo = hub.repos["org/adapter"] = Repo()

    def source(cache: Path, **given: Any) -> Source:
        return HubSource(None, cache, endpoint=hub.url, **FAST, **given)

    def fail(status: int) -> None:
        hub.broken, hub.broken_status = 1000 if status else 0, status

    def corrupt(times: int) -> None:
        hub.corrupt = times

    yield Store(
        "org/adapter",
        "",
        lambda files: repo.commit(dict(files)) and None,
        source,
        lambda: hub.requests,
        hub.halt,
        fail,
        corrupt,
    )


def _s3(get: Callable[[str], Any], patch: pytest.MonkeyPatch) -> Iterator[Store]:
    server = get("s3")

    def put(files: Mapping[str, bytes]) -> None:
        for one in server.client.list_objects_v2(Bucket="loras", Prefix="x/").get("Contents", []):
            server.client.delete_object(Bucket="loras", Key=one["Key"])
        for name, data in files.items():
            server.put(f"x/adapter/{name}", data)

    def source(cache: Path, **given: Any) -> Source:
        return S3Source(DiskCache(cache), endpoint=server.url, **FAST, **given)

    def fail(status: int) -> None:
        server.broken, server.fault = 1000 if status else 0, status
        server.code = "AccessDenied" if status == 403 else "SlowDown"

    def corrupt(times: int) -> None:
        server.where, server.fault, server.broken = "adapter_model", "corrupt", times

    flags = ["--s3-endpoint-url", server.url]
    requests = lambda: server.requests  # noqa: E731
    yield Store(
        "loras/x/adapter", "s3://", put, source, requests, server.halt, fail, corrupt, flags
    )


def _pbase(get: Callable[[str], Any], patch: pytest.MonkeyPatch) -> Iterator[Store]:
    api = FakeApi()
    api.has("/v2/repos/pirat/version/3", status="completed", adapterPath="s3://loras/x/adapter")
    for store in _s3(get, patch):

        def source(cache: Path, below: Store = store, **given: Any) -> Source:
            s3 = below.source(cache, **given)
            assert isinstance(s3, S3Source)
            return PbaseSource(s3, api.url, token="alice", **FAST)

        def fail(status: int) -> None:
            api.failure, api.failures = status, 1000 if status else 0

        flags = ["--default-adapter-source=pbase", f"--predibase-gateway-endpoint={api.url}"]
        flags += ["--predibase-api-token=alice", *store.flags]
        given = (store.put, source, store.requests, store.halt, fail, store.corrupt, flags)
        yield Store("pirat/3", "", *given)
    api.stop()


def _https(get: Callable[[str], Any], patch: pytest.MonkeyPatch) -> Iterator[Store]:
    server = WebServer(get("tmp_path_factory").mktemp("tls"))
    patch.setenv("SSL_CERT_FILE", str(server.certificate))

    def put(files: Mapping[str, bytes]) -> None:
        server.files.clear()
        server.put("x/adapter", dict(files))

    def source(cache: Path, **given: Any) -> Source:
        given = {"context": server.context, **FAST, **given}
        return HttpsSource(DiskCache(cache), [server.host], **given)

    def fail(status: int) -> None:
        server.where, server.status, server.broken = "HEAD", status, 1000 if status else 0

    flags = ["--adapter-hosts", server.host]
    name, requests = f"{server.host}/x/adapter", lambda: server.requests
    yield Store(name, "https://", put, source, requests, server.halt, fail, None, flags)
    server.stop()


def _webhdfs(get: Callable[[str], Any], patch: pytest.MonkeyPatch) -> Iterator[Store]:
    server = FakeHdfs()
    address = {"host": "127.0.0.1", "port": server.port}
    patch.setenv("FSSPEC_WEBHDFS", json.dumps(address))  # of other processes
    patch.setitem(__import__("fsspec").config.conf, "webhdfs", address)

    def put(files: Mapping[str, bytes]) -> None:
        server.files.clear()
        server.files |= {f"/x/adapter/{name}": data for name, data in files.items()}

    def source(cache: Path, **given: Any) -> Source:
        return SchemeSource("webhdfs", DiskCache(cache), **FAST, **given)

    def fail(status: int) -> None:
        server.status = status

    flags, requests = ["--adapter-schemes", "webhdfs"], lambda: server.requests
    yield Store("/x/adapter", "webhdfs://", put, source, requests, server.halt, fail, None, flags)
    server.stop()
