"""The files of strangers: opened once, where they may lie; `.bin` through a child; nothing of it holds up others."""

from __future__ import annotations

import asyncio
import hashlib
import os
import pickle
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.adapters.exchange import Exchange
from engine.adapters.hub import HubSource
from engine.adapters.ref import AdapterRef
from engine.adapters.sources import AdapterFiles, LocalSource, Progress, Version, open_folder
from engine.adapters.tiers import HostRegion
from engine.config import GIB, AdapterConfig, EngineConfig, ModelConfig
from engine.errors import AdapterForbidden, AdapterIncompatible, AdapterLoadFailed
from engine.sandbox import convert, parent
from tests.adapters.fake_hub import FakeHub
from tests.lora import tiny

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYOUT = tiny.llama_layout("bfloat16")


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def ref(name: str) -> AdapterRef:
    return AdapterRef.parse(name)


def no_progress(done: int, total: int) -> None:
    pass


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """A root with the adapter `x`."""
    shutil.copytree(saved / "a", tmp_path / "root" / "x")
    return tmp_path / "root"


def pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside / path.name)


def folder(path: Path, outside: Path) -> None:
    path.mkdir()


SWAPS = {pipe: AdapterIncompatible, link: AdapterForbidden, folder: AdapterIncompatible}


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_swapped_after_it_was_found(
    swap: Callable[[Path, Path], None], name: str, root: Path, saved: Path
) -> None:
    """Refused at once, and nothing stays open."""
    before = num_open()
    source = LocalSource([root])
    version = source.resolve(ref("x"), None)
    (root / "x" / name).unlink()
    swap(root / "x" / name, saved / "b")
    for call in (
        lambda: source.fetch(version, None, no_progress),
        lambda: source.resolve(ref("x"), None),
    ):
        with pytest.raises(SWAPS[swap]) as caught:
            call()
        assert name in caught.value.message or caught.value.hint
    assert num_open() == before


@pytest.mark.parametrize("swap", SWAPS)
def test_swapped_after_it_was_fetched(
    swap: Callable[[Path, Path], None], root: Path, saved: Path
) -> None:
    """What was opened is what is read."""
    source = LocalSource([root])
    with source.fetch(source.resolve(ref("x"), None), None, no_progress) as files:
        for name in (CONFIG, WEIGHTS):
            os.rename(root / "x" / name, root / name)
            swap(root / "x" / name, saved / "b")
        assert files.weights.read() == (saved / "a" / WEIGHTS).read_bytes()
        assert files.config.read() == (saved / "a" / CONFIG).read_bytes()


def test_a_folder_that_is_named(saved: Path, tmp_path: Path) -> None:
    """Links lead where they lead; what is missing is an error that names it."""
    (tmp_path / "x").mkdir()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "x" / name).symlink_to(saved / "a" / name)
    with open_folder(tmp_path / "x") as files:
        assert files.weights.size == (saved / "a" / WEIGHTS).stat().st_size
    files.close()
    (tmp_path / "x" / CONFIG).unlink()
    with pytest.raises(AdapterIncompatible, match=CONFIG):
        open_folder(tmp_path / "x")
    with pytest.raises(AdapterLoadFailed, match="cannot read"):
        open_folder(tmp_path / "none")


def test_links_of_the_hubs_cache(hub: FakeHub, saved: Path, tmp_path: Path) -> None:
    """They lead to its blobs, also where the cache itself is a link; one out of it is refused."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "volume")
    source = HubSource(None, tmp_path / "cache", endpoint=hub.url, attempts=1)
    version = source.resolve(ref("org/public"), None)
    with source.fetch(version, None, no_progress) as files:
        path = files.weights.path
        assert path.is_symlink() and files.weights.read() == (saved / "a" / WEIGHTS).read_bytes()
    before = num_open()
    path.unlink()
    path.symlink_to(saved / "b" / WEIGHTS)
    with pytest.raises(AdapterForbidden, match="leads out"):
        source.fetch(version, None, no_progress)
    assert num_open() == before


# -- the exchange


class SlowSource(LocalSource):
    """Delivers when it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__([root])
        self.asked, self.done = asyncio.Event(), asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.path: Path | None = None

    def fetch(self, version: Version, token: str | None, progress: Progress) -> AdapterFiles:
        self.loop.call_soon_threadsafe(self.asked.set)
        deadline = time.monotonic() + 100
        while self.path is None or not self.path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        files = super().fetch(version, token, progress)
        self.loop.call_soon_threadsafe(self.done.set)
        return files


@pytest.fixture
async def make(root: Path, tmp_path: Path) -> AsyncIterator[Callable[..., Exchange]]:
    made: list[tuple[Exchange, HostRegion]] = []

    def build(sources: dict[Any, Any] | None = None) -> Exchange:
        model = ModelConfig(model_id="org/base", huggingface_hub_cache=str(tmp_path / "cache"))
        adapters = AdapterConfig(adapter_root=(str(root),), adapter_source="local")
        region = HostRegion.create(1 << 20)
        made.append(
            (Exchange(EngineConfig(model, adapters), LAYOUT, region, sources=sources), region)
        )
        return made[-1][0]

    yield build
    for exchange, region in made:
        await exchange.close()
        region.close()


async def test_what_arrives_for_nobody_is_closed(
    make: Callable[..., Exchange], root: Path, tmp_path: Path
) -> None:
    source = SlowSource(root)
    exchange = make({"local": source})
    waiting = asyncio.create_task(exchange.acquire(ref("x")))
    await source.asked.wait()
    before = num_open()
    await exchange.close()
    with pytest.raises(AdapterLoadFailed, match="shutting down"):
        await waiting
    source.path = root
    await source.done.wait()
    deadline = time.monotonic() + 100
    while num_open() > before and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert num_open() <= before


async def test_loading_leaves_nothing_open(make: Callable[..., Exchange], root: Path) -> None:
    exchange = make()
    (await exchange.acquire(ref("x"))).release()
    before = num_open()
    shutil.copytree(root / "x", root / "y")
    shutil.copytree(root / "x", root / "bad")
    (root / "bad" / WEIGHTS).write_bytes(b"nonsense")
    (await exchange.acquire(ref("y"))).release()
    with pytest.raises(AdapterIncompatible):
        await exchange.acquire(ref("bad"))
    assert num_open() == before


def as_bin(folder: Path) -> None:
    """An adapter's weights as torch.save writes them."""
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


async def test_a_bin_is_converted_once(
    make: Callable[..., Exchange], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the cache of downloads; the image is that of the same values as safetensors."""
    shutil.copytree(root / "x", root / "y")
    as_bin(root / "y")
    digests, calls = [], []
    monkeypatch.setattr(convert, "run", lambda *given: calls.append(given) or parent.run(*given))
    for names in ("xy", "y"):
        exchange = make()
        for name in names:
            with await exchange.acquire(ref(name)) as lease:
                digests.append(lease.image.digest)
        await exchange.close()
    assert len(set(digests)) == 1 and len(calls) == 1
    assert len(list((tmp_path / "cache" / "lorax-converted").iterdir())) == 1


async def test_converted_files_count_in_the_budget_of_the_disk(
    root: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three fit, and the least recently used goes."""
    tensors = (saved / "a" / WEIGHTS).read_bytes()

    def run(task: str, files: dict[str, int], *given: Any) -> dict[str, Any]:
        """The child, without its limits."""
        os.pwrite(files["target"], tensors, 0)
        return {}

    monkeypatch.setattr(convert, "run", run)
    digests = {}
    for name in "abc":
        shutil.copytree(saved / name, root / name)
        as_bin(root / name)
        digests[name] = hashlib.sha256((root / name / "adapter_model.bin").read_bytes()).hexdigest()
    budget = 2.5 * len(tensors)
    model = ModelConfig(model_id="org/base", huggingface_hub_cache=str(tmp_path / "cache"))
    adapters = AdapterConfig(
        adapter_root=(str(root),), adapter_source="local", adapter_disk_cache_gb=budget / GIB
    )
    for names, kept in (("ab", "ab"), ("a", "ab"), ("c", "ac"), ("b", "cb")):
        region = HostRegion.create(1 << 20)
        exchange = Exchange(EngineConfig(model, adapters), LAYOUT, region)
        for name in names:
            (await exchange.acquire(ref(name))).release()
        await exchange.close()
        region.close()
        found = {path.stem for path in (tmp_path / "cache" / "lorax-converted").iterdir()}
        assert found == {digests[name] for name in kept}


async def test_a_hostile_bin_holds_up_nobody(make: Callable[..., Exchange], root: Path) -> None:
    """While it computes for ever, others load, and the exchange closes at once."""
    shutil.copytree(root / "x", root / "evil")
    as_bin(root / "evil")
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    with (root / "evil" / "adapter_model.bin").open("wb") as file:
        for part in (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}):
            pickle.dump(part, file, protocol=2)
        text = pickle.dumps(nested, protocol=2)
        file.write(text[:2] + b"}" + text[2:-1] + b"Ns.")
    exchange = make()
    evil = asyncio.create_task(exchange.acquire(ref("evil")))
    folder = Path(exchange._config.model.huggingface_hub_cache or "") / "lorax-converted"
    while not folder.exists() or not list(folder.iterdir()):
        await asyncio.sleep(0.01)
    (await exchange.acquire(ref("x"))).release()
    assert not evil.done()
    await exchange.close()
    with pytest.raises(AdapterLoadFailed, match="shutting down"):
        await evil
    assert not list(folder.iterdir())
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
