"""A lease: keeps an adapter's image in host memory while a request needs it."""

from __future__ import annotations

from collections.abc import Callable

from engine.files import Closable
from engine.messages import AdapterImageRef, AdapterText, Tier


class Lease(Closable):
    """An adapter's image, kept in place until `release`. A context manager."""

    def __init__(
        self,
        image: AdapterImageRef,
        cache_salt: bytes,
        release: Callable[[], None],
        fresh_s: float = 0.0,
        text: AdapterText | None = None,
        tier: Tier = "host",
    ) -> None:
        self.image = image
        self.text = text  # None: the base model's
        self.tier: Tier = tier  # where the adapter was
        self.fresh_s = fresh_s  # seconds until version and permission must be checked again
        self.cache_salt = cache_salt  # empty for public adapters
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Ends the lease. May be called again."""
        if self._release is not None:
            release, self._release = self._release, None
            release()

    def close(self) -> None:
        """The end of `with`."""
        self.release()
