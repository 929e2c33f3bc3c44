"""Starts a server on an address, or an engine in this process with a private socket.

Both are the same HTTP application. `lorax generate` without `--url` talks to it over a Unix socket in a temporary
folder, so prompts take the same path in both.
"""

from __future__ import annotations

import asyncio
import dataclasses
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

    from engine.backend import Backend
    from engine.messages import EngineInfo

CLOSE_S = 10.0  # seconds until processes that do not end are killed
MIN_CLOSE_S = 0.5

Started = Callable[["EngineInfo", str], None]
Start = Callable[[EngineConfig], Coroutine[Any, Any, "Backend"]]


@asynccontextmanager
async def opened(config: EngineConfig, local: bool) -> AsyncIterator[web.Application]:
    """Starts an engine and yields the application on it: `local` in this process, else in its own processes."""
    from engine.adapters.base_model import fetch_base_model
    from engine.adapters.registry import check_merging, default_source, make_sources
    from engine.checkpoint import folder_of
    from engine.process import LocalBackend, ProcessBackend
    from engine.server.access import check_origins
    from engine.server.app import build_app
    from engine.server.front import FRONT
    from engine.server.keys import Keys
    from engine.server.text import Text

    # Before the processes start: one download, and wrong names, keys and origins fail at once.
    default_source(config.adapters, make_sources(config))
    if config.adapters.merge_adapter_weights:
        check_merging(config)
    Keys(config.server)
    check_origins(config.server)
    await asyncio.to_thread(fetch_base_model, config, config.model.load_format != "dummy")
    folder = await asyncio.to_thread(folder_of, config.model, False)
    start: Start = LocalBackend.start if local else ProcessBackend.start
    if (
        local
    ):  # two threads would import it at once, and its import replaces its own module at the end
        await asyncio.to_thread(import_module, "transformers")
    # In parallel: both import large libraries.
    loading = asyncio.create_task(
        asyncio.to_thread(Text, str(folder), config.model.tokenizer_config_path)
    )
    starting = asyncio.create_task(start(config))
    end_by: float | None = None  # deadline of the processes
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
        if succeeded(loading):
            loading.result().close()
        if succeeded(starting):
            backend = starting.result()
            if isinstance(backend, ProcessBackend):
                left = CLOSE_S if end_by is None else end_by - time.monotonic()
                await backend.close(min(CLOSE_S, max(MIN_CLOSE_S, left)))
            else:
                await backend.close()


def succeeded(task: asyncio.Task[Any]) -> bool:
    """Whether the task ended with a result."""
    return not task.cancelled() and task.exception() is None


async def serve(config: EngineConfig, started: Started) -> None:
    """Serves over HTTP until a signal. `started` is called with the engine's info and the address.

    Raises the errors of the start, and EngineDead.
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
    """Raises OSError if the address is not available, before an engine starts."""
    loop, server = asyncio.get_running_loop(), config.server
    tried = await loop.create_server(
        asyncio.Protocol, server.hostname, server.port, start_serving=False
    )
    tried.close()
    await tried.wait_closed()


async def serve_while(
    config: EngineConfig, started: Started, work: Callable[[str], Awaitable[bool]]
) -> None:
    """As `serve`, and runs `work` with the address. Serving ends early if `work` returns False."""
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
    """The address for a client on this machine, also of a server that listens on all addresses."""
    return address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


@asynccontextmanager
async def local_client(config: EngineConfig) -> AsyncIterator[Client]:
    """A client of an engine in this process. API keys in the environment are for servers that others reach."""
    from aiohttp import UnixConnector, web

    from engine.server.app import runner_of

    server = dataclasses.replace(
        config.server, api_key=(), api_keys_file=None, prefix_cache_per_tenant=False
    )
    config = dataclasses.replace(config, server=server)
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
    """Turns an OSError about the address into a ConfigError; others pass."""
    where = f"{config.server.hostname}:{config.server.port}"
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"{where} is already in use",
                field="port",
                hint="choose another --port; 0 picks a free one",
            ) from None
        if error.errno in (errno.EACCES, errno.EADDRNOTAVAIL) or isinstance(error, socket.gaierror):
            raise ConfigError(
                f"cannot listen on {where}: {error.strerror}", field="hostname"
            ) from None
        raise
