"""What the front has asked the exchange and waits for, whichever process answers it."""

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
    ListAdapters,
    Refused,
    Unload,
    Unloaded,
)

T = TypeVar("T")
Message = Acquire | ListAdapters | Unload
Answer = Acquired | Adapters | Unloaded


@dataclass(slots=True)
class _Question:
    message: Message
    answer: asyncio.Future[Answer]
    asked: float = field(default_factory=time.monotonic)


class Questions:
    """Every open question by its call. `send` carries one to the exchange, or drops it where there is none yet."""

    def __init__(self, send: Callable[[msgspec.Struct], None]) -> None:
        self._send = send
        self._open: dict[int, _Question] = {}

    def __len__(self) -> int:
        return len(self._open)

    async def ask(self, message: Message) -> Answer:
        """The answer, or what it was refused with."""
        question = _Question(message, asyncio.get_running_loop().create_future())
        self._open[message.call] = question
        try:
            self._send(message)
            return await question.answer
        finally:
            del self._open[message.call]

    def ask_again(self) -> None:
        """Another exchange answers now."""
        for question in self._open.values():
            if not question.answer.done():
                self._send(question.message)

    def answered(self, message: Refused | Answer) -> None:
        question = self._open.get(message.call)
        if question is None or question.answer.done():
            return  # given up, and the exchange has been told so
        if isinstance(message, Refused):
            refuse(question.answer, from_wire(message.error))
        else:
            question.answer.set_result(message)

    def fail(self, error: LoraxError, before: float = math.inf) -> None:
        """Refuses what was asked before a time (monotonic); without one, everything."""
        for question in self._open.values():
            if question.asked < before:
                refuse(question.answer, from_wire(error.to_wire()))

    def acquiring(self) -> list[Acquire]:
        """The adapters that are waited for."""
        messages = (question.message for question in self._open.values())
        return [message for message in messages if isinstance(message, Acquire)]


def refuse(future: asyncio.Future[T], error: LoraxError) -> None:
    """Fails what somebody may wait for."""
    if not future.done():
        future.set_exception(error)
        future.exception()  # whoever waited may be gone; that is no error of its own
