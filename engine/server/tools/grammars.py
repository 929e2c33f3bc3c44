"""Grammars for answers that must be calls: Lark for llguidance, in the call format of a family.

The arguments of a call follow its tool's JSON schema.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.server.reasoning import Marks
from engine.server.tools.definitions import Tool
from engine.server.tools.qwen_xml import types_of

# JSON as models write it, without room for endless white space.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """The calls that an answer must have: one of `tools`, with `parallel` any number of them.

    `token`: a mark as a terminal, because special tokens are not text. `template`: the chat template.
    """

    tools: Sequence[Tool]
    parallel: bool
    token: Callable[[str], str]
    template: str


@dataclass(frozen=True, slots=True)
class Rules:
    """Lark rules for all calls of an answer; `start` begins."""

    start: str
    others: Sequence[str] = ()


Writer = Callable[[Wanted], Rules]


def hermes(wanted: Wanted) -> Rules:
    begin, end = wanted.token("<tool_call>"), wanted.token("</tool_call>")
    call = f'{begin} "\\n" object "\\n" {end}'
    more = ' ("\\n" call)*' if wanted.parallel else ""
    return Rules(f"call{more}", [f"call: {call}", *_objects(wanted.tools, "arguments")])


def granite(wanted: Wanted) -> Rules:
    return _listed(wanted, "<|tool_call|>", "")


def mistral(wanted: Wanted) -> Rules:
    if "[ARGS]" not in wanted.template:
        return _listed(wanted, "[TOOL_CALLS]", " ")
    begin, behind = wanted.token("[TOOL_CALLS]"), wanted.token("[ARGS]")
    calls = [f"{_text(tool.name)} {behind} {_json(tool.parameters)}" for tool in wanted.tools]
    more = "+" if wanted.parallel else ""
    return Rules(f"call{more}", [f"call: {begin} object", *_choice("object", calls)])


def llama3(wanted: Wanted) -> Rules:
    more = ' ("; " object)*' if wanted.parallel else ""
    return Rules(f"object{more}", _objects(wanted.tools, "parameters"))


def pythonic(wanted: Wanted) -> Rules:
    calls, rules = [], []
    for number, tool in enumerate(wanted.tools):
        pairs = {
            key: f"{_text(f'{key}=')} {_json(_inner(tool.parameters, schema))}"
            for key, schema in _properties(tool).items()
        }
        rules += _optional_list(f"pairs_{number}", pairs, _required(tool))
        calls.append(f'{_text(f"{tool.name}(")} pairs_{number} ")"')
    more = ' (", " object)*' if wanted.parallel else ""
    return Rules(f'"[" object{more} "]"', [*_choice("object", calls), *rules])


def qwen_xml(wanted: Wanted) -> Rules:
    begin, end = wanted.token("<tool_call>"), wanted.token("</tool_call>")
    calls, rules = [], []
    for number, tool in enumerate(wanted.tools):
        required, parts = _required(tool), []
        for at, (key, schema) in enumerate(_properties(tool).items()):
            name = f"parameter_{number}_{at}"
            rules += _parameter(name, key, _inner(tool.parameters, schema))
            parts.append(name if key in required else f"{name}?")
        calls.append(f'{_text(f"<function={tool.name}>")} "\\n" {" ".join(parts)} "</function>"')
    more = ' ("\\n" call)*' if wanted.parallel else ""
    call = f'call: {begin} "\\n" object "\\n" {end}'
    return Rules(f"call{more}", [call, *_choice("object", calls), *rules])


def grammar_of(
    writer: Writer,
    wanted: Wanted,
    thoughts: tuple[Marks, bool] | None,
    free: str | None = None,
) -> str:
    """The grammar of an answer. `thoughts`: the marks of reasoning, and whether it has begun. `free`: the mark before
    which any text may come; the answer may have no call then."""
    token = wanted.token
    if free is not None:
        wanted = replace(wanted, token=lambda mark: "begin" if mark == free else token(mark))
    rules = writer(wanted)
    start, others = rules.start, list(rules.others)
    if free is not None:
        start = f"({start})* /(.|\\n)*/"
        lazy = "[lazy]" if token(free).startswith('"') else ""
        others += [f"begin{lazy}: /(.|\\n)*/ {token(free)}"]
    if thoughts is not None:
        before, thought = _thoughts(*thoughts, token)
        start, others = f"{before} {start}", [*others, *thought]
    return _lark(start, others)


def after_thoughts(grammar: str, marks: Marks, begun: bool, token: Callable[[str], str]) -> str:
    """The grammar of an answer that may reason before what `grammar` demands. `begun`: it reasons already."""
    before, thought = _thoughts(marks, begun, token)
    inner: dict[str, Any] = {"lark_grammar": grammar}
    if grammar.startswith("{"):
        (inner,) = json.loads(grammar)["grammars"]
    outer = {"lark_grammar": _lark(f"{before} @answer", thought)}
    return json.dumps({"grammars": [outer, inner | {"name": "answer"}]})


def _lark(start: str, others: Sequence[str]) -> str:
    return "\n".join(["%llguidance {}", f"start: {start}", *others, ""])


def _thoughts(marks: Marks, begun: bool, token: Callable[[str], str]) -> tuple[str, list[str]]:
    """What stands before an answer that may reason first, and its rules."""
    begin, end = map(token, marks)
    before = "thought" if begun else f"({begin} thought)?"
    if end.startswith('"'):
        return before, ["thought: thought_end /\\n{0,2}/", f"thought_end[lazy]: /(.|\\n)*/ {end}"]
    return before, [f"thought: /(.|\\n)*/ {end} /\\n{{0,2}}/"]


def _listed(wanted: Wanted, mark: str, space: str) -> Rules:
    """A JSON list of calls."""
    more = ' (", " object)*' if wanted.parallel else ""
    start = f'{wanted.token(mark)} {_text(f"{space}[")} object{more} "]"'
    return Rules(start, _objects(wanted.tools, "arguments"))


def _objects(tools: Sequence[Tool], field: str) -> list[str]:
    """`object`: a call as a JSON object."""
    heads = [f'{{"name": {json.dumps(tool.name)}, "{field}": ' for tool in tools]
    calls = [
        f'{_text(head)} {_json(tool.parameters)} "}}"'
        for head, tool in zip(heads, tools, strict=True)
    ]
    return _choice("object", calls)


def _choice(name: str, choices: Sequence[str]) -> list[str]:
    numbered = [f"{name}_{at}" for at in range(len(choices))]
    rules = [f"{one}: {choice}" for one, choice in zip(numbered, choices, strict=True)]
    return [f"{name}: {' | '.join(numbered)}", *rules]


def _optional_list(name: str, parts: Mapping[str, str], required: Sequence[str]) -> list[str]:
    """`name`: the parts in order, with ", " between them; those that are not required may be missing."""
    rules = [f"{name}_{at}: {part}" for at, part in enumerate(parts.values())]
    later = ""  # what may follow a part, from the last one backwards
    starts: list[str] = []
    for at, key in reversed(list(enumerate(parts))):
        starts = [f"{name}_{at} {later}", *(starts if key not in required else ())]
        follow = f'", " {name}_{at} {later}'
        rules.append(
            f"{name}_after_{at}: {follow}" + ("" if key in required else f" | {later or _text('')}")
        )
        later = f"{name}_after_{at}"
    if not any(key in required for key in parts):
        starts.append('""')
    return [f"{name}: {' | '.join(starts)}", *rules]


def _parameter(name: str, key: str, schema: Mapping[str, Any]) -> list[str]:
    """A parameter of Qwen's XML: text as it is, everything else as JSON."""
    begin, end = _text(f"<parameter={key}>\n"), "\n</parameter>\n"
    choices = schema.get("enum")
    if isinstance(choices, list) and all(isinstance(one, str) for one in choices):
        return [f"{name}: {begin} ({' | '.join(map(_text, choices))}) {_text(end)}"]
    if "string" not in (types_of(schema) or {"string"}):
        return [f"{name}: {begin} {_json(schema)} {_text(end)}"]
    return [
        f"{name}: {begin} {name}_end",
        f"{name}_end[lazy]: /(.|\\n)*/ {_text(end)}",
    ]


def _properties(tool: Tool) -> Mapping[str, Any]:
    found = tool.parameters.get("properties")
    return found if isinstance(found, dict) else {}


def _required(tool: Tool) -> Sequence[str]:
    found = tool.parameters.get("required")
    return found if isinstance(found, list) else ()


def _inner(outer: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """A property's schema with the definitions that it may refer to."""
    shared = {key: outer[key] for key in ("$defs", "definitions") if key in outer}
    return (dict(schema) if isinstance(schema, dict) else {}) | shared


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**(schema or _ANY), 'x-guidance': _COMPACT})}"


def _text(text: str) -> str:
    return json.dumps(text)
