"""What the sources over a network share: retries, digests of what a server lists, and errors."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterable

from engine.errors import RENAME, AdapterLoadFailed


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


def first_line(error: BaseException) -> str:
    """The first line of an error of a library, or its class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
