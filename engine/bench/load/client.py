"""One streamed request: sent, timed, and its events counted without reading what is in them.

A token is an event of the stream (on OpenAI's route, one that brings text). When a server tells in its last event how
many tokens there were (`usage`), that is the number of tokens, because some send several in one event. The gap before
the events of one read counts once, and once 0 for every further event of it: that is when the client has them.
"""

from __future__ import annotations

import json
import random
import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from engine.bench.load.workload import Asked
from engine.errors import EngineDead, LoraxError

if TYPE_CHECKING:
    import aiohttp

FALLBACK_VOCAB = 10_000  # of a server that does not tell: every model that is served today has more
FIRST_TOKEN_ID = 100  # below are often special tokens
CONNECT_SECONDS = 10.0
MOST_WORDS = 400
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "you",
    "that",
    "it",
    "he",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
    "be",
    "this",
    "from",
    "have",
    "or",
    "by",
]


@dataclass(slots=True)
class Record:
    """What came of one request. Times are of time.perf_counter()."""

    asked: Asked
    due: float  # when it was to be sent
    counted: bool  # not of the warm-up
    times: array[float] = field(default_factory=lambda: array("d"))  # of every event with a token
    end: float = 0.0  # of the last byte, or of the failure
    tokens: int = 0
    error: str | None = None  # kind of failure
    reason: str | None = None  # in words, where the server has some

    @property
    def first(self) -> float | None:
        return self.times[0] if self.times else None


@dataclass(frozen=True, slots=True)
class Server:
    """What is known of the server at an address."""

    url: str
    api: Literal["openai", "native"]
    model: str  # name of its base model
    vocab: int
    adapter_source: str | None = None
    tokens_per_word: float = 1.0
    about: dict[str, str] = field(default_factory=dict)
    room: int | None = None  # tokens of prompt and answer together, if it tells


async def _json(session: aiohttp.ClientSession, method: str, url: str, body: Any = None) -> Any:
    """The answer, or None if there is no such route. Raises EngineDead if nobody answers."""
    import aiohttp

    try:
        async with session.request(method, url, json=body) as response:
            return json.loads(await response.text()) if response.status < 400 else None
    except (aiohttp.ClientConnectionError, TimeoutError) as error:
        raise EngineDead(
            f"no server answers at {url}: {error}", hint="start one with: lorax launch"
        ) from None
    except aiohttp.InvalidURL:
        raise EngineDead(f"{url!r} is not an address", field="url") from None
    except ValueError:
        return None


async def look_at(
    session: aiohttp.ClientSession,
    url: str,
    api: Literal["openai", "native"],
    adapter_source: str | None,
) -> Server:
    """Finds out what a server serves: /info of ours, /v1/models of any. Raises EngineDead or LoraxError."""
    url = url.rstrip("/")
    info = await _json(session, "GET", f"{url}/info") or {}
    models = await _json(session, "GET", f"{url}/v1/models") or {}
    listed = [one["id"] for one in models.get("data", []) if isinstance(one, dict) and "id" in one]
    model = info.get("model_id") or (listed[0] if listed else None)
    if model is None:
        raise LoraxError(f"{url} has neither /info nor /v1/models", field="url")
    about = {
        name: str(info[name])
        for name in ("version", "model_dtype", "device_name")
        if info.get(name) is not None
    }
    ratio = 1.0
    if api == "native":
        text = " ".join(WORDS[index % len(WORDS)] for index in range(MOST_WORDS))
        spans = await _json(session, "POST", f"{url}/tokenize", {"inputs": text})
        if not spans:
            raise LoraxError(
                f"{url} has no /tokenize", field="api", hint="measure it with --api openai"
            )
        ratio = len(spans) / MOST_WORDS
    vocab = int(info.get("vocab_size") or FALLBACK_VOCAB)
    room = info.get("max_total_tokens")
    return Server(url, api, str(model), vocab, adapter_source, ratio, about, room)


def body_of(server: Server, asked: Asked, chooser: random.Random) -> dict[str, Any]:
    """The request's JSON: greedy, with a random prompt, going on after an end-of-sequence token."""
    if server.api == "native":
        number = max(1, round(asked.input_tokens / server.tokens_per_word))
        parameters: dict[str, Any] = {
            "max_new_tokens": asked.output_tokens,
            "ignore_eos_token": True,
        }
        if asked.adapter is not None:
            parameters["adapter_id"] = asked.adapter
            if server.adapter_source:
                parameters["adapter_source"] = server.adapter_source
        return {"inputs": " ".join(chooser.choices(WORDS, k=number)), "parameters": parameters}
    low = FIRST_TOKEN_ID if server.vocab > 2 * FIRST_TOKEN_ID else 0
    body = {
        "model": asked.adapter or server.model,
        "prompt": chooser.choices(range(low, server.vocab), k=asked.input_tokens),
        "max_tokens": asked.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,  # vLLM's and SGLang's name
        "ignore_eos_token": True,  # ours
    }
    if server.adapter_source:
        body["adapter_source"] = server.adapter_source
    return body


class Counter:
    """Counts the events of a stream, fed with bytes as they come."""

    __slots__ = ("_native", "_rest", "done", "error", "reason", "usage")

    def __init__(self, native: bool) -> None:
        self._native = native
        self._rest = b""
        self.done = False
        self.error: str | None = None
        self.reason: str | None = None
        self.usage: int | None = None  # tokens, as the server says

    def feed(self, data: bytes) -> int:
        """Events with a token in `data`."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        events = 0
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            events += self._event(line[5:].strip())
        return events

    def _event(self, text: bytes) -> int:
        if text == b"[DONE]":
            self.done = True
            return 0
        if text.startswith((b'{"error"', b'{"object":"error"')):
            self.error, self.reason = failure_of(text, "stream")
            return 0
        if self._native:
            return 1
        if b'"text":""' in text or b'"text": ""' in text:
            return 0  # the reason of the end, or part of a character
        if b'"choices":[]' in text or b'"choices": []' in text:
            usage = json.loads(text).get("usage") or {}
            self.usage = usage.get("completion_tokens", self.usage)
            return 0
        return 1


def failure_of(body: bytes, where: str) -> tuple[str, str | None]:
    """(kind, reason) of an error's body, ours or OpenAI's: `where` with the machine-readable type, and the words."""
    try:
        value = json.loads(body)
    except ValueError:
        return where, None
    if isinstance(value, dict) and isinstance(value.get("error"), dict):
        value = value["error"]
    if not isinstance(value, dict):
        return where, None
    found = value.get("code") or value.get("error_type") or value.get("type")
    reason = value.get("message") or value.get("error")
    return f"{where} {found}" if found else where, None if reason is None else str(reason)


async def stream(
    session: aiohttp.ClientSession, server: Server, record: Record, body: bytes
) -> None:
    """Sends one request and fills its record; a failure is in the record too."""
    import aiohttp

    route = "/generate_stream" if server.api == "native" else "/v1/completions"
    headers = {"Content-Type": "application/json"}
    counter, now = Counter(server.api == "native"), time.perf_counter
    try:
        async with session.post(server.url + route, data=body, headers=headers) as response:
            if response.status >= 400:
                said = await response.read()
                record.error, record.reason = failure_of(said, str(response.status))
            else:
                read = response.content.readany
                while data := await read():
                    at = now()
                    for _ in range(counter.feed(data)):
                        record.times.append(at)
                record.error, record.reason = counter.error, counter.reason
                if not record.times and record.error is None:
                    record.error = "no tokens"
    except TimeoutError:
        record.error = "timeout"
    except aiohttp.ClientPayloadError:
        record.error = "broken off"
    except aiohttp.ClientError as error:
        record.error = f"connection {type(error).__name__}"
    finally:
        record.end = now()
        record.tokens = len(record.times) if counter.usage is None else counter.usage
