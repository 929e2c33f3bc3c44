"""Tools of chat completions: a call, its result and an answer, for every family, with OpenAI's own client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from llguidance import LLMatcher, LLTokenizer
from openai import AsyncOpenAI

from engine.server.text import Text
from tests.server.chat.test_chat_templates import CLOCK, TEMPLATES, USER, WEATHER
from tests.server.chat.test_tool_parsers import ARGUMENTS, HERMES, LISTED, LLAMA, PYTHON, XML
from tests.server.fake import FakeBackend, Json, Start
from tests.server.own import read

Said = list[tuple[str, Json]]
WEATHER_ASKED: Json = json.loads(ARGUMENTS)
ONE: Said = [("get_weather", WEATHER_ASKED)]
BOTH: Said = [*ONE, ("clock", {})]
XML_WITHOUT_LIST = XML.replace('<parameter=near>\n[{"a": [1]}]\n</parameter>\n', "")
# Template -> an answer and its calls.
ANSWERS: dict[str, tuple[str, Said]] = {
    "hermes": (HERMES, ONE),
    "qwen2_5": (HERMES, ONE),
    "qwen3": (f"<think>\nHm.\n</think>\n\n{HERMES}", ONE),
    "qwen3_coder": (
        XML_WITHOUT_LIST,
        [("get_weather", {"city": WEATHER_ASKED["city"], "days": 2})],
    ),
    "llama3": (f"<|python_tag|>{LLAMA}", ONE),
    "llama3_pythonic": (PYTHON, BOTH),
    "mistral": (f"[TOOL_CALLS] {LISTED}", BOTH),
    "mistral_args": (f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]clock[ARGS]{{}}", BOTH),
    "granite": (f"<|tool_call|>{LISTED}", BOTH),
    "phi4_mini": (f"<|tool_call|>{LISTED}<|/tool_call|>", BOTH),
}


async def chat(openai: AsyncOpenAI, **given: Any) -> Any:
    asked: Json = {"model": "", "messages": [USER], "tools": [WEATHER, CLOCK], "max_tokens": 800}
    return await openai.chat.completions.create(**asked | given)


async def streamed(openai: AsyncOpenAI, **given: Any) -> tuple[Json, str]:
    """The message that the deltas make, and the finish reason."""
    message: Json = {"content": "", "reasoning": "", "calls": []}
    reason = ""
    async for chunk in await chat(openai, stream=True, **given):
        (choice,) = chunk.choices
        reason = choice.finish_reason or reason
        message["content"] += choice.delta.content or ""
        message["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or []:
            if call.id is not None:
                assert (call.type, call.function.arguments) == ("function", "")
                assert call.index == len(message["calls"])
                message["calls"].append([call.id, call.function.name, ""])
            else:
                assert call.type is None and call.function.name is None
                assert call.index == len(message["calls"]) - 1
                message["calls"][call.index][2] += call.function.arguments
    return message, reason


@pytest.mark.parametrize("burst", [1, 5])
@pytest.mark.parametrize("family", ANSWERS, indirect=True)
async def test_a_round(
    openai: AsyncOpenAI, backend: FakeBackend, text: Text, family: str, burst: int
) -> None:
    answer, calls = ANSWERS[family]
    backend.say(answer)
    backend.burst = burst
    found = await chat(openai, seed=1)
    (choice,) = found.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    made = choice.message.tool_calls
    assert [(one.function.name, json.loads(one.function.arguments)) for one in made] == calls
    assert len({one.id for one in made}) == len(calls)
    message, reason = await streamed(openai, seed=1)
    assert reason == "tool_calls" and message["content"] == ""
    assert [(name, json.loads(text)) for _, name, text in message["calls"]] == calls
    thought = "Hm." if family == "qwen3" else None
    assert (message["reasoning"] or None) == thought
    assert getattr(choice.message, "reasoning_content", None) == thought

    backend.say("It rains.")
    history: list[Any] = [USER, choice.message.model_dump(exclude_none=True)]
    if family == "llama3":
        history[1]["tool_calls"] = history[1]["tool_calls"][:1]
    history += [
        {"role": "tool", "tool_call_id": one["id"], "content": "rain"}
        for one in history[1]["tool_calls"]
    ]
    found = await chat(openai, messages=history)
    assert found.choices[0].message.content == "It rains."
    assert found.choices[0].message.tool_calls is None
    assert found.choices[0].finish_reason == "stop"
    prompt = text.written(backend.requests[-1].tokens)
    assert "get_weather" in prompt and "rain" in prompt and '\\"city' not in prompt


@pytest.mark.parametrize("cut", range(1, 60, 7))
async def test_a_call_that_is_cut_off(openai: AsyncOpenAI, backend: FakeBackend, cut: int) -> None:
    """The text before the arguments is content; begun arguments are a call. The reason is the length."""
    backend.say(HERMES)
    found = (await chat(openai, max_tokens=cut, seed=1)).choices[0]
    message, reason = await streamed(openai, max_tokens=cut, seed=1)
    assert found.finish_reason == reason == "length"
    assert (found.message.content or "") == message["content"]
    calls = found.message.tool_calls or []
    assert [call.function.arguments for call in calls] == [text for *_, text in message["calls"]]
    assert HERMES.startswith(message["content"])
    assert all(ARGUMENTS.startswith(call.function.arguments.rstrip("\ufffd")) for call in calls)
    assert bool(calls) != bool(message["content"])


async def test_text_next_to_calls(openai: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.say(f"I look.\n{HERMES}\n")
    found = (await chat(openai)).choices[0]
    assert found.message.content == "I look." and len(found.message.tool_calls) == 1
    found = (await chat(openai, stop=["</tool_call>"])).choices[0]
    assert len(found.message.tool_calls) == 1 and found.finish_reason == "tool_calls"


async def test_one_call_without_parallel_ones(openai: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.say(f"{HERMES}\n{HERMES}")
    found = (await chat(openai, parallel_tool_calls=False)).choices[0]
    assert len(found.message.tool_calls) == 1
    message, _ = await streamed(openai, parallel_tool_calls=False)
    assert len(message["calls"]) == 1 and message["content"] == ""


async def test_no_tools_no_calls(openai: AsyncOpenAI, backend: FakeBackend, text: Text) -> None:
    backend.say(HERMES)
    given: list[Json] = [{"tools": []}, {"tool_choice": "none"}]
    for one in given:
        found = (await chat(openai, **one)).choices[0]
        assert found.message.tool_calls is None and found.finish_reason == "stop"
        assert "get_weather" not in text.written(backend.requests[-1].tokens)


@pytest.mark.parametrize("family", ["mistral_args", "qwen3"], indirect=True)
async def test_reasoning(
    openai: AsyncOpenAI, backend: FakeBackend, family: str, text: Text
) -> None:
    begin, end = (
        ("[THINK]", "[/THINK]") if family == "mistral_args" else ("<think>\n", "\n</think>\n\n")
    )
    backend.say(f"{begin}Hm, so.{end}Yes.")
    for tools in ([], [WEATHER]):
        found = await chat(openai, tools=tools, seed=1)
        message = found.choices[0].message
        assert (message.content, message.reasoning_content) == ("Yes.", "Hm, so.")
        assert message.reasoning == "Hm, so."
        least = len(await text.encode("Hm, so.", special=False))
        count = found.usage.completion_tokens_details.reasoning_tokens
        assert least <= count < found.usage.completion_tokens
        parts, _ = await streamed(openai, tools=tools, seed=1)
        assert (parts["content"], parts["reasoning"]) == ("Yes.", "Hm, so.")
        hidden: Json = {"extra_body": {"include_reasoning": False}, "tools": tools}
        message = (await chat(openai, **hidden)).choices[0].message
        assert message.content == "Yes." and not hasattr(message, "reasoning_content")
        parts, _ = await streamed(openai, **hidden)
        assert (parts["content"], parts["reasoning"]) == ("Yes.", "")


@pytest.mark.parametrize("family", ["deepseek"], indirect=True)
async def test_reasoning_that_the_prompt_begins(
    openai: AsyncOpenAI, backend: FakeBackend, family: str
) -> None:
    backend.say("Hm.\n</think>\n\nYes.")
    message = (await chat(openai, tools=[])).choices[0].message
    assert (message.content, message.reasoning_content) == ("Yes.", "Hm.")
    message = (await chat(openai, tools=[], max_tokens=2)).choices[0].message
    assert message.content is None and message.reasoning_content == "Hm"
    prefill = [USER, {"role": "assistant", "content": "<think>H"}]
    backend.say("m.</think>Yes.")
    extra = {"continue_final_message": True}
    message = (await chat(openai, tools=[], messages=prefill, extra_body=extra)).choices[0].message
    assert (message.content, message.reasoning_content) == ("Yes.", "m.")


async def test_the_parser_is_the_adapters(
    start: Start, backend: FakeBackend, folder: Path, tmp_path: Path
) -> None:
    """An adapter with a template of another family; and a server that insists on one."""
    (tmp_path / "chat_template.jinja").write_text((TEMPLATES / "llama3.jinja").read_text())
    found = read(folder, tmp_path).text
    assert found is not None
    backend.adapter_texts["me/own"] = found
    asked: Json = {"messages": [USER], "tools": [WEATHER], "max_tokens": 800}
    for insisted, expect in (
        ("auto", {"base": 0, "me/own": 1}),
        ("hermes", {"base": 0, "me/own": 0}),
    ):
        client: TestClient = await start({"tool_call_parser": insisted})
        for model, count in expect.items():
            backend.say(LLAMA)
            response = await client.post("/v1/chat/completions", json=asked | {"model": model})
            message = (await response.json())["choices"][0]["message"]
            assert len(message.get("tool_calls", [])) == count, (insisted, model)


# Choice -> whether the grammar accepts one call of get_weather, two calls, text.
REQUIRED: list[tuple[Any, bool, tuple[bool, bool, bool]]] = [
    ("required", True, (True, True, False)),
    ("required", False, (True, False, False)),
    ({"type": "function", "function": {"name": "get_weather"}}, True, (True, False, False)),
    ({"type": "function", "function": {"name": "clock"}}, True, (False, False, False)),
]
CALL = '{"city": "Köln", "days": 2}'
WRITTEN = {
    "hermes": (f'<tool_call>\n{{"name": "get_weather", "arguments": {CALL}}}\n</tool_call>', "\n"),
    "llama3": (f'{{"name": "get_weather", "parameters": {CALL}}}', "; "),
    "mistral_args": (f"[TOOL_CALLS]get_weather[ARGS]{CALL}", ""),
    "qwen3_coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n<parameter=days>\n2\n"
        "</parameter>\n</function>\n</tool_call>",
        "\n",
    ),
    "chatml": (f'<tool_call>\n{{"name": "get_weather", "arguments": {CALL}}}\n</tool_call>', "\n"),
}
LISTS = {
    "mistral": ("[TOOL_CALLS] [", f'{{"name": "get_weather", "arguments": {CALL}}}', ", ", "]"),
    "granite": ("<|tool_call|>[", f'{{"name": "get_weather", "arguments": {CALL}}}', ", ", "]"),
    "llama3_pythonic": ("[", 'get_weather(city="Köln", days=2)', ", ", "]"),
}
LISTS |= {name: ("", call, separator, "") for name, (call, separator) in WRITTEN.items()}


@pytest.mark.parametrize("family", LISTS, indirect=True)
@pytest.mark.parametrize(("choice", "parallel", "accepts"), REQUIRED)
async def test_required_calls_have_a_grammar(
    openai: AsyncOpenAI,
    monkeypatch: pytest.MonkeyPatch,
    backend: FakeBackend,
    text: Text,
    family: str,
    choice: Any,
    parallel: bool,
    accepts: tuple[bool, bool, bool],
) -> None:
    """In the family's own format, and what it accepts is read back as calls."""
    grammars = _record(monkeypatch)
    begin, call, separator, end = LISTS[family]
    one, two = f"{begin}{call}{end}", f"{begin}{call}{separator}{call}{end}"
    backend.say(one)
    found = (await chat(openai, tool_choice=choice, parallel_tool_calls=parallel)).choices[0]
    (grammar,) = grammars
    assert grammar is not None
    checked = [_accepts(grammar, text, answer) for answer in (one, two, "No.")]
    assert checked == list(accepts)
    if accepts[0]:
        (called,) = found.message.tool_calls
        assert json.loads(called.function.arguments) == json.loads(CALL)
    bad = one.replace("2", '"two"') if family != "qwen3_coder" else one.replace("\n2\n", "\ntwo\n")
    assert not _accepts(grammar, text, bad)


@pytest.mark.parametrize("family", ["hermes"], indirect=True)
@pytest.mark.parametrize("given", [{}, {"parameters": None}])
async def test_a_function_without_parameters_takes_none(
    openai: AsyncOpenAI,
    monkeypatch: pytest.MonkeyPatch,
    backend: FakeBackend,
    text: Text,
    family: str,
    given: Json,
) -> None:
    """As OpenAI defines it; an empty schema allows any."""
    grammars = _record(monkeypatch)
    backend.say("x")
    for function in ({"name": "now"} | given, {"name": "now", "parameters": {}}):
        tool = {"type": "function", "function": function}
        await chat(openai, tool_choice="required", tools=[tool])
    calls = [
        f'<tool_call>\n{{"name": "now", "arguments": {arguments}}}\n</tool_call>'
        for arguments in ("{}", '{"a": 1}')
    ]
    without, any_ = grammars
    assert without is not None and any_ is not None
    assert [_accepts(without, text, call) for call in calls] == [True, False]
    assert [_accepts(any_, text, call) for call in calls] == [True, True]


def _record(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The grammars that generations get from now on."""
    from engine.server import generation

    found: list[str | None] = []
    original = generation.reading_of

    async def record(*given: Any) -> Any:
        reading, parameters = await original(*given)
        found.append(parameters.grammar)
        return reading, parameters

    monkeypatch.setattr(generation, "reading_of", record)
    return found


def _accepts(grammar: str, text: Text, answer: str) -> bool:
    matcher = LLMatcher(LLTokenizer(text._tokenizer.to_str()), grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids = text._tokenizer.encode(answer, add_special_tokens=False).ids
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    "family", ["hermes", "mistral", "mistral_args", "qwen3_coder", "granite"], indirect=True
)
async def test_strict_tools_leave_text_free(
    openai: AsyncOpenAI,
    monkeypatch: pytest.MonkeyPatch,
    backend: FakeBackend,
    text: Text,
    family: str,
) -> None:
    grammars = _record(monkeypatch)
    backend.say("x")
    strict = WEATHER | {"function": WEATHER["function"] | {"strict": True}}
    await chat(openai, tools=[strict, CLOCK])
    await chat(openai)
    grammar, without = grammars
    assert grammar is not None and without is None
    begin, call, separator, end = LISTS[family]
    one = f"{begin}{call}{end}"
    for answer in (
        "",
        "No, <b>\n",
        one,
        f"So: {one}",
        f"{begin}{call}{separator}{call}{end}",
        f"{one} Done.",
    ):
        assert _accepts(grammar, text, answer), answer
    bad = one.replace("2", '"two"') if family != "qwen3_coder" else one.replace("\n2\n", "\ntwo\n")
    assert not _accepts(grammar, text, bad)
    assert not _accepts(grammar, text, one.replace("get_weather", "other"))


@pytest.mark.parametrize("family", ["qwen3", "deepseek"], indirect=True)
async def test_required_calls_may_be_thought_about(
    openai: AsyncOpenAI,
    monkeypatch: pytest.MonkeyPatch,
    backend: FakeBackend,
    text: Text,
    family: str,
) -> None:
    grammars = _record(monkeypatch)
    backend.say("x")
    await chat(openai, tool_choice="required")
    (grammar,) = grammars
    assert grammar is not None
    call = WRITTEN["hermes"][0]
    opened = family == "deepseek"  # the prompt begins the reasoning
    assert _accepts(grammar, text, f"Hm.\n</think>\n\n{call}") == opened
    assert _accepts(grammar, text, f"<think>\nHm.\n</think>\n\n{call}")
    assert _accepts(grammar, text, call) != opened


FUNCTION: Json = {"name": "f", "parameters": {}}
DEEP: Any = {"type": "object"}
for _ in range(20):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
REFUSED: list[tuple[Json, str]] = [
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ({"tools": ["x"]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    (
        {"tools": [{"type": "function", "function": FUNCTION | {"name": "a b"}}]},
        "tools[0].function.name",
    ),
    (
        {"tools": [{"type": "function", "function": FUNCTION | {"name": "a" * 65}}]},
        "tools[0].function.name",
    ),
    (
        {"tools": [{"type": "function", "function": FUNCTION | {"parameters": []}}]},
        "tools[0].function.parameters",
    ),
    (
        {
            "tools": [
                {"type": "function", "function": FUNCTION | {"parameters": {"type": "string"}}}
            ]
        },
        "tools[0].function.parameters",
    ),
    (
        {"tools": [{"type": "function", "function": FUNCTION | {"description": 3}}]},
        "tools[0].function.description",
    ),
    (
        {"tools": [{"type": "function", "function": FUNCTION | {"description": "x" * 300_000}}]},
        "tools",
    ),
    ({"tools": [{"type": "function", "function": FUNCTION | {"parameters": DEEP}}]}, "tools"),
    (
        {
            "tools": [
                {"type": "function", "function": FUNCTION | {"name": f"f{i}"}} for i in range(129)
            ]
        },
        "tools",
    ),
    ({"tools": [{"type": "function", "function": FUNCTION}] * 2}, "tools"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"functions": [FUNCTION]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    (
        {
            "tool_choice": "required",
            "tools": [
                {
                    "type": "function",
                    "function": FUNCTION | {"parameters": {"properties": {"a": {"not": {}}}}},
                }
            ],
        },
        "tools",
    ),
]


@pytest.mark.parametrize(("given", "field"), REFUSED)
async def test_refused_by_name(start: Start, backend: FakeBackend, given: Json, field: str) -> None:
    client = await start()
    asked: Json = {"messages": [USER], "tools": [WEATHER]}
    response = await client.post("/v1/chat/completions", json=asked | given)
    error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, field), error
    assert not backend.requests


@pytest.mark.parametrize("family", ["chatml", "gpt_oss"], indirect=True)
async def test_a_template_without_known_calls(
    start: Start, backend: FakeBackend, family: str
) -> None:
    """The remedy is in the error, and works."""
    client = await start()
    asked: Json = {"messages": [USER], "tools": [WEATHER], "max_tokens": 800}
    response = await client.post("/v1/chat/completions", json=asked)
    error = (await response.json())["error"]
    assert response.status == 400 and error["param"] == "tools"
    assert "--tool-call-parser" in error["message"]
    client = await start({"tool_call_parser": "hermes"})
    backend.say(HERMES)
    response = await client.post("/v1/chat/completions", json=asked)
    assert (await response.json())["choices"][0]["finish_reason"] == "tool_calls"
