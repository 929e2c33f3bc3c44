"""Log-probabilities in the shapes of both OpenAI formats, for exactly the tokens whose text was sent."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence

from engine.server.events import Finish, PromptLogprobs, Token
from engine.server.openai.schemas import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
)
from engine.server.text import Text

LEAST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot write

LoggedToken = tuple[int, Token]  # offset in the answer where its text begins, and the token


class TokenLog:
    """The tokens of one choice, given out together with their text.

    Text that may begin a stop sequence is held back, and its tokens with it. The tokens of the stop sequence and the
    end-of-sequence token are never given out.
    """

    __slots__ = ("_length", "_num_out", "_waiting")

    def __init__(self) -> None:
        self._waiting: list[LoggedToken] = []
        self._length = 0  # characters of all tokens
        self._num_out = 0  # characters of the text that was sent

    def push(self, token: Token) -> None:
        self._waiting.append((self._length, token))
        if not token.special:
            self._length += len(token.text)
        self._num_out += len(token.delta)

    def end(self, finish: Finish) -> None:
        self._num_out += len(finish.delta)
        if finish.reason == "stop_sequence":
            self._waiting = [entry for entry in self._waiting if entry[0] < self._num_out]
        elif finish.reason == "eos_token" and self._waiting and self._waiting[-1][1].special:
            self._waiting.pop()
        self._num_out = self._length + 1  # all that is left is part of the answer

    def take(self) -> list[LoggedToken]:
        """The tokens whose text began to be sent since the last call."""
        ready = [entry for entry in self._waiting if entry[0] < self._num_out]
        self._waiting = self._waiting[len(ready) :]
        return ready


def chat(text: Text, tokens: Sequence[LoggedToken]) -> ChatLogprobs:
    """For /v1/chat/completions."""
    return ChatLogprobs(
        [
            TokenLogprob(
                text.token_text(token.id),
                _finite(token.logprob),
                list(text.token_bytes(token.id)),
                [
                    TopLogprob(text.token_text(id), _finite(logprob), list(text.token_bytes(id)))
                    for id, logprob in token.alternatives or ()
                ],
            )
            for _, token in tokens
        ]
    )


def completion(
    text: Text,
    tokens: Sequence[LoggedToken],
    echoed: str,
    prompt: Sequence[int] = (),
    scores: PromptLogprobs | None = None,
) -> CompletionLogprobs:
    """For /v1/completions. The answer follows `echoed`, the text of an echoed `prompt`, whose tokens
    but the first have `scores`."""
    made = CompletionLogprobs([], [], [], prompt_offsets(text, prompt, echoed))
    made.tokens += [_name(text, id) for id in prompt]
    if prompt:
        made.token_logprobs.append(None)
        made.top_logprobs.append(None)
    if scores is not None:
        for id, logprob, top in zip(prompt[1:], scores.logprobs, scores.tops, strict=True):
            made.token_logprobs.append(_finite(logprob))
            made.top_logprobs.append(_top(text, [top, (id, logprob)]))
    for start, token in tokens:
        made.tokens.append(_name(text, token.id))
        made.token_logprobs.append(_finite(token.logprob))
        made.top_logprobs.append(
            _top(text, [*(token.alternatives or ()), (token.id, token.logprob)])
        )
        made.text_offset.append(len(echoed) + start)
    return made


def _name(text: Text, id: int) -> str:
    """A token's text; of a part of a character, its bytes as OpenAI writes them: `bytes:\\xf0\\x9f`."""
    name, raw = text.token_text(id), text.token_bytes(id)
    if name.encode() == raw:
        return name
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _top(text: Text, tokens: Iterable[tuple[int, float | None]]) -> dict[str, float]:
    """By name; of tokens with the same name the most likely one counts."""
    found: dict[str, float] = {}
    for id, logprob in tokens:
        name = _name(text, id)
        found[name] = max(found.get(name, LEAST), _finite(logprob))
    return found


def prompt_offsets(text: Text, ids: Sequence[int], shown: str) -> list[int]:
    """The offset in the prompt's text `shown` at which each of its tokens begins.

    Where several tokens make one character, all but the first begin after it. Tokens that are not shown have length 0:
    special tokens that the tokenizer adds, or the space of a first word.
    """
    found, at = [], 0
    decoder = getincrementaldecoder("utf-8")("replace")
    for id in ids:
        found.append(at)
        name = decoder.decode(text.token_bytes(id))
        for part in (name, name.lstrip()):
            if shown.startswith(part, at):
                at += len(part)
                break
    return found


def _finite(logprob: float | None) -> float:
    return LEAST if logprob is None else max(logprob, LEAST)
