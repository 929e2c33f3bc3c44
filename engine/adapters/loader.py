"""One load: from versions to an image in the host tier, in threads, with a deadline.

A merge is loaded like any adapter: its parts are fetched and parsed at the same time, and its image is written from
matrices that are computed group by group.

A load that hangs (in a file system, or because a source does not answer) fails at its deadline, and only its own
requests fail with it. Memory that its thread may still write to stays reserved until the thread ends
(`engine.adapters.workers`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from engine.adapters.leftovers import remove_leftovers
from engine.adapters.own_text import TextReader
from engine.adapters.refusals import Refusals
from engine.adapters.resolved import Resolved, all_of
from engine.adapters.room import Room
from engine.adapters.sources import AdapterFiles, Source, Version
from engine.adapters.tiers import HostImage, HostRegion
from engine.adapters.turns import Turns
from engine.adapters.workers import Job, Workers
from engine.checkpoint import cache_folder, folder_of
from engine.config import EngineConfig
from engine.errors import AGAIN, AdapterLoadFailed
from engine.files import OpenFile
from engine.lora.formats import load_peft
from engine.lora.image import ImageSize, image_size, write_image
from engine.lora.merge import Part, merge
from engine.lora.own import CheckpointTables, without_base_rows
from engine.lora.report import count_targets
from engine.lora.weights import LoraWeights
from engine.messages import AdapterPhase, AdapterText, TenantRef, Tier
from engine.ops.layout import ShardLayout
from engine.sandbox import Converter, is_pickle

T = TypeVar("T")

FETCH_THREADS = 32  # per source, so a slow source delays no other; they wait for network and disk
CONVERT_THREADS = 16  # they wait for child processes; few of these run at a time
PARSE_THREADS = 2  # with an engine on the CPU, which needs the cores
MAX_PARSE_THREADS = 8  # with an engine on a GPU, which leaves most cores idle
LARGE_BYTES = 32 << 20  # images that are written at a lower priority, with an engine on the CPU
LARGE_NICENESS = 6  # added to that of the process
RESOLVE_S = 45.0  # limit of one `resolve`, retries included

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class AdapterState:
    """The status of one version of one adapter, or of one merge."""

    name: str
    source: str
    state: AdapterPhase = "fetching"
    digest: bytes | None = None
    size: ImageSize | None = None
    targets: list[str] = field(default_factory=list)
    base_model: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    merged: bool = False
    tenant: bytes = b""  # digest of the token whose holder may see it; empty: everybody
    text: AdapterText | None = None  # None: the base model's
    unconfirmed: bool = False  # see `Version`
    revision: str | None = None  # None: of a merge, or not known
    ranks: list[int] = field(default_factory=list)
    folder: Path | None = None  # of its files; None: of a merge, or not known
    remote: bool = False  # its source downloads files
    downloaded: bool = False  # the last load did

    @property
    def found_in(self) -> Tier:
        """Where its files were at the last load."""
        return "disk" if self.remote and not self.downloaded else "source"

    def progress(self, done: int, total: int) -> None:
        """See `sources.Progress`. Called in threads."""
        self.downloaded = True


class _Attempt:
    """One load in progress: its deadline, its threads, and the tenant with whose loads it waits."""

    def __init__(self, deadline: float, tenant: str) -> None:
        """`deadline`: by time.monotonic()."""
        self.tenant = tenant
        self._deadline = deadline
        self._jobs: list[Job[Any]] = []

    async def run(self, workers: Workers, call: Callable[..., T], *given: Any) -> T:
        """Runs a call in a thread and returns its result. Raises AdapterLoadFailed at the deadline."""
        job: Job[T] = await workers.start(call, *given, deadline=self._deadline, key=self.tenant)
        self._jobs.append(job)
        return await job.result(self._deadline)

    @asynccontextmanager
    async def turn(self, turns: Turns) -> AsyncIterator[None]:
        """Waits for one of the turns and holds it in the block. Raises AdapterLoadFailed at the deadline."""
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                await turns.acquire(self.tenant)
        except TimeoutError:
            raise AdapterLoadFailed("too many adapters are being merged", hint=AGAIN) from None
        try:
            yield
        finally:
            turns.release()

    def raise_if_late(self) -> None:
        if time.monotonic() > self._deadline:
            raise AdapterLoadFailed(
                "loading took too long and was aborted", hint="raise --adapter-load-timeout-s"
            )

    def when_over(self, call: Callable[[], None]) -> None:
        """Calls back when its threads have ended. A stuck thread may still write until then."""
        if self._jobs:
            self._jobs.pop().when_ended(lambda: self.when_over(call))
        else:
            call()


class Loader:
    """Loads adapters into one host tier."""

    def __init__(
        self,
        config: EngineConfig,
        layout: ShardLayout,
        region: HostRegion,
        sources: Mapping[str, Source],
        room: Room,
        device: str,
        converter: Converter,
    ) -> None:
        """`device`: the engine's. `converter`: closed with the loader."""
        self._config = config
        self._layout = layout
        self._region = region
        self._sources = sources
        self._room = room
        self._on_cpu = device == "cpu"
        self._fetchers = {name: Workers(FETCH_THREADS, f"adapter-{name}") for name in sources}
        self._converters = Workers(CONVERT_THREADS, "adapter-convert")
        self._converter = converter
        cache = cache_folder(config.model.huggingface_hub_cache)
        threading.Thread(target=remove_leftovers, args=(cache,), daemon=True).start()
        self._parsers = Workers(parse_threads(device), "adapter-parse")
        merge_threads = max(1, parse_threads(device) // 2)
        self._mergers = Workers(merge_threads, "adapter-merge")
        self._merge_turns = Turns(merge_threads)
        self._refused = Refusals()
        self._texts = TextReader(config.model)
        self._closing = False

    @property
    def abandoned(self) -> int:
        """Threads that did not end at their deadline."""
        return sum(
            pool.abandoned
            for pool in (self._parsers, self._mergers, self._converters, *self._fetchers.values())
        )

    async def call(self, source: str, tenant: str, call: Callable[..., T], *given: Any) -> T:
        """Calls a source in one of its threads. Raises AdapterLoadFailed after RESOLVE_S."""
        self._raise_if_closing()
        deadline = time.monotonic() + RESOLVE_S
        return await self._fetchers[source].run(call, *given, deadline=deadline, key=tenant)

    async def load(
        self, adapter: AdapterState, what: Resolved, token: str | None, tenant: TenantRef
    ) -> HostImage:
        """The image of an adapter, or of a merge, committed to the tier. Updates `adapter` on the way.

        Loads of different tenants take turns at threads and memory. Raises AdapterError, or Overloaded if the tier
        stays full.
        """
        self._raise_if_closing()
        deadline = time.monotonic() + self._config.adapters.adapter_load_timeout_s
        attempt = _Attempt(deadline, tenant.name)

        def pause() -> None:
            """Threads call it between two pieces of work."""
            self._raise_if_closing()
            attempt.raise_if_late()

        started = time.monotonic()
        held, reserved = ExitStack(), ExitStack()
        held.push(reserved)
        try:
            files = await self._fetch(attempt, adapter, what, token, held)
            adapter.seconds["fetch"] = time.monotonic() - started
            adapter.state = "parsing"
            self._raise_if_closing()
            started = time.monotonic()
            weights = await self._weights(attempt, what, files, held, pause)
            size = adapter.size = image_size(weights, self._layout)
            notes = weights.notes + await self._text(attempt, adapter, what, files)
            opened = time.monotonic() - started
            # Merges take seconds: those that wait for a thread hold no memory meanwhile.
            async with attempt.turn(self._merge_turns) if what.recipe else nullcontext():
                offset = await self._room.reserve(adapter.name, size.total, tenant)
                reserved.callback(self._room.abandon, offset)
                started = time.monotonic() - opened
                view = self._region.view[offset : offset + size.total]
                write = partial(write_image, weights, self._layout, out=view, pause=pause)
                if self._on_cpu and (what.recipe or size.total > LARGE_BYTES):
                    write = partial(_slowly, write)
                digest = await attempt.run(self._mergers if what.recipe else self._parsers, write)
            # Fails if the files were replaced meanwhile: an old configuration may have been read with new weights.
            await self._fetch(attempt, adapter, what, token, held)
            reserved.pop_all()
        finally:
            attempt.when_over(held.close)
        image = self._room.commit(offset, digest)
        adapter.digest, adapter.state = digest, "ready"
        adapter.targets = list(count_targets(weights, self._layout.targets))
        adapter.ranks = sorted({pair.rank for pair in weights.pairs.values()})
        adapter.folder = files[0].folder if what.recipe is None else None
        adapter.base_model = weights.base_model
        adapter.seconds["parse"] = time.monotonic() - started
        for note in notes:
            logger.info("%s: %s", adapter.name, note)
        return image

    async def _fetch(
        self,
        attempt: _Attempt,
        adapter: AdapterState,
        what: Resolved,
        token: str | None,
        held: ExitStack,
    ) -> list[AdapterFiles]:
        """The files of every part, open; `held` closes them."""

        async def one(name: str, version: Version) -> AdapterFiles:
            source, fetchers = self._sources[version.source], self._fetchers[version.source]
            with what.naming(name):
                files = await attempt.run(fetchers, source.fetch, version, token, adapter.progress)
            held.callback(files.close)
            return files

        return await all_of(map(one, what.names, what.versions))

    async def _weights(
        self,
        attempt: _Attempt,
        what: Resolved,
        files: Sequence[AdapterFiles],
        held: ExitStack,
        pause: Callable[[], None],
    ) -> LoraWeights:
        """The tensors of an adapter, or of a merge that is computed while they are read. `held` closes open files."""

        async def one(name: str, files: AdapterFiles) -> LoraWeights:
            with what.naming(name):
                return await self._matched(attempt, files, held, pause)

        found = await all_of(map(one, what.names, files))
        if what.recipe is None:
            return found[0]
        parts = [Part(*part) for part in zip(what.names, found, strict=True)]
        max_rank = self._config.adapters.max_adapter_rank
        return merge(parts, what.recipe, max_rank=max_rank, pause=pause)

    async def _text(
        self,
        attempt: _Attempt,
        adapter: AdapterState,
        what: Resolved,
        files: Sequence[AdapterFiles],
    ) -> list[str]:
        """Reads an adapter's own text; returns notes. A merge uses the base model's."""
        if what.recipe is not None or not files[0].texts:
            return []
        assert adapter.size is not None
        vocab = adapter.size.vocab or self._layout.targets.vocab
        found = await attempt.run(self._parsers, self._texts.read, files[0].texts, vocab)
        adapter.text = found.text
        for file in files[0].texts:
            file.close()
        return list(found.notes)

    async def _matched(
        self, attempt: _Attempt, files: AdapterFiles, held: ExitStack, pause: Callable[[], None]
    ) -> LoraWeights:
        """The tensors of one adapter, matched with the layout. Open files are closed by `held`."""
        readable = files.weights
        if is_pickle(readable):
            convert = self._converter.convert
            readable = await attempt.run(self._converters, convert, readable, pause)
            held.callback(readable.close)
        opened = files.config, readable, files.shards, pause
        weights = await attempt.run(self._parsers, self._open, *opened)
        held.callback(weights.close)
        files.config.close()  # an adapter that waits for memory keeps few files open
        return weights

    def stop(self) -> None:
        """Running loads end at their next `pause`; new ones fail."""
        self._closing = True

    async def close(self) -> None:
        """Stops, and waits for threads that parse, merge or convert."""
        self.stop()
        await asyncio.gather(self._parsers.close(), self._mergers.close(), self._converters.close())
        self._converter.close()

    def _open(
        self,
        config: OpenFile,
        weights: OpenFile,
        shards: Sequence[OpenFile],
        pause: Callable[[], None],
    ) -> LoraWeights:
        """The tensors of an adapter, matched with the layout. Files that were refused before are refused at once."""
        given = self._config.adapters
        with self._refused.remembered(config, weights, shards):
            found = load_peft(
                config,
                weights,
                self._layout.targets,
                shards=shards,
                max_rank=given.max_adapter_rank,
                max_added_tokens=given.max_added_tokens,
                base_model=self._config.model.model_id.partition("@")[0],
            )
        if found.own and (tables := self._tables()) is not None:
            return without_base_rows(found, self._layout, tables, pause)
        return found

    def _tables(self) -> CheckpointTables | None:
        """Embedding and head of the base model; None if its weights are not in files."""
        model = self._config.model
        if model.load_format == "dummy":
            return None
        return CheckpointTables(folder_of(model, weights=False), self._layout.targets)

    def _raise_if_closing(self) -> None:
        if self._closing:
            raise AdapterLoadFailed("the server is shutting down", hint=AGAIN)


def parse_threads(device: str) -> int:
    """Number of adapters that are parsed at the same time."""
    if device == "cpu":
        return PARSE_THREADS
    return max(PARSE_THREADS, min(MAX_PARSE_THREADS, len(os.sched_getaffinity(0)) // 2))


def _slowly(call: Callable[[], T]) -> T:
    """Calls in a thread of its own, whose priority it lowers: it would take the engine's cores for seconds."""
    os.nice(LARGE_NICENESS)  # of this thread, on Linux
    return call()
