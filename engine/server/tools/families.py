"""The families of call formats: which one a chat template has, how it is read, and how a grammar demands it."""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.server.tools import grammars
from engine.server.tools.definitions import Tool
from engine.server.tools.json_calls import Granite, Hermes, Llama3, Mistral
from engine.server.tools.machine import Machine
from engine.server.tools.pythonic import Pythonic
from engine.server.tools.qwen_xml import QwenXml

AUTO = "auto"
_SHORT = string.ascii_letters + string.digits


class Parser(Protocol):
    def __call__(self, tools: Sequence[Tool], /) -> Machine: ...


def _long_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _short_id() -> str:
    """Mistral's templates refuse ids of other lengths."""
    return "".join(random.choices(_SHORT, k=9))


@dataclass(frozen=True, slots=True)
class Family:
    """`signs`: a chat template with one of these texts is of this family. `marks`: tokens that belong to calls and stay
    in the text of an answer even if they are special."""

    name: str
    parser: Parser
    signs: tuple[str, ...]
    marks: tuple[str, ...]
    grammar: grammars.Writer
    begin: str | None = None  # the mark before a call; None: calls are the whole answer
    new_id: Callable[[], str] = _long_id


FAMILIES = (
    Family(
        "mistral",
        Mistral,
        signs=("[TOOL_CALLS]",),
        marks=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        grammar=grammars.mistral,
        begin="[TOOL_CALLS]",
        new_id=_short_id,
    ),
    Family(
        "qwen3_coder",
        QwenXml,
        signs=("<function=",),
        marks=("<tool_call>", "</tool_call>"),
        grammar=grammars.qwen_xml,
        begin="<tool_call>",
    ),
    Family(
        "granite",
        Granite,
        signs=("<|tool_call|>", "<|tool|>"),
        marks=("<|tool_call|>", "<|/tool_call|>", "<tool_call>", "</tool_call>"),
        grammar=grammars.granite,
        begin="<|tool_call|>",
    ),
    Family(
        "hermes",
        Hermes,
        signs=("<tool_call>",),
        marks=("<tool_call>", "</tool_call>"),
        grammar=grammars.hermes,
        begin="<tool_call>",
    ),
    Family(
        "llama3_json",
        Llama3,
        signs=("<|python_tag|>", "Environment: ipython", '"parameters": dictionary'),
        marks=("<|python_tag|>", "<|python_start|>", "<|python_end|>"),
        grammar=grammars.llama3,
    ),
    Family(
        "pythonic",
        Pythonic,
        signs=("<|python_start|>", "func_name1("),
        marks=("<|python_tag|>", "<|python_start|>", "<|python_end|>"),
        grammar=grammars.pythonic,
    ),
)
BY_NAME = {family.name: family for family in FAMILIES}


def family_of(template: str, insisted: str = AUTO) -> Family | None:
    """The family that the server insists on, else that of a chat template; None: unknown."""
    if insisted != AUTO:
        return BY_NAME[insisted]
    return next((one for one in FAMILIES if any(sign in template for sign in one.signs)), None)
