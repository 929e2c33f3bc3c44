"""Merges in the exchange: loaded, shared, cached and refused like any adapter."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.adapters.ref import AdapterRef
from engine.errors import (
    AdapterForbidden,
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterNotFound,
    Overloaded,
)
from engine.lora.image import image_size, write_image
from engine.lora.merge import Part, _Merger, merge
from engine.lora.recipe import Recipe
from tests.adapters.fake_hub import FakeHub
from tests.adapters.test_exchange import (
    LAYOUT,
    CountingSource,
    Make,
    Stuck,
    digest_of,
    hub_source,
    image_of,
    ref,
)
from tests.adapters.test_exchange import make as make_exchange
from tests.lora import tiny

make = make_exchange
DARE = Recipe.parse([0.5, 0.5], "dare_linear", 0.5)


def merged(*ids: str, recipe: Recipe | None = None, source: str | None = None) -> AdapterRef:
    return AdapterRef.merged(ids, recipe or Recipe.parse([1] * len(ids)), source)


def expected(saved: Path, names: str, recipe: Recipe) -> bytes:
    """The digest of a merge that is computed without an exchange."""
    parts = [Part(name, tiny.load(saved / name, LAYOUT)) for name in names]
    with merge(parts, recipe) as weights:
        return write_image(
            weights, LAYOUT, memoryview(bytearray(image_size(weights, LAYOUT).total))
        )


@pytest.mark.parametrize("strategy", ["linear", "cat", "svd", "ties", "dare_ties"])
async def test_acquire(make: Make, saved: Path, strategy: str) -> None:
    exchange, recipe = make(), Recipe.parse([0.5, -2], strategy, 0.5)
    with await exchange.acquire(merged("a", "b", recipe=recipe)) as lease:
        assert lease.image.digest == digest_of(exchange, lease) == expected(saved, "ab", recipe)
        assert (lease.image.name, lease.image.source, lease.cache_salt) == ("a,b", "local", b"")
        (status,) = await exchange.adapters()
        assert (status.name, status.state, status.leases) == ("a,b", "ready", 1)
        assert status.merged and lease.image.merged and status.targets == ["q_proj", "up_proj"]
    assert await exchange.unload("a,b")
    assert not await exchange.adapters()


async def test_one_adapter_of_weight_1_is_the_adapter(make: Make) -> None:
    exchange = make()
    with await exchange.acquire(ref("a")) as alone, await exchange.acquire(merged("a")) as lease:
        assert lease.image.digest == alone.image.digest
        assert lease.image.offset == alone.image.offset


async def test_one_load_for_all_who_wait(make: Make, saved: Path) -> None:
    """A hundred requests for one recipe are one load; the next one reads nothing; another recipe is another load."""
    source = CountingSource(saved)
    exchange = make(sources={"local": source})
    leases = await asyncio.gather(
        *(exchange.acquire(merged("a", "b", recipe=DARE)) for _ in range(100))
    )
    leases.append(await exchange.acquire(merged("a", "b", recipe=DARE)))
    assert source.fetched == {"a": 2, "b": 2}, "once to read, once to see that nothing changed"
    other = Recipe.parse([0.5, 0.5], "dare_linear", 0.5, seed=1)
    leases.append(await exchange.acquire(merged("a", "b", recipe=other)))
    assert source.fetched == {"a": 4, "b": 4}
    assert len({lease.image.digest for lease in leases}) == 2
    for lease in leases:
        lease.release()
    exchange.tier.check()
    assert not any(image.leases for image in exchange.tier)


async def test_a_changed_part_is_another_merge(make: Make, saved: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(saved / name, tmp_path / name)
    source = CountingSource(tmp_path)
    source.ttl_s = 0.0
    exchange = make(sources={"local": source})
    with await exchange.acquire(merged("a", "b")) as old:
        shutil.copytree(saved / "c", tmp_path / "b", dirs_exist_ok=True)
        with await exchange.acquire(merged("a", "b")) as new:
            assert new.image.digest != old.image.digest == digest_of(exchange, old)
            assert new.image.digest == expected(tmp_path, "ab", Recipe.parse([1, 1]))


async def test_different_ranks(make: Make, saved: Path) -> None:
    """Refused by name, again without reading; `cat` serves them."""
    source = CountingSource(saved)
    exchange = make(sources={"local": source})
    for _ in range(2):
        with pytest.raises(AdapterIncompatible, match="rank 4 in a and rank 12 in large") as caught:
            await exchange.acquire(merged("a", "large"))
        assert "cat" in (caught.value.hint or "")
        assert source.fetched == {"a": 1, "large": 1}
    with await exchange.acquire(merged("a", "large", recipe=Recipe.parse([1, 1], "cat"))) as lease:
        assert lease.image.stacked_rank == 16
        assert len(image_of(exchange, lease))


async def test_failures_name_the_part(make: Make, saved: Path, tmp_path: Path) -> None:
    """They are those of the merge alone, and leave nothing behind."""
    for name in "ab":
        shutil.copytree(saved / name, tmp_path / name)
    shutil.copytree(saved / "c", tmp_path / "bad")
    file = tmp_path / "bad" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    source = CountingSource(tmp_path)
    source.ttl_s = 0.0
    exchange = make(sources={"local": source})
    cases: list[tuple[str, type[Exception]]] = [
        ("none", AdapterNotFound),
        ("/etc", AdapterForbidden),
        ("bad", AdapterLoadFailed),
    ]
    for name, kind in cases:
        with pytest.raises(kind, match=f"^{name}: ") as caught:
            await exchange.acquire(merged("a", name, "b"))
        assert caught.value.field == "merged_adapters"  # type: ignore[attr-defined]
    file.write_bytes(whole)
    (await exchange.acquire(merged("a", "bad", "b"))).release()
    (await exchange.acquire(merged("a", "b"))).release()
    exchange.tier.check()
    assert exchange.tier.used == sum(image.num_bytes for image in exchange.tier)


async def test_a_source_that_fails(make: Make, saved: Path) -> None:
    source = CountingSource(saved)
    source.failures = 2
    exchange = make(sources={"local": source})
    with pytest.raises(AdapterLoadFailed, match="^[ab]: the disk is away") as caught:
        await exchange.acquire(merged("a", "b"))
    assert (caught.value.field, caught.value.hint) == ("merged_adapters", "bring it back")
    assert not exchange.tier.used
    (await exchange.acquire(merged("a", "b"))).release()


async def test_a_stuck_part(make: Make, saved: Path) -> None:
    """The merge fails at its deadline; others load meanwhile, and what it held is free when its thread ends."""
    exchange = make(adapter_load_timeout_s=1.0)
    exchange._loader._open = stuck = Stuck(exchange._loader._open)  # type: ignore[method-assign]
    stuck.names = {"b"}
    waiting = asyncio.create_task(exchange.acquire(merged("a", "b")))
    (await exchange.acquire(ref("c"))).release()
    with pytest.raises(AdapterLoadFailed, match="^b: loading took too long"):
        await waiting
    assert exchange.abandoned == 1
    stuck.gate.set()
    async with asyncio.timeout(5):
        while exchange.abandoned:
            await asyncio.sleep(0.01)
    (await exchange.acquire(merged("a", "b"))).release()


async def test_merges_delay_no_other_adapter(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """More merges than threads: those that wait hold no memory. They end at their deadline, without residue.

    The first ones' threads keep their memory: one that gets its turn just before its deadline finds none.
    """
    exchange, gate = make(2, adapter_load_timeout_s=3.0), threading.Event()
    compute = _Merger._compute

    def slow(*given: Any) -> Any:
        gate.wait(10)
        return compute(*given)

    monkeypatch.setattr(_Merger, "_compute", slow)
    pairs = ["ab", "ac", "ad", "bc", "bd"]
    merges = [asyncio.create_task(exchange.acquire(merged(*pair))) for pair in pairs]
    async with asyncio.timeout(2):
        (await exchange.acquire(ref("e"))).release()
    assert not any(merge.done() for merge in merges)
    failed = await asyncio.gather(*merges, return_exceptions=True)
    assert all(isinstance(error, AdapterLoadFailed | Overloaded) for error in failed), failed
    gate.set()
    async with asyncio.timeout(5):
        while exchange.abandoned:
            await asyncio.sleep(0.01)
    assert exchange.tier.used == sum(image.num_bytes for image in exchange.tier)
    (await exchange.acquire(merged("a", "b"))).release()


async def test_a_private_part(make: Make, hub: FakeHub, saved: Path, tmp_path: Path) -> None:
    """Each part is asked for with the tenant's token, and one private part makes the merge private."""
    sources = {"hub": hub_source(hub, tmp_path), "local": CountingSource(saved)}
    exchange = make(sources=sources, adapter_source="hub")
    both = merged("org/public", "org/private")
    with pytest.raises((AdapterForbidden, AdapterNotFound), match="^org/private: ") as caught:
        await exchange.acquire(both)
    assert caught.value.field == "merged_adapters"
    salts = set()
    for token in ("alice", "operator"):
        with await exchange.acquire(both, token) as lease:
            salts.add(lease.cache_salt)
            assert lease.fresh_s > 0
    assert len(salts) == 2 and b"" not in salts
    with await exchange.acquire(merged("org/public", "a"), "alice") as lease:
        assert lease.cache_salt == b"" and lease.image.source == "hub,local"
