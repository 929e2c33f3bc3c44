"""Prompts of chat templates, against transformers' `apply_chat_template`: the base model's, and an adapter's own."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import pytest
from aiohttp.test_utils import TestClient
from transformers import AutoTokenizer

from engine.errors import InvalidRequest
from engine.messages import AdapterText
from engine.server.conversation import Conversation
from engine.server.openai.messages import conversation
from engine.server.openai.schemas import ChatBody
from engine.server.templates import Templates
from engine.server.text import Text
from tests.server.fake import FakeBackend, Json
from tests.server.own import read

TEMPLATES = Path(__file__).parents[2] / "data" / "templates"
FAMILIES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
TEXT_ARGUMENTS = {"deepseek"}  # templates that join arguments to text

WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather <now> & later",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CLOCK: Json = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
CALL: Json = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Köln", "days": 2}'},
}
USER: Json = {"role": "user", "content": "Weather in Köln?"}
ROUND: list[Json] = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {
        "role": "tool",
        "name": "get_weather",
        "tool_call_id": "abcdef123",
        "content": '{"sky": "rain"}',
    },
]
SYSTEM: Json = {"role": "system", "content": "Be brief."}
LONG: list[Json] = [USER, {"role": "assistant", "content": "Rain."}, USER]
PREFILL: list[Json] = [USER, {"role": "assistant", "content": "The sky"}]
DOCUMENTS = [{"title": "a", "text": "It rains."}]
CASES: dict[str, Json] = {
    "plain": {"messages": [USER]},
    "system": {"messages": [SYSTEM, *LONG]},
    "parts": {"messages": [USER | {"content": [{"type": "text", "text": "Weather in Köln?"}]}]},
    "tools": {"messages": [SYSTEM, USER], "tools": [WEATHER, CLOCK]},
    "result": {"messages": ROUND, "tools": [WEATHER]},
    "answered": {"messages": [*ROUND, {"role": "assistant", "content": "Rain."}, USER]},
    "history": {"messages": PREFILL, "add_generation_prompt": False},
    "thought": {"messages": [USER, LONG[1] | {"reasoning_content": "Hm."}, USER]},
    "prefill": {"messages": PREFILL, "continue_final_message": True},
    "variables": {
        "messages": [USER],
        "chat_template_kwargs": {
            "enable_thinking": False,
            "thinking": True,
            "date_string": "1 May",
            "controls": {"length": "short"},
        },
        "reasoning_effort": "high",
    },
    "documents": {"messages": [USER], "documents": DOCUMENTS},
}


def tokenizer_of(folder: Path, family: str) -> Any:
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.chat_template = (TEMPLATES / f"{family}.jinja").read_text()
    return loaded


def expected(tokenizer: Any, case: Json, family: str) -> str | None:
    """Transformers' prompt; None: the template refuses the messages."""
    given = copy.deepcopy(case)
    for message in given["messages"]:
        if isinstance(message["content"], list):
            message["content"] = message["content"][0]["text"]
        for call in message.get("tool_calls") or []:
            function = call["function"]
            arguments = json.loads(function["arguments"])
            if family not in TEXT_ARGUMENTS:
                function["arguments"] = arguments
    continues = given.get("continue_final_message", False)
    effort = {"reasoning_effort": given["reasoning_effort"]} if "reasoning_effort" in given else {}
    try:
        return str(
            tokenizer.apply_chat_template(
                given["messages"],
                tools=given.get("tools"),
                documents=given.get("documents"),
                tokenize=False,
                add_generation_prompt=given.get("add_generation_prompt", not continues),
                continue_final_message=continues,
                **given.get("chat_template_kwargs", {}) | effort,
            )
        )
    except jinja2.TemplateError:
        return None


def asked(case: Json) -> Conversation:
    """As the route makes it."""
    body = msgspec.convert({key: value for key, value in case.items() if key != "tools"}, ChatBody)
    return replace(conversation(body), tools=case.get("tools"))


@pytest.mark.parametrize("family", FAMILIES)
async def test_prompts_are_transformers(family: str, folder: Path) -> None:
    """Of the base model's template, and of the same one as an adapter's."""
    theirs = tokenizer_of(folder, family)
    base = Text(str(folder), str(TEMPLATES / f"{family}.jinja"))
    templates = Templates(max_children=1)
    own = base.adapted(AdapterText(b"", template=theirs.chat_template), templates)
    served = 0
    try:
        for name, case in CASES.items():
            prompt, made = expected(theirs, case, family), asked(case)
            if prompt is None:
                with pytest.raises(InvalidRequest, match="refused the messages"):
                    base.chat.render(made)
                with pytest.raises(InvalidRequest, match="refused the messages"):
                    await own.chat.render_own(made, 10_000)
                continue
            served += 1
            assert base.chat.render(made) == prompt, name
            assert await own.chat.render_own(made, 10_000) == prompt, name
            ids = theirs.encode(prompt, add_special_tokens=False)
            assert await base.encode_chat(made) == await own.encode_chat(made) == ids, name
    finally:
        templates.close()
        base.close()
    assert served >= len(CASES) - (3 if family in ("gemma", "mistral") else 1)


NAMED = {
    "default": "D{{ messages[0].content }}",
    "tool_use": "T{{ tools | length }}",
    "rag": "R{{ documents[0].text }}",
}


async def test_named_templates(folder: Path, tmp_path: Path) -> None:
    """As transformers chooses: `tool_use` with tools, else `default`; `rag` by its name. The adapter's too."""
    listed = [{"name": name, "template": text} for name, text in NAMED.items()]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = NAMED
    base = Text(str(folder), str(tmp_path / "tokenizer_config.json"))
    found = read(folder, tmp_path).text
    assert found is not None
    templates = Templates(max_children=3)
    own = Text(str(folder)).adapted(found, templates)
    try:
        for given in ({}, {"tools": [WEATHER]}, {"documents": DOCUMENTS, "chat_template": "rag"}):
            made = asked({"messages": [USER], **given})
            prompt = theirs.apply_chat_template([USER], tokenize=False, **given)
            assert base.chat.render(made) == await own.chat.render_own(made, 100) == prompt
        with pytest.raises(InvalidRequest, match="default, rag, tool_use") as caught:
            base.chat.render(asked({"messages": [USER], "chat_template": "{{ 1 }}"}))
        assert caught.value.field == "chat_template"
    finally:
        templates.close()
        base.close()


def test_a_developer_is_the_system_where_the_template_knows_no_other(folder: Path) -> None:
    case: Json = {"messages": [SYSTEM | {"role": "developer"}, USER]}
    for family, role in (("chatml", "system"), ("gpt_oss", "developer")):
        text = Text(str(folder), str(TEMPLATES / f"{family}.jinja"))
        expect = {"messages": [SYSTEM | {"role": role}, USER]}
        assert text.chat.render(asked(case)) == expected(
            tokenizer_of(folder, family), expect, family
        )
        text.close()


DEEP: Any = {}
for _ in range(17):
    DEEP = {"a": DEEP}

REFUSED: list[tuple[Json, str]] = [
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"_a": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {f"a{i}": 1 for i in range(33)}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"a": "x" * 17000}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"a": DEEP}}, "chat_template_kwargs"),
    ({"documents": [{}] * 129}, "documents"),
    ({"continue_final_message": True}, "continue_final_message"),
    (
        {"messages": PREFILL, "continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
    ),
    (
        {"messages": [USER, ROUND[1] | {"tool_calls": [CALL | {"type": "x"}]}]},
        "messages[1].tool_calls[0].type",
    ),
    ({"messages": [USER, ROUND[1] | {"tool_calls": [CALL] * 129}]}, "messages[1].tool_calls"),
    *(
        (
            {
                "messages": [
                    USER,
                    ROUND[1]
                    | {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
                ]
            },
            "messages[1].tool_calls[0].function.arguments",
        )
        for arguments in ("{", "[1]", "[" * 5000, DEEP)
    ),
    (
        {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]},
        "messages[0].function_call",
    ),
]


@pytest.mark.parametrize(("given", "field"), REFUSED)
async def test_refused_by_name(
    client: TestClient, backend: FakeBackend, given: Json, field: str
) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": [USER]} | given)
    error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, field), error
    assert not backend.requests


async def test_messages_that_the_template_leaves_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    text = Text(str(folder), str(tmp_path / "t.jinja"))
    with pytest.raises(InvalidRequest, match="empty prompt .*add a message with the role user"):
        await text.encode_chat(Conversation([SYSTEM]))
    text.close()
