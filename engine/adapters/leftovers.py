"""What processes that were killed have left in the cache: partial files and folders without an owner.

Each is locked while its process lives, so a lock that can be taken shows that the owner is gone.
"""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import suppress
from pathlib import Path

from engine.adapters import disk_cache
from engine.sandbox import convert

TENANT_FOLDER = "lorax-tenants"  # below it, each tenant has a hub cache
_PARTIAL = re.compile(r"(?P<etag>.+)\.[0-9a-f]{8}\.incomplete")


def remove_leftovers(cache: Path) -> None:
    """Removes unfinished downloads and conversions. Errors are ignored: the next start tries again."""
    with suppress(OSError):
        disk_cache.remove_stale(cache / disk_cache.FOLDER)
        convert.remove_stale(cache / convert.FOLDER)
        for hub in (cache, *(cache / TENANT_FOLDER).glob("*")):
            _remove_partial_files(hub)


def _remove_partial_files(hub: Path) -> None:
    """Removes partial files of huggingface_hub, which removes none itself."""
    for path in hub.glob("models--*/blobs/*.incomplete"):
        if match := _PARTIAL.fullmatch(path.name):
            repository = path.parents[1].name
            _remove_unless_locked(path, hub / ".locks" / repository / f"{match['etag']}.lock")


def _remove_unless_locked(path: Path, lock: Path) -> None:
    with suppress(OSError):  # locked, or already removed
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            path.unlink()
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(fd)
