"""Sources and conversions, which block, behind an event loop: in threads, so that a slow one holds up no other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from engine.adapters.ref import AdapterRef, SourceName
from engine.adapters.sources import AdapterFiles, Source, Version
from engine.files import OpenFile
from engine.sandbox import Converter, is_pickle

FETCH_THREADS = 32  # of each source; they wait for network and disk
CONVERT_THREADS = 16  # they wait for a child process, of which few run at a time


class Fetcher:
    """See the module. `pause` is called before each call and while files are converted; it may raise."""

    def __init__(
        self,
        sources: Mapping[SourceName, Source],
        cache: Path,
        pause: Callable[[], None],
        max_file_bytes: int,
    ) -> None:
        """`cache`: the folder of downloads, where what is converted is kept; `max_file_bytes`: of what is converted."""
        self._sources = sources
        self._pause = pause
        self._converter = Converter(cache, max_file_bytes)
        self._converters = ThreadPoolExecutor(CONVERT_THREADS, "adapter-convert")
        self._pools = {
            name: ThreadPoolExecutor(FETCH_THREADS, f"adapter-{name}") for name in sources
        }

    async def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        """As the source's `resolve`."""
        assert ref.source is not None, "the registry has chosen"
        self._pause()
        source, pool = self._sources[ref.source], self._pools[ref.source]
        return await asyncio.wrap_future(pool.submit(source.resolve, ref, token))

    async def fetch(self, version: Version, token: str | None) -> AdapterFiles:
        """As the source's `fetch`. If nobody waits any more when the files are open, they are closed."""
        self._pause()
        source, pool = self._sources[version.source], self._pools[version.source]
        future = pool.submit(source.fetch, version, token, _no_progress)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(_close_files)
            raise

    async def readable(self, file: OpenFile) -> OpenFile:
        """As `Converter.readable`. Must not be cancelled: a thread reads the file."""
        if not is_pickle(file):
            return file
        self._pause()
        call = self._converter.readable
        return await asyncio.wrap_future(self._converters.submit(call, file, self._pause))

    def close(self) -> None:
        """To be called when nothing is under way but what was cancelled."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        self._converters.shutdown(wait=True, cancel_futures=True)
        self._converter.close()


def _close_files(future: Future[AdapterFiles]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()


def _no_progress(done: int, total: int) -> None:
    pass
