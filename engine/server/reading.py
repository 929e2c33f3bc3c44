"""How the answers of one request are read: reasoning first, then tool calls, then text.

It depends on the chat template in force, which may be an adapter's, so it is known once the adapter is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from engine.errors import InvalidRequest
from engine.grammar import check
from engine.server.conversation import Conversation
from engine.server.events import Finish, Token
from engine.server.parameters import Parameters, invalid
from engine.server.prompts import Prompt
from engine.server.reasoning import Marks, Thoughts, marks_of
from engine.server.text import Text
from engine.server.tools.definitions import ToolUse
from engine.server.tools.families import AUTO, BY_NAME, Family, family_of
from engine.server.tools.grammars import Wanted, after_thoughts, grammar_of
from engine.server.tools.machine import (
    Arguments,
    CallBegin,
    Content,
    Machine,
    Part,
    Reasoning,
    joined,
)

NUM_LAST = 16  # tokens of a prompt that may have the mark with which reasoning begins
_FALLBACK = BY_NAME["hermes"]  # for calls that a grammar demands where the template has no format


@dataclass(slots=True)
class Call:
    id: str
    name: str
    arguments: str = ""  # JSON text


@dataclass(slots=True)
class Said:
    """A whole answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Reading:
    """`family` reads calls, `marks` are those of reasoning; None: the answer has none. `opened`: the prompt ends in
    reasoning. `shown`: special tokens that stay in the text, so that they can be read."""

    use: ToolUse | None = None
    family: Family | None = None
    marks: Marks | None = None
    opened: bool = False
    shown: frozenset[int] = frozenset()

    def reader(self) -> AnswerReader:
        return AnswerReader(self)


class AnswerReader:
    """Reads one answer. The parts, with neighbours joined, do not depend on the pieces of text."""

    def __init__(self, reading: Reading) -> None:
        family, use, marks = reading.family, reading.use, reading.marks
        self._new_id = (family or _FALLBACK).new_id
        self._most = 1 if use is not None and not use.parallel else None  # calls
        self._thoughts = Thoughts(marks, opened=reading.opened) if marks is not None else None
        self._calls: Machine | None = None
        if family is not None and use is not None:
            self._calls = family.parser(use.callable)
        self.said = Said()
        self.reasoning_tokens = 0

    def add(self, event: Token | Finish) -> list[Part]:
        """The parts that an event brings; those of the end with `Finish`."""
        before = self._thoughts is not None and self._thoughts.thinking
        parts = self._push(event.delta)
        if isinstance(event, Finish):
            parts += self._end()
        elif self._thoughts is not None:
            self.reasoning_tokens += before or self._thoughts.thinking
        parts = [part for part in joined(parts) if self._keeps(part)]
        for part in parts:
            self._note(part)
        return parts

    def _push(self, text: str) -> list[Part]:
        if not text:
            return []
        return self._read_calls(self._thoughts.push(text) if self._thoughts else [Content(text)])

    def _end(self) -> list[Part]:
        parts = self._read_calls(self._thoughts.end()) if self._thoughts else []
        return parts + (self._calls.end() if self._calls else [])

    def _read_calls(self, parts: list[Part]) -> list[Part]:
        made: list[Part] = []
        for part in parts:
            if self._calls is not None and isinstance(part, Content):
                made += self._calls.push(part.text)
            else:
                made.append(part)
        return made

    def _keeps(self, part: Part) -> bool:
        """Without parallel calls only the first is given."""
        if self._most is None or not isinstance(part, CallBegin | Arguments):
            return True
        return part.index < self._most

    def _note(self, part: Part) -> None:
        said = self.said
        if isinstance(part, Content):
            said.content += part.text
        elif isinstance(part, Reasoning):
            said.reasoning += part.text
        elif isinstance(part, CallBegin):
            said.calls.append(Call(self._new_id(), part.name))
        else:
            said.calls[part.index].arguments += part.text


async def reading_of(
    prompts: Sequence[Prompt],
    tokens: Sequence[Sequence[int]],
    parameters: Parameters,
    text: Text,
    insisted: str,
) -> tuple[Reading, Parameters]:
    """The reading of a request, and its parameters with the grammar of calls that it demands.

    `insisted`: --tool-call-parser. Raises InvalidRequest.
    """
    conversation = next((one for one in prompts if isinstance(one, Conversation)), None)
    if conversation is None:
        return Reading(), parameters
    template, use = text.chat.choose(conversation), conversation.use
    marks = marks_of(template)
    opened = marks is not None and _opened(conversation, text.written(tokens[0][-NUM_LAST:]), marks)
    family = None if use is None else _family(use, template, insisted)
    shown = text.special_tokens([*(marks or ()), *(family.marks if family else ())])
    reading = Reading(use, family, marks, opened, frozenset(shown.values()))

    def token(mark: str) -> str:
        return f"<[{shown[mark]}]>" if mark in shown else json.dumps(mark)

    if parameters.grammar is not None:
        if use is not None and use.required:
            raise invalid(
                "tool_choice",
                "cannot be combined with a format for the answer",
                "leave out one of them",
            )
        if marks is not None:
            grammar = after_thoughts(parameters.grammar, marks, opened, token)
            return reading, replace(parameters, grammar=grammar)
        return reading, parameters
    if use is None or family is None:
        return reading, parameters
    strict = family.begin is not None and any(tool.strict for tool in use.tools)
    if not use.required and not strict:
        return reading, parameters
    wanted = Wanted(
        tools=use.callable,
        parallel=use.parallel and use.named is None,
        token=token,
        template=template,
    )
    thoughts = None if marks is None else (marks, opened)
    free = None if use.required else family.begin
    grammar = grammar_of(family.grammar, wanted, thoughts, free)
    await text.in_thread(lambda: check(grammar, "tools"))
    return reading, replace(parameters, grammar=grammar)


def _opened(conversation: Conversation, ending: str, marks: Marks) -> bool:
    """Whether the prompt, which has this `ending`, ends in reasoning."""
    begin, end = marks
    if conversation.continue_final_message:
        last = str(conversation.messages[-1].get("content") or "")
        return last.rfind(begin) > last.rfind(end)
    return ending.rstrip().endswith(begin)


def _family(use: ToolUse, template: str, insisted: str) -> Family:
    """Raises InvalidRequest where calls could not be found in the answer."""
    family = family_of(template, insisted)
    if family is None and use.required:
        return _FALLBACK
    if family is None or (insisted == AUTO and not use.required and "tools" not in template):
        raise InvalidRequest(
            "the chat template has no tool calls that this server knows",
            field="tools",
            hint="set `tool_choice` to `required`, leave out `tools`, or start the server with --tool-call-parser"
            " or a template that takes tools (--tokenizer-config-path)",
        )
    return family
