"""Adapters of web servers, over TLS on this machine."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.adapters import web
from engine.adapters.disk_cache import FOLDER, DiskCache
from engine.adapters.https import HttpsSource
from engine.adapters.ref import AdapterRef
from engine.adapters.registry import Registry, make_sources
from engine.config import AdapterConfig, EngineConfig
from engine.errors import (
    AdapterError,
    AdapterForbidden,
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterTooLarge,
    ConfigError,
)
from tests.adapters.conftest import contents
from tests.adapters.fake_web import WebServer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def server(saved: Path, tmp_path: Path) -> Iterator[WebServer]:
    server = WebServer(tmp_path)
    server.put("my team/a", contents(saved / "a"))
    yield server
    server.stop()


Make = Callable[..., HttpsSource]


@pytest.fixture
def make(server: WebServer, tmp_path: Path) -> Make:
    def source(*hosts: str, **given: object) -> HttpsSource:
        settings: dict[str, object] = {"backoff_s": 0.01, "attempts": 2, "context": server.context}
        cache = DiskCache(tmp_path, 0, 20.0)
        return HttpsSource(cache, hosts or (server.host,), **{**settings, **given})  # type: ignore[arg-type]

    return source


def load(source: HttpsSource, place: str) -> bytes:
    version = source.resolve(AdapterRef((place,)), "token")
    with source.fetch(version, "token", lambda done, total: None) as files:
        return files.weights.read()


def test_equals_the_folder_and_is_downloaded_once(
    server: WebServer, make: Make, saved: Path
) -> None:
    for _ in range(2):
        found = load(make(), f"{server.host}/my team/a/")
        assert found == (saved / "a" / WEIGHTS).read_bytes()
    assert server.requests[f"GET /my%20team/a/{WEIGHTS}"] == 1
    server.put("my team/a", contents(saved / "b"))
    assert load(make(), f"{server.host}/my team/a") == (saved / "b" / WEIGHTS).read_bytes()


def test_only_listed_hosts(server: WebServer, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also another port, a host in a password's place, and a name with a private address."""
    for place in (
        f"localhost:{server.port}/my team/a",
        "127.0.0.1/my team/a",
        f"x@{server.host}/my team/a",
        "127.0.0.1:1/a",
        "",
    ):
        with pytest.raises(AdapterForbidden):
            load(make(), place)
    with pytest.raises(AdapterForbidden, match="private address"):
        load(make(f"localhost:{server.port}"), f"localhost:{server.port}/my team/a")
    assert not server.requests
    real = socket.getaddrinfo

    def rebind(host: str, *given: object, **more: object) -> object:
        """A public address first, a private one second."""
        return real("8.8.8.8", *given, **more) + real("127.0.0.1", *given, **more)  # type: ignore[arg-type, operator]

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    with pytest.raises(AdapterForbidden, match="private address"):
        load(make("public.example"), "public.example/a")


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("8.8.8.8", False),
        ("2001:4860:4860::8888", False),
        ("127.0.0.1", True),
        ("10.1.2.3", True),
        ("169.254.169.254", True),
        ("100.64.0.1", True),
        ("0.0.0.0", True),
        ("224.0.0.1", True),
        ("::1", True),
        ("fe80::1%eth0", True),
        ("fd00::1", True),
        ("::ffff:127.0.0.1", True),
        ("64:ff9b::7f00:1", True),
        ("2002:7f00:1::", True),
    ],
)
def test_private_addresses(address: str, private: bool) -> None:
    assert web.is_private(address) == private


@pytest.mark.parametrize("where", ["HEAD", "GET"])
@pytest.mark.parametrize(
    "to", ["https://127.0.0.1:1/", "http://{host}/", "https://[::1]/", "//localhost/"]
)
def test_redirects_stay_on_the_list(server: WebServer, make: Make, where: str, to: str) -> None:
    server.where, server.status, server.broken = where, 302, 100
    server.location = to.format(host=server.host)
    with pytest.raises(AdapterForbidden, match="redirect|--adapter-hosts"):
        load(make(), f"{server.host}/my team/a")


def test_a_redirect_on_the_list(server: WebServer, make: Make, saved: Path) -> None:
    server.where, server.status, server.broken = "HEAD", 307, 1
    server.location = f"/my%20team/a/{CONFIG}"
    assert load(make(), f"{server.host}/my team/a") == (saved / "a" / WEIGHTS).read_bytes()
    server.location, server.broken = f"https://{server.host}/loop", 1000
    server.files["/loop"] = b""
    with pytest.raises(AdapterLoadFailed, match="redirects more than"):
        load(make(), f"{server.host}/other")


@pytest.mark.parametrize("where", ["HEAD", "GET"])
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (403, AdapterForbidden),
        (401, AdapterForbidden),
        (500, AdapterLoadFailed),
        (410, (AdapterNotFound, AdapterLoadFailed)),
    ],
)
def test_faults(
    server: WebServer, make: Make, tmp_path: Path, where: str, status: int, kind: type[AdapterError]
) -> None:
    server.where, server.status, server.broken = where, status, 100
    with pytest.raises(kind) as caught:
        load(make(), f"{server.host}/my team/a")
    assert caught.value.hint
    assert list((tmp_path / FOLDER).glob("*.tmp")) == []
    server.broken = 1
    if status == 500:
        assert load(make(), f"{server.host}/my team/a")


def test_cut_off(server: WebServer, make: Make, tmp_path: Path, saved: Path) -> None:
    server.cut, server.broken = True, 100
    with pytest.raises(AdapterLoadFailed):
        load(make(), f"{server.host}/my team/a")
    assert list((tmp_path / FOLDER).glob("*.tmp")) == []
    server.broken = 1
    assert load(make(), f"{server.host}/my team/a") == (saved / "a" / WEIGHTS).read_bytes()


def test_replaced_between_resolve_and_fetch(server: WebServer, make: Make, saved: Path) -> None:
    source = make()
    version = source.resolve(AdapterRef((f"{server.host}/my team/a",)), None)
    server.put("my team/a", contents(saved / "b"))
    with pytest.raises(AdapterLoadFailed, match="changed during loading"):
        source.fetch(version, None, lambda done, total: None)


def test_missing_foreign_and_too_large(server: WebServer, make: Make, saved: Path) -> None:
    server.put("empty", {CONFIG: b"{}"})
    with pytest.raises(AdapterIncompatible, match="has neither"):
        load(make(), f"{server.host}/empty")
    with pytest.raises(AdapterNotFound, match="there is no adapter_config.json"):
        load(make(), f"{server.host}/none")
    with pytest.raises(AdapterTooLarge, match="the limit is 10 bytes"):
        load(make(max_file_bytes=10), f"{server.host}/my team/a")
    server.headers = False
    with pytest.raises(AdapterLoadFailed, match="neither ETag nor"):
        load(make(), f"{server.host}/my team/a")
    with pytest.raises(AdapterLoadFailed, match="certificate"):
        load(make(context=None), f"{server.host}/my team/a")


def test_settings(tmp_path: Path) -> None:
    """Off unless hosts are listed."""
    shutil.rmtree(tmp_path)
    config = EngineConfig(adapters=AdapterConfig(adapter_hosts=("example.org",)))
    assert "https" in make_sources(config) and "https" not in make_sources(EngineConfig())
    (ref,) = Registry(make_sources(config), "hub").candidates(
        AdapterRef.parse("https://example.org/a")
    )
    assert (ref.id, ref.source) == ("example.org/a", "https")
    for bad in ("https://x", "x/y", "", "a@b", "x:port", ":1"):
        with pytest.raises(ConfigError, match="--adapter-hosts"):
            HttpsSource(DiskCache(tmp_path), [bad])


def test_a_server_that_is_gone(server: WebServer, make: Make, saved: Path) -> None:
    """Connections are refused: what was downloaded serves on, and nothing else."""
    place = f"{server.host}/my team/a"
    load(make(), place)
    server.stop()
    assert make().resolve(AdapterRef((place,)), None).unconfirmed
    assert load(make(), place) == (saved / "a" / WEIGHTS).read_bytes()
    with pytest.raises(AdapterLoadFailed):
        load(make(), f"{server.host}/other")
