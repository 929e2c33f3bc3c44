"""One streamed request: it is sent and timed, and its events are counted without parsing them.

An event of the stream is a token (on OpenAI's route, an event with text). If the last event has a `usage`, its number
of tokens is used instead, because some servers send several tokens in one event. When one read brings several events,
the gap before the first is measured and the others have a gap of 0: that is when the client has them.
"""

from __future__ import annotations

import json
import random
import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from engine.bench.load.traffic import LoadRequest
from engine.errors import EngineDead, LoraxError

if TYPE_CHECKING:
    import aiohttp

FALLBACK_VOCAB = 10_000  # if the server does not report one: every current model has more
FIRST_TOKEN_ID = 100  # lower ids are often special tokens
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
    """The outcome of one request. Times are of time.perf_counter()."""

    request: LoadRequest
    due: float  # when it should be sent
    counted: bool  # False during the warm-up
    times: array[float] = field(default_factory=lambda: array("d"))  # of every event with a token
    end: float = 0.0  # time of the last byte, or of the failure
    tokens: int = 0
    error: str | None = None  # kind of failure
    reason: str | None = None  # the server's message, if it sent one

    @property
    def first(self) -> float | None:
        return self.times[0] if self.times else None


@dataclass(frozen=True, slots=True)
class Server:
    """The server at an address."""

    url: str
    api: Literal["openai", "native"]
    model: str  # name of its base model
    vocab: int
    adapter_source: str | None = None
    tokens_per_word: float = 1.0
    about: dict[str, str] = field(default_factory=dict)
    max_total_tokens: int | None = None  # of prompt and output, if the server reports it


async def _json(session: aiohttp.ClientSession, method: str, url: str, body: Any = None) -> Any:
    """The answer, or None if there is no such route. Raises EngineDead if the server does not answer."""
    import aiohttp

    try:
        async with session.request(method, url, json=body) as response:
            return json.loads(await response.text()) if response.status < 400 else None
    except (aiohttp.ClientConnectionError, TimeoutError) as error:
        raise EngineDead(
            f"no server responds at {url}: {error}", hint="start one with: lorax launch"
        ) from None
    except aiohttp.InvalidURL:
        raise EngineDead(f"{url!r} is not a valid URL", field="url") from None
    except ValueError:
        return None


async def find_server(
    session: aiohttp.ClientSession,
    url: str,
    api: Literal["openai", "native"],
    adapter_source: str | None,
) -> Server:
    """Asks the server for its model: /info of LoRAX, else /v1/models. Raises EngineDead or LoraxError."""
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
            raise LoraxError(f"{url} has no /tokenize", field="api", hint="use --api openai")
        ratio = len(spans) / MOST_WORDS
    vocab = int(info.get("vocab_size") or FALLBACK_VOCAB)
    return Server(
        url=url,
        api=api,
        model=str(model),
        vocab=vocab,
        adapter_source=adapter_source,
        tokens_per_word=ratio,
        about=about,
        max_total_tokens=info.get("max_total_tokens"),
    )


def body_of(server: Server, request: LoadRequest, chooser: random.Random) -> dict[str, Any]:
    """The JSON body: greedy, a random prompt, generation continues after an end-of-sequence token."""
    if server.api == "native":
        number = max(1, round(request.input_tokens / server.tokens_per_word))
        parameters: dict[str, Any] = {
            "max_new_tokens": request.output_tokens,
            "ignore_eos_token": True,
        }
        if request.adapter is not None:
            parameters["adapter_id"] = request.adapter
            if server.adapter_source:
                parameters["adapter_source"] = server.adapter_source
        return {"inputs": " ".join(chooser.choices(WORDS, k=number)), "parameters": parameters}
    low = FIRST_TOKEN_ID if server.vocab > 2 * FIRST_TOKEN_ID else 0
    body = {
        "model": request.adapter or server.model,
        "prompt": chooser.choices(range(low, server.vocab), k=request.input_tokens),
        "max_tokens": request.output_tokens,
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
    """Counts the events of a stream, in bytes as they arrive."""

    __slots__ = ("_native", "_rest", "done", "error", "reason", "usage")

    def __init__(self, native: bool) -> None:
        self._native = native
        self._rest = b""
        self.done = False
        self.error: str | None = None
        self.reason: str | None = None
        self.usage: int | None = None  # tokens that the server reports

    def feed(self, data: bytes) -> int:
        """The number of events with a token in `data`."""
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
            return 0  # the finish reason, or part of a character
        if b'"choices":[]' in text or b'"choices": []' in text:
            usage = json.loads(text).get("usage") or {}
            self.usage = usage.get("completion_tokens", self.usage)
            return 0
        return 1


def failure_of(body: bytes, where: str) -> tuple[str, str | None]:
    """(kind, reason) of an error body, ours or OpenAI's: `where` with the machine-readable type, and the message."""
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
    """Sends one request and fills its record. A failure goes into the record too."""
    import aiohttp

    route = "/generate_stream" if server.api == "native" else "/v1/completions"
    headers = {"Content-Type": "application/json"}
    counter, now = Counter(server.api == "native"), time.perf_counter
    try:
        async with session.post(server.url + route, data=body, headers=headers) as response:
            if response.status >= 400:
                body = await response.read()
                record.error, record.reason = failure_of(body, str(response.status))
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
        record.error = "connection lost"
    except aiohttp.ClientError as error:
        record.error = f"connection {type(error).__name__}"
    finally:
        record.end = now()
        record.tokens = len(record.times) if counter.usage is None else counter.usage
