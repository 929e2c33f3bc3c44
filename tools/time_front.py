"""CPU time of the front for each streamed token, beside the least that aiohttp spends on the same bytes.

    python -m tools.time_front [--streams 64] [--tokens 256] [--api openai|native] [--profile FILE]

The server's own application streams to a client in another process, a token for every stream each 10 ms, from an
engine that says what it is told. Then a bare handler writes chunks of the same length at the same times.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
from aiohttp import web

from engine.backend import Reader
from engine.bench.shapes import write_model
from engine.config import EngineConfig, ServerConfig
from engine.messages import EngineInfo, EngineStats, Request, TokenOutput, Update, Usage
from engine.process.pipe_messages import Cancel, Submit, Updates
from engine.process.streams import Streams
from engine.server.app import build_app
from engine.server.text import Text

STEP_S = 0.01
PROMPT = [100 + index for index in range(128)]


async def steps(count: int) -> AsyncIterator[int]:
    """0 .. count - 1, one every STEP_S seconds."""
    due = time.perf_counter()
    for index in range(count):
        yield index
        due += STEP_S
        await asyncio.sleep(max(0.0, due - time.perf_counter()))


class Ticking:
    """A backend whose every open request gets a token each step, as bytes that are decoded as a shard's are."""

    alive = True
    stats = EngineStats()

    def __init__(self, streams: int, tokens: int) -> None:
        self.info = EngineInfo(
            model_id="tiny",
            model_type="mistral",
            revision=None,
            dtype="bfloat16",
            device="cpu",
            device_name="none",
            vocab_size=32000,
            max_input_length=4096,
            max_total_tokens=4096,
            max_batch_total_tokens=streams * 4096,
            max_batch_size=streams,
            max_step_tokens=4096,
            block_size=16,
            adapter_bytes=1 << 20,
            host_bytes=1 << 20,
            backends={},
            memory_plan=[],
            targets=[],
        )
        self.ready = asyncio.Event()
        self._streams = Streams(self._send)
        self._number, self._tokens = streams, tokens
        self._ids: list[str] = []

    def _send(self, message: Submit | Cancel) -> None:
        if isinstance(message, Submit):
            self._ids.append(message.request.id)
            if len(self._ids) == self._number:
                self.ready.set()

    def submit(self, request: Request, reader: Reader) -> None:
        self._streams.submit(request, reader)

    def cancel(self, id: str) -> None:
        self._streams.cancel(id)

    async def run(self) -> None:
        """Every stream from its first token to its last."""
        await self.ready.wait()
        decode = msgspec.msgpack.Decoder(Updates).decode
        async for index in steps(self._tokens):
            last = index == self._tokens - 1
            finish = "length" if last else None
            usage = Usage(len(PROMPT), 0, self._tokens) if last else None
            outputs = [
                TokenOutput(150 + (index * 7 + number) % 9000) for number in range(len(self._ids))
            ]
            news = [
                Update(id, [output], finish, usage)
                for id, output in zip(self._ids, outputs, strict=True)
            ]
            message = msgspec.msgpack.encode(Updates(news))
            self._streams.deliver(decode(message).updates)


def read_all(port: int, path: str, streams: int, body: bytes) -> None:
    """The client: as many requests, whose answers are read to the end."""
    selector = selectors.DefaultSelector()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(streams):
        end = socket.create_connection(("127.0.0.1", port))
        end.sendall(head.encode() + body)
        selector.register(end, selectors.EVENT_READ)
    num_bytes = 0
    while selector.get_map():
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            data = key.fileobj.recv(1 << 16)
            num_bytes += len(data)
            if not data:
                selector.unregister(key.fileobj)
    print(num_bytes)


async def measure(
    app: web.Application,
    path: str,
    streams: int,
    body: bytes,
    run: Callable[[], Awaitable[None]],
    profile: Path | None,
) -> tuple[float, int]:
    """(CPU seconds of this thread while all streams ran, bytes that the client got)."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tools.time_front", "--read", str(port), path, str(streams)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    talking = asyncio.create_task(client.communicate(body))
    profiler = cProfile.Profile() if profile else None
    if profiler:
        profiler.enable()
    begin = time.thread_time()
    await run()
    out, _ = await talking
    taken = time.thread_time() - begin
    if profiler:
        profiler.disable()
        profiler.dump_stats(str(profile))
    await runner.cleanup()
    return taken, int(out)


def bare(
    streams: int, tokens: int, size: int
) -> tuple[web.Application, Callable[[], Awaitable[None]]]:
    """An application that writes `tokens` chunks of `size` bytes to each of its streams, and what makes it run."""
    ready = asyncio.Event()
    waiting: list[asyncio.Future[bytes | None]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse()
        await response.prepare(request)
        loop = asyncio.get_running_loop()
        while True:
            news = loop.create_future()
            waiting.append(news)
            if len(waiting) == streams:
                ready.set()
            data = await news
            if data is None:
                break
            await response.write(data)
        await response.write_eof()
        return response

    async def run() -> None:
        await ready.wait()
        async for index in steps(tokens + 1):
            told, waiting[:] = waiting[:], []
            for news in told:
                news.set_result(b"x" * size if index < tokens else None)

    app = web.Application()
    app.add_routes([web.post("/", handler)])
    return app, run


async def compare(args: argparse.Namespace, text: Text) -> None:
    total = args.streams * args.tokens
    body: dict[str, object]
    if args.api == "openai":
        path = "/v1/completions"
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": args.tokens, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
    else:
        path = "/generate_stream"
        body = {"inputs": "abcdefgh" * 16}
        body["parameters"] = {"max_new_tokens": args.tokens, "ignore_eos_token": True}
    for _ in range(args.repeat):
        backend = Ticking(args.streams, args.tokens)
        server = ServerConfig(max_concurrent_requests=args.streams)
        app = build_app(backend, text, EngineConfig(server=server))  # type: ignore[arg-type]
        taken, size = await measure(
            app,
            path,
            streams=args.streams,
            body=json.dumps(body).encode(),
            run=backend.run,
            profile=args.profile,
        )
        least_app, run = bare(args.streams, args.tokens, size // total)
        least, _ = await measure(
            least_app, "/", streams=args.streams, body=b"x", run=run, profile=None
        )
        print(
            f"front {1e6 * taken / total:6.1f} us a token, bare {1e6 * least / total:6.1f}, "
            f"ratio {taken / least:.2f}, {size / total:.0f} bytes a token"
        )


def main() -> None:
    if sys.argv[1:2] == ["--read"]:
        read_all(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.stdin.buffer.read())
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--api", choices=("openai", "native"), default="openai")
    parser.add_argument("--profile", type=Path, help="file for pstats")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorax-front-") as folder:
        text = Text(str(write_model(Path(folder) / "model", "mistral-7b")))
        try:
            asyncio.run(compare(args, text))
        finally:
            text.close()


if __name__ == "__main__":
    main()
