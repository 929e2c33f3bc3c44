"""Starts what the commands serve with: a server on an address, or an engine in this process behind a private socket.

Both are the same HTTP application; `lorax generate` without `--url` asks it over a Unix socket that only this command
can see, so there is one way from a prompt to its text.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig
from engine.errors import ConfigError
from lorax_cli.client import Client

if TYPE_CHECKING:
    from aiohttp import web

    from engine.messages import EngineInfo
    from engine.server.backend import Backend

CLOSE_S = 10.0  # that the processes get to end; then they are killed
LEAST_CLOSE_S = 0.5

Started = Callable[["EngineInfo", str], None]
Start = Callable[[EngineConfig], Coroutine[Any, Any, "Backend"]]


@asynccontextmanager
async def opened(config: EngineConfig, local: bool) -> AsyncIterator[web.Application]:
    """The application on a started engine: in processes of its own, or in this one. Closed at the end."""
    from engine.checkpoint import folder_of
    from engine.process import LocalBackend, ProcessBackend
    from engine.server.app import build_app
    from engine.server.front import FRONT
    from engine.server.text import Text

    # Before the processes start: a download happens once, and a wrong name fails at once.
    folder = await asyncio.to_thread(folder_of, config.model, False)
    start: Start = LocalBackend.start if local else ProcessBackend.start
    if local:  # two threads are about to import it, and it takes another module's place when its import ends
        await asyncio.to_thread(import_module, "transformers")
    # Beside them: both import large libraries.
    loading = asyncio.create_task(
        asyncio.to_thread(Text, str(folder), config.model.tokenizer_config_path)
    )
    starting = asyncio.create_task(start(config))
    end_by: float | None = None  # of the processes
    try:
        await asyncio.gather(loading, starting)
        app = build_app(starting.result(), loading.result(), config)
        try:
            yield app
        finally:
            end_by = app[FRONT].end_by
    finally:
        starting.cancel()
        for task in (loading, starting):
            with suppress(Exception, asyncio.CancelledError):
                await task
        if came_of(loading):
            loading.result().close()
        if came_of(starting):
            backend = starting.result()
            if isinstance(backend, ProcessBackend):
                left = CLOSE_S if end_by is None else end_by - time.monotonic()
                await backend.close(min(CLOSE_S, max(LEAST_CLOSE_S, left)))
            else:
                await backend.close()


def came_of(task: asyncio.Task[Any]) -> bool:
    """Whether something came of it."""
    return not task.cancelled() and task.exception() is None


async def serve(config: EngineConfig, started: Started) -> None:
    """Serves over HTTP until a signal; `started` is told the engine and the address.

    Raises what keeps the server from starting, and EngineDead.
    """
    from engine.logs import configure_logging
    from engine.process.collector import freeze_gc
    from engine.server.app import run
    from engine.server.connections import raise_descriptor_limit
    from engine.server.front import FRONT

    configure_logging(config.server)
    raise_descriptor_limit()
    with _listening(config):
        await _try_address(config)
    async with opened(config, local=False) as app:
        freeze_gc()
        with _listening(config):
            await run(app, lambda address: started(app[FRONT].backend.info, address))


async def _try_address(config: EngineConfig) -> None:
    """Raises OSError if the address cannot be listened on, before an engine takes its time to start."""
    loop, server = asyncio.get_running_loop(), config.server
    tried = await loop.create_server(
        asyncio.Protocol, server.hostname, server.port, start_serving=False
    )
    tried.close()
    await tried.wait_closed()


async def serve_while(
    config: EngineConfig, started: Started, work: Callable[[str], Awaitable[bool]]
) -> None:
    """As `serve`, with `work` beside it, which gets the address; serving ends early if it returns False."""
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def announce(info: EngineInfo, where: str) -> None:
        started(info, where)
        address.set_result(where)

    server = asyncio.create_task(serve(config, announce))
    either: list[asyncio.Future[Any]] = [server, address]
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not server.done() and await work(reachable(address.result())):
            await server
    finally:
        if not server.done():
            server.cancel()
            await asyncio.wait({server})
    if not server.cancelled():
        server.result()


def reachable(address: str) -> str:
    """Where a client on this machine finds a server that listens on every address."""
    return address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


@asynccontextmanager
async def local_client(config: EngineConfig) -> AsyncIterator[Client]:
    """A client of an engine in this process."""
    from aiohttp import UnixConnector, web

    from engine.server.app import runner_of

    async with opened(config, local=True) as app:
        runner = runner_of(app)
        await runner.setup()
        try:
            with tempfile.TemporaryDirectory(prefix="lorax-") as folder:
                socket = str(Path(folder) / "socket")
                await web.UnixSite(runner, socket).start()
                async with Client("http://lorax", connector=UnixConnector(socket)) as client:
                    yield client
        finally:
            await runner.cleanup()


@contextmanager
def _listening(config: EngineConfig) -> Iterator[None]:
    """Says of an OSError why the address cannot be listened on; one of another kind passes."""
    where = f"{config.server.hostname}:{config.server.port}"
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"{where} is taken by another program",
                field="port",
                hint="use --port 0, or PORT=0, for a free one",
            ) from None
        if error.errno in (errno.EACCES, errno.EADDRNOTAVAIL) or isinstance(error, socket.gaierror):
            raise ConfigError(
                f"cannot listen on {where}: {error.strerror}", field="hostname"
            ) from None
        raise
