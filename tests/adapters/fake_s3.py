"""A real S3 API server (moto) in a thread, and a proxy in front of it that breaks answers on demand."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
from moto.s3 import models
from moto.server import ThreadedMotoServer

from tests.adapters.halt import Halt, flipped

BUCKET = "loras"


class FakeS3:
    """`url` is the proxy's. The next `broken` requests whose path contains `where` get the answer `fault`."""

    def __init__(self) -> None:
        self._forget()
        self._lock = threading.Lock()
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        fake = self

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # else small answers wait 40 ms
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake._answer(self)

            def do_HEAD(self) -> None:
                fake._answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._proxy.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._proxy.server_address[1]}"

    def start(self) -> None:
        models.S3_UPLOAD_PART_MIN_SIZE = 256
        self._moto.start()
        threading.Thread(target=self._proxy.serve_forever, args=(0.01,), daemon=True).start()
        port = self._moto._server.server_port  # type: ignore[union-attr]
        self._upstream = ("127.0.0.1", port)
        self.client: Any = boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1"
        )
        self.client.create_bucket(Bucket=BUCKET)

    def stop(self) -> None:
        self.client.close()
        self._proxy.shutdown()
        self._proxy.server_close()
        self._moto.stop()

    def _forget(self) -> None:
        self.requests: Counter[str] = Counter()
        self.broken = 0
        # A status; or `cut`: the body ends in its middle; or `corrupt`: one of its bytes is another.
        self.fault: int | str = 503
        self.code = "SlowDown"
        self.body: bytes | None = None  # of a broken answer with a status
        self.where = ""
        self.delay_s = 0.0  # between two pieces of a body
        self.add_headers: dict[str, str] = {}  # to answers of HEAD for weights
        self.halt = Halt()

    def reset(self) -> None:
        """No faults, no objects."""
        self._forget()
        for one in self.client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
            self.client.delete_object(Bucket=BUCKET, Key=one["Key"])

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def put_folder(self, key: str, folder: Path) -> None:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            self.put(f"{key}/{name}", (folder / name).read_bytes())

    def forget_checksum(self, key: str) -> None:
        """Makes an object one that was stored without an additional checksum."""
        for account in models.s3_backends.values():
            stored = account["aws"].head_object(BUCKET, key)
            stored.checksum_algorithm = stored.checksum_value = None

    @property
    def downloads(self) -> int:
        """Requests for a weight file."""
        return sum(n for path, n in self.requests.items() if "adapter_model" in path)

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.requests[request.path] += request.command == "GET"
            is_broken = self.broken > 0 and self.where in request.path
            is_broken &= request.command == "GET"
            self.broken -= is_broken
        if is_broken and isinstance(self.fault, int):
            body = self.body
            if body is None:
                body = f"<Error><Code>{self.code}</Code><Message>fault</Message></Error>".encode()
            request.send_response(self.fault)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body)
            return
        upstream = http.client.HTTPConnection(*self._upstream, timeout=10)
        headers = {key: value for key, value in request.headers.items() if key != "Host"}
        upstream.request(request.command, request.path, headers=headers)
        answer = upstream.getresponse()
        body = answer.read()
        upstream.close()
        request.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("connection", "content-length", "server", "date"):
                request.send_header(key, value)
        length = answer.headers.get("Content-Length") if request.command == "HEAD" else None
        request.send_header("Content-Length", length or str(len(body)))
        if request.command == "HEAD" and "adapter_model" in request.path:
            for key, value in self.add_headers.items():
                request.send_header(key, value)
        request.end_headers()
        if self.halt.write(request, body):
            return
        if self.fault == "corrupt" and is_broken:
            body = flipped(body)
        end = len(body) // 2 if is_broken and self.fault == "cut" else len(body)
        step = 1 << 10 if self.delay_s else 1 << 20
        try:
            for start in range(0, end, step):
                request.wfile.write(body[start : min(end, start + step)])
                request.wfile.flush()
                time.sleep(self.delay_s)
        except OSError:
            pass
        request.close_connection = is_broken
