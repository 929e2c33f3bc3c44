"""One choice of a generation: turns the engine's updates into events, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.errors import GenerationError, from_wire
from engine.messages import Request, TokenOutput, Update, Usage
from engine.server.events import Event, Finish, FinishedBy, PromptLogprobs, Token
from engine.server.stops import StopMatcher
from engine.server.text import Text, TextStream


@dataclass(slots=True, eq=False)
class Choice:
    """One continuation of one prompt, while it grows."""

    index: int  # in its generation
    request: Request
    seed: int | None  # None: greedy
    text: Text
    stream: TextStream
    stops: StopMatcher
    shown: frozenset[int] = frozenset()  # special tokens that are text
    score_only: bool = False  # generated tokens are dropped
    parts: list[str] = field(default_factory=list)
    num_tokens: int = 0
    cached_tokens: int = 0  # of the prompt
    logprobs: float = 0.0

    def read(self, update: Update, events: list[Event]) -> Finish | None:
        """Appends the events of `update`; returns the end if this was the last update or completed a stop sequence.

        Raises the error with which the engine ended the choice.
        """
        if update.error is not None:
            raise from_wire(update.error)
        self.cached_tokens += update.cached_tokens
        if update.prompt_logprobs is not None:
            events.append(PromptLogprobs(self.index, update.prompt_logprobs, update.prompt_tops))
        ends = update.finish == "eos"
        token: Token | None = None
        tokens = [] if self.score_only else update.tokens
        for index, output in enumerate(tokens, 1):
            token = self._read(output, ends and index == len(tokens))
            events.append(token)
            if self.stops.matched is not None:
                return self._finish("stop_sequence", None)
        if update.finish is None:
            return None
        if update.finish == "cancelled":
            raise GenerationError("the engine cancelled the request")
        if self.score_only:
            return self._finish("length", None)
        tail = self._end()
        if token is not None:
            token.delta += tail
            tail = ""
        reason: FinishedBy = "eos_token" if ends else "length"
        matched = self.stops.matched is not None
        return self._finish("stop_sequence" if matched else reason, update.usage, delta=tail)

    def _read(self, output: TokenOutput, ends: bool) -> Token:
        id, text = output.token, self.text
        special = id in text.special_ids and id not in self.shown
        special = special or (ends and id in self.request.eos_token_ids)
        piece = "" if special else self.stream.push(id)
        self.num_tokens += 1
        stoppable = self.num_tokens > self.request.sampling.min_tokens
        delta = self.stops.push(piece) if piece and stoppable else piece
        self.logprobs += output.logprob or 0.0
        if delta:
            self.parts.append(delta)
        own = text.token_text(id) if special else piece
        if (
            special and stoppable and own in self.stops.stops
        ):  # a stop sequence may name a special token
            delta = self._end()
            self.stops.matched = own
        return Token(
            choice=self.index,
            id=id,
            text=own,
            delta=delta,
            logprob=output.logprob,
            alternatives=output.alternatives,
            special=special,
        )

    def _end(self) -> str:
        """The text that was held back, once no more tokens come."""
        tail = self.stops.push(self.stream.flush())
        if self.stops.matched is None:
            tail += self.stops.flush()
        self.parts.append(tail)
        return tail

    def _finish(self, reason: FinishedBy, usage: Usage | None, delta: str = "") -> Finish:
        num_tokens = self.num_tokens
        return Finish(
            choice=self.index,
            reason=reason,
            delta=delta,
            text="".join(self.parts),
            usage=usage or Usage(len(self.request.tokens), self.cached_tokens, num_tokens),
            mean_logprob=self.logprobs / max(1, num_tokens),
            seed=self.seed,
            stop=self.stops.matched,
        )
