"""Answers, streams and errors in OpenAI's formats."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

import engine
from engine.errors import AdapterError, AdapterNotFound, LoraxError
from engine.logs import printable
from engine.lora.recipe import FIELD
from engine.server.events import Event, Finish, FinishedChoice, PromptLogprobs, Token
from engine.server.formats import Answer
from engine.server.generation import Generation
from engine.server.openai import logprobs
from engine.server.openai.schemas import (
    CachedTokens,
    CompletionBody,
    CompletionChoice,
    CompletionLogprobs,
    OpenAIAnswer,
    OpenAIBody,
    OpenAIUsage,
)
from engine.server.prompts import Prompt
from engine.server.text import Text

FINGERPRINT = f"lorax-{engine.__version__}"
REASONS = {"length": "length", "eos_token": "stop", "stop_sequence": "stop"}
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

B = TypeVar("B", bound=OpenAIBody)


def error_body(error: LoraxError) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`."""
    status = error.status
    merged = (error.field or "").startswith(FIELD)
    adapter = error.field == "adapter_id" or (isinstance(error, AdapterError) and not merged)
    return {
        "error": {
            "message": printable(str(error)),
            "type": ERROR_TYPES.get(
                status, "invalid_request_error" if status < 500 else "server_error"
            ),
            "param": "model" if adapter else error.field,
            "code": "model_not_found" if isinstance(error, AdapterNotFound) else error.error_type,
        }
    }


def status_of(error: LoraxError) -> int:
    """OpenAI's API answers 400 for what others call 422."""
    return 400 if error.status == 422 else error.status


@dataclass(slots=True)
class GrowingChoice:
    """One choice as its events arrive."""

    index: int
    log: logprobs.TokenLog | None  # None: the client wants no log-probabilities
    prompt: PromptLogprobs | None = None
    finish: Finish | None = None
    begun: bool = False  # a chunk was sent
    num_tokens: int = 0  # generated so far

    def add(self, event: Event) -> str:
        """The text that `event` brought."""
        if isinstance(event, Token):
            self.num_tokens += 1
            if self.log is not None:
                self.log.push(event)
            return event.delta
        if isinstance(event, PromptLogprobs):
            self.prompt = event
            return ""
        self.finish = event
        if self.log is not None:
            self.log.end(event)
        return event.delta

    def ready(self) -> list[logprobs.LoggedToken]:
        """Tokens whose text has come out since the last call."""
        return self.log.take() if self.log is not None else []


class OpenAIFormatter(ABC, Generic[B]):
    """See `Formatter`. What chat completions and completions have in common."""

    object: str  # of a whole answer
    chunk_object: str  # of a chunk of a stream

    def __init__(self, body: B, model: str, generation: Generation, text: Text) -> None:
        self._body = body
        self._model = model
        self._generation = generation
        self._text = text
        self._created = int(time.time())
        options = body.stream_options
        self._include_usage = options is not None and bool(options.include_usage)
        self._usage_in_chunks = options is not None and bool(options.continuous_usage_stats)
        self._encode = msgspec.json.Encoder().encode
        self._choices = [self._begin(index) for index in range(generation.num_choices)]

    @property
    @abstractmethod
    def _with_logprobs(self) -> bool: ...

    @abstractmethod
    def _chunks(self, choice: GrowingChoice, event: Event, delta: str) -> list[Any]:
        """The chunks that `event` of `choice` makes; it brought `delta`."""

    @abstractmethod
    def _whole(self, choices: Sequence[FinishedChoice]) -> list[Any]:
        """The choices of an answer."""

    # -- a stream

    def events(self, events: list[Event]) -> bytes:
        usage: Any = None if self._include_usage else msgspec.UNSET
        lines: list[bytes] = []
        for event in events:
            choice = self._choices[event.choice]
            for chunk in self._chunks(choice, event, choice.add(event)):
                if self._usage_in_chunks:
                    usage = self._usage(sum(one.num_tokens for one in self._choices))
                answer = self._answer(self.chunk_object, [chunk], usage)
                lines += b"data: ", self._encode(answer), b"\n\n"
        return b"".join(lines)

    def end(self) -> bytes:
        last = b""
        if self._include_usage:
            answer = self._answer(
                self.chunk_object, [], self._usage(self._generation.generated_tokens)
            )
            last = b"data: " + self._encode(answer) + b"\n\n"
        return last + b"data: [DONE]\n\n"

    def failure(self, error: LoraxError) -> bytes:
        return b"data: " + self._encode(error_body(error)) + b"\n\n"

    # -- one answer

    def answer(self, choices: Sequence[FinishedChoice]) -> Answer:
        whole = self._whole(choices)
        usage = self._usage(self._generation.generated_tokens)
        return Answer(self._answer(self.object, whole, usage))

    # -- parts

    def _begin(self, index: int) -> GrowingChoice:
        return GrowingChoice(index, logprobs.TokenLog() if self._with_logprobs else None)

    def _grown(self, finished: FinishedChoice) -> GrowingChoice:
        """The choice with all its events."""
        choice = self._begin(finished.finish.choice)
        if choice.log is not None:
            for token in finished.tokens:
                choice.log.push(token)
            choice.log.end(finished.finish)
        choice.prompt = finished.prompt
        return choice

    def _answer(self, object: str, choices: list[Any], usage: Any) -> OpenAIAnswer:
        return OpenAIAnswer(
            id=self._generation.id,
            object=object,
            created=self._created,
            model=self._model,
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=usage,
        )

    def _usage(self, answer: int) -> OpenAIUsage:
        """`answer`: generated tokens."""
        prompt = self._generation.prompt_tokens
        cached = CachedTokens(self._generation.cached_tokens)
        return OpenAIUsage(prompt, answer, prompt + answer, cached)


class CompletionFormatter(OpenAIFormatter[CompletionBody]):
    """Of /v1/completions. `n` choices of each prompt are answered with."""

    object = chunk_object = "text_completion"

    def __init__(
        self,
        body: CompletionBody,
        model: str,
        prompts: Sequence[Prompt],
        generation: Generation,
        text: Text,
    ) -> None:
        super().__init__(body, model, generation, text)
        self._prompts = prompts
        self._n = 1 if body.n is None else body.n

    @property
    def _with_logprobs(self) -> bool:
        return self._body.logprobs is not None

    def _chunks(self, choice: GrowingChoice, event: Event, delta: str) -> list[Any]:
        finish = choice.finish
        if not choice.begun and self._body.echo and (delta or finish):
            delta = self._echo(choice.index) + delta
        if not delta and finish is None:
            return []
        begins, choice.begun = not choice.begun, True
        reason = REASONS[finish.reason] if finish else None
        found = self._logprobs(choice, begins=begins)
        return [CompletionChoice(choice.index, delta, found, reason)]

    def _whole(self, choices: Sequence[FinishedChoice]) -> list[Any]:
        made: list[CompletionChoice] = []
        for finished in _best(choices, self._generation.parameters.best_of, self._n):
            choice, finish = self._grown(finished), finished.finish
            found = self._logprobs(choice, begins=True)
            text = self._echo(choice.index) + finish.text
            made.append(CompletionChoice(len(made), text, found, REASONS[finish.reason]))
        return made

    def _echo(self, index: int) -> str:
        """The text of the choice's prompt, with `echo`."""
        if not self._body.echo:
            return ""
        prompt = self._prompts[index // self._generation.parameters.best_of]
        if isinstance(prompt, str) and not self._generation.parameters.truncate:
            return prompt
        return self._text.decode(self._generation.prompt_of(index))

    def _logprobs(self, choice: GrowingChoice, *, begins: bool) -> CompletionLogprobs | None:
        """Of the tokens that are ready, and of an echoed prompt if the choice's text `begins` here."""
        if choice.log is None:
            return None
        prompt = self._generation.prompt_of(choice.index) if begins and self._body.echo else []
        return logprobs.completion(
            self._text,
            choice.ready(),
            self._echo(choice.index),
            prompt,
            choice.prompt if prompt else None,
        )


def _best(choices: Sequence[FinishedChoice], best_of: int, n: int) -> list[FinishedChoice]:
    """For each prompt, the `n` of its `best_of` choices with the highest mean log-probability."""
    kept: list[FinishedChoice] = []
    for start in range(0, len(choices), best_of):
        group = choices[start : start + best_of]
        if best_of > n:
            group = sorted(group, key=lambda one: one.finish.mean_logprob, reverse=True)[:n]
        kept += group
    return kept
