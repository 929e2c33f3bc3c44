"""`openai`: tools of chat completions. A grammar makes the calls of the small model valid."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from tests.conformance.wire import (
    CITY,
    MESSAGES,
    ONE_CALL,
    TOOLS,
    TWO_CALLS,
    Server,
    calling,
    function,
    is_weather,
)

NAMED: Any = {"type": "function", "function": {"name": "weather"}}
GREEDY: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 120}


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.v1, api_key=server.key, max_retries=0) as client:
        yield client


@pytest.fixture
async def later(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=server.v1, api_key=server.key, max_retries=0) as client:
        yield client


def create(client: OpenAI, **given: Any) -> Any:
    return client.chat.completions.create(**{"model": "base", "tools": TOOLS} | GREEDY | given)


def calls_of(chunks: Any) -> list[dict[str, str]]:
    """The calls that the deltas of a stream make, put together as clients do."""
    made: list[dict[str, str]] = []
    for chunk in chunks:
        for delta in chunk.choices[0].delta.tool_calls or ():
            if delta.index == len(made):
                made.append({"id": delta.id, "name": delta.function.name, "arguments": ""})
                assert delta.type == "function"
            else:
                assert not delta.id and not delta.function.name
            made[delta.index]["arguments"] += delta.function.arguments or ""
    return made


def as_called(message: Any) -> list[tuple[str, str]]:
    return [(one.function.name, one.function.arguments) for one in message.tool_calls]


@pytest.mark.parametrize("model", ["base", "pirate", "json"])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_that_must_be(client: OpenAI, model: str, choice: Any) -> None:
    answer = create(client, model=model, tool_choice=choice, tools=TOOLS[:1]).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call, *_) = answer.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_")
    assert call.function.name == "weather" and is_weather(call.function.arguments)


def test_named_is_one_of_several(client: OpenAI) -> None:
    for name in ("weather", "clock"):
        choice = {"type": "function", "function": {"name": name}}
        made = create(client, tool_choice=choice).choices[0].message.tool_calls
        assert {one.function.name for one in made} == {name}


def test_required_at_any_temperature(client: OpenAI) -> None:
    """Each of several choices is a valid call of one of the tools."""
    answer = create(client, tool_choice="required", n=8, temperature=1.5, seed=1)
    made = [call for one in answer.choices for call in one.message.tool_calls]
    assert len(made) >= 8 and {one.function.name for one in made} <= {"weather", "clock"}
    for call in made:
        if call.function.name == "weather":
            assert is_weather(call.function.arguments)
        else:
            assert json.loads(call.function.arguments)["zone"] in ("UTC", "CET")


@pytest.mark.parametrize("choice", ["auto", None], ids=["auto", "unset"])
def test_auto_may_be_text(client: OpenAI, server: Server, choice: Any) -> None:
    given = {} if choice is None else {"tool_choice": choice}
    answer = create(client, max_tokens=24, **given)
    same = server.chat(tools=TOOLS)
    message = answer.choices[0].message
    assert message.tool_calls is None and message.content
    assert message.content == same["choices"][0]["message"]["content"]
    assert answer.usage.prompt_tokens == same["usage"]["prompt_tokens"]


def test_auto_may_be_a_call(client: OpenAI) -> None:
    answer = create(client, tool_choice="auto", extra_body=calling(ONE_CALL)).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    ((name, arguments),) = as_called(answer.message)
    assert name == "weather" and is_weather(arguments)


def test_parallel_calls(client: OpenAI) -> None:
    message = create(client, extra_body=calling(TWO_CALLS)).choices[0].message
    assert [name for name, _ in as_called(message)] == ["weather", "clock"]
    assert len({call.id for call in message.tool_calls}) == 2


def test_no_parallel_calls(client: OpenAI) -> None:
    message = (
        create(client, parallel_tool_calls=False, extra_body=calling(TWO_CALLS)).choices[0].message
    )
    assert [name for name, _ in as_called(message)] == ["weather"]


def test_none_means_no_tools(client: OpenAI, server: Server) -> None:
    answer = create(client, tool_choice="none", max_tokens=24)
    message = answer.choices[0].message
    assert message.tool_calls is None and message.content == server.says()


@pytest.mark.parametrize(
    "given",
    [
        {"tool_choice": "required"},
        {"tool_choice": NAMED},
        {"extra_body": calling(ONE_CALL)},
        {"extra_body": calling(TWO_CALLS)},
    ],
    ids=["required", "named", "auto", "parallel"],
)
def test_deltas_make_the_calls(client: OpenAI, given: Any) -> None:
    whole = create(client, **given).choices[0]
    chunks = list(create(client, stream=True, **given))
    made = calls_of(chunks)
    assert [(one["name"], one["arguments"]) for one in made] == as_called(whole.message)
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert len({one["id"] for one in made}) == len(made)


def test_arguments_arrive_in_pieces(client: OpenAI) -> None:
    chunks = list(create(client, stream=True, tool_choice=NAMED))
    pieces = [
        call.function.arguments
        for chunk in chunks
        for call in chunk.choices[0].delta.tool_calls or ()
    ]
    assert len(pieces) > 3


def test_stream_helper_puts_calls_together(client: OpenAI) -> None:
    whole = create(client, tool_choice=NAMED).choices[0].message
    with client.chat.completions.stream(
        model="base", tools=TOOLS, tool_choice=NAMED, **GREEDY
    ) as stream:
        done = [one for one in stream if one.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion().choices[0].message
    assert as_called(final) == as_called(whole)
    assert [(one.name, one.arguments) for one in done] == as_called(whole)


def test_results_go_back_to_the_model(client: OpenAI) -> None:
    """Question, call, result, answer: the prompt grows by the call and its result."""
    asked = create(client, tool_choice=NAMED)
    said = asked.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "It rains in Lyon."}
        for call in said.tool_calls
    ]
    answer = create(client, messages=[*MESSAGES, said, *results], max_tokens=24)
    assert answer.usage.prompt_tokens > asked.usage.prompt_tokens + 10
    assert answer.choices[0].message.content is not None
    longer = [one | {"content": one["content"] * 2} for one in results]
    more = create(client, messages=[*MESSAGES, said, *longer], max_tokens=24)
    assert more.usage.prompt_tokens > answer.usage.prompt_tokens


def test_tools_are_in_the_prompt(client: OpenAI) -> None:
    counts = [create(client, tools=TOOLS[:count], max_tokens=1).usage for count in (1, 2)]
    plain = client.chat.completions.create(model="base", **GREEDY | {"max_tokens": 1}).usage
    assert plain and plain.prompt_tokens < counts[0].prompt_tokens < counts[1].prompt_tokens


class Weather(BaseModel):
    """Tells the weather."""

    city: Literal["Lyon", "Paris"]
    days: int = Field(ge=1, le=9)


@pytest.mark.parametrize("beta", [False, True], ids=["chat", "beta"])
def test_parse_of_a_pydantic_tool(client: OpenAI, beta: bool) -> None:
    completions = client.beta.chat.completions if beta else client.chat.completions
    answer = completions.parse(
        model="base",
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        **GREEDY,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls
    parsed = calls[0].function.parsed_arguments
    assert isinstance(parsed, Weather) and parsed.city in ("Lyon", "Paris")


def test_strict_with_auto(client: OpenAI, server: Server) -> None:
    """Text is free; a call would follow the schema. The SDK's own schema of a model is accepted."""
    tool: Any = openai.pydantic_function_tool(Weather)
    assert tool["function"]["strict"] is True
    answer, plain = (create(client, tools=tools, max_tokens=24) for tools in ([tool], []))
    assert answer.choices[0].message.content == server.says(tools=[tool]) != ""
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens


def test_a_tool_without_parameters(client: OpenAI) -> None:
    bare: Any = [{"type": "function", "function": {"name": "now"}}]
    call = create(client, tools=bare, tool_choice="required").choices[0].message.tool_calls[0]
    assert (call.function.name, call.function.arguments) == ("now", "{}")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "zebra"}}}, "tool_choice"),
        ({"tools": [function("bad name", CITY)]}, "tools"),
        ({"tools": [function("weather", CITY)] * 2}, "tools"),
        ({"tools": [{"type": "magic"}]}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ],
    ids=["unknown", "name", "twice", "type", "no tools"],
)
def test_refused(client: OpenAI, given: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, **given)
    assert refused.value.param is not None and refused.value.param.startswith(param)


async def test_asyncio(later: AsyncOpenAI, client: OpenAI) -> None:
    stream = await later.chat.completions.create(
        model="base", tools=TOOLS, tool_choice=NAMED, stream=True, **GREEDY
    )
    chunks = [chunk async for chunk in stream]
    whole = create(client, tool_choice=NAMED).choices[0].message
    assert [(one["name"], one["arguments"]) for one in calls_of(chunks)] == as_called(whole)
