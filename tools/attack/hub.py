"""A hub that delivers hostile files, and one that misbehaves itself: a program of its own.

    python -m tools.attack.hub FOLDER

prints its address and ends with its input. The repository `files/NAME` is the folder NAME of FOLDER, honestly served;
`hostile/WORD-N` misbehaves as WORD of `MANNERS` says.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.adapters.fake_hub import FakeHub, Repo

COMMIT = "a" * 40
MAX_SENT = 1 << 30  # bytes of an answer without end
MAX_DRIP_S = 300.0
DRIP_S = 0.5
CONFIG = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8}'
FILES = {"adapter_config.json": len(CONFIG), "adapter_model.safetensors": 100_000}

Manner = Callable[[BaseHTTPRequestHandler, str], None]


def send(
    request: BaseHTTPRequestHandler, status: int, data: bytes, size: int = -1, **headers: str
) -> None:
    request.send_response(status)
    for key, value in headers.items():
        request.send_header(key.replace("_", "-"), value)
    if size != -2:
        request.send_header("Content-Length", str(len(data) if size < 0 else size))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)


def info(request: BaseHTTPRequestHandler, sizes: dict[str, int] = FILES) -> None:
    siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
    body = {"id": "x/y", "sha": COMMIT, "private": False, "gated": False, "siblings": siblings}
    send(request, 200, json.dumps(body).encode())


def begin(request: BaseHTTPRequestHandler, path: str, size: int = -1) -> bool:
    """Answers everything but the weights' body; True if that is what is asked for."""
    if path.startswith("api/"):
        info(request)
        return False
    if path.endswith("adapter_config.json"):
        send(request, 200, CONFIG, X_Repo_Commit=COMMIT, ETag='"c"')
        return False
    length = FILES["adapter_model.safetensors"] if size < 0 else size
    request.send_response(200)
    request.send_header("X-Repo-Commit", COMMIT)
    request.send_header("ETag", '"w"')
    if length:
        request.send_header("Content-Length", str(length))
    request.send_header("Connection", "close")
    request.close_connection = True
    request.end_headers()
    return request.command != "HEAD"


def drips(request: BaseHTTPRequestHandler, path: str) -> None:
    """A byte now and then, often enough for any timeout between two bytes."""
    if begin(request, path):
        for _ in range(int(MAX_DRIP_S / DRIP_S)):
            request.wfile.write(b"x")
            time.sleep(DRIP_S)


def drips_facts(request: BaseHTTPRequestHandler, path: str) -> None:
    """The list of files itself, byte by byte."""
    request.send_response(200)
    request.send_header("Content-Length", "100000")
    request.end_headers()
    for _ in range(int(MAX_DRIP_S / DRIP_S)):
        request.wfile.write(b" ")
        time.sleep(DRIP_S)


def silent(request: BaseHTTPRequestHandler, path: str) -> None:
    time.sleep(MAX_DRIP_S)


def lies(request: BaseHTTPRequestHandler, path: str) -> None:
    """100,000 bytes are announced, 1,000 come."""
    if begin(request, path):
        request.wfile.write(bytes(1000))


def fails(request: BaseHTTPRequestHandler, path: str) -> None:
    send(request, 500, b"<html>" + b"x" * 10_000)


def busy(request: BaseHTTPRequestHandler, path: str) -> None:
    send(request, 429, b"{}", Retry_After="100000")


def circles(request: BaseHTTPRequestHandler, path: str) -> None:
    send(request, 307, b"", Location="/" + path)


def elsewhere(request: BaseHTTPRequestHandler, path: str) -> None:
    """Redirects to an address that answers nothing."""
    send(request, 302, b"", Location="http://127.0.0.1:9/" + path)


def resets(request: BaseHTTPRequestHandler, path: str) -> None:
    """Closes in the middle, with a reset."""
    if begin(request, path):
        request.wfile.write(bytes(5000))
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def endless(request: BaseHTTPRequestHandler, path: str) -> None:
    """Weights of no announced length that do not end."""
    if begin(request, path, 0):
        piece = bytes(1 << 20)
        for _ in range(MAX_SENT // len(piece)):
            request.wfile.write(piece)


def endless_facts(request: BaseHTTPRequestHandler, path: str) -> None:
    """A list of files that does not end."""
    send(request, 200, b'{"id": "x/y", "siblings": [', -2, Connection="close")
    request.close_connection = True
    piece = b'{"rfilename": "x", "size": 1},' * 30_000
    for _ in range(MAX_SENT // 4 // len(piece)):
        request.wfile.write(piece)


def not_json(request: BaseHTTPRequestHandler, path: str) -> None:
    send(request, 200, b"<html>not a hub</html>")


def wrong_json(request: BaseHTTPRequestHandler, path: str) -> None:
    bodies = [b"[]", b"null", b'{"siblings": 7}', b'{"id": 1, "siblings": [1]}', b"[" * 100_000]
    send(request, 200, bodies[zlib.crc32(path.encode()) % len(bodies)])


def escaping(request: BaseHTTPRequestHandler, path: str) -> None:
    """File names and a commit that lead out of the cache's folder."""
    siblings = [{"rfilename": name} for name in ("../../x", *FILES)]
    body = {"id": "x/y", "sha": "../../../../tmp/out", "siblings": siblings}
    if path.startswith("api/"):
        send(request, 200, json.dumps(body).encode())
    else:
        send(request, 404, b"", X_Error_Code="EntryNotFound")


def noise(request: BaseHTTPRequestHandler, path: str) -> None:
    """No HTTP at all."""
    request.close_connection = True
    request.wfile.write(b"\x16\x03\x01" + bytes(range(256)) * 100)


def wide_header(request: BaseHTTPRequestHandler, path: str) -> None:
    send(request, 200, b"{}", X_Long="x" * 5_000_000)


MANNERS: dict[str, Manner] = {
    "drips": drips,
    "drips-facts": drips_facts,
    "silent": silent,
    "lies": lies,
    "fails": fails,
    "busy": busy,
    "circles": circles,
    "elsewhere": elsewhere,
    "resets": resets,
    "endless": endless,
    "endless-facts": endless_facts,
    "not-json": not_json,
    "wrong-json": wrong_json,
    "escaping": escaping,
    "noise": noise,
    "wide-header": wide_header,
}


class HostileHub(FakeHub):
    """See the module."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def _answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        owner, name = (path.removeprefix("api/models/").split("/") + [""])[:2]
        # Whoever asked may be gone.
        with suppress(OSError):
            if owner == "hostile" and (manner := MANNERS.get(name.rpartition("-")[0])):
                manner(request, path)
                return
            if owner == "files":
                self.repos[f"files/{name}"] = self._read(name)
            del request.headers["Authorization"]  # any token may read everything here
            super()._answer(request, body)

    def _read(self, name: str) -> Repo:
        """A folder as a repository; only what is a plain file."""
        paths = (self.folder / Path(name).name).glob("adapter_*")
        files = {path.name: path.read_bytes() for path in paths if path.is_file()}
        repo = Repo()
        repo.commit(files)
        return repo


def main() -> None:
    with HostileHub(Path(sys.argv[1])) as hub:
        print(hub.url, flush=True)
        sys.stdin.read()
        hub.stopped = True


if __name__ == "__main__":
    main()
