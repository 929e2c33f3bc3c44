"""The disk cache alone: what is on disk decides, whoever left it there."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from engine.adapters.disk_cache import FOLDER, DiskCache
from engine.adapters.sources import Version
from engine.adapters.transfer import NewFile, Transfer
from engine.errors import AdapterLoadFailed, AdapterTooLarge

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIZE = 1000  # bytes of an adapter


class Filler:
    """Writes files and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.error: Exception | None = None

    def __call__(self, folder: Path, transfer: Transfer) -> None:
        self.calls += 1
        transfer.reserve(SIZE)
        for name, size in ((CONFIG, 100), (WEIGHTS, SIZE - 100)):
            with NewFile(folder / name, size) as file:
                file.write(b"x" * size, 0)
                transfer.wrote(size)
                if self.error is not None:
                    raise self.error


def version(name: str, salt: bytes = b"") -> Version:
    return Version("test", name, "1", WEIGHTS, salt=salt, num_bytes=SIZE - 100)


def load(cache: DiskCache, name: str, fill: Filler, salt: bytes = b"") -> None:
    with cache.fetch(version(name, salt), "", lambda done, total: None, fill) as files:
        assert files.weights.read() == b"x" * (SIZE - 100)


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / FOLDER).rglob("*") if path.is_file())


def entries(folder: Path) -> list[Path]:
    return [path for path in (folder / FOLDER).iterdir() if path.is_dir()]


def test_the_budget_counts_what_is_on_disk(tmp_path: Path) -> None:
    """Every download of many processes, each with its own view, stays within the budget."""
    fill = Filler()
    for number in range(20):
        load(DiskCache(tmp_path, 5 * SIZE), str(number), fill)
        assert on_disk(tmp_path) <= 5 * SIZE
    assert fill.calls == 20 and len(entries(tmp_path)) >= 3
    load(DiskCache(tmp_path, 5 * SIZE), "19", fill)
    assert fill.calls == 20
    with pytest.raises(AdapterTooLarge, match="--adapter-disk-cache-gb"):
        load(DiskCache(tmp_path, SIZE - 1), "x", fill)
    for number in range(20):
        load(DiskCache(tmp_path), str(number), fill)
    assert len(entries(tmp_path)) == 20


def test_tenants_do_not_share(tmp_path: Path) -> None:
    fill = Filler()
    for salt in (b"alice", b"bob", b"alice"):
        load(DiskCache(tmp_path), "a", fill, salt)
    assert fill.calls == 2


@pytest.mark.parametrize(
    ("number", "words", "hint"),
    [
        (errno.ENOSPC, "is full", "--adapter-disk-cache-gb"),
        (errno.EDQUOT, "is full", "--adapter-disk-cache-gb"),
        (errno.EIO, "cannot write", "--huggingface-hub-cache"),
    ],
)
def test_disk_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str, hint: str
) -> None:
    def fail(fd: int, start: int, size: int) -> None:
        raise OSError(number, os.strerror(number))

    cache = DiskCache(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail)
        with pytest.raises(AdapterLoadFailed, match=words) as caught:
            load(cache, "a", Filler())
    assert hint in (caught.value.hint or "") and entries(tmp_path) == []
    load(cache, "a", Filler())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterLoadFailed, match="cannot write"):
        load(DiskCache(tmp_path / "file"), "a", Filler())


def test_a_failed_download_leaves_nothing(tmp_path: Path) -> None:
    fill = Filler()
    fill.error = RuntimeError("any")
    with pytest.raises(RuntimeError):
        load(DiskCache(tmp_path), "a", fill)
    assert entries(tmp_path) == []


def test_what_others_left(tmp_path: Path) -> None:
    """Temporaries without an owner go; a damaged entry is downloaded again."""
    fill = Filler()
    load(DiskCache(tmp_path), "a", fill)
    stale = tmp_path / FOLDER / "0123456789abcdef.tmp"
    stale.mkdir()
    (stale / WEIGHTS).write_bytes(b"half")
    (entry,) = (path for path in entries(tmp_path) if path != stale)
    (entry / CONFIG).unlink()
    load(DiskCache(tmp_path), "a", fill)
    assert fill.calls == 2 and entries(tmp_path) == [entry]


def test_converted_files_share_the_budget(tmp_path: Path) -> None:
    """The least recently used goes, whether it was downloaded or converted. Other files are not touched."""
    folder = tmp_path / "converted"
    folder.mkdir()
    cache = DiskCache(tmp_path, 4 * SIZE, files="converted")

    def convert(name: str, used: float) -> Path:
        path = folder / f"{name}.safetensors"
        path.write_bytes(b"x" * SIZE)
        os.utime(path, (used, 0))
        cache.grew(SIZE)
        return path

    (folder / "other").write_bytes(b"x" * SIZE)
    fill, now = Filler(), time.time()
    load(cache, "a", fill)
    old, new = convert("old", now - 10), convert("new", now + 10)
    load(cache, "b", fill)
    assert old.exists() and len(entries(tmp_path)) == 2
    load(cache, "c", fill)
    assert not old.exists() and new.exists()
    convert("newer", now + 20)
    convert("newest", now + 30)
    convert("last", now + 40)
    assert len(list(folder.glob("*.safetensors"))) == 4, "the downloads went first"
    assert not entries(tmp_path) and (folder / "other").exists()
    convert("large", now - 1).write_bytes(b"x" * 9 * SIZE)
    cache.grew(8 * SIZE)
    assert not (folder / "large.safetensors").exists()
