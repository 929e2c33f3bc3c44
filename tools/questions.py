"""The same question on four routes, whole or streamed, and its answer in one form."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """A greedy request. `adapter` None: the base model."""

    route: str  # one of ROUTES
    adapter: str | None
    prompt: str
    max_tokens: int

    def path(self, stream: bool) -> str:
        return "/generate_stream" if stream and self.route == "/generate" else self.route

    def body(self, stream: bool) -> Json:
        if self.route == "/generate":
            parameters: Json = {"max_new_tokens": self.max_tokens, "details": True}
            if self.adapter:
                parameters["adapter_id"] = self.adapter
            return {"inputs": self.prompt, "parameters": parameters}
        body: Json = {
            "model": self.adapter or "base",
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": stream,
        }
        if stream and self.route != "/v1/messages":
            body["stream_options"] = {"include_usage": True}
        if self.route == "/v1/completions":
            return body | {"prompt": self.prompt}
        return body | {"messages": [{"role": "user", "content": self.prompt}]}

    def whole(self, body: Json) -> Answer:
        """The answer in the body of a request that is not streamed."""
        return _WHOLE[self.route](body)

    def streamed(self, data: bytes) -> Answer:
        """The answer in a complete stream. Raises ValueError if it has an error or is not complete."""
        lines = [line[5:].strip() for line in data.split(b"\n") if line.startswith(b"data:")]
        return _STREAMED[self.route](lines)


class Answer(NamedTuple):
    """What an answer says, whatever its form."""

    text: str
    finish: str  # in the words of the route
    input_tokens: int
    output_tokens: int


def _native(body: Json) -> Answer:
    details = body["details"]
    counts = details["prompt_tokens"], details["generated_tokens"]
    return Answer(body["generated_text"], details["finish_reason"], *counts)


def _openai(body: Json) -> Answer:
    (choice,) = body["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    usage = body["usage"]
    counts = usage["prompt_tokens"], usage["completion_tokens"]
    return Answer(text or "", choice["finish_reason"], *counts)


def _anthropic(body: Json) -> Answer:
    usage = body["usage"]
    text = "".join(block["text"] for block in body["content"])
    read = usage["input_tokens"] + (usage.get("cache_read_input_tokens") or 0)
    return Answer(text, body["stop_reason"], read, usage["output_tokens"])


def _native_stream(lines: list[bytes]) -> Answer:
    events = _events(lines)
    _require(bool(events) and events[-1]["generated_text"] is not None, "no last event", lines)
    text = "".join(one["token"]["text"] for one in events if not one["token"]["special"])
    _require(text == events[-1]["generated_text"], "tokens make another text", lines)
    counted = events[-1]["details"]["generated_tokens"]
    _require(len(events) == counted, "as many events as tokens", lines)
    return _native(events[-1])


def _openai_stream(lines: list[bytes]) -> Answer:
    _require(lines[-1:] == [b"[DONE]"] and lines.count(b"[DONE]") == 1, "one [DONE]", lines)
    *chunks, last = _events(lines[:-1])
    _require(last["choices"] == [], "usage in a last chunk", lines)
    choices = [one["choices"][0] for one in chunks]
    finishes = [one["finish_reason"] for one in choices if one["finish_reason"]]
    _require(len(finishes) == 1 and choices[-1]["finish_reason"] is not None, "one finish", lines)
    text = "".join(_piece(one) for one in choices)
    return _openai(
        {"choices": [{"text": text, "finish_reason": finishes[0]}], "usage": last["usage"]}
    )


def _piece(choice: Json) -> str:
    return choice["text"] if "text" in choice else choice["delta"].get("content") or ""


def _anthropic_stream(lines: list[bytes]) -> Answer:
    events = _events(lines)
    kinds = [one["type"] for one in events]
    _require(kinds[-1:] == ["message_stop"], "message_stop at the end", lines)
    _require(kinds[:1] == ["message_start"] and kinds.count("message_delta") == 1, "order", lines)
    deltas = [one["delta"] for one in events if one["type"] == "content_block_delta"]
    text = "".join(one["text"] for one in deltas)
    last = next(one for one in events if one["type"] == "message_delta")
    usage = events[0]["message"]["usage"] | {"output_tokens": last["usage"]["output_tokens"]}
    content = [{"text": text}]
    return _anthropic(
        {"content": content, "stop_reason": last["delta"]["stop_reason"], "usage": usage}
    )


def _events(lines: list[bytes]) -> list[Json]:
    events = [json.loads(line) for line in lines]
    for event in events:
        if event.get("error") is not None:
            raise ValueError(f"an error in the stream: {event}")
    return events


def _require(holds: bool, what: str, lines: list[bytes]) -> None:
    if not holds:
        raise ValueError(f"not so: {what}; the stream ends with {lines[-2:]}")


_WHOLE: dict[str, Callable[[Json], Answer]] = {
    "/generate": _native,
    "/v1/chat/completions": _openai,
    "/v1/completions": _openai,
    "/v1/messages": _anthropic,
}
_STREAMED: dict[str, Callable[[list[bytes]], Answer]] = {
    "/generate": _native_stream,
    "/v1/chat/completions": _openai_stream,
    "/v1/completions": _openai_stream,
    "/v1/messages": _anthropic_stream,
}
ROUTES = tuple(_WHOLE)
