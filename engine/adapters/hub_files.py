"""The files that huggingface_hub downloads: sizes, hashes, and what killed processes left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from engine.adapters.checksums import Checksum
from engine.adapters.sources import INDEX_NAME, shard_names
from engine.errors import AdapterError, AdapterLoadFailed
from engine.files import OpenFile, remedy

TENANT_FOLDER = "lorax-tenants"  # below it, each tenant has a hub cache
MAX_KNOWN = 4096  # files that are known to be intact
_UNFINISHED = "*--*/blobs/*.????????.incomplete"  # a name of one download; none continues it


def remove_unfinished(cache: Path) -> None:
    """Removes the unfinished files of downloads that have ended, from a hub cache and the tenants' below it.

    huggingface_hub holds a lock per file while it downloads. Where the file system has no locks, nothing is removed.
    """
    for hub in (cache, *(cache / TENANT_FOLDER).glob("*")):
        for path in hub.glob(_UNFINISHED):
            etag, repository = path.name.partition(".")[0], path.parents[1].name
            lock = hub / ".locks" / repository / f"{etag}.lock"
            with contextlib.suppress(OSError), _locked(lock):
                path.unlink()


def disk_error(error: OSError) -> AdapterLoadFailed:
    """The error for a failure of the cache's disk."""
    return AdapterLoadFailed(
        f"the hub's cache (--huggingface-hub-cache) cannot be used: {error.strerror}",
        hint=remedy(error),
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Raises OSError if another process holds the lock. A lock that does not exist is free."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


class Integrity:
    """Compares files with the hashes that the hub listed, each file once. Thread-safe.

    huggingface_hub names a file in its cache by the hub's etag: the SHA-256 of a large file, Git's SHA-1 of a small
    one. It does not compare them. A file under another name is not checked.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()  # fingerprints
        self._lock = threading.Lock()

    def holds(self, path: Path) -> bool:
        """Whether a file of the cache is what its name says. Raises OSError."""
        real = path.resolve()
        hashes = _hashes(real.name)
        if not hashes:
            return True
        with OpenFile(real) as file:
            with self._lock:
                if file.fingerprint in self._known:
                    return True
            if not any(one.matches(file.fd, file.size) for one in hashes):
                return False
            with self._lock:
                if len(self._known) >= MAX_KNOWN:
                    self._known.clear()
                self._known.add(file.fingerprint)
        return True


def _hashes(name: str) -> tuple[Checksum, ...]:
    """What a file's name says of its contents. Some mirrors of the hub use the plain SHA-1."""
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return (Checksum("sha256", bytes.fromhex(name)),)
    if re.fullmatch(r"[0-9a-f]{40}", name):
        digest = bytes.fromhex(name)
        return (Checksum("git blob", digest), Checksum("sha1", digest))
    return ()


def discard(path: Path) -> None:
    """Removes a file from the cache, so that it is downloaded again. Raises OSError."""
    real = path.resolve()
    path.unlink(missing_ok=True)
    real.unlink(missing_ok=True)


def is_complete(folder: Path, weights: str) -> bool:
    """Whether every shard of a downloaded copy is there."""
    if not weights.endswith(INDEX_NAME):
        return True
    try:
        with OpenFile(folder / INDEX_NAME) as index:
            return all((folder / name).exists() for name in shard_names(index))
    except (OSError, AdapterError):
        return False


def num_bytes(weights: str, sizes: Mapping[str, int]) -> int:
    """Bytes of the weights. Of a sharded adapter: of all safetensors files in the index's folder."""
    if not weights.endswith(INDEX_NAME):
        return sizes[weights]
    folder = weights.removesuffix(INDEX_NAME)
    return sum(
        size
        for name, size in sizes.items()
        if name.endswith(".safetensors") and name.rpartition("/")[0] == folder.rstrip("/")
    )
