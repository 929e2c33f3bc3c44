"""Answers, streams and errors in LoRAX's own format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from engine.errors import LoraxError
from engine.logs import printable
from engine.server.events import Event, Finish, FinishedChoice, Token
from engine.server.formats import Answer
from engine.server.generation import Generation
from engine.server.native.schemas import (
    AlternativeToken,
    BestOfSequence,
    Details,
    GenerateAnswer,
    GenerateParameters,
    OutputToken,
    PrefillToken,
    StreamAnswer,
    StreamDetails,
)
from engine.server.text import Text


def error_body(error: LoraxError) -> dict[str, Any]:
    """`{error, error_type, field?}`."""
    body: dict[str, Any] = {"error": printable(str(error)), "error_type": error.error_type}
    return body | ({"field": error.field} if error.field else {})


class NativeFormatter:
    """See `Formatter`. `before` is put before the text; with `in_list` an answer is a list of one."""

    def __init__(
        self,
        given: GenerateParameters,
        generation: Generation,
        text: Text,
        *,
        before: str,
        in_list: bool,
    ) -> None:
        self._given = given
        self._generation = generation
        self._text = text
        self._before = before
        self._in_list = in_list
        self._encode = msgspec.json.Encoder().encode

    # -- a stream

    def events(self, events: list[Event]) -> bytes:
        """The event of the last token has the whole text and the details."""
        answers: list[StreamAnswer] = []
        for event in events:
            if isinstance(event, Token):
                answers.append(StreamAnswer(_token(self._text, event)))
            elif isinstance(event, Finish):
                if not answers or event.delta:  # no token to carry the end: an empty one does
                    answers.append(StreamAnswer(OutputToken(0, event.delta, None, not event.delta)))
                answers[-1].generated_text = self._before + event.text
                if self._given.details:
                    answers[-1].details = StreamDetails(
                        event.reason,
                        self._generation.prompt_tokens,
                        event.usage.generated_tokens,
                        event.seed,
                    )
        return b"".join([b"data:" + self._encode(answer) + b"\n\n" for answer in answers])

    def end(self) -> bytes:
        return b""

    def failure(self, error: LoraxError) -> bytes:
        return b"data:" + self._encode(error_body(error)) + b"\n\n"

    # -- one answer

    def answer(self, choices: Sequence[FinishedChoice]) -> Answer:
        """The text of the choice with the highest mean log-probability; the others are in the details."""
        best, *others = sorted(
            choices, key=lambda one: (-one.finish.mean_logprob, one.finish.choice)
        )
        made = GenerateAnswer(self._before + best.finish.text)
        if self._given.details or self._given.decoder_input_details:
            made.details = Details(
                finish_reason=best.finish.reason,
                prompt_tokens=self._generation.prompt_tokens,
                generated_tokens=best.finish.usage.generated_tokens,
                skipped_tokens=0,
                seed=best.finish.seed,
                prefill=self._prefill(best),
                tokens=self._tokens(best),
            )
            if others:
                made.details.best_of_sequences = [
                    BestOfSequence(
                        generated_text=self._before + other.finish.text,
                        finish_reason=other.finish.reason,
                        generated_tokens=other.finish.usage.generated_tokens,
                        seed=other.finish.seed,
                        prefill=self._prefill(other),
                        tokens=self._tokens(other),
                    )
                    for other in others
                ]
        return Answer([made] if self._in_list else made)

    def _tokens(self, choice: FinishedChoice) -> list[OutputToken]:
        return [_token(self._text, token) for token in choice.tokens]

    def _prefill(self, choice: FinishedChoice) -> list[PrefillToken]:
        if choice.prompt is None:
            return []
        prompt = self._generation.prompt_of(choice.finish.choice)
        logprobs: list[float | None] = [None, *choice.prompt.logprobs]
        return [
            PrefillToken(id, self._text.token_text(id), logprob)
            for id, logprob in zip(prompt, logprobs, strict=False)
        ]


def _token(text: Text, token: Token) -> OutputToken:
    """As LoRAX shows it: the texts of all tokens that are not special make the answer. A special token that completes
    a character has a delta, and is shown as that text."""
    special = token.special and not token.delta
    shown = OutputToken(token.id, token.text if special else token.delta, token.logprob, special)
    if token.alternatives is not None:
        shown.alternative_tokens = [
            AlternativeToken(id, text.token_text(id), logprob) for id, logprob in token.alternatives
        ]
    return shown
