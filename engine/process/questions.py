"""The open questions of the front to the exchange. They outlive the process of the exchange."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from engine.errors import LoraxError, from_wire
from engine.process.pipe_messages import (
    Acquire,
    Acquired,
    Adapters,
    AskTiers,
    ListAdapters,
    Refused,
    Tiers,
    Unload,
    Unloaded,
)

T = TypeVar("T")
Message = Acquire | ListAdapters | Unload | AskTiers
Answer = Acquired | Adapters | Unloaded | Tiers


@dataclass(slots=True)
class _Question:
    message: Message
    answer: asyncio.Future[Answer]
    asked: float = field(default_factory=time.monotonic)


class Questions:
    """Every open question by its call. `send` sends one to the exchange, or drops it if none is ready."""

    def __init__(self, send: Callable[[msgspec.Struct], None]) -> None:
        self._send = send
        self._open: dict[int, _Question] = {}

    def __len__(self) -> int:
        return len(self._open)

    async def ask(self, message: Message) -> Answer:
        """The answer. Raises the error of a refusal."""
        question = _Question(message, asyncio.get_running_loop().create_future())
        self._open[message.call] = question
        try:
            self._send(message)
            return await question.answer
        finally:
            del self._open[message.call]

    def ask_again(self) -> None:
        """Sends all open questions to a new process."""
        for question in self._open.values():
            if not question.answer.done():
                self._send(question.message)

    def answered(self, message: Refused | Answer) -> None:
        question = self._open.get(message.call)
        if question is None or question.answer.done():
            return  # abandoned; the exchange has received `Release`
        if isinstance(message, Refused):
            fail_future(question.answer, from_wire(message.error))
        else:
            question.answer.set_result(message)

    def fail(self, error: LoraxError, before: float = math.inf) -> None:
        """Fails the questions from before a time (monotonic); by default all."""
        for question in self._open.values():
            if question.asked < before:
                fail_future(question.answer, from_wire(error.to_wire()))

    def acquiring(self) -> list[Acquire]:
        """The open questions for an adapter."""
        messages = (question.message for question in self._open.values())
        return [message for message in messages if isinstance(message, Acquire)]


def fail_future(future: asyncio.Future[T], error: LoraxError) -> None:
    """Fails a future that is not done."""
    if not future.done():
        future.set_exception(error)
        future.exception()  # marked retrieved, so asyncio does not log it
