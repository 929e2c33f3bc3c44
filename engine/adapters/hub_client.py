"""The HTTP client that huggingface_hub uses, with bounds on what one answer may bring.

The hub's own tools read an answer to its end, however long that takes and however large it grows. Here the bytes and
the seconds of every answer are limited by whoever asks (`bounded`); beyond them the connection is closed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from huggingface_hub import set_client_factory
from huggingface_hub.utils import _http

if TYPE_CHECKING:
    import httpx2 as httpx
else:  # huggingface_hub 2 has it from httpx2, huggingface_hub 1 from httpx
    httpx = getattr(_http, "httpx2", None) or _http.httpx

MOST_PACKED = (
    1000  # so many times its bytes an answer may have when it is unpacked: deflate's limit is 1032
)
PACKED_BYTES = 64 << 10  # of an answer that is packed although that was not asked for

TRANSPORT_ERROR: type[Exception] = httpx.HTTPError


class TooMuch(Exception):
    """The answer brings more bytes than it may."""


class TooSlow(OSError):
    """The answer takes longer than it may."""


@dataclass(frozen=True, slots=True)
class _Bounds:
    max_bytes: int
    end_by: float  # time.monotonic()


_BOUNDS: ContextVar[_Bounds | None] = ContextVar("bounds", default=None)


@contextmanager
def bounded(max_bytes: int, seconds: float) -> Iterator[None]:
    """Every answer within the block. Reading beyond the bounds raises TooMuch or TooSlow."""
    token = _BOUNDS.set(_Bounds(max_bytes, time.monotonic() + seconds))
    try:
        yield
    finally:
        _BOUNDS.reset(token)


def install() -> None:
    """Makes huggingface_hub use this client, in this process."""
    set_client_factory(_client)


def _client() -> httpx.Client:
    client = _http.default_client_factory()
    client.headers["Accept-Encoding"] = "identity"
    client.event_hooks["response"].append(_bound)
    return client


def _bound(response: httpx.Response) -> None:
    bounds = _BOUNDS.get()
    if bounds is None or not isinstance(response.stream, httpx.SyncByteStream):
        return
    if response.headers.get("content-encoding", "identity") != "identity":
        bounds = replace(bounds, max_bytes=max(PACKED_BYTES, bounds.max_bytes // MOST_PACKED))
    response.stream = _Bounded(response.stream, bounds)


class _Bounded(httpx.SyncByteStream):
    """A body as it arrives, before it is unpacked."""

    def __init__(self, stream: httpx.SyncByteStream, bounds: _Bounds) -> None:
        self._stream = stream
        self._bounds = bounds

    def __iter__(self) -> Iterator[bytes]:
        received = 0
        for piece in self._stream:
            received += len(piece)
            if received > self._bounds.max_bytes:
                raise TooMuch(f"it sends more than {self._bounds.max_bytes} bytes")
            if time.monotonic() > self._bounds.end_by:
                raise TooSlow("it sends too slowly")
            yield piece

    def close(self) -> None:
        self._stream.close()
