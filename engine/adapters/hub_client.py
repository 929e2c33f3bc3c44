"""The HTTP client of huggingface_hub, with limits on the size and duration of an answer.

huggingface_hub reads every answer to its end. Here the caller sets the limits with `bounded`; an answer that exceeds
them is aborted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from huggingface_hub import set_client_factory
from huggingface_hub.utils import _http
from huggingface_hub.utils.tqdm import tqdm

if TYPE_CHECKING:
    import httpx2 as httpx
else:  # huggingface_hub 2 has it from httpx2, huggingface_hub 1 from httpx
    httpx = getattr(_http, "httpx2", None) or _http.httpx

MAX_EXPANSION = 1000  # largest ratio of decompressed to received bytes; deflate reaches 1032
MAX_CUTS = (
    5  # answers that end early; huggingface_hub itself continues for ever if a few bytes came
)
MIN_COMPRESSED_BYTES = 64 << 10  # lowest limit of an answer that is compressed against our request

TRANSPORT_ERROR: type[Exception] = httpx.HTTPError


class TooMuch(Exception):
    """The answer has more bytes than allowed."""


class TooSlow(OSError):
    """The answer takes longer than allowed."""


class CutOff(OSError):
    """The server has closed the connection in the middle of too many answers."""


@dataclass(frozen=True, slots=True)
class _Bounds:
    max_bytes: int
    end_by: float  # time.monotonic()
    cuts: list[Exception] = field(default_factory=list)  # answers of the block that ended early


_BOUNDS: ContextVar[_Bounds | None] = ContextVar("bounds", default=None)


@contextmanager
def bounded(max_bytes: int, seconds: float) -> Iterator[None]:
    """Limits every answer within the block. Reading beyond a limit raises TooMuch, TooSlow or CutOff."""
    token = _BOUNDS.set(_Bounds(max_bytes, time.monotonic() + seconds))
    try:
        yield
    finally:
        _BOUNDS.reset(token)


def install() -> None:
    """Makes huggingface_hub use this client in this process."""
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
        bounds = replace(
            bounds, max_bytes=max(MIN_COMPRESSED_BYTES, bounds.max_bytes // MAX_EXPANSION)
        )
    response.stream = _Bounded(response.stream, bounds)


class _Bounded(httpx.SyncByteStream):
    """A body as received, before decompression."""

    def __init__(self, stream: httpx.SyncByteStream, bounds: _Bounds) -> None:
        self._stream = stream
        self._bounds = bounds

    def __iter__(self) -> Iterator[bytes]:
        bounds, received = self._bounds, 0
        try:
            for piece in self._stream:
                received += len(piece)
                if received > bounds.max_bytes:
                    raise TooMuch(f"the limit is {bounds.max_bytes} bytes")
                if time.monotonic() > bounds.end_by:
                    raise TooSlow("the answer took too long")
                yield piece
        except httpx.RemoteProtocolError as error:
            bounds.cuts.append(error)
            if len(bounds.cuts) > MAX_CUTS:
                raise CutOff(f"the answer ended early {len(bounds.cuts)} times: {error}") from None
            raise

    def close(self) -> None:
        self._stream.close()


def reporter(progress: Callable[[int, int], None]) -> type[tqdm]:
    """A progress bar for huggingface_hub that calls `progress` and draws nothing."""

    class Reporter(tqdm):
        monitor_interval = 0  # no thread that redraws

        def __init__(self, *args: Any, **fields: Any) -> None:
            super().__init__(*args, **{**fields, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            progress(self.n, int(self.total or 0))

    return Reporter


class Refusal(Exception):
    """A permanent failure: another try gives the same answer."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error
