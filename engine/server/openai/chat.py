"""Answers and streams of chat completions: text, reasoning and tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from engine.server.events import Event, FinishedChoice, PromptLogprobs
from engine.server.generation import Generation
from engine.server.openai import logprobs
from engine.server.openai.format import REASONS, GrowingChoice, OpenAIFormatter
from engine.server.openai.schemas import (
    AnswerMessage,
    CallDelta,
    ChatBody,
    ChatChoice,
    ChatChunkChoice,
    Delta,
    FunctionDelta,
    MadeCall,
    MadeFunction,
    OpenAIUsage,
    ReasoningTokens,
)
from engine.server.reading import AnswerReader, Said
from engine.server.text import Text
from engine.server.tools.machine import CallBegin, Content, Part, Reasoning


class ChatFormatter(OpenAIFormatter[ChatBody]):
    """Of /v1/chat/completions."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, body: ChatBody, model: str, generation: Generation, text: Text) -> None:
        super().__init__(body, model, generation, text)
        self._readers = [generation.reading.reader() for _ in range(generation.num_choices)]
        self._with_reasoning = body.include_reasoning is not False

    @property
    def _with_logprobs(self) -> bool:
        return bool(self._body.logprobs)

    def _chunks(self, choice: GrowingChoice, event: Event, delta: str) -> list[Any]:
        made: list[Any] = []
        if not choice.begun:
            choice.begun = True
            made.append(ChatChunkChoice(choice.index, Delta("assistant", "")))
        reader, ready = self._readers[choice.index], choice.ready()
        parts = [] if isinstance(event, PromptLogprobs) else reader.add(event)
        grown = [found for part in parts if (found := self._delta(part, reader)) is not None]
        if ready and not grown:
            grown.append(Delta(content=""))
        chunks = [ChatChunkChoice(choice.index, one) for one in grown]
        if chunks and choice.log is not None:
            chunks[0].logprobs = logprobs.chat(self._text, ready)
        made += chunks
        if choice.finish is not None:
            reason = _reason(choice.finish.reason, reader.said)
            made.append(ChatChunkChoice(choice.index, Delta(), None, reason))
        return made

    def _delta(self, part: Part, reader: AnswerReader) -> Delta | None:
        """None: the client does not want it."""
        if isinstance(part, Content):
            return Delta(content=part.text)
        if isinstance(part, Reasoning):
            if not self._with_reasoning:
                return None
            return Delta(reasoning_content=part.text, reasoning=part.text)
        if isinstance(part, CallBegin):
            call = reader.said.calls[part.index]
            begun = FunctionDelta(part.name, "")
            return Delta(tool_calls=[CallDelta(part.index, begun, call.id, "function")])
        return Delta(tool_calls=[CallDelta(part.index, FunctionDelta(arguments=part.text))])

    def _whole(self, choices: Sequence[FinishedChoice]) -> list[Any]:
        made: list[ChatChoice] = []
        for index, finished in enumerate(choices):
            choice, finish, reader = self._grown(finished), finished.finish, self._readers[index]
            for token in finished.tokens:
                reader.add(token)
            reader.add(finish)
            found = logprobs.chat(self._text, choice.ready()) if choice.log is not None else None
            reason = _reason(finish.reason, reader.said)
            made.append(ChatChoice(index, self._message(reader.said), found, reason))
        return made

    def _message(self, said: Said) -> AnswerMessage:
        reasoning = said.reasoning if said.reasoning and self._with_reasoning else msgspec.UNSET
        calls = [MadeCall(call.id, MadeFunction(call.name, call.arguments)) for call in said.calls]
        without_text = not said.content and (said.calls or said.reasoning)
        return AnswerMessage(
            role="assistant",
            content=None if without_text else said.content,
            reasoning_content=reasoning,
            reasoning=reasoning,
            tool_calls=calls or msgspec.UNSET,
        )

    def _usage(self, answer: int) -> OpenAIUsage:
        usage = super()._usage(answer)
        tokens = sum(reader.reasoning_tokens for reader in self._readers)
        usage.completion_tokens_details = ReasoningTokens(tokens)
        return usage


def _reason(reason: str, said: Said) -> str:
    """`finish_reason`."""
    found = REASONS[reason]
    return "tool_calls" if said.calls and found == "stop" else found
