"""A source is one class and one entry in the table: this file adds one and loads an adapter through it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.adapters.exchange import Exchange
from engine.adapters.ref import AdapterRef
from engine.adapters.registry import Registry, default_source, make_sources, selectable
from engine.adapters.sources import (
    AdapterFiles,
    Progress,
    Source,
    Version,
    find_weights,
    open_folder,
)
from engine.adapters.tiers import HostRegion
from engine.config import AdapterConfig, EngineConfig, ModelConfig
from engine.errors import AdapterNotFound, ConfigError, InvalidRequest
from engine.settings import resolve
from engine.settings import settings as engine_settings
from tests.lora import tiny

LAYOUT = tiny.llama_layout("bfloat16")


class BucketSource(Source):
    """Folders of a "bucket", named `bucket://folder` or by adapter_source `bucket`."""

    name = "bucket"
    prefix = "bucket://"

    def __init__(self, bucket: Path) -> None:
        self.bucket = bucket
        self.resolved: list[AdapterRef] = []

    def names(self) -> list[str]:
        return ["bucket://b"]

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        self.resolved.append(ref)
        folder = self.bucket / ref.id
        if not folder.is_dir():
            raise AdapterNotFound(f"the bucket has no {ref.id}", field="adapter_id")
        weights = find_weights((path.name for path in folder.iterdir()), ref.id)
        return Version(self.name, str(folder), "1", weights)

    def fetch(self, version: Version, token: str | None, progress: Progress) -> AdapterFiles:
        return open_folder(Path(version.id))


class HiddenSource(BucketSource):
    name = "hidden"
    prefix = "hidden://"
    selectable = False


@pytest.fixture
def bucket(saved: Path) -> BucketSource:
    return BucketSource(saved)


@pytest.fixture
async def exchange(bucket: BucketSource, tmp_path: Path) -> AsyncIterator[Exchange]:
    config = EngineConfig(
        model=ModelConfig(model_id="org/base", huggingface_hub_cache=str(tmp_path / "cache")),
        adapters=AdapterConfig(
            adapter_root=(str(tmp_path),),
            adapter_source="local",
            preloaded_adapter_ids=("bucket://c",),
        ),
    )
    hidden = HiddenSource(bucket.bucket)
    sources = {**make_sources(config), bucket.name: bucket, hidden.name: hidden}
    region = HostRegion.create(1 << 20)
    exchange = Exchange(config, LAYOUT, region, sources=sources)
    yield exchange
    await exchange.close()
    region.close()


async def test_by_name_and_by_prefix(exchange: Exchange, bucket: BucketSource) -> None:
    """Both mean the same adapter: the source sees one id, and the files are loaded once."""
    by_name = await exchange.acquire(AdapterRef.parse("a", "Bucket"))
    by_prefix = await exchange.acquire(AdapterRef.parse("bucket://a"))
    both = await exchange.acquire(AdapterRef.parse("bucket://a", "bucket"))
    assert by_name.image.digest == by_prefix.image.digest == both.image.digest
    assert by_name.image.digest.hex() == tiny.inspect(bucket.bucket / "a", LAYOUT).digest
    assert {lease.image.source for lease in (by_name, by_prefix, both)} == {"bucket"}
    assert {(ref.id, ref.source) for ref in bucket.resolved} == {("a", "bucket")}
    (status,) = [one for one in await exchange.adapters() if one.state == "ready"]
    assert (status.source, status.leases) == ("bucket", 3)
    for lease in (by_name, by_prefix, both):
        lease.release()


async def test_names_without_the_prefix_are_looked_up_elsewhere(
    exchange: Exchange, bucket: BucketSource
) -> None:
    with pytest.raises(AdapterNotFound):
        await exchange.acquire(AdapterRef.parse("a"))
    with pytest.raises(AdapterNotFound, match="the bucket has no none"):
        await exchange.acquire(AdapterRef.parse("bucket://none"))
    assert [ref.id for ref in bucket.resolved] == ["none"]


async def test_preloaded_and_listed(exchange: Exchange) -> None:
    await exchange.start()
    (image,) = exchange.preloaded
    assert (image.name, image.source) == ("bucket://c", "bucket")
    listed = {(one.name, one.source) for one in await exchange.adapters() if one.state == "listed"}
    assert listed == {("bucket://b", "bucket"), ("bucket://b", "hidden")}


async def test_as_the_default_source(bucket: BucketSource) -> None:
    """By the flags: the config knows no source."""
    config = resolve({"adapter_source": "bucket", "preloaded_adapter_ids": ["c"]}, environment={})
    region = HostRegion.create(1 << 20)
    exchange = Exchange(config, LAYOUT, region, sources={"bucket": bucket})
    await exchange.start()
    with await exchange.acquire(AdapterRef.parse("a")) as lease:
        assert lease.image.source == "bucket"
    assert [(image.name, image.source) for image in exchange.preloaded] == [("c", "bucket")]
    await exchange.close()
    region.close()


@pytest.mark.parametrize("field", ["adapter_source", "default_adapter_source"])
@pytest.mark.parametrize("name", ["ftp", "hidden", "gs"])
def test_default_sources_that_do_not_exist(bucket: BucketSource, field: str, name: str) -> None:
    config = resolve({"adapter_source": "bucket", field: name}, environment={})
    sources = {"bucket": bucket, "hidden": HiddenSource(bucket.bucket)}
    with pytest.raises(ConfigError, match=rf"'{name}' .* it has bucket \(") as caught:
        default_source(config.adapters, sources)
    assert caught.value.field == field and caught.value.hint


def test_the_help_names_every_source() -> None:
    settings = [one for one in engine_settings() if one.name.endswith("adapter_source")]
    assert len(settings) == 2
    for setting in settings:
        for name in selectable(make_sources(EngineConfig())):
            assert name in setting.option.help


async def test_a_source_that_requests_cannot_name(exchange: Exchange) -> None:
    with pytest.raises(InvalidRequest, match=r"it has local, hub, s3, pbase, bucket \(") as caught:
        await exchange.acquire(AdapterRef.parse("a", "hidden"))
    assert caught.value.field == "adapter_source"
    with await exchange.acquire(AdapterRef.parse("hidden://a")) as lease:
        assert lease.image.source == "hidden"


def test_unknown_sources_are_refused_by_name(bucket: BucketSource, saved: Path) -> None:
    config = EngineConfig(model=ModelConfig(huggingface_hub_cache=str(saved / "cache")))
    assert config.model.model_id == "demo"
    registry = Registry({**make_sources(config), "bucket": bucket}, "hub")
    for source in ("GS", "ftp", "demo"):
        with pytest.raises(InvalidRequest) as caught:
            registry.candidates(AdapterRef.parse("a", source))
        assert caught.value.field == "adapter_source" and caught.value.hint
        assert repr(source.lower()) in caught.value.message
        assert caught.value.message.endswith("it has local, hub, s3, pbase, bucket")
    assert asyncio.run(resolve_demo(registry)).source == "demo"


async def resolve_demo(registry: Registry) -> Version:
    """A demo adapter, which is found by its name only."""
    name = registry.sources["demo"].names()[0]

    async def ask(ref: AdapterRef) -> Version:
        assert ref.source is not None
        return registry.sources[ref.source].resolve(ref, None)

    return await registry.resolve(AdapterRef.parse(name), ask)
