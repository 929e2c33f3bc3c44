"""What a generation yields: tokens, log-probabilities of the prompt and ends, each of one choice.

`choice` is an index. The choices of the first prompt come first, then those of the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msgspec import Struct

from engine.messages import Usage

FinishedBy = Literal["length", "eos_token", "stop_sequence"]


class Token(Struct):
    """One generated token. `text` is the token's own text; for a special token, its name.

    `delta` is what the answer grows by. It is empty for special tokens, and while the text may begin a stop sequence.
    """

    choice: int
    id: int
    text: str
    delta: str
    logprob: float | None
    alternatives: list[tuple[int, float]] | None
    special: bool


class PromptLogprobs(Struct):
    """Log-probabilities of all prompt tokens but the first. Comes before the choice's first token."""

    choice: int
    logprobs: list[float]
    tops: list[tuple[int, float]]  # the most likely token of each of these positions


class Finish(Struct):
    """The end of one choice. `delta` is text that came without a token; `text` is the whole answer."""

    choice: int
    reason: FinishedBy
    delta: str
    text: str
    usage: Usage
    mean_logprob: float
    seed: int | None  # None: greedy
    stop: str | None = None  # the stop sequence that ended it


Event = Token | PromptLogprobs | Finish


@dataclass(frozen=True, slots=True)
class FinishedChoice:
    """All events of one choice."""

    finish: Finish
    tokens: list[Token]
    prompt: PromptLogprobs | None  # None: not asked for
