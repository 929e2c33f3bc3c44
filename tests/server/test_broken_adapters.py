"""Broken adapters are refused with reason and remedy, to their own requests alone, and leave nothing behind."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file

from engine.process import Parts
from tests.adapters import conftest as stores
from tests.server.broken_files import FILES, SAFE, Kind, padded
from tests.server.broken_sources import FULL, HUB, SOURCES, FailingHub, World
from tests.server.whole import LARGE_BYTES, Whole, serving
from tools.attack.pickles import BIN, CODE_MARK

if TYPE_CHECKING:
    from tests.adapters.fake_s3 import FakeS3

pytestmark = pytest.mark.asyncio(loop_scope="module")
s3_server = stores.s3_server  # a fixture

OF_HUB = (".locks", "models--hostile", "models--files--bad")  # what huggingface_hub keeps
STREAMED = 500  # tokens of the stream that runs meanwhile


@dataclass
class Bench:
    """The server of all rows, its sources, and what it gives without faults."""

    server: Whole
    world: World
    alone: list[int]  # tokens of the good adapter
    before: dict[str, object]

    async def check(self, adapter: str, source: str | None, kind: Kind, *words: str) -> None:
        """Asks for a broken adapter while a good one's stream runs. The message has the words, in this order."""
        async with self.server.stream("good", STREAMED) as stream:
            status, body = await self.server.ask(adapter, source)
            count = len(stream.tokens)
            await stream.reach(min(count + 1, STREAMED))
        assert stream.error is None and len(stream.tokens) > 1
        assert stream.tokens == self.alone[: len(stream.tokens)]
        assert (body.get("error_type"), status) == kind, body
        rest = body["error"]
        for word in words:
            _, found, rest = rest.partition(word)
            assert found, body


def levels(server: Whole) -> dict[str, object]:
    """What must stay as it is, but for connections that sources keep open and whole files of the hub's cache."""
    exchange = psutil.Process(server.backend.pids["exchange"])
    links = (os.readlink(path) for path in Path(f"/proc/{exchange.pid}/fd").iterdir())
    cache = server.folder.parent / "cache"
    files = [path.relative_to(cache) for path in cache.rglob("*") if path.is_file()]
    kept = [path for path in files if path.parts[0].startswith(OF_HUB)]
    return {
        "descriptors": Counter(link for link in links if not link.startswith("socket:")),
        "files": sorted(str(path) for path in files if path not in kept),
        "unfinished": [path for path in kept if path.suffix == ".incomplete"],
        "children": len(exchange.children()),
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(
    tmp_path_factory: pytest.TempPathFactory, s3_server: FakeS3
) -> AsyncIterator[Bench]:
    folder = tmp_path_factory.mktemp("broken")
    full = folder / "full"
    with pytest.MonkeyPatch.context() as patch, FailingHub(folder / "adapters") as hub:
        for name, value in {**stores.AWS, HUB: hub.url, FULL: str(full)}.items():
            patch.setenv(name, value)
        parts = Parts(exchange="tests.server.broken_sources:fragile_exchange")
        async with serving(
            folder, parts, host_cache_gb=LARGE_BYTES / (1 << 30), s3_endpoint_url=s3_server.url
        ) as server:
            good = server.write("good", 1)
            server.write_large("large")
            s3_server.put_folder("team/good", good)
            s3_server.put_folder("team/bad", server.write("bad", 3))
            pickled = server.write("pickled", 4)
            torch.save(load_file(pickled / SAFE), pickled / BIN)
            (pickled / SAFE).unlink()
            for adapter, source in (("files/good", "hub"), ("s3://loras/team/good", None)):
                status, body = await server.ask(adapter, source)
                assert status == 200, body
            alone = await server.tokens_of("good", STREAMED)
            assert alone != await server.tokens_of(None, STREAMED)
            await server.idle()
            yield Bench(server, World(s3_server, full), alone, levels(server))


@pytest.mark.parametrize("name", FILES)
async def test_a_broken_file(bench: Bench, name: str) -> None:
    row, root = FILES[name], bench.server.folder
    folder = root / "".join(letter if letter.isalnum() else "-" for letter in name)
    shutil.copytree(root / "good", folder)
    row.spoil(folder)
    await bench.check(folder.name, None, row.kind, row.reason, row.remedy)
    assert not (folder / CODE_MARK).exists()


@pytest.mark.parametrize("name", SOURCES)
async def test_a_source_that_fails(bench: Bench, name: str) -> None:
    row, world = SOURCES[name], bench.world
    row.arm(world)
    try:
        await bench.check(row.adapter, row.source, row.kind, row.reason, row.remedy)
    finally:
        world.s3._forget()
        world.full.unlink(missing_ok=True)


async def test_a_good_file_that_looks_like_a_page(bench: Bench) -> None:
    """The length of its header is the letter <."""
    folder = bench.server.folder / "padded"
    shutil.copytree(bench.server.folder / "good", folder)
    padded(folder)
    assert (folder / SAFE).read_bytes()[:1] == b"<"
    assert await bench.server.tokens_of("padded", STREAMED) == bench.alone


async def test_nothing_stays_behind(bench: Bench) -> None:
    """Runs last. An adapter that needs the whole host tier has room there, so nothing is reserved or leased."""
    server = bench.server
    await server.idle()
    assert levels(server) == bench.before
    assert len(await server.tokens_of("large", 3)) == 3
    assert await server.tokens_of("good", STREAMED) == bench.alone
    assert server.backend.exchange_restarts == 0
    await server.idle()
    assert len({digest for _, digest, _ in server.backend.stats.resident}) <= 2, "good and large"
