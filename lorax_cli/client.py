"""HTTP client of a running server, on the routes of LoRAX.

`Client` is an async context manager around one aiohttp session. It raises the classes of `engine.errors` by their
machine-readable type, so exit codes are the same for an engine in this process and for a server.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, urlencode

from engine.errors import EngineDead, LoraxError, error_classes

if TYPE_CHECKING:
    import aiohttp

CONNECT_SECONDS = 10.0
MAX_LINE = 1 << 22  # bytes of one event: the last one repeats the whole text


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream: the text of a token. The last event also has the whole text."""

    text: str
    special: bool = False
    generated_text: str | None = None
    details: Mapping[str, Any] | None = None


def error_from(body: Any, status: int, url: str) -> LoraxError:
    """The typed error of an `{error, error_type}` body."""
    if not isinstance(body, dict):
        return LoraxError(f"{url} returned status {status}")
    if isinstance(body.get("error"), dict):  # the OpenAI routes
        body = {"error": body["error"].get("message"), "error_type": body["error"].get("type")}
    by_type = {cls.error_type: cls for cls in error_classes().values()}
    cls = by_type.get(str(body.get("error_type")), LoraxError)
    return cls(str(body.get("error") or f"{url} returned status {status}"), hint=body.get("hint"))


class Client:
    """One server."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        connector: aiohttp.BaseConnector | None = None,
        api_key: str | None = None,
    ) -> None:
        """`token`: for private adapters. `api_key`: the server's, if it has keys."""
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key or token}"} if api_key or token else {}
        if api_key and token:
            self._headers["x-adapter-token"] = token
        self._connector = connector
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS)
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=timeout,
            connector=self._connector,
            read_bufsize=MAX_LINE,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def health(self) -> bool:
        """Whether the server responds and its engine is alive."""
        try:
            await self._ask("GET", "/health")
        except LoraxError:
            return False
        return True

    async def info(self) -> dict[str, Any]:
        answer = await self._ask("GET", "/info")
        return dict(answer or {})

    async def adapters(self, **query: str | int | None) -> dict[str, Any]:
        """`{adapters, total}`: the entries that a query selects, by state, tier, prefix and limit."""
        given = {name: value for name, value in query.items() if value is not None}
        return dict(await self._ask("GET", f"/adapters?{urlencode(given)}"))

    async def adapter(self, name: str, source: str | None = None) -> dict[str, Any]:
        """The entry of one adapter."""
        query = f"?{urlencode({'source': source})}" if source else ""
        return dict(await self._ask("GET", f"/adapters/{quote(name)}{query}"))

    async def manage(self, what: str, name: str, **fields: Any) -> dict[str, Any]:
        """The answer of POST /adapters/`what`."""
        return dict(await self._ask("POST", f"/adapters/{what}", {"adapter_id": name, **fields}))

    async def cache(self) -> dict[str, Any]:
        """The tiers of adapters, and counters."""
        return dict(await self._ask("GET", "/cache"))

    async def generate(self, prompt: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """`{generated_text, details}` of one prompt."""
        body = {"inputs": prompt, "parameters": dict(parameters)}
        return dict(await self._ask("POST", "/generate", body))

    async def stream(self, prompt: str, parameters: Mapping[str, Any]) -> AsyncIterator[Event]:
        """The events of one prompt as they arrive. Raises an error of the stream."""
        body = {"inputs": prompt, "parameters": dict(parameters)}
        async with self._open("POST", "/generate_stream", body) as response:
            await self._check(response)
            async for line in response.content:
                if not line.startswith(b"data:"):
                    continue
                data = json.loads(line[5:])
                if "error" in data:
                    raise error_from(data, response.status, self.url)
                token = data.get("token") or {}
                yield Event(
                    text=token.get("text") or "",
                    special=bool(token.get("special")),
                    generated_text=data.get("generated_text"),
                    details=data.get("details"),
                )

    def _open(self, method: str, path: str, body: Any = None) -> _Opened:
        assert self._session is not None, "use `async with`"
        return _Opened(self._session.request(method, self.url + path, json=body), self.url)

    async def _ask(self, method: str, path: str, body: Any = None) -> Any:
        async with self._open(method, path, body) as response:
            await self._check(response)
            text = await response.text()
            return json.loads(text) if text else None

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        if response.status < 400:
            return
        text = await response.text()
        try:
            body = json.loads(text)
        except ValueError:
            body = None
        raise error_from(body, response.status, self.url)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server, and what opens it and private adapters."""

    url: str
    token: str | None = field(default=None, repr=False)
    api_key: str | None = field(default=None, repr=False)

    def client(self) -> Client:
        return Client(self.url, self.token, api_key=self.api_key)


class _Opened:
    """A request. If the server cannot be reached, it raises an EngineDead with the URL."""

    def __init__(self, request: Any, url: str) -> None:
        self._request = request
        self._url = url

    async def __aenter__(self) -> aiohttp.ClientResponse:
        import aiohttp

        try:
            response: aiohttp.ClientResponse = await self._request.__aenter__()
        except (aiohttp.ClientConnectionError, TimeoutError) as error:
            raise EngineDead(
                f"no server responds at {self._url}: {error}", hint="start one with: lorax launch"
            ) from None
        except aiohttp.InvalidURL:
            raise EngineDead(f"{self._url!r} is not a valid URL", field="url") from None
        return response

    async def __aexit__(self, *failure: Any) -> None:
        import aiohttp

        await self._request.__aexit__(*failure)
        if isinstance(failure[1], aiohttp.ClientPayloadError | aiohttp.ClientConnectionError):
            raise EngineDead(f"{self._url} closed the connection during its answer") from None
