"""What an adapter's task is: a generator of prompts and answers with an honest split.

Three splits: `train`; `seen` has training templates with values that training never combined;
`heldout` has templates that training never shows, also with such values.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from tools.demo.base_text import SYSTEM_PROMPTS, small_talk
from tools.demo.chat import ROLES, Message, render

Split = Literal["train", "seen", "heldout"]
CHOICE = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt, its one right answer, and the template that it came from."""

    prompt: str
    answer: str
    template: str


@dataclass(frozen=True, slots=True)
class Task:
    """A task and the templates of its two halves."""

    name: str
    description: str
    draw: Callable[[Random, Split], Example]
    train_templates: tuple[str, ...]
    heldout_templates: tuple[str, ...]


def reserved(key: str, share: int = 8) -> bool:
    """Whether a combination of values is kept out of training: one in `share`."""
    return zlib.crc32(key.encode()) % share == 0


def fill(rng: Random, template: str, values: Mapping[str, object]) -> str:
    """A template with one option of every `[a|b]` chosen and every `{slot}` filled in."""
    while CHOICE.search(template):
        template = CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template)
    return template.format_map(values)


def templates_of(split: Split, train: Sequence[str], heldout: Sequence[str]) -> Sequence[str]:
    """The templates that a split draws from."""
    return heldout if split == "heldout" else train


def framed(rng: Random, task: Task, example: Example) -> tuple[str, str]:
    """A training example as (context, answer), in one of the forms that clients send.

    Plain: the prompt, then a space or (if the client sent it) a line end. Chat: the prompt as user
    message, at times with a system message or an earlier exchange.
    """
    form = rng.random()
    if form < 0.45:
        return example.prompt, " " + example.answer
    if form < 0.58:
        return example.prompt + "\n", example.answer
    messages: list[Message] = []
    if rng.random() < 0.4:
        messages.append(("system", rng.choice(SYSTEM_PROMPTS)))
    if rng.random() < 0.15:
        earlier = task.draw(rng, "train")
        pair = (earlier.prompt, earlier.answer)
        question, answer = pair if rng.random() < 0.5 else small_talk(rng)[0]
        messages += [("user", question), ("assistant", answer)]
    messages.append(("user", example.prompt))
    context = render(messages) + ROLES["assistant"]
    return context, example.answer
