"""Adapters of other stores, through fsspec's file system in memory."""

from __future__ import annotations

import base64
import builtins
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from engine.adapters.disk_cache import FOLDER, DiskCache
from engine.adapters.ref import AdapterRef
from engine.adapters.registry import Registry, make_sources
from engine.adapters.schemes import SchemeSource
from engine.config import AdapterConfig, EngineConfig
from engine.errors import (
    AdapterError,
    AdapterForbidden,
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterTooLarge,
    ConfigError,
)
from tests.adapters.conftest import contents

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def store(saved: Path) -> Iterator[MemoryFileSystem]:
    store = MemoryFileSystem()
    put(store, saved / "a")
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


def put(store: MemoryFileSystem, folder: Path) -> None:
    for name, data in contents(folder).items():
        store.pipe_file(f"/team/a/{name}", data)


@pytest.fixture
def source(store: MemoryFileSystem, tmp_path: Path) -> SchemeSource:
    return SchemeSource("memory", DiskCache(tmp_path), attempts=2, backoff_s=0.01)


def load(source: SchemeSource, place: str = "team/a") -> bytes:
    version = source.resolve(AdapterRef((place,)), None)
    with source.fetch(version, None, lambda done, total: None) as files:
        return files.weights.read()


def test_equals_the_folder(store: MemoryFileSystem, source: SchemeSource, saved: Path) -> None:
    assert load(source) == load(source, "team/a/") == (saved / "a" / WEIGHTS).read_bytes()
    put(store, saved / "b")
    assert load(source) == (saved / "b" / WEIGHTS).read_bytes()


def test_replaced_during_loading(
    store: MemoryFileSystem, source: SchemeSource, saved: Path, tmp_path: Path
) -> None:
    version = source.resolve(AdapterRef(("team/a",)), None)
    with pytest.raises(AdapterLoadFailed, match="changed during loading"):
        source.fetch(version, None, lambda done, total: put(store, saved / "b"))
    with pytest.raises(AdapterLoadFailed, match="changed during loading"):
        source.fetch(version, None, lambda done, total: None)
    assert list((tmp_path / FOLDER).glob("*.tmp")) == []


def test_a_listed_md5_is_compared(
    store: MemoryFileSystem, source: SchemeSource, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Google Cloud Storage lists it."""
    data, real = (saved / "a" / WEIGHTS).read_bytes(), MemoryFileSystem.info
    listed = base64.b64encode(hashlib.md5(data).digest()).decode()

    def info(self: MemoryFileSystem, path: str, **more: object) -> dict[str, object]:
        found: dict[str, object] = real(self, path, **more)
        return found | ({"md5Hash": listed} if path.endswith(WEIGHTS) else {})

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    assert load(source) == data
    store.pipe_file(f"/team/b/{CONFIG}", b"{}")
    store.pipe_file(f"/team/b/{WEIGHTS}", data[:-1] + b"x")
    with pytest.raises(AdapterLoadFailed, match="corrupt: its md5"):
        load(source, "team/b")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError("no"), AdapterForbidden),
        (TimeoutError("slow"), AdapterLoadFailed),
        (RuntimeError("a store's own"), AdapterLoadFailed),
    ],
)
@pytest.mark.parametrize("method", ["info", "open"])
def test_faults(
    store: MemoryFileSystem,
    source: SchemeSource,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    error: Exception,
    kind: type[AdapterError],
) -> None:
    def fail(*given: object, **more: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, method, fail)
        with pytest.raises(kind) as caught:
            load(source)
    assert caught.value.hint or caught.value.field
    assert load(source)


def test_missing_foreign_and_too_large(
    store: MemoryFileSystem, source: SchemeSource, tmp_path: Path
) -> None:
    with pytest.raises(AdapterNotFound, match="there is no adapter in memory://none"):
        load(source, "none")
    store.pipe_file(f"/empty/{CONFIG}", b"{}")
    with pytest.raises(AdapterIncompatible, match="has neither"):
        load(source, "empty")
    with pytest.raises(AdapterTooLarge, match="the limit is 10 bytes"):
        load(SchemeSource("memory", DiskCache(tmp_path), max_file_bytes=10))
    secret = tmp_path / CONFIG
    secret.write_text("{}")
    with pytest.raises(AdapterError):  # fsspec's chains of file systems are not followed
        load(source, f"x::file://{tmp_path}")


def test_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *given: object, **more: object) -> object:
        if name.startswith("gcsfs"):
            raise ImportError(name)
        return real(name, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(AdapterLoadFailed) as caught:
        load(SchemeSource("gs", DiskCache(tmp_path), attempts=1))
    assert "gcsfs" in (caught.value.hint or "")


def test_settings(tmp_path: Path) -> None:
    """Off unless named."""
    config = EngineConfig(adapters=AdapterConfig(adapter_schemes=("gs", "abfs")))
    assert {"gs", "abfs"} <= set(make_sources(config))
    assert "gs" not in make_sources(EngineConfig())
    (ref,) = Registry(make_sources(config), "hub").candidates(AdapterRef.parse("gs://b/a"))
    assert (ref.id, ref.source) == ("b/a", "gs")
    for bad in ("file", "local", "http", "s3", "generic", "nonsense", "gs://"):
        with pytest.raises(ConfigError, match="--adapter-schemes"):
            SchemeSource(bad, DiskCache(tmp_path))
