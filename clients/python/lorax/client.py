"""The clients: one pool of connections each, and a method for every call of `lorax.calls` and `lorax.adapters`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from lorax import calls
from lorax.adapters import Adapters, AsyncAdapters
from lorax.calls import Call, error_of
from lorax.errors import LoraxError, ServerTimeoutError, ServerUnreachableError, ValidationError
from lorax.events import StreamReader
from lorax.methods import asks, async_asks, async_streams, streams
from lorax.types import MergedAdapters, StreamResponse

__all__ = ["AsyncClient", "Client", "MergedAdapters"]

CONNECT_SECONDS = 10.0
RETRY_SECONDS = 0.25  # before the first retry; each later one waits twice as long
# The server limits how much runs at once, and says so; a client that waited for a connection would time out.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=100)
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout)  # the server has seen nothing of the request

T = TypeVar("T")


class _Base:
    """What both clients have: where the server is, and what every request to it carries."""

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str] | None,
        cookies: Mapping[str, str] | None,
        timeout: float | None,
        max_session_retries: int,
        api_key: str | None,
    ) -> None:
        self.base_url = base_url
        self.headers = headers
        self.cookies = cookies
        self.timeout = timeout
        self.max_session_retries = max_session_retries
        self._api_key = api_key
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise ValidationError(f"`base_url` is not a URL: {error}") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ValidationError("`base_url` must begin with http:// or https:// and a host")
        self._shown = f"{url.scheme}://{url.netloc.decode()}{url.path}"  # without a password

    def _options(self, call: Call[Any]) -> dict[str, Any]:
        """Of httpx's `build_request`."""
        headers = httpx.Headers(self.headers)
        headers.update(call.headers)
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        connect = CONNECT_SECONDS if self.timeout is None else min(CONNECT_SECONDS, self.timeout)
        return {
            "method": call.method,
            "url": self.base_url.rstrip("/") + call.path if call.path else self.base_url,
            "json": call.body,
            "params": call.query or None,
            "headers": headers,
            "timeout": httpx.Timeout(self.timeout, connect=connect),
        }

    def _delays(self) -> Iterator[float | None]:
        """Seconds to wait after each attempt to connect that fails; None after the last one."""
        for attempt in range(self.max_session_retries):
            yield RETRY_SECONDS * 2**attempt
        yield None

    @contextmanager
    def _typed(self) -> Iterator[None]:
        """Raises httpx's errors as ours."""
        try:
            yield
        except (httpx.LocalProtocolError, ValueError):
            # Their messages show the value, which may be a key.
            raise ValidationError(
                "the request or a header has characters or numbers that cannot be sent"
            ) from None
        except httpx.ConnectTimeout as error:
            raise ServerTimeoutError(f"{self._shown} did not accept the connection") from error
        except httpx.TimeoutException as error:
            raise ServerTimeoutError(
                f"{self._shown} sent nothing for {self.timeout} s; set a longer `timeout`"
            ) from error
        except (httpx.TransportError, httpx.DecodingError, httpx.InvalidURL) as error:
            raise ServerUnreachableError(
                f"the connection to {self._shown} failed: {str(error) or type(error).__name__}"
            ) from error


class Client(_Base):
    """A server. Threads may share a client.

    >>> with Client("http://127.0.0.1:3000") as client:
    ...     client.generate("Hello", adapter_id="pirate").generated_text
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str] | None = None,
        cookies: Mapping[str, str] | None = None,
        timeout: float | None = 60,
        session: httpx.Client | None = None,
        max_session_retries: int = 2,
        *,
        api_key: str | None = None,
    ) -> None:
        """`timeout`: seconds without a byte from the server; None: no limit. A connection has 10 s at most.

        `session`: used instead of connections of its own, and not closed. `max_session_retries`: attempts to connect
        again, after the first. `api_key`: the server's; the `api_token` of calls is for private adapters.
        """
        super().__init__(base_url, headers, cookies, timeout, max_session_retries, api_key)
        if session is not None and not isinstance(session, httpx.Client):
            raise ValidationError("`session` must be an httpx.Client")
        self.session = session or httpx.Client(limits=LIMITS)
        self.session.cookies.update(dict(cookies or {}))
        self._owns_session = session is None
        self.adapters = Adapters(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        if self._owns_session:
            self.session.close()

    generate = asks(calls.generate)
    generate_stream = streams(calls.generate_stream)
    embed = asks(calls.embed)
    classify = asks(calls.classify)
    classify_batch = asks(calls.classify_batch)
    tokenize = asks(calls.tokenize)
    info = asks(calls.info)
    metrics = asks(calls.metrics)

    def health(self) -> bool:
        """Whether the server responds and its engine is alive."""
        try:
            self._ask(calls.health())
        except LoraxError:
            return False
        return True

    def _ask(self, call: Call[T]) -> T:
        with self._typed():
            response = self._send(call)
        if not response.is_success:
            raise error_of(response)
        return call.read(response)

    def _stream(self, call: Call[None]) -> Generator[StreamResponse, None, None]:
        with self._typed():
            response = self._send(call, stream=True)
            try:
                if not response.is_success:
                    response.read()
                    raise error_of(response)
                reader = StreamReader(response.status_code, dict(response.headers))
                for chunk in response.iter_bytes():
                    yield from reader.feed(chunk)
                reader.end()
            finally:
                response.close()

    def _send(self, call: Call[Any], *, stream: bool = False) -> httpx.Response:
        for delay in self._delays():
            request = self.session.build_request(**self._options(call))
            try:
                return self.session.send(request, stream=stream)
            except NOT_SENT:
                if delay is None:
                    raise
            time.sleep(delay)
        raise AssertionError("the last attempt returns or raises")


class AsyncClient(_Base):
    """A server, for asyncio.

    Each event loop has connections of its own, so one client may serve several calls of `asyncio.run`.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str] | None = None,
        cookies: Mapping[str, str] | None = None,
        timeout: float | None = 60,
        session: httpx.AsyncClient | None = None,
        max_session_retries: int = 2,
        *,
        api_key: str | None = None,
    ) -> None:
        """As `Client`."""
        super().__init__(base_url, headers, cookies, timeout, max_session_retries, api_key)
        if session is not None and not isinstance(session, httpx.AsyncClient):
            raise ValidationError("`session` must be an httpx.AsyncClient")
        if session is not None:
            session.cookies.update(dict(cookies or {}))
        self.session = session
        self._owns_session = session is None
        self._loop: asyncio.AbstractEventLoop | None = None  # of our own session
        self.adapters = AsyncAdapters(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections of this event loop."""
        if self._owns_session and self.session and self._loop is asyncio.get_running_loop():
            await self.session.aclose()

    generate = async_asks(calls.generate)
    generate_stream = async_streams(calls.generate_stream)
    embed = async_asks(calls.embed)
    classify = async_asks(calls.classify)
    classify_batch = async_asks(calls.classify_batch)
    tokenize = async_asks(calls.tokenize)
    info = async_asks(calls.info)
    metrics = async_asks(calls.metrics)

    async def health(self) -> bool:
        """Whether the server responds and its engine is alive."""
        try:
            await self._ask(calls.health())
        except LoraxError:
            return False
        return True

    def _pool(self) -> httpx.AsyncClient:
        """The session of the running event loop: connections of another cannot be used."""
        loop = asyncio.get_running_loop()
        if self.session is None or (self._owns_session and self._loop is not loop):
            self.session, self._loop = httpx.AsyncClient(limits=LIMITS), loop
            self.session.cookies.update(dict(self.cookies or {}))
        return self.session

    async def _ask(self, call: Call[T]) -> T:
        with self._typed():
            response = await self._send(call)
        if not response.is_success:
            raise error_of(response)
        return call.read(response)

    async def _stream(self, call: Call[None]) -> AsyncGenerator[StreamResponse, None]:
        with self._typed():
            response = await self._send(call, stream=True)
            try:
                if not response.is_success:
                    await response.aread()
                    raise error_of(response)
                reader = StreamReader(response.status_code, dict(response.headers))
                async for chunk in response.aiter_bytes():
                    for answer in reader.feed(chunk):
                        yield answer
                reader.end()
            finally:
                await response.aclose()

    async def _send(self, call: Call[Any], *, stream: bool = False) -> httpx.Response:
        for delay in self._delays():
            session = self._pool()
            request = session.build_request(**self._options(call))
            try:
                return await session.send(request, stream=stream)
            except NOT_SENT:
                if delay is None:
                    raise
            await asyncio.sleep(delay)
        raise AssertionError("the last attempt returns or raises")
