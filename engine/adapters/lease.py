"""What a request holds while it needs an adapter in host memory."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from engine.messages import AdapterImageRef


class Lease:
    """An adapter in host memory, kept there until `release`. A context manager."""

    def __init__(
        self,
        image: AdapterImageRef,
        cache_salt: bytes,
        release: Callable[[], None],
        fresh_s: float = 0.0,
    ) -> None:
        self.image = image
        self.fresh_s = fresh_s  # for which its version counts as the newest, and the caller as allowed to have it
        self.cache_salt = cache_salt  # not empty for adapters that not everybody may see
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Idempotent."""
        if self._release is not None:
            release, self._release = self._release, None
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
