"""Splits an answer into what the model thinks, which its template marks, and what it says."""

from __future__ import annotations

from engine.server.tools.machine import Content, Machine, Reading, Reasoning

Marks = tuple[str, str]  # begin and end

MARKS: tuple[Marks, ...] = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


def marks_of(template: str) -> Marks | None:
    """The marks that a chat template has."""
    return next((marks for marks in MARKS if any(mark in template for mark in marks)), None)


class Thoughts(Machine):
    """Reasoning comes at the beginning of an answer, or nowhere. White space around it is left out.

    `opened`: the prompt has the first mark. Without the last mark all of the answer is reasoning.
    """

    def __init__(self, marks: Marks, *, opened: bool) -> None:
        self._begin_mark, self._end_mark = marks
        self.thinking = opened
        super().__init__()

    def _read(self) -> Reading[None]:
        if self.thinking:
            self._text = Reasoning
        char = yield from self._skip()
        marked = char == self._begin_mark[0] and (yield from self._word(self._begin_mark))
        if marked:
            self.thinking = True
            self._text = Reasoning
            self._accept()
        elif self._held:
            self._reject_white(self.thinking)
        if self.thinking:
            yield from self._drop_white()
            yield from self._find((self._end_mark,))
            self._accept()
            self.thinking, self._text = False, Content
            yield from self._drop_white()
        yield from self._rest()

    def _reject_white(self, drop: bool) -> None:
        """The character that was read last is read again; `drop`: without the white space before it."""
        if drop:
            self._again = self._held[-1]
            self._accept()
        else:
            self._reject_last()

    def _drop_white(self) -> Reading[None]:
        yield from self._skip()
        self._reject_white(drop=True)
