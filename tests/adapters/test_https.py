"""Adapters of web servers, over TLS on this machine."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

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

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

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
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server._answer(self)

            def do_HEAD(self) -> None:
                server._answer(self)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, address: object) -> None:
                pass

        certificate = folder / "certificate.pem"
        certificate.write_text(CERTIFICATE + KEY)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
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
        if request.command == "GET":
            request.wfile.write(data[: len(data) // 2] if is_spoiled and self.cut else data)


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
        load(make(), f"{server.host}/my team/a")


@pytest.mark.parametrize("where", ["HEAD", "GET"])
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (403, AdapterForbidden),
        (401, AdapterForbidden),
        (500, AdapterLoadFailed),
        (410, AdapterLoadFailed),
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
