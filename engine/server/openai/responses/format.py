"""Answers and typed events of responses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from engine.errors import LoraxError
from engine.logs import printable
from engine.server.blocks import Block, Blocks, Step
from engine.server.events import Event, FinishedChoice
from engine.server.formats import Answer
from engine.server.generation import Generation
from engine.server.openai.format import error_body
from engine.server.openai.responses.schemas import ResponsesBody
from engine.server.text import Text

Json = dict[str, Any]

DELTAS = {
    "text": "response.output_text",
    "reasoning": "response.reasoning_text",
    "call": "response.function_call_arguments",
}


def responses_error_body(error: LoraxError) -> Json:
    """As of chat completions, with this route's name for the messages."""
    body = error_body(error)
    if body["error"]["param"] == "messages":
        body["error"]["param"] = "input"
    return body


class ResponsesFormatter:
    """Of /v1/responses. See `Formatter`."""

    def __init__(self, body: ResponsesBody, model: str, generation: Generation, text: Text) -> None:
        self._body = body
        self._model = model
        self._generation = generation
        self._blocks = Blocks(generation.reading.reader())
        self._created = int(time.time())
        self._number = 0  # of the next event

    # -- a stream

    def events(self, events: list[Event]) -> bytes:
        made: list[bytes] = []
        if not self._number:
            for name in ("created", "in_progress"):
                made.append(self._event(f"response.{name}", response=self._response("in_progress")))
        for event in events:
            for step in self._blocks.add(event):
                made += self._step(step)
        return b"".join(made)

    def end(self) -> bytes:
        status = self._status()
        return self._event(f"response.{status}", response=self._response(status))

    def failure(self, error: LoraxError) -> bytes:
        failed = {"code": "server_error", "message": printable(str(error))}
        response = self._response("failed") | {"error": failed}
        return self._event("response.failed", response=response)

    def _event(self, name: str, **fields: Any) -> bytes:
        data = msgspec.json.encode({"type": name, **fields, "sequence_number": self._number})
        self._number += 1
        return b"event: %s\ndata: %s\n\n" % (name.encode(), data)

    def _step(self, step: Step) -> list[bytes]:
        block, name = step.block, DELTAS[step.block.kind]
        is_call = block.kind == "call"
        place: Json = {"item_id": self._id(block), "output_index": block.index}
        if not is_call:
            place["content_index"] = 0
        logprobs: Json = {"logprobs": []} if block.kind == "text" else {}
        if step.does == "more":
            return [self._event(f"{name}.delta", **place, delta=step.text, **logprobs)]
        begins = step.does == "open"
        parts, verb = [], "added" if begins else "done"
        if not begins:
            text = {"arguments" if is_call else "text": block.text}
            parts.append(self._event(f"{name}.done", **place, **text, **logprobs))
        item_event = partial(self._event, f"response.output_item.{verb}", output_index=block.index)
        if begins:
            parts.append(item_event(item=self._item(block, begins=True)))
        if not is_call:
            part = _part(block, "" if begins else block.text)
            parts.append(self._event(f"response.content_part.{verb}", **place, part=part))
        if not begins:
            parts.append(item_event(item=self._item(block)))
        return parts

    # -- one answer

    def answer(self, choices: Sequence[FinishedChoice]) -> Answer:
        self._blocks.add_all(choices[0])
        return Answer(self._response(self._status()))

    # -- parts

    def _status(self) -> str:
        finish = self._blocks.finish
        assert finish is not None, "the generation has finished"
        return "incomplete" if finish.reason == "length" else "completed"

    def _id(self, block: Block) -> str:
        kind = {"text": "msg", "reasoning": "rs", "call": "fc"}[block.kind]
        return f"{kind}_{self._generation.id.removeprefix('resp_')}_{block.index}"

    def _item(self, block: Block, *, begins: bool = False) -> Json:
        """An item of the output; without its content where it `begins`."""
        finish = self._blocks.finish
        cut = finish is not None and finish.reason == "length" and block is self._blocks.made[-1]
        status = "in_progress" if begins else "incomplete" if cut else "completed"
        shared = {"id": self._id(block), "status": status}
        if block.kind == "call":
            assert block.call is not None, "it is a call"
            names = {"call_id": block.call.id, "name": block.call.name}
            arguments = "" if begins else block.text
            return {"type": "function_call", **shared, **names, "arguments": arguments}
        content = [] if begins else [_part(block, block.text)]
        if block.kind == "reasoning":
            return {"type": "reasoning", **shared, "summary": [], "content": content}
        return {"type": "message", **shared, "role": "assistant", "content": content}

    def _response(self, status: str) -> Json:
        body, ended = self._body, status in ("completed", "incomplete")
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        effort = body.reasoning.effort if body.reasoning else None
        return {
            "id": self._generation.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model,
            "output": [self._item(block) for block in self._blocks.made] if ended else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": effort, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            "metadata": body.metadata or {},
        }

    def _usage(self) -> Json:
        prompt, answer = self._generation.prompt_tokens, self._generation.generated_tokens
        cached, thought = self._generation.cached_tokens, self._blocks.reader.reasoning_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": prompt + answer,
        }


def _part(block: Block, text: str) -> Json:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
