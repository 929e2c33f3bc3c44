"""The files that huggingface_hub downloads: their hashes, and what killed processes left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from engine.adapters.checksums import Checksum
from engine.files import OpenFile

MAX_KNOWN = 4096  # files that are known to be intact
_UNFINISHED = "*--*/blobs/*.????????.incomplete"  # a name of one download; none continues it


def remove_unfinished(cache: Path) -> None:
    """Removes the unfinished files of downloads that have ended, from a cache of huggingface_hub.

    huggingface_hub holds a lock per file while it downloads. Where the file system has no locks, nothing is removed.
    """
    for path in cache.glob(_UNFINISHED):
        etag, repository = path.name.partition(".")[0], path.parents[1].name
        lock = cache / ".locks" / repository / f"{etag}.lock"
        with contextlib.suppress(OSError), _locked(lock):
            path.unlink()


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
