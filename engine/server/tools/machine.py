"""Reads an answer character by character, so that no way of cutting it into pieces changes what is found.

A parser is a generator that takes one character at a time. What it has read stays *held* until it is decided: accepted
as part of a call, or passed on as text. So no text is lost, but white space next to a call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

MAX_WHITE = 64  # characters of white space that are held because a mark may follow
WHITE = " \n\r\t"

T = TypeVar("T")
Reading = Generator[None, str, T]


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    index: int  # of the call in its answer
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the JSON text of the arguments of call `index`."""

    index: int
    text: str


Part = Content | Reasoning | CallBegin | Arguments


class Machine(ABC):
    """`push` pieces of an answer, then `end`. The parts, with neighbours joined, do not depend on the pieces."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._held: list[str] = []
        self._again = ""  # a character to read once more
        self._text: Callable[[str], Part] = Content  # what undecided text is
        self._num_calls = 0
        self._after_call = False  # only white space came since
        self._reading = self._read()
        next(self._reading)

    @abstractmethod
    def _read(self) -> Reading[None]:
        """Reads a whole answer; never returns."""

    def push(self, piece: str) -> list[Part]:
        """The parts that `piece` decides."""
        for char in piece:
            self._reading.send(char)
        return self._take()

    def end(self) -> list[Part]:
        """The rest: what is held is text, but white space after a call."""
        self._reading.close()
        if not (self._after_call and "".join(self._held).isspace()):
            self._reject()
        return self._take()

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return joined(parts)

    # -- what a parser reads with

    def _next(self) -> Reading[str]:
        if self._again:
            char, self._again = self._again, ""
        else:
            char = yield
        self._held.append(char)
        return char

    def _skip(self, more: str = "") -> Reading[str]:
        """The next character that is neither white space nor one of `more`."""
        while (char := (yield from self._next())) in WHITE or char in more:
            pass
        return char

    def _word(self, *words: str) -> Reading[str | None]:
        """Which of `words` comes; its first character was read. Without one, what was read is text."""
        found = self._held[-1]
        while found not in words:
            if not any(word.startswith(found) for word in words):
                self._reject_last()
                return None
            found += yield from self._next()
        return found

    def _up_to(self, stop: str, most: int) -> Reading[str | None]:
        """The text before the character `stop`. If it is too long or has a line break, what was read is text."""
        found: list[str] = []
        while (char := (yield from self._next())) != stop:
            found.append(char)
            if char == "\n" or len(found) > most:
                self._reject_last()
                return None
        return "".join(found)

    def _find(self, marks: Sequence[str]) -> Reading[str]:
        """Passes text on up to one of `marks`, which is held with the white space in front of it."""
        while True:
            yield from self._next()
            while True:
                held = "".join(self._held)
                mark = held.lstrip()
                if mark in marks:
                    return mark
                white = len(held) - len(mark)
                if white <= MAX_WHITE and any(one.startswith(mark) for one in marks):
                    break
                self._pass_on(self._held.pop(0))

    def _rest(self) -> Reading[None]:
        """All that comes is text."""
        while True:
            yield from self._next()
            self._reject()

    # -- what it decides

    def _accept(self) -> None:
        self._held.clear()

    def _reject(self) -> None:
        text = "".join(self._held)
        self._held.clear()
        if text:
            self._pass_on(text)

    def _reject_last(self) -> None:
        """What was read is text; its last character is read again, as it may begin a mark."""
        self._again = self._held.pop()
        self._reject()

    def _pass_on(self, text: str) -> None:
        self._after_call = self._after_call and text.isspace()
        self._parts.append(self._text(text))

    def _begin(self, name: str) -> None:
        """What was read begins a call."""
        self._accept()
        self._parts.append(CallBegin(self._num_calls, name))
        self._num_calls += 1

    def _add(self, arguments: str) -> None:
        self._parts.append(Arguments(self._num_calls - 1, arguments))

    def _finish(self) -> None:
        """What was read ends the call."""
        self._accept()
        self._after_call = True


def joined(parts: Sequence[Part]) -> list[Part]:
    """`parts` with neighbours of one kind, and of one call, joined."""
    made: list[Part] = []
    texts: list[str] = []
    for part in parts:
        if isinstance(part, CallBegin):
            _close(made, texts)
            made.append(part)
            continue
        if not texts or not _continues(made[-1], part):
            _close(made, texts)
            made.append(part)
        texts.append(part.text)
    _close(made, texts)
    return made


def _continues(last: Part, part: Part) -> bool:
    if isinstance(last, Arguments) and isinstance(part, Arguments):
        return last.index == part.index
    return type(last) is type(part)


def _close(made: list[Part], texts: list[str]) -> None:
    """Gives the last part the joined texts."""
    if not texts:
        return
    text, last = "".join(texts), made[-1]
    if isinstance(last, Arguments):
        made[-1] = Arguments(last.index, text)
    else:
        made[-1] = Reasoning(text) if isinstance(last, Reasoning) else Content(text)
    texts.clear()
