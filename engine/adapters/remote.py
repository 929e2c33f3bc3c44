"""What the sources over a network share: retries, digests of what a server lists, and errors."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable

from engine.errors import RENAME, AdapterIncompatible, AdapterLoadFailed
from engine.files import OpenFile
from engine.names import shown

DOWNLOADS = 2  # of a file whose checksum differs
Check = Callable[[OpenFile], None]  # raises AdapterIncompatible for a configuration that is refused


def is_transient(status: int) -> bool:
    """Whether another try may succeed after an HTTP status (RFC 9110, RFC 6585, RFC 8470)."""
    return status in (408, 425, 429) or status >= 500


def pause(attempt: int, backoff_s: float) -> None:
    """Waits after the failed try number `attempt`, which counts from 1: doubling, with jitter."""
    time.sleep(backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))


def revision_of(files: Iterable[tuple[str, str, int]]) -> str:
    """The revision of an adapter's files: a digest of (name, stamp, bytes). A stamp changes with the contents."""
    text = "".join(f"{name}\n{stamp}\n{size}\n" for name, stamp, size in files)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def changed(where: str) -> AdapterLoadFailed:
    """The error for files that were replaced between `resolve` and the end of `fetch`."""
    return AdapterLoadFailed(f"{where} changed during loading", hint=RENAME)


def corrupt(where: str, algorithm: str) -> AdapterLoadFailed:
    """The error for a file that was downloaded twice and differs from what its source lists."""
    return AdapterLoadFailed(
        f"{where} is corrupt: its {algorithm} is not the one that its source lists",
        hint="upload the file again, or check the network's proxies",
    )


def check_rank(config: OpenFile, max_rank: int) -> None:
    """Raises AdapterIncompatible if a configuration names a rank above the limit. What else is wrong is not said here:
    the files are checked when they are complete."""
    try:
        fields = json.loads(config.read().decode("utf-8-sig"))
        patterns = fields.get("rank_pattern") or {}
        ranks = {"r": fields.get("r"), **{f"rank_pattern {key}": patterns[key] for key in patterns}}
    except (OSError, ValueError, RecursionError, AttributeError, TypeError):
        return
    for name, rank in ranks.items():
        if isinstance(rank, int) and rank > max_rank:
            raise AdapterIncompatible(
                f"{config.name}: {shown(name)} is {rank}; the limit is {max_rank}",
                field="r",
                hint=f"start the server with --max-adapter-rank {rank}",
            )


def first_line(error: BaseException) -> str:
    """The first line of an error of a library, or its class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
