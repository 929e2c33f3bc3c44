"""A host tier with room for three images, and many requests at once: each is served, or refused because of the size."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

from engine.messages import aligned
from engine.ops.layout import data_start
from tests.server.whole import CONTEXT, Whole, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADAPTERS, MERGES = 14, 6
IMAGE_BYTES = 7680
MERGED: dict[str, Any] = {"merge_strategy": "linear", "weights": [1.0, -0.5]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Whole]:
    folder = tmp_path_factory.mktemp("full")
    async with serving(folder, host_cache_gb=3.5 * IMAGE_BYTES / (1 << 30)) as server:
        for number in range(ADAPTERS):
            server.write(f"a{number}", number)
        server.write("large", 1, rank=64)
        yield server


def questions() -> list[dict[str, Any]]:
    """One for each adapter, and merges of two."""
    plain: list[dict[str, Any]] = [{"adapter": f"a{number}"} for number in range(ADAPTERS)]
    merged = [
        {"adapter": None, "merged_adapters": MERGED | {"ids": [f"a{number}", f"a{number + 7}"]}}
        for number in range(MERGES)
    ]
    return [one for pair in zip(plain, merged, strict=False) for one in pair] + plain[MERGES:]


async def test_all_are_served(server: Whole) -> None:
    asked = questions()
    assert len(asked) == ADAPTERS + MERGES
    together = await asyncio.gather(*(server.ask(**one, tokens=30) for one in asked))
    alone = [await server.ask(**one, tokens=30) for one in asked]
    assert [status for status, _ in together] == [200] * len(asked), together
    assert together == alone
    assert len({body["generated_text"] for _, body in alone}) == len(asked)
    start = data_start(server.layout.record_bytes)
    images = [one for one in await server.backend.adapters() if one.state == "ready"]
    assert {aligned(start + one.data_bytes) for one in images} == {IMAGE_BYTES} and len(images) <= 3


async def test_a_request_waits_for_the_end_of_another(server: Whole) -> None:
    """Streams hold all images. When one of them ends, its image makes room."""
    expected = await server.ask("a5", tokens=10)
    async with AsyncExitStack() as others:
        async with server.stream("a0", CONTEXT - 16):
            for name in ("a1", "a2"):
                await others.enter_async_context(server.stream(name, CONTEXT - 16))
            assert {one.name for one in await server.backend.adapters() if one.leases} == {
                "a0",
                "a1",
                "a2",
            }
            waiting = asyncio.create_task(server.ask("a5", tokens=10))
            await asyncio.sleep(0.2)
            assert not waiting.done()
        async with asyncio.timeout(20):
            assert await waiting == expected


async def test_what_never_fits_is_refused(server: Whole) -> None:
    status, body = await server.ask("large")
    assert (status, body["error_type"]) == (413, "adapter_too_large")
    assert "needs" in body["error"] and "raise --host-cache-gb" in body["error"]
