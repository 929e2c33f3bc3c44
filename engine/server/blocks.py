"""An answer as the blocks that some protocols send: text, reasoning and calls, each opened, filled and closed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.server.events import Event, Finish, FinishedChoice, PromptLogprobs
from engine.server.reading import AnswerReader, Call
from engine.server.tools.machine import CallBegin, Content, Part, Reasoning

Kind = Literal["text", "reasoning", "call"]


@dataclass(slots=True)
class Block:
    kind: Kind
    index: int
    text: str = ""  # of a call: its arguments, as JSON text
    call: Call | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A change of the block that is open. `text`: what it grows by, with `more`."""

    does: Literal["open", "more", "close"]
    block: Block
    text: str = ""


class Blocks:
    """The blocks of one answer as its events arrive. An answer has at least one."""

    def __init__(self, reader: AnswerReader) -> None:
        self.reader = reader
        self.made: list[Block] = []
        self.finish: Finish | None = None
        self._is_open = False

    def add(self, event: Event) -> list[Step]:
        if isinstance(event, PromptLogprobs):
            return []
        steps: list[Step] = []
        for part in self.reader.add(event):
            self._add(part, steps)
        if isinstance(event, Finish):
            self.finish = event
            if not self.made:
                self._open(Block("text", 0), steps)
            self._close(steps)
        return steps

    def add_all(self, choice: FinishedChoice) -> list[Block]:
        """The blocks of a whole answer."""
        for token in choice.tokens:
            self.add(token)
        self.add(choice.finish)
        return self.made

    def _add(self, part: Part, steps: list[Step]) -> None:
        if isinstance(part, CallBegin):
            call = self.reader.said.calls[part.index]
            self._open(Block("call", len(self.made), call=call), steps)
            return
        kind: Kind = "call"
        if isinstance(part, Content | Reasoning):
            kind = "text" if isinstance(part, Content) else "reasoning"
        if not self._is_open or self.made[-1].kind != kind:
            self._open(Block(kind, len(self.made)), steps)
        block = self.made[-1]
        block.text += part.text
        steps.append(Step("more", block, part.text))

    def _open(self, block: Block, steps: list[Step]) -> None:
        self._close(steps)
        self.made.append(block)
        self._is_open = True
        steps.append(Step("open", block))

    def _close(self, steps: list[Step]) -> None:
        if self._is_open:
            steps.append(Step("close", self.made[-1]))
        self._is_open = False
