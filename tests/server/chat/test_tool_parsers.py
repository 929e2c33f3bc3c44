"""Parsers of tool calls and reasoning: what they find, and that no split of the text changes it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.server.reasoning import Thoughts, marks_of
from engine.server.tools.definitions import Tool
from engine.server.tools.families import BY_NAME, family_of
from engine.server.tools.machine import (
    Arguments,
    CallBegin,
    Content,
    Machine,
    Part,
    Reasoning,
    joined,
)
from engine.server.tools.pythonic import calls_of
from engine.settings import settings
from tests.server.chat.test_chat_templates import FAMILIES, TEMPLATES

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "near": {"type": "array"},
        "exact": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "note": {"type": ["string", "null"]},
    },
}
TOOLS = [Tool("get_weather", SCHEMA), Tool("clock")]
ARGUMENTS = '{"city": "Köln {\\"[", "days": 2, "near": [{"a": [1]}]}'
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": ' + ARGUMENTS + "}\n</tool_call>"
CLOCK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
LLAMA = '{"name": "get_weather", "parameters": ' + ARGUMENTS + "}"
LISTED = (
    '[{"name": "get_weather", "arguments": '
    + ARGUMENTS
    + ', "id": "x"}, {"name": "clock", "arguments": {}}]'
)
XML = """<tool_call>
<function=get_weather>
<parameter=city>
Köln {"[
</parameter>
<parameter=days>
2
</parameter>
<parameter=near>
[{"a": [1]}]
</parameter>
</function>
</tool_call>"""
PYTHON = "[get_weather(city='Köln {\"[', days=2, near=[{'a': [1]}]), clock()]"
WEATHER = ("get_weather", json.loads(ARGUMENTS))
TIME = ("clock", {})

# Family, answer -> its text and its calls.
ANSWERS: list[tuple[str, str, str, list[tuple[str, object]]]] = [
    ("hermes", HERMES, "", [WEATHER]),
    ("hermes", f"I look.\n{HERMES}\n{CLOCK}\n", "I look.", [WEATHER, TIME]),
    ("hermes", f"{HERMES}\n\nDone.", "\n\nDone.", [WEATHER]),
    ("hermes", HERMES.removesuffix("</tool_call>"), "", [WEATHER]),
    (
        "hermes",
        '<tool_call>{"arguments": {"days": 1}, "name": "clock"}',
        "",
        [("clock", {"days": 1})],
    ),
    ("hermes", '<tool_call>{"name": "clock"}</tool_call>', "", [TIME]),
    ("hermes", '<tool_call>{"name": "clock", "arguments": "{}"}</tool_call>', "", [TIME]),
    ("hermes", "<tool_call>clock</tool_call>", "<tool_call>clock</tool_call>", []),
    ("hermes", f"a < b <tool_call><tool_call {CLOCK}", "a < b <tool_call><tool_call", [TIME]),
    ("hermes", '<tool_call>{"no": 1}</tool_call> x', '<tool_call>{"no": 1}</tool_call> x', []),
    ("hermes", "x</tool_call>", "x</tool_call>", []),
    ("hermes", "  spaces \n\n and <tags>  ", "  spaces \n\n and <tags>  ", []),
    ("hermes", '<tool_call>{"name": "clock", "argu', '<tool_call>{"name": "clock", "argu', []),
    (
        "hermes",
        '<tool_call>{"name": "a b", "arguments": {}}',
        '<tool_call>{"name": "a b", "arguments": {}}',
        [],
    ),
    ("granite", f"<|tool_call|>{LISTED}", "", [WEATHER, TIME]),
    ("granite", f"<|tool_call|>{LISTED}<|/tool_call|>", "", [WEATHER, TIME]),
    ("granite", "<|tool_call|>[]", "<|tool_call|>[]", []),
    ("mistral", f"[TOOL_CALLS] {LISTED}", "", [WEATHER, TIME]),
    (
        "mistral",
        f"So: [TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]clock[ARGS]{{}}",
        "So:",
        [WEATHER, TIME],
    ),
    ("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]abcdef123[ARGS]{ARGUMENTS}", "", [WEATHER]),
    ("mistral", f"[TOOL_CALLS]get_weather{ARGUMENTS}", "", [WEATHER]),
    ("mistral", "[TOOL_CALLS] [x", "[TOOL_CALLS] [x", []),
    ("mistral", "[TOOL_CALLS]a b[ARGS]{}", "[TOOL_CALLS]a b[ARGS]{}", []),
    ("mistral", "[1, 2] [TOOL", "[1, 2] [TOOL", []),
    ("llama3_json", LLAMA, "", [WEATHER]),
    ("llama3_json", f"<|python_tag|>{LLAMA}", "", [WEATHER]),
    ("llama3_json", f'{LLAMA}; {{"name": "clock", "parameters": {{}}}}', "", [WEATHER, TIME]),
    ("llama3_json", '{"type": "function", "name": "clock", "parameters": {}}', "", [TIME]),
    ("llama3_json", LISTED, "", [WEATHER, TIME]),
    (
        "llama3_json",
        '{"name": "Ada", "parameters": {"a": 1}}',
        '{"name": "Ada", "parameters": {"a": 1}}',
        [],
    ),
    ("llama3_json", '{"person": {"name": "clock"}}', '{"person": {"name": "clock"}}', []),
    ("llama3_json", f"Sure: {LLAMA}", f"Sure: {LLAMA}", []),
    ("llama3_json", '<|python_tag|>search.call(q="x")', '<|python_tag|>search.call(q="x")', []),
    ("llama3_json", f"{LLAMA} and", " and", [WEATHER]),
    ("qwen3_coder", XML, "", [WEATHER]),
    ("qwen3_coder", f"First.\n\n{XML}\n{XML}", "First.", [WEATHER, WEATHER]),
    ("qwen3_coder", "<function=clock></function>", "", [TIME]),
    ("qwen3_coder", "<tool_call>\nno", "<tool_call>\nno", []),
    ("qwen3_coder", "<function=a b>", "<function=a b>", []),
    ("qwen3_coder", "<function=clock>?", "?", [TIME]),
    (
        "qwen3_coder",
        "<function=get_weather><parameter=exact>True</parameter><parameter=note>null</parameter>"
        "<parameter=days>two</parameter><parameter=other>1</parameter></function>",
        "",
        [("get_weather", {"exact": True, "note": None, "days": "two", "other": "1"})],
    ),
    ("pythonic", PYTHON, "", [WEATHER, TIME]),
    ("pythonic", f"<|python_start|>{PYTHON}<|python_end|>", "", [WEATHER, TIME]),
    (
        "pythonic",
        "[clock(a=None, b=-1.5, c=(1, {'x': true}))]",
        "",
        [("clock", {"a": None, "b": -1.5, "c": [1, {"x": True}]})],
    ),
    ("pythonic", "[clock(a=open('/'))]", "[clock(a=open('/'))]", []),
    ("pythonic", "[other(a=1)]", "[other(a=1)]", []),
    ("pythonic", "[clock(), other()]", "[clock(), other()]", []),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", f"See {PYTHON}", f"See {PYTHON}", []),
    (
        "pythonic",
        "[clock(" + "[" * 50 + "]" * 50 + ")]",
        "[clock(" + "[" * 50 + "]" * 50 + ")]",
        [],
    ),
]
THOUGHTS = [
    (False, "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    (True, "Hm < x\n\n</think>\n\nYes.\n", "Hm < x", "Yes.\n"),
    (True, "\n<think>\nHm.</think>Yes.", "Hm.", "Yes."),
    (True, "Hm.</thi", "Hm.</thi", ""),
    (True, "<thin", "<thin", ""),
    (False, "<think>\n\n</think>\n\nYes.", "", "Yes."),
    (False, "Yes <think>no</think>", "", "Yes <think>no</think>"),
    (False, " <thin", "", " <thin"),
    (False, "  <th>Yes.", "", "  <th>Yes."),
]


def read(machine: Machine, pieces: list[str]) -> list[Part]:
    parts = [part for piece in pieces for part in machine.push(piece)]
    return joined(parts + machine.end())


def content(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Content))


def calls(parts: list[Part]) -> list[tuple[str, object]]:
    """Names and arguments; each call begins before its arguments."""
    found: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, CallBegin):
            assert part.index == len(found)
            found.append((part.name, ""))
        elif isinstance(part, Arguments):
            name, text = found[part.index]
            found[part.index] = (name, text + part.text)
    return [(name, json.loads(text)) for name, text in found]


@pytest.mark.parametrize(("family", "answer", "text", "wanted"), ANSWERS)
def test_answers(family: str, answer: str, text: str, wanted: list[tuple[str, object]]) -> None:
    """At once, and in every way of cutting the answer into two, and into characters."""
    parser = BY_NAME[family].parser
    whole = read(parser(TOOLS), [answer])
    assert (content(whole), calls(whole)) == (text, wanted)
    for at in range(len(answer)):
        assert read(parser(TOOLS), [answer[:at], answer[at:]]) == whole
    assert read(parser(TOOLS), list(answer)) == whole


@pytest.mark.parametrize(("opened", "answer", "reasoning", "text"), THOUGHTS)
def test_reasoning(opened: bool, answer: str, reasoning: str, text: str) -> None:
    def thoughts() -> Machine:
        return Thoughts(("<think>", "</think>"), opened=opened)

    whole = read(thoughts(), [answer])
    assert "".join(part.text for part in whole if isinstance(part, Reasoning)) == reasoning
    assert content(whole) == text
    for at in range(len(answer)):
        assert read(thoughts(), [answer[:at], answer[at:]]) == whole
    assert read(thoughts(), list(answer)) == whole


PIECES = [
    *("<tool_call>", "</tool_call>", "<|tool_call|>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"),
    *("<function=clock>", "<parameter=a>", "</parameter>", "</function>", '"arguments": {'),
    *('{"name": "clock", "arguments": {"a": [', '"x\\"', '"', "}", "]", "[", "{", "<", "\n", " "),
    *("clock", "clock(", "a='", "'", ")", ",", ";", "\\", "text", "é", "</think>", "<think>", "="),
]
MACHINES: dict[str, Callable[[], Machine]] = {
    **{name: (lambda family=family: family.parser(TOOLS)) for name, family in BY_NAME.items()},
    "thoughts": lambda: Thoughts(("<think>", "</think>"), opened=False),
    "opened": lambda: Thoughts(("<think>", "</think>"), opened=True),
}


@given(
    st.sampled_from(sorted(MACHINES)),
    st.lists(st.sampled_from(PIECES), max_size=24).map("".join),
    st.lists(st.integers(0, 200), max_size=8),
)
def test_no_split_changes_what_is_found(name: str, answer: str, cuts: list[int]) -> None:
    """Nor is a character lost: all that is no call is text, in order."""
    places = sorted({0, len(answer), *(cut for cut in cuts if cut < len(answer))})
    pieces = [answer[a:b] for a, b in zip(places, places[1:], strict=False)]
    whole = read(MACHINES[name](), [answer])
    assert read(MACHINES[name](), pieces) == whole
    if not any(isinstance(part, CallBegin | Reasoning) for part in whole) and name in BY_NAME:
        assert content(whole) == answer
    rest = iter(answer)
    assert all(char in rest for char in content(whole)), "in order"


def test_arguments_come_while_they_are_made() -> None:
    for name, answer in (
        ("hermes", HERMES),
        ("mistral", f"[TOOL_CALLS]{LISTED}"),
        ("llama3_json", LLAMA),
    ):
        parser, pieces = BY_NAME[name].parser(TOOLS), 0
        for char in answer:
            pieces += any(isinstance(part, Arguments) for part in parser.push(char))
        assert pieces >= len(ARGUMENTS)


def test_long_answers_take_linear_time() -> None:
    """Marks that never become a call, and nested ones; quadratic work would take minutes."""
    for name in BY_NAME:
        for answer in (
            "<tool_call>{" * 20_000,
            " " * 40_000,
            '{"a":' * 10_000,
            "[clock(" + "[" * 40_000,
        ):
            assert content(read(BY_NAME[name].parser(TOOLS), [answer])) == answer


FAMILY_OF = {
    **{"hermes": "hermes", "qwen2_5": "hermes", "qwen3": "hermes", "qwen3_coder": "qwen3_coder"},
    **{"llama3": "llama3_json", "llama3_pythonic": "pythonic", "mistral": "mistral"},
    **{"mistral_args": "mistral", "granite": "granite", "phi4_mini": "granite"},
    **{"gemma": None, "chatml": None, "deepseek": None, "gpt_oss": None},
}


def test_every_family_has_a_setting() -> None:
    (setting,) = [one for one in settings() if one.flag == "--tool-call-parser"]
    assert set(setting.choices) == {"auto", *BY_NAME}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_is_that_of_the_template(name: str) -> None:
    template = (TEMPLATES / f"{name}.jinja").read_text()
    found = family_of(template)
    assert (found.name if found else None) == FAMILY_OF[name]
    assert family_of(template, "pythonic") is BY_NAME["pythonic"]
    marked = {"qwen3": "<think>", "deepseek": "<think>", "mistral_args": "[THINK]"}
    marks = marks_of(template)
    assert (marks[0] if marks else None) == marked.get(name)


@pytest.mark.parametrize(
    "text",
    [
        "[f(1)]",
        "[f(a=b)]",
        "[f(a=1]",
        "f(a=1)",
        "[f(a=1e999)]",
        "[f(a={1: 2})]",
        "[f(a='x)]",
        "[f() g()]",
    ],
)
def test_what_is_no_list_of_calls(text: str) -> None:
    assert calls_of(text) is None
