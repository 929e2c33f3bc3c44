"""The files that huggingface_hub downloads: what killed processes left."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

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
