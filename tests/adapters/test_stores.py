"""What holds for every source over a network: layouts, limits before the download, checksums, a source that is down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine.adapters.disk_cache import FOLDER, DiskCache
from engine.adapters.exchange import Exchange
from engine.adapters.hub import HubSource
from engine.adapters.ref import AdapterRef
from engine.adapters.registry import make_sources
from engine.adapters.remote import check_rank
from engine.adapters.s3 import S3Source
from engine.adapters.sources import LocalSource
from engine.adapters.text_files import TEMPLATE, TEXT_FILES
from engine.adapters.tiers import HostRegion
from engine.config import AdapterConfig, EngineConfig, ModelConfig
from engine.errors import (
    AdapterForbidden,
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterTooLarge,
)
from engine.files import OpenFile
from engine.messages import EngineStats
from engine.metrics import Metrics
from tests.adapters.fake_hub import FakeHub, Repo
from tests.adapters.halt import flipped
from tests.adapters.stores import FAST, STORES, Store, contents, store
from tests.adapters.test_layouts import shard
from tests.lora import tiny

if TYPE_CHECKING:
    from tests.adapters.fake_s3 import FakeS3

CONFIG, WEIGHTS, INDEX = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.safetensors.index.json",
)


@pytest.fixture(params=STORES)
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with store(request.param, request.getfixturevalue, monkeypatch) as found:
        yield found


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """The same adapter in every layout."""
    ludwig = ("ludwig/model/model_weights", "both/model/model_weights", "saved/model_weights")
    for name in ("plain", "sharded", *ludwig):
        shutil.copytree(saved / "a", tmp_path / "root" / name)
    shutil.copytree(saved / "b", tmp_path / "root" / "other")
    shard(tmp_path / "root/sharded")
    shard(tmp_path / "root/both/model/model_weights", 2)
    return tmp_path / "root"


def entries(cache: Path) -> list[Path]:
    """What is in the disk cache, complete or not."""
    return [path for path in (cache / FOLDER).glob("*") if path.is_dir()]


def test_layouts(served: Store, root: Path, tmp_path: Path) -> None:
    """Every layout gives the bytes of the local folder, and the second time nothing is downloaded."""
    local, source = LocalSource([root]), served.source(tmp_path / "cache")
    for layout in ("plain", "sharded", "ludwig", "saved", "both"):
        served.put(contents(root / layout) | {"other.safetensors": b"x", "README.md": b"x"})
        want = served.load(local, local.resolve(AdapterRef((layout,)), None))
        assert served.load(source) == want, layout
        before = served.downloads("adapter_model")
        assert served.load(source) == want
        again = 1 if layout in ("sharded", "both") and source.name != "hub" else 0
        assert served.downloads("adapter_model") - before == again, "only the index is read again"
    assert not served.downloads("README") and not served.downloads("other")


def test_tokenizer_and_chat_template(served: Store, root: Path, tmp_path: Path) -> None:
    """They come with the weights, from Ludwig's folder too; another template is another version."""
    texts = {name: f"contents of {name}".encode() for name in TEXT_FILES}
    source = served.source(tmp_path / "cache")
    for layout in ("", "model/model_weights/"):
        files = {layout + name: data for name, data in contents(root / "plain").items()}
        files |= {layout + name: data for name, data in texts.items()}
        served.put(files)
        version = served.resolve(source)
        assert served.load(source, version)[2:] == list(texts.values())
        served.put(files | {layout + TEMPLATE: b"another"})
        assert served.resolve(source).revision != version.revision
        assert served.load(source)[2:] == [*list(texts.values())[:2], b"another"]
    served.put(files | {layout + TEMPLATE: bytes(TEXT_FILES[TEMPLATE] + 1)})
    with pytest.raises(AdapterTooLarge, match=rf"{TEMPLATE} of .*; the limit is \d+ bytes"):
        served.resolve(source)


def test_a_sharded_adapter_that_changes(served: Store, root: Path, tmp_path: Path) -> None:
    """Another shard is another version."""
    files = contents(root / "sharded")
    served.put(files)
    source = served.source(tmp_path / "cache")
    version = served.resolve(source)
    name = next(name for name in files if "-00002-" in name)
    served.put(files | {name: files[name] + b" "})
    assert served.resolve(source).revision != version.revision


def listing(*names: str) -> bytes:
    weights = {str(number): name for number, name in enumerate(names)}
    return json.dumps({"weight_map": weights}).encode()


BROKEN = {
    "outside": (listing("../plain/" + WEIGHTS), "not a safetensors file of"),
    "address": (listing("https://host/x.safetensors"), "not a safetensors file of"),
    "many": (listing(*(f"{number}.safetensors" for number in range(33))), "the limit is 32"),
    "missing": (listing("none.safetensors"), "none.safetensors"),
    "nothing": (listing(), "names no file"),
    "nonsense": (b"[1", "is damaged"),
    "large": (b" " * ((16 << 20) + 1), "16777216"),
}


@pytest.mark.parametrize("served", ["s3", "https", "webhdfs"], indirect=True)
def test_broken_indexes(served: Store, root: Path, tmp_path: Path) -> None:
    """Refused before any weights are downloaded, and an index without bounds is not read."""
    files, source = contents(root / "sharded"), served.source(tmp_path / "cache")
    for case, (index, words) in BROKEN.items():
        served.put(files | {INDEX: index})
        before = served.downloads(INDEX)
        with pytest.raises(AdapterIncompatible) as caught:
            served.load(source)
        assert words in caught.value.message and caught.value.hint, case
        assert served.downloads(INDEX) - before == (case != "large")
    assert not served.downloads("adapter_model-") and not entries(tmp_path / "cache")


@pytest.mark.parametrize("served", ["s3", "https", "webhdfs"], indirect=True)
def test_an_index_that_comes_too_slowly(
    served: Store, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.put(contents(root / "sharded"))
    monkeypatch.setattr("engine.adapters.store.RESOLVE_S", -1.0)
    with pytest.raises(AdapterLoadFailed, match="too slow|too long") as caught:
        served.resolve(served.source(tmp_path / "cache"))
    assert caught.value.hint


def config_with(files: dict[str, bytes], **fields: object) -> bytes:
    return json.dumps(json.loads(files[CONFIG]) | fields).encode()


def test_ranks_before_the_download(served: Store, root: Path, tmp_path: Path) -> None:
    """The same limit that the parser has; at the limit it is served."""
    files = contents(root / "sharded")
    source = served.source(tmp_path / "cache", check=partial(check_rank, max_rank=64))
    for fields, words in (({"r": 65}, "r is 65"), ({"rank_pattern": {"x": 65}}, "rank_pattern x")):
        served.put(files | {CONFIG: config_with(files, **fields)})
        with pytest.raises(AdapterIncompatible, match=words) as caught:
            served.load(source)
        assert "--max-adapter-rank 65" in (caught.value.hint or "")
    assert served.downloads(CONFIG) and not served.downloads("adapter_model-")
    assert not entries(tmp_path / "cache")
    served.put(files | {CONFIG: config_with(files, r=64)})
    assert served.load(source)


def test_sizes_before_the_download(served: Store, root: Path, tmp_path: Path) -> None:
    """The limit is for all files of the weights together."""
    files = contents(root / "sharded")
    served.put(files)
    total = sum(len(data) for name, data in files.items() if "adapter_model" in name)
    with pytest.raises(AdapterTooLarge, match="the limit is") as caught:
        served.load(served.source(tmp_path / "cache", max_file_bytes=total // 2))
    assert "--host-cache-gb" in (caught.value.hint or "")
    assert not served.downloads("adapter_model-") and not entries(tmp_path / "cache")
    assert served.load(served.source(tmp_path / "cache", max_file_bytes=total))


def test_the_limits_of_a_server(tmp_path: Path) -> None:
    """Every source over a network gets them from the settings."""
    config = EngineConfig(
        model=ModelConfig(huggingface_hub_cache=str(tmp_path)),
        adapters=AdapterConfig(
            adapter_hosts=("x",),
            adapter_schemes=("gs",),
            max_adapter_rank=2,
            s3_endpoint_url="http://x",
        ),
    )
    (tmp_path / CONFIG).write_text('{"r": 3}')
    sources = make_sources(config, 5)
    for name in ("hub", "s3", "https", "gs"):
        source: Any = sources[name]
        assert source._max_file_bytes == 5
        with (
            OpenFile(tmp_path / CONFIG) as file,
            pytest.raises(AdapterIncompatible, match="r is 3"),
        ):
            source._check(file)


@pytest.mark.parametrize("served", ["hub", "s3", "pbase"], indirect=True)
def test_corrupt_bodies(served: Store, root: Path, tmp_path: Path) -> None:
    """The right length and another byte: downloaded again once, then refused and not kept."""
    files = contents(root / "plain")
    served.put(files)
    assert served.corrupt is not None
    served.corrupt(1000)
    source = served.source(tmp_path / "cache")
    with pytest.raises(AdapterLoadFailed) as caught:
        served.load(source)
    assert caught.value.hint and served.downloads(WEIGHTS) == 2
    broken = [path for path in (tmp_path / "cache").rglob("*") if "adapter_model" in path.name]
    assert not broken and not entries(tmp_path / "cache")
    served.corrupt(1)
    assert served.load(source) == [files[CONFIG], files[WEIGHTS]]
    assert served.downloads(WEIGHTS) == 4


def test_a_file_of_the_hubs_cache_that_decayed(root: Path, hub: FakeHub, tmp_path: Path) -> None:
    """Found at the first use in a process, and downloaded again."""
    files = contents(root / "plain")
    hub.repos["org/x"] = repo = Repo()
    repo.commit(files)
    for number in range(2):
        source = HubSource(None, tmp_path / "cache", endpoint=hub.url, attempts=1)
        version = source.resolve(AdapterRef.parse("org/x"), None)
        for _ in range(2):
            with source.fetch(version, None, lambda done, total: None) as found:
                assert found.weights.read() == files[WEIGHTS]
        assert hub.count(f"GET org/x/resolve/{version.revision}/{WEIGHTS}") == number + 1
        path = found.weights.path.resolve()
        path.write_bytes(flipped(files[WEIGHTS]))


def test_a_source_that_is_down(
    served: Store, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last version serves on, and the log says so. An answer is never overridden."""
    old, new = contents(root / "plain"), contents(root / "other")
    served.put(old)
    served.load(served.source(tmp_path / "cache"))
    served.put(new)
    served.load(served.source(tmp_path / "cache"))
    served.fail(503)
    source = served.source(tmp_path / "cache")
    version = served.resolve(source)
    assert version.unconfirmed and "using the downloaded copy" in caplog.text
    assert served.load(source, version) == [new[CONFIG], new[WEIGHTS]]
    with pytest.raises(AdapterLoadFailed):
        served.resolve(served.source(tmp_path / "empty"))
    served.fail(403)
    with pytest.raises(AdapterForbidden):
        served.resolve(source)
    served.fail(0)
    assert not served.resolve(source).unconfirmed
    served.put({})
    with pytest.raises((AdapterNotFound, AdapterIncompatible)):
        served.resolve(source)


async def test_the_status_of_a_source_that_is_down(s3: FakeS3, tmp_path: Path) -> None:
    """Requests are served, and the adapter's status says that its version is not confirmed."""
    model = ModelConfig(model_id="org/base", huggingface_hub_cache=str(tmp_path))
    source = S3Source(DiskCache(tmp_path), endpoint=s3.url, ttl_s=0.0, **FAST)
    region = HostRegion.create(1 << 20)
    exchange = Exchange(
        EngineConfig(model, AdapterConfig(adapter_source="s3")),
        tiny.llama_layout("bfloat16"),
        region,
        sources={"s3": source},
    )
    digests = set()
    for is_down in (False, True, False):
        s3.broken, s3.fault = 1000 * is_down, 503
        with await exchange.acquire(AdapterRef.parse("s3://loras/team/a")) as lease:
            digests.add(lease.image.digest)
        (status,) = await exchange.adapters()
        assert status.unconfirmed == is_down
        text = Metrics().render(EngineStats(), [status], 16).decode()
        assert f"lorax_adapters_unconfirmed {float(is_down)}" in text
    assert len(digests) == 1
    await exchange.close()
    region.close()


def test_a_whole_digest_needs_no_answer(s3: FakeS3, root: Path, tmp_path: Path) -> None:
    """Of S3: what was downloaded is served by its digest, also after it was replaced."""
    old = contents(root / "sharded")
    for name, data in old.items():
        s3.put(f"x/model/model_weights/{name}", data)
    source = S3Source(DiskCache(tmp_path / "cache"), endpoint=s3.url, **FAST)
    version = source.resolve(AdapterRef(("loras/x",)), None)
    source.fetch(version, None, lambda done, total: None).close()
    s3.put(f"x/model/model_weights/{CONFIG}", b"{}")
    s3.requests.clear()
    exact = source.resolve(AdapterRef(("loras/x",), "s3", version.revision), None)
    with source.fetch(exact, None, lambda done, total: None) as files:
        assert files.config.read() == old[CONFIG] and len(files.shards) == 3
    assert exact == replace(version, id=exact.id, num_bytes=None) and not s3.requests
    with pytest.raises(AdapterNotFound, match="has no revision"):
        source.resolve(AdapterRef(("loras/x",), "s3", "0" * 40), None)
