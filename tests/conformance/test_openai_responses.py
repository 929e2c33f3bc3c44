"""`openai`: responses, streamed and whole, with functions and formats."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from tests.conformance.wire import ADAPTERS, CITY, CLOCK, PROMPT, Server, is_weather

GREEDY: dict[str, Any] = {"input": PROMPT, "temperature": 0, "max_output_tokens": 24}
LONG = GREEDY | {"max_output_tokens": 120}
WEATHER = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
TOOLS: Any = [WEATHER, {"type": "function", "name": "clock", "parameters": CLOCK, "strict": False}]
NAMED: Any = {"type": "function", "name": "weather"}


class Stay(BaseModel):
    city: Literal["Lyon", "Rome"]
    days: int = Field(ge=1, le=9)


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.v1, api_key=server.key, max_retries=0) as client:
        yield client


@pytest.fixture
async def later(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=server.v1, api_key=server.key, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("model", ["base", *ADAPTERS])
def test_same_as_the_chat(client: OpenAI, server: Server, model: str) -> None:
    answer = client.responses.create(model=model, **GREEDY)
    assert answer.object == "response" and answer.model == model and answer.id.startswith("resp_")
    assert answer.output_text == server.says(model) != ""
    assert answer.error is None and answer.status in ("completed", "incomplete")
    (item,) = answer.output
    assert item.type == "message" and item.role == "assistant"


def test_usage(client: OpenAI, server: Server) -> None:
    usage = client.responses.create(model="base", **GREEDY).usage
    chat = server.chat()["usage"]
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (
        chat["prompt_tokens"],
        chat["completion_tokens"],
        chat["total_tokens"],
    )


@pytest.mark.parametrize("model", ["base", "pirate"])
def test_events_of_a_stream(client: OpenAI, model: str) -> None:
    whole = client.responses.create(model=model, **GREEDY)
    events = list(client.responses.create(model=model, stream=True, **GREEDY))
    deltas = [one.delta for one in events if one.type == "response.output_text.delta"]
    done = [one.text for one in events if one.type == "response.output_text.done"]
    assert "".join(deltas) == done[0] == whole.output_text and len(deltas) > 3
    assert [one.sequence_number for one in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == whole.output_text
    assert last.response.usage == whole.usage


def test_stream_helper(client: OpenAI) -> None:
    whole = client.responses.create(model="pirate", **GREEDY)
    with client.responses.stream(model="pirate", **GREEDY) as stream:
        deltas = [one.delta for one in stream if one.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == whole.output_text


def test_instructions_are_a_system_message(client: OpenAI, server: Server) -> None:
    answer = client.responses.create(model="base", instructions="Be short.", **GREEDY)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": PROMPT}]
    assert answer.output_text == server.says(messages=messages)
    assert answer.instructions == "Be short."


def test_items_are_messages(client: OpenAI, server: Server) -> None:
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": PROMPT},
    ]
    plain = [items[0] | {"content": "Hello"}, *items[1:]]
    answer = client.responses.create(model="base", **GREEDY | {"input": items})
    assert answer.output_text == server.says(messages=plain)


def test_output_goes_back_as_input(client: OpenAI) -> None:
    first = client.responses.create(model="base", **GREEDY)
    turns: Any = [{"role": "user", "content": PROMPT}, *first.output]
    turns.append({"role": "user", "content": "And then?"})
    second = client.responses.create(model="base", **GREEDY | {"input": turns})
    assert first.usage and second.usage
    assert second.usage.input_tokens > first.usage.total_tokens


def test_length(client: OpenAI) -> None:
    answer = client.responses.create(model="base", **GREEDY | {"max_output_tokens": 2})
    assert answer.status == "incomplete" and answer.incomplete_details
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage and answer.usage.output_tokens == 2


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_function_call(client: OpenAI, choice: Any) -> None:
    answer = client.responses.create(model="base", tools=[WEATHER], tool_choice=choice, **LONG)
    assert answer.status == "completed" and answer.output_text == ""
    call = answer.output[0]
    assert call.type == "function_call" and call.name == "weather" and call.call_id
    assert is_weather(call.arguments)


def test_function_call_of_a_stream(client: OpenAI) -> None:
    whole = client.responses.create(model="base", tools=TOOLS, tool_choice=NAMED, **LONG).output[0]
    events = list(
        client.responses.create(model="base", tools=TOOLS, tool_choice=NAMED, stream=True, **LONG)
    )
    first = [one for one in events if one.type == "response.function_call_arguments.done"][0]
    deltas = [
        one.delta
        for one in events
        if one.type == "response.function_call_arguments.delta" and one.item_id == first.item_id
    ]
    assert whole.type == "function_call"
    assert "".join(deltas) == first.arguments == whole.arguments and is_weather(first.arguments)


def test_no_call(client: OpenAI) -> None:
    counts = []
    for choice in ("auto", "none"):
        answer = client.responses.create(model="base", tools=TOOLS, tool_choice=choice, **GREEDY)
        assert [one.type for one in answer.output] == ["message"] and answer.usage
        counts.append(answer.usage.input_tokens)
    plain = client.responses.create(model="base", **GREEDY).usage
    assert plain and counts[0] > counts[1] == plain.input_tokens


def test_results_go_back_to_the_model(client: OpenAI) -> None:
    asked = client.responses.create(model="base", tools=TOOLS, tool_choice=NAMED, **LONG)
    results = [
        {"type": "function_call_output", "call_id": one.call_id, "output": "It rains."}
        for one in asked.output
        if one.type == "function_call"
    ]
    turns: Any = [{"role": "user", "content": PROMPT}, *asked.output, *results]
    answer = client.responses.create(model="base", tools=TOOLS, **GREEDY | {"input": turns})
    assert asked.usage and answer.usage and results
    assert answer.usage.input_tokens > asked.usage.input_tokens + 10


def test_parse(client: OpenAI) -> None:
    answer = client.responses.parse(model="base", text_format=Stay, **LONG)
    assert isinstance(answer.output_parsed, Stay)
    assert answer.output_parsed == Stay.model_validate_json(answer.output_text)


def test_parse_of_a_function(client: OpenAI) -> None:
    answer = client.responses.parse(
        model="base",
        tools=[_tool_of(Stay)],
        tool_choice="required",
        **LONG,
    )
    call = answer.output[0]
    assert call.type == "function_call" and json.loads(call.arguments)["city"] in ("Lyon", "Rome")


def _tool_of(model: type[BaseModel]) -> Any:
    function = openai.pydantic_function_tool(model)["function"]
    return {"type": "function", **function}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"temperature": -1}, "temperature"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
    ],
    ids=["state", "background", "input", "temperature", "length", "tools"],
)
def test_refused(client: OpenAI, given: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="base", **GREEDY | given)
    assert refused.value.param is not None and refused.value.param.startswith(param)


def test_unknown_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="zebra", **GREEDY)


def test_nothing_is_stored(client: OpenAI) -> None:
    answer = client.responses.create(model="base", store=True, **GREEDY)
    assert answer.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


async def test_asyncio(later: AsyncOpenAI, server: Server) -> None:
    answer = await later.responses.create(model="pirate", **GREEDY)
    stream = await later.responses.create(model="pirate", stream=True, **GREEDY)
    deltas = [one.delta async for one in stream if one.type == "response.output_text.delta"]
    assert answer.output_text == "".join(deltas) == server.says("pirate")
