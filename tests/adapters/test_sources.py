"""Local folders, the demo, the hub: who gets what, and what is said to who does not."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from engine.adapters.hub import HubSource
from engine.adapters.ref import AdapterRef
from engine.adapters.registry import Registry, make_sources
from engine.adapters.sources import AdapterFiles, DemoSource, LocalSource, Source, Version
from engine.config import AdapterConfig, EngineConfig, ModelConfig
from engine.errors import (
    AdapterError,
    AdapterForbidden,
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterTooLarge,
    InvalidRequest,
)
from tests.adapters.conftest import contents
from tests.adapters.fake_hub import FakeHub

WEIGHTS = "adapter_model.safetensors"


def fetch(source: Source, name: str, token: str | None = None) -> AdapterFiles:
    """The files, closed again."""
    version = source.resolve(AdapterRef.parse(name), token)
    with source.fetch(version, token, lambda done, total: None) as files:
        return files


# -- local


def test_local_by_path_and_by_name(saved: Path) -> None:
    source = LocalSource([saved.parent / "other", saved])
    for name in ("a", f"{saved}/a", "./a", "b/../a"):
        files = fetch(source, name)
        assert files.config.path == saved / "a" / "adapter_config.json"
        assert files.weights.path == saved / "a" / WEIGHTS


@pytest.mark.parametrize("name", ["/etc", "../other", "/no/such/folder", "a/../../.."])
def test_local_outside_the_roots(name: str, saved: Path) -> None:
    """Forbidden whether it exists or not: the answer tells nothing of the disk."""
    with pytest.raises(AdapterForbidden) as caught:
        fetch(LocalSource([saved]), name)
    assert "--adapter-root" in (caught.value.hint or "")


def test_local_links(saved: Path, tmp_path: Path) -> None:
    """A link may not lead out, neither the folder's nor a file's; within the roots it may."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    for folder in (outside / "x", root / "linked-file", root / "real"):
        folder.mkdir(parents=True)
    for name, data in contents(saved / "a").items():
        for folder in (outside / "x", root / "real"):
            (folder / name).write_bytes(data)
    (root / "linked-folder").symlink_to(outside / "x")
    (root / "linked-within").symlink_to(root / "real")
    (root / "linked-file" / "adapter_config.json").symlink_to(root / "real/adapter_config.json")
    (root / "linked-file" / WEIGHTS).symlink_to(outside / "x" / WEIGHTS)
    (root / "loop").symlink_to(root / "loop")
    source = LocalSource([root])
    assert fetch(source, "linked-within").weights.path == root / "real" / WEIGHTS
    for name in ("linked-folder", "linked-file"):
        with pytest.raises(AdapterForbidden):
            fetch(source, name)
    with pytest.raises(AdapterNotFound):
        fetch(source, "loop")


def test_local_that_is_no_adapter(tmp_path: Path) -> None:
    source = LocalSource([tmp_path])
    with pytest.raises(AdapterNotFound) as caught:
        fetch(source, "nothing")
    assert "nothing" in caught.value.message
    (tmp_path / "x").mkdir()
    with pytest.raises(AdapterIncompatible, match=r"no adapter_config\.json"):
        fetch(source, "x")
    (tmp_path / "x" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterIncompatible, match="neither"):
        fetch(source, "x")
    os.mkfifo(tmp_path / "x" / WEIGHTS)
    with pytest.raises(AdapterIncompatible, match="regular file"):
        fetch(source, "x")


def test_local_revisions(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "name@v1").symlink_to(saved / "a")
    (tmp_path / "plain").symlink_to(saved / "a")
    source = LocalSource([tmp_path, saved])
    assert fetch(source, "name@v1")
    with pytest.raises(AdapterNotFound, match="no revision"):
        fetch(source, "plain@v1")


def test_local_updates_are_other_versions(tmp_path: Path, saved: Path) -> None:
    for name, data in contents(saved / "a").items():
        (tmp_path / name).write_bytes(data)
    source = LocalSource([tmp_path])
    ref = AdapterRef.parse(".")
    before = source.resolve(ref, None)
    (tmp_path / WEIGHTS).write_bytes((saved / "b" / WEIGHTS).read_bytes())
    os.utime(tmp_path / WEIGHTS, (1, 1))
    assert source.resolve(ref, None).revision != before.revision
    with pytest.raises(AdapterLoadFailed, match="changed"):
        source.fetch(before, None, lambda done, total: None)


def test_demo(saved: Path, tmp_path: Path) -> None:
    source = DemoSource(saved)
    assert source.names() == ["a", "b", "c", "d", "e", "f", "large"]
    assert fetch(source, "a").folder == saved / "a"
    for name in ("../saved", "a/../b", "/etc", "none"):
        with pytest.raises(AdapterNotFound, match="the demo has no adapter"):
            fetch(source, name)
    with pytest.raises(AdapterNotFound, match="not installed"):
        fetch(DemoSource(tmp_path / "none"), "a")


# -- hub


@pytest.fixture
def source(hub: FakeHub, tmp_path: Path) -> HubSource:
    return make(hub, tmp_path)


def make(hub: FakeHub, cache: Path, token: str | None = None, **fields: Any) -> HubSource:
    given = {"endpoint": hub.url, "attempts": 3, "backoff_s": 0.01} | fields
    return HubSource(token, cache, **given)


def test_hub_fetches_two_files_once(source: HubSource, hub: FakeHub, saved: Path) -> None:
    seen: list[tuple[int, int]] = []
    version = source.resolve(AdapterRef.parse("org/public"), None)
    with source.fetch(version, None, lambda *at: seen.append(at)) as files:
        pass
    assert files.weights.path.read_bytes() == (saved / "a" / WEIGHTS).read_bytes()
    assert files.revision == version.revision == hub.repos["org/public"].branches["main"]
    assert seen[-1][0] == files.weights.size
    before = sum(hub.requests.values())
    with source.fetch(version, None, lambda *at: None) as again:
        assert again.weights.fingerprint == files.weights.fingerprint
    assert sum(hub.requests.values()) == before, "a commit that was downloaded is not asked for"
    assert not hub.count("README") and not version.salt


def test_hub_revisions(source: HubSource, hub: FakeHub, saved: Path) -> None:
    repo = hub.repos["org/public"]
    first = repo.branches["main"]
    repo.commit(contents(saved / "b"), "dev")
    second = repo.commit(contents(saved / "c"))
    for name, folder in (("", "c"), ("@main", "c"), ("@dev", "b"), (f"@{first}", "a")):
        files = fetch(source, "org/public" + name)
        assert files.weights.path.read_bytes() == (saved / folder / WEIGHTS).read_bytes()
    assert source.resolve(AdapterRef.parse("org/public"), None).revision == second
    with pytest.raises(AdapterNotFound, match="no revision 'none'"):
        fetch(source, "org/public@none")


@pytest.mark.parametrize(
    ("name", "token", "error", "field"),
    [
        (
            "org/none",
            None,
            AdapterForbidden,
            "api_token",
        ),  # as the hub: it says no more to strangers
        ("org/none", "bob", AdapterNotFound, "adapter_id"),
        ("org/private", None, AdapterForbidden, "api_token"),
        ("org/private", "bob", AdapterNotFound, "adapter_id"),
        ("org/private", "expired", AdapterForbidden, "api_token"),
        ("org/gated", None, AdapterForbidden, "api_token"),
        ("org/gated", "bob", AdapterForbidden, "api_token"),
        ("org/empty", None, AdapterIncompatible, "adapter_config.json"),
        ("../../etc", None, AdapterNotFound, "adapter_id"),
        ("a/b/c", None, AdapterNotFound, "adapter_id"),
    ],
)
def test_hub_refusals(
    name: str,
    token: str | None,
    error: type[Exception],
    field: str,
    source: HubSource,
    hub: FakeHub,
) -> None:
    with pytest.raises(error) as caught:
        fetch(source, name, token)
    assert caught.value.field == field  # type: ignore[attr-defined]
    assert sum(hub.requests.values()) <= 2, "a refusal is not asked for again"


def test_hub_tokens(hub: FakeHub, tmp_path: Path) -> None:
    """The request's token before the configured one; each tenant has a salt of its own."""
    source = make(hub, tmp_path, token="operator")
    ref = AdapterRef.parse("org/private")
    alice, operator = source.resolve(ref, "alice"), source.resolve(ref, None)
    assert alice.salt and operator.salt and alice.salt != operator.salt
    assert alice.cache != operator.cache
    assert source.tenant("alice") == alice.salt and b"alice" not in alice.salt
    with pytest.raises(AdapterNotFound):
        source.resolve(ref, "bob")
    assert source.resolve(AdapterRef.parse("org/gated"), "alice").salt == alice.salt
    assert not source.resolve(AdapterRef.parse("org/public"), "alice").salt


def test_hub_and_a_token_that_it_does_not_know(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not matter for a public adapter, and opens nothing else: neither what the operator's token opens, nor
    what lies on the disk."""
    source = make(hub, tmp_path, token="operator")
    ref = AdapterRef.parse
    public = source.resolve(ref("org/public"), None)
    assert source.resolve(ref("org/public"), "key of a gateway") == public
    assert fetch(source, "org/public", "key of a gateway").revision == public.revision
    for name in ("org/private", "org/gated", "org/none"):
        with pytest.raises(AdapterForbidden):
            source.resolve(ref(name), "key of a gateway")
    fetch(source, "org/private", "alice")
    hub.tokens.remove("alice")
    info = source._info

    def away(ref: AdapterRef, token: str | bool) -> Any:
        if not token:
            raise OSError("the hub is away")
        return info(ref, token)

    monkeypatch.setattr(source, "_info", away)
    with pytest.raises(AdapterForbidden):
        source.resolve(ref("org/private"), "alice")


def test_hub_away(hub: FakeHub, tmp_path: Path) -> None:
    """What was downloaded serves on, to whom it was given; the rest is a failure that names the hub."""
    source = make(hub, tmp_path)
    ref = AdapterRef.parse
    fetch(source, "org/public")
    fetch(source, "org/private", "alice")
    hub.stop()
    assert source.resolve(ref("org/public"), None).revision
    assert source.resolve(ref("org/public"), "bob").revision
    assert fetch(source, "org/public@main").weights.path.exists()
    assert fetch(source, "org/private", "alice").weights.path.exists()
    assert source.resolve(ref("org/private"), "alice").salt
    for name, token in (("org/private", None), ("org/private", "bob"), ("org/gated", "alice")):
        with pytest.raises(AdapterLoadFailed, match="the hub request failed"):
            source.resolve(ref(name), token)


def test_hub_that_stumbles(source: HubSource, hub: FakeHub) -> None:
    hub.broken = 2
    assert source.resolve(AdapterRef.parse("org/public"), None)
    hub.broken = 3
    with pytest.raises(AdapterLoadFailed):
        source.resolve(AdapterRef.parse("org/private"), "alice")


@pytest.mark.parametrize("status", [408, 425, 429, 500, 501, 503, 599])
def test_hub_failures_that_pass(status: int, source: HubSource, hub: FakeHub) -> None:
    """Asked again, as often as `attempts` says."""
    ref = AdapterRef.parse("org/public")
    hub.broken_status = status
    hub.broken = 2
    assert source.resolve(ref, None).revision == hub.repos["org/public"].branches["main"]
    assert sum(hub.requests.values()) == 3
    hub.broken = 9
    with pytest.raises(AdapterLoadFailed, match=f"the hub request failed: .*{status}"):
        source.resolve(ref, None)
    assert sum(hub.requests.values()) == 6


@pytest.mark.parametrize("status", [400, 404, 407, 409, 424, 426, 428, 430, 499])
def test_hub_refusals_that_stay(status: int, source: HubSource, hub: FakeHub) -> None:
    """Asked once."""
    hub.broken_status, hub.broken = status, 1
    with pytest.raises(AdapterError):
        source.resolve(AdapterRef.parse("org/public"), None)
    assert sum(hub.requests.values()) == 1 and hub.broken == 0


def test_hub_offline_mode(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(hub, tmp_path)
    fetch(source, "org/public")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = sum(hub.requests.values())
    assert fetch(source, "org/public").weights.path.exists()
    with pytest.raises(AdapterNotFound, match="the hub is disabled"):
        fetch(source, "org/gated")
    assert sum(hub.requests.values()) == before


def test_hub_refuses_what_is_too_large(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(AdapterTooLarge, match="bytes"):
        make(hub, tmp_path, max_file_bytes=100).resolve(AdapterRef.parse("org/public"), None)
    assert not hub.count("resolve")


# -- registry


def resolve(registry: Registry, ref: AdapterRef) -> Version:
    async def ask(one: AdapterRef) -> Version:
        assert one.source
        return registry.sources[one.source].resolve(one, None)

    return asyncio.run(registry.resolve(ref, ask))


def config(saved: Path, model: str = "org/base", **fields: Any) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model_id=model, huggingface_hub_cache=str(saved / "cache")),
        adapters=AdapterConfig(adapter_root=(str(saved),), **fields),
    )


def test_names_are_looked_for_in_order(hub: FakeHub, tmp_path: Path, saved: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "b").symlink_to(saved / "c")
    sources: dict[Any, Source] = {
        "demo": DemoSource(saved / "."),
        "local": LocalSource([tmp_path]),
        "hub": make(hub, tmp_path / "cache"),
    }
    registry = Registry(sources, "hub")
    assert resolve(registry, AdapterRef.parse("a")).source == "demo"
    assert resolve(registry, AdapterRef.parse("org/public")).source == "hub"
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "public").mkdir()
    for name, data in contents(saved / "a").items():
        (tmp_path / "org" / "public" / name).write_bytes(data)
    assert resolve(registry, AdapterRef.parse("org/public")).source == "local"
    assert resolve(registry, AdapterRef.parse("org/public", "hub")).source == "hub"
    registry.register(AdapterRef.parse("org/public"), "hub")
    assert resolve(registry, AdapterRef.parse("org/public")).source == "hub"


def test_not_found_says_where_it_was_looked_for(hub: FakeHub, tmp_path: Path, saved: Path) -> None:
    sources: dict[Any, Source] = {
        "demo": DemoSource(saved),
        "local": LocalSource([tmp_path]),
        "hub": make(hub, tmp_path / "cache"),
    }
    registry = Registry(sources, "hub")
    registry.register(AdapterRef.parse("first"), "local")
    with pytest.raises(AdapterNotFound) as caught:
        resolve(registry, AdapterRef.parse("pirat"))
    for words in (
        "preloaded",
        "first",
        "the demo has no",
        "below an --adapter-root",
        "'pirat' is not a valid hub id",
    ):
        assert words in caught.value.message
    assert "it has a, b" in (caught.value.hint or "")
    for name in ("/etc/passwd", "org/private"):
        with pytest.raises(AdapterForbidden):
            resolve(registry, AdapterRef.parse(name))
    hub.stop()
    with pytest.raises(AdapterLoadFailed, match="the demo has no"):
        resolve(registry, AdapterRef.parse("org/pirat"))
    for name in ("pirat", "a/b/c", "./pirat", "pirate~1/x y"):
        with pytest.raises(AdapterNotFound, match="not a valid hub id"):
            resolve(registry, AdapterRef.parse(name))


def test_the_sources_of_a_server(saved: Path) -> None:
    assert set(make_sources(config(saved))) == {"local", "hub", "s3", "pbase"}
    assert set(make_sources(config(saved, "demo"))) == {"local", "hub", "s3", "pbase", "demo"}
    registry = Registry(make_sources(config(saved)), "local")
    with pytest.raises(InvalidRequest):
        registry.candidates(AdapterRef(("x",), "demo"))
    assert resolve(registry, AdapterRef.parse("a")).source == "local"
    with pytest.raises(AdapterNotFound, match="no preloaded"):
        resolve(Registry(make_sources(config(saved, "demo")), "local"), AdapterRef.parse("z"))
