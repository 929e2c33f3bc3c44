"""What processes that were killed have left in the cache: partial files and folders without an owner.

Each is locked while its process lives, so a lock that can be taken shows that the owner is gone.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from engine.adapters import disk_cache
from engine.adapters.hub_files import remove_unfinished
from engine.sandbox import convert


def remove_leftovers(cache: Path) -> None:
    """Removes unfinished downloads and conversions. Errors are ignored: the next start tries again."""
    with suppress(OSError):
        disk_cache.remove_stale(cache / disk_cache.FOLDER)
        convert.remove_stale(cache / convert.FOLDER)
        remove_unfinished(cache)
