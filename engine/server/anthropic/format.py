"""Answers, streams and errors of Anthropic's messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from engine.errors import LoraxError
from engine.logs import printable
from engine.server.anthropic.schemas import OutBlock, OutMessage, OutUsage
from engine.server.blocks import Block, Blocks, Step
from engine.server.events import Event, FinishedChoice
from engine.server.formats import Answer
from engine.server.generation import Generation
from engine.server.text import Text

REASONS = {"length": "max_tokens", "eos_token": "end_turn", "stop_sequence": "stop_sequence"}
ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


def error_body(error: LoraxError) -> dict[str, Any]:
    """`{"type": "error", "error": {type, message, param}}`; `param` is ours."""
    kind = ERROR_TYPES.get(
        error.status, "invalid_request_error" if error.status < 500 else "api_error"
    )
    told = {"type": kind, "message": printable(str(error)), "param": error.field}
    return {"type": "error", "error": told}


class MessagesFormatter:
    """Of /v1/messages. See `Formatter`."""

    def __init__(self, model: str, generation: Generation, text: Text) -> None:
        self._model = model
        self._generation = generation
        self._blocks = Blocks(generation.reading.reader())
        self._begun = False

    def events(self, events: list[Event]) -> bytes:
        made: list[bytes] = []
        if not self._begun:
            self._begun = True
            usage = OutUsage(self._generation.prompt_tokens, 0)
            made.append(_event("message_start", message=self._message([], usage)))
        for event in events:
            made += [_sent(step) for step in self._blocks.add(event)]
        return b"".join(made)

    def end(self) -> bytes:
        reason, stop = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": stop}
        return _event("message_delta", delta=delta, usage=self._usage()) + _event("message_stop")

    def failure(self, error: LoraxError) -> bytes:
        return b"event: error\ndata: " + msgspec.json.encode(error_body(error)) + b"\n\n"

    def answer(self, choices: Sequence[FinishedChoice]) -> Answer:
        blocks = self._blocks.add_all(choices[0])
        message = self._message([_block(one, whole=True) for one in blocks], self._usage())
        message.stop_reason, message.stop_sequence = self._stop()
        return Answer(message)

    def _message(self, content: list[OutBlock], usage: OutUsage) -> OutMessage:
        return OutMessage(self._generation.id, self._model, content, None, None, usage)

    def _stop(self) -> tuple[str, str | None]:
        """`stop_reason` and `stop_sequence`."""
        finish = self._blocks.finish
        assert finish is not None, "the generation has finished"
        reason = REASONS[finish.reason]
        if self._blocks.reader.said.calls and reason != "max_tokens":
            return "tool_use", None
        return reason, finish.stop

    def _usage(self) -> OutUsage:
        """Cached tokens are counted apart from the others."""
        cached = self._generation.cached_tokens
        return OutUsage(
            input_tokens=self._generation.prompt_tokens - cached,
            output_tokens=self._generation.generated_tokens,
            cache_read_input_tokens=cached,
        )


def _event(name: str, **fields: Any) -> bytes:
    data = msgspec.json.encode({"type": name, **fields})
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data)


def _sent(step: Step) -> bytes:
    index = step.block.index
    if step.does == "open":
        block = _block(step.block, whole=False)
        return _event("content_block_start", index=index, content_block=block)
    if step.does == "close":
        return _event("content_block_stop", index=index)
    kind, field = {
        "text": ("text_delta", "text"),
        "reasoning": ("thinking_delta", "thinking"),
        "call": ("input_json_delta", "partial_json"),
    }[step.block.kind]
    return _event("content_block_delta", index=index, delta={"type": kind, field: step.text})


def _block(block: Block, *, whole: bool) -> OutBlock:
    """A block of an answer, or with nothing in it, as a stream begins it."""
    text = block.text if whole else ""
    if block.kind == "text":
        return OutBlock("text", text=text)
    if block.kind == "reasoning":
        return OutBlock("thinking", thinking=text, signature="")
    assert block.call is not None, "it is a call"
    return OutBlock("tool_use", id=block.call.id, name=block.call.name, input=_input(text))


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call; none if they were cut off."""
    try:
        found = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
