"""Sends fuzzed bodies to a server over HTTP, and says what is wrong with its answers.

Every answer is JSON in the format of its route, none is the server's fault, and nothing stays open. What a strict
reader of JSON refuses, the server refuses too.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote

import aiohttp
from yarl import URL

from tests.server.fuzzed import Case

WORKERS = 8
ANSWER_S = 60.0
REFERENCE = {"inputs": "Hello", "parameters": {"max_new_tokens": 12, "seed": 7}}
TEXT = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")  # answers of success
ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")


class Round:
    """Bodies sent to one server. `faults`: what was wrong, with the cases."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.faults: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.kinds: Counter[str] = Counter()  # types of errors

    async def send(self, given: Iterable[Case]) -> None:
        """Sends all, several at a time. Before and after, a reference request has the same answer."""
        rest = iter(given)
        connector = aiohttp.TCPConnector(limit=WORKERS)
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            before = await self._reference(session)
            await asyncio.gather(*(self._work(session, rest) for _ in range(WORKERS)))
            after = await self._reference(session)
            if before != after:
                self.faults.append(f"the reference request was answered {before}, then {after}")
            await self._check_idle(session)

    async def _work(self, session: aiohttp.ClientSession, rest: Iterator[Case]) -> None:
        for one in rest:
            try:
                problem = await self._ask(session, one)
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = f"no answer: {error!r}"
            if problem:
                self.faults.append(f"{problem}\n  {one}")

    async def _ask(self, session: aiohttp.ClientSession, one: Case) -> str | None:
        url = URL(self._url + one.path, encoded=True)
        async with session.request(
            one.method, url, data=one.body, headers=one.headers, auto_decompress=False
        ) as response:
            body = await response.read()
            self.statuses[response.status] += 1
            return self._problem(one, response.status, response.content_type, body)

    def _problem(self, one: Case, status: int, content_type: str, body: bytes) -> str | None:
        """What is wrong with an answer; None: nothing."""
        shown = f"{status} {content_type} {body[:1000]!r}"
        if status >= 500:
            return f"an error of the server: {shown}"
        if content_type == "text/event-stream" and status == 200:
            return _stream_problem(body)
        if content_type == "text/plain" and status == 200 and one.path in TEXT:
            return None
        if content_type != "application/json":
            return f"not JSON: {shown}"
        try:
            answer = json.loads(body, parse_constant=_refuse)
        except ValueError as error:
            return f"{error}: {shown}"
        if status < 300:
            return None if one.is_json is not False else f"no JSON was accepted: {shown}"
        kind = error_type(one.path, answer)
        self.kinds[f"{status} {kind}"] += 1
        return f"not the format of the route's errors: {shown}" if kind is None else None

    async def _reference(self, session: aiohttp.ClientSession) -> str:
        async with session.post(f"{self._url}/generate", json=REFERENCE) as response:
            return await response.text()

    async def _check_idle(self, session: aiohttp.ClientSession) -> None:
        """Ends all pins, then waits until nothing runs and no adapter is in use."""
        async with session.get(f"{self._url}/adapters/aliases") as response:
            aliases = (await response.json())["aliases"]
        for one in aliases:  # an adapter may be pinned under a name that is now an alias
            name = quote(one["name"], safe="")
            await session.delete(URL(f"{self._url}/adapters/aliases/{name}", encoded=True))
        for one in await self._adapters(session):
            pin = {"adapter_id": one["id"], "pinned": False}
            await session.post(f"{self._url}/adapters/pin", json=pin)
        deadline = time.monotonic() + ANSWER_S
        while True:
            async with session.get(f"{self._url}/info") as response:
                info = await response.json()
            left = {name: info[name] for name in ("waiting", "running")}
            left["uses"] = sum(one["requests"] for one in await self._adapters(session))
            if not any(left.values()):
                return
            if time.monotonic() > deadline:
                self.faults.append(f"left over: {left}")
                return
            await asyncio.sleep(0.1)

    async def _adapters(self, session: aiohttp.ClientSession) -> list[dict[str, Any]]:
        async with session.get(f"{self._url}/adapters") as response:
            return list((await response.json())["adapters"])


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def error_type(path: str, answer: Any) -> str | None:
    """The type of an error in the format of its route; None: it has another form."""
    if not isinstance(answer, dict):
        return None
    if not path.startswith("/v1/"):
        known = {"error", "error_type", "field"}
        texts = all(isinstance(value, str) for value in answer.values())
        right = texts and known >= answer.keys() >= known - {"field"}
        return answer["error_type"] if right else None
    error, fields = answer.get("error"), {"message", "type", "param", "code"}
    if path in ANTHROPIC:
        fields -= {"code"}
        if answer.keys() != {"type", "error"} or answer["type"] != "error":
            return None
    elif answer.keys() != {"error"}:
        return None
    if not isinstance(error, dict) or error.keys() != fields:
        return None
    return str(error.get("code", error["type"]))


def _stream_problem(body: bytes) -> str | None:
    """Events are JSON, or [DONE]; an error in them is none of the server's."""
    for line in body.decode().split("\n"):
        name, _, data = line.partition(":")
        if name != "data" or data.strip() == "[DONE]":
            continue
        try:
            event = json.loads(data, parse_constant=_refuse)
        except ValueError as error:
            return f"{error} in a stream: {line[:500]}"
        if isinstance(event, dict) and (
            event.get("error") or event.get("type") == "response.failed"
        ):
            return f"an error in a stream: {line[:500]}"
    return None
