"""`anthropic`: messages, streamed and whole, with tools, and counts of tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

from tests.conformance.wire import ADAPTERS, CITY, CLOCK, MESSAGES, PROMPT, Server, is_weather

GREEDY: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 24, "extra_body": {"temperature": 0}}
LONG = GREEDY | {"max_tokens": 120}
WEATHER: Any = {"name": "weather", "description": "Tells the weather.", "input_schema": CITY}
TOOLS: Any = [WEATHER, {"name": "clock", "input_schema": CLOCK}]
ANY: Any = {"type": "any"}
NAMED: Any = {"type": "tool", "name": "weather"}


@pytest.fixture
def client(server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key=server.key, max_retries=0) as client:
        yield client


@pytest.fixture
async def later(server: Server) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=server.url, api_key=server.key, max_retries=0) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(one.text for one in message.content if one.type == "text")


def prompt_of(message: Any) -> int:
    """Tokens of the prompt, cached or not."""
    cached: int = message.usage.cache_read_input_tokens or 0
    return cached + int(message.usage.input_tokens)


@pytest.mark.parametrize("model", ["base", *ADAPTERS])
def test_same_as_the_chat(client: Anthropic, server: Server, model: str) -> None:
    answer = client.messages.create(model=model, **GREEDY)
    assert answer.type == "message" and answer.role == "assistant" and answer.model == model
    assert answer.id.startswith("msg_") and answer.stop_reason in ("end_turn", "max_tokens")
    assert text_of(answer) == server.says(model) != ""


def test_usage(client: Anthropic, server: Server) -> None:
    """Cached tokens are counted on their own."""
    answer = client.messages.create(model="base", **GREEDY)
    chat = server.chat()["usage"]
    assert prompt_of(answer) == chat["prompt_tokens"]
    assert answer.usage.output_tokens == chat["completion_tokens"]


@pytest.mark.parametrize("model", ["base", "pirate"])
def test_stream_helper(client: Anthropic, server: Server, model: str) -> None:
    with client.messages.stream(model=model, **GREEDY) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    whole = client.messages.create(model=model, **GREEDY)
    assert "".join(pieces) == text_of(final) == server.says(model) and len(pieces) > 3
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_events_of_a_stream(client: Anthropic) -> None:
    kinds = [event.type for event in client.messages.create(model="base", stream=True, **GREEDY)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) <= {"content_block_delta", "ping"}


def test_system(client: Anthropic, server: Server) -> None:
    blocks: Any = [{"type": "text", "text": "Be short."}]
    answers = [
        client.messages.create(model="base", system=system, **GREEDY)
        for system in ("Be short.", blocks)
    ]
    messages = [{"role": "system", "content": "Be short."}, *MESSAGES]
    assert {text_of(one) for one in answers} == {server.says(messages=messages)}


def test_blocks_are_their_text(client: Anthropic, server: Server) -> None:
    content: Any = [{"type": "text", "text": PROMPT}]
    messages: Any = [{"role": "user", "content": content}]
    answer = client.messages.create(model="base", **GREEDY | {"messages": messages})
    assert text_of(answer) == server.says()


def test_stop_sequences(client: Anthropic, server: Server) -> None:
    whole = server.says("pirate")
    answer = client.messages.create(model="pirate", stop_sequences=["zebra", "castle"], **GREEDY)
    assert answer.stop_reason == "stop_sequence" and answer.stop_sequence == "castle"
    assert text_of(answer).rstrip() == whole.partition("castle")[0].rstrip() != whole


def test_length(client: Anthropic) -> None:
    answer = client.messages.create(model="base", **GREEDY | {"max_tokens": 2})
    assert answer.stop_reason == "max_tokens" and answer.usage.output_tokens == 2


def test_greedy_filter(client: Anthropic, server: Server) -> None:
    answer = client.messages.create(
        model="base", messages=MESSAGES, max_tokens=24, extra_body={"top_k": 1}
    )
    assert text_of(answer) == server.says()


def test_turns(client: Anthropic) -> None:
    first = client.messages.create(model="base", **GREEDY)
    turns: Any = [*MESSAGES, {"role": "assistant", "content": first.content}]
    turns.append({"role": "user", "content": "And then?"})
    second = client.messages.create(model="base", **GREEDY | {"messages": turns})
    assert prompt_of(second) > prompt_of(first) + first.usage.output_tokens


def test_a_beginning_is_continued(client: Anthropic, server: Server) -> None:
    """The last message of the assistant is the beginning of the answer."""
    whole = server.says("pirate")
    begun: Any = [*MESSAGES, {"role": "assistant", "content": "Arr, me"}]
    assert whole.startswith("Arr, me")
    answer = client.messages.create(model="pirate", **GREEDY | {"messages": begun})
    assert "Arr, me" + text_of(answer) == whole


@pytest.mark.parametrize("choice", [ANY, NAMED], ids=["any", "named"])
@pytest.mark.parametrize("model", ["base", "pirate"])
def test_tool_use(client: Anthropic, model: str, choice: Any) -> None:
    answer = client.messages.create(model=model, tools=[WEATHER], tool_choice=choice, **LONG)
    assert answer.stop_reason == "tool_use" and text_of(answer) == ""
    block = answer.content[0]
    assert block.type == "tool_use" and block.name == "weather" and block.id
    assert isinstance(block.input, dict) and is_weather(block.input)


def test_tool_use_of_a_stream(client: Anthropic) -> None:
    whole = client.messages.create(model="base", tools=TOOLS, tool_choice=NAMED, **LONG)
    with client.messages.stream(model="base", tools=TOOLS, tool_choice=NAMED, **LONG) as stream:
        pieces = [one.partial_json for one in stream if one.type == "input_json"]
        final = stream.get_final_message()
    made = [one.input for one in final.content if one.type == "tool_use"]
    assert made == [one.input for one in whole.content if one.type == "tool_use"]
    assert len(pieces) > 3 and final.stop_reason == "tool_use" and is_weather(made[0])


def test_no_parallel_tool_use(client: Anthropic) -> None:
    choice: Any = ANY | {"disable_parallel_tool_use": True}
    answer = client.messages.create(model="base", tools=TOOLS, tool_choice=choice, **LONG)
    assert [one.type for one in answer.content] == ["tool_use"]


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_text_although_there_are_tools(client: Anthropic, choice: str) -> None:
    given: Any = {"type": choice}
    answer = client.messages.create(model="base", tools=TOOLS, tool_choice=given, **GREEDY)
    assert [one.type for one in answer.content] == ["text"]
    used: Any = {"tools": TOOLS} if choice == "auto" else {}
    counted = client.messages.count_tokens(model="base", messages=MESSAGES, **used)
    assert prompt_of(answer) == counted.input_tokens


def test_results_go_back_to_the_model(client: Anthropic) -> None:
    asked = client.messages.create(model="base", tools=TOOLS, tool_choice=NAMED, **LONG)
    results = [
        {"type": "tool_result", "tool_use_id": one.id, "content": "It rains."}
        for one in asked.content
        if one.type == "tool_use"
    ]
    turns: Any = [*MESSAGES, {"role": "assistant", "content": asked.content}]
    turns.append({"role": "user", "content": results})
    answer = client.messages.create(model="base", tools=TOOLS, **GREEDY | {"messages": turns})
    assert prompt_of(answer) > prompt_of(asked) + 10 and results


@pytest.mark.parametrize("given", [{}, {"system": "Be short."}, {"tools": TOOLS}])
def test_count_tokens(client: Anthropic, given: Any) -> None:
    """As many as the request itself has."""
    counted = client.messages.count_tokens(model="base", messages=MESSAGES, **given)
    answer = client.messages.create(model="base", **GREEDY | given)
    plain = client.messages.count_tokens(model="base", messages=MESSAGES)
    assert counted.input_tokens == prompt_of(answer)
    assert (counted.input_tokens > plain.input_tokens) == bool(given)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"messages": []}, "messages"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"extra_body": {"temperature": -1}}, "temperature"),
        ({"tool_choice": {"type": "tool", "name": "zebra"}, "tools": TOOLS}, "tool_choice"),
        ({"messages": [{"role": "zebra", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages"),
    ],
    ids=["messages", "max_tokens", "temperature", "tool_choice", "role", "long"],
)
def test_bad_request(client: Anthropic, given: Any, field: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.messages.create(model="base", **GREEDY | given)
    body: Any = refused.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"].startswith(field)


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_model(client: Anthropic, stream: bool) -> None:
    with pytest.raises(anthropic.NotFoundError) as refused:
        client.messages.create(model="zebra", stream=stream, **GREEDY)
    body: Any = refused.value.body
    assert body["error"]["type"] == "not_found_error"


def test_wrong_key(server: Server) -> None:
    with Anthropic(base_url=server.url, api_key="sk-wrong", max_retries=0) as stranger:
        with pytest.raises(anthropic.AuthenticationError) as refused:
            stranger.messages.create(model="base", **GREEDY)
        with pytest.raises(anthropic.AuthenticationError):
            stranger.messages.count_tokens(model="base", messages=MESSAGES)
    body: Any = refused.value.body
    assert body["error"]["type"] == "authentication_error"


def test_a_token_instead_of_a_key(server: Server) -> None:
    with Anthropic(base_url=server.url, auth_token=server.key, max_retries=0) as client:
        assert text_of(client.messages.create(model="base", **GREEDY)) == server.says()


def test_closing_a_stream_cancels_it(
    client: Anthropic, until_cancelled: Callable[[], None]
) -> None:
    """The schema wants so long a text that the answer cannot end by itself."""
    long = {"type": "object", "properties": {"a": {"type": "string", "minLength": 4000}}}
    tool: Any = {"name": "tell", "input_schema": long | {"required": ["a"]}}
    given: Any = GREEDY | {"max_tokens": 700, "tools": [tool], "tool_choice": ANY}
    with client.messages.stream(model="base", **given) as stream:
        next(iter(stream))
    until_cancelled()


async def test_asyncio(later: AsyncAnthropic, server: Server) -> None:
    answer = await later.messages.create(model="pirate", **GREEDY)
    async with later.messages.stream(model="pirate", **GREEDY) as stream:
        pieces = [piece async for piece in stream.text_stream]
    counted = await later.messages.count_tokens(model="base", messages=MESSAGES)
    assert text_of(answer) == "".join(pieces) == server.says("pirate")
    assert counted.input_tokens == server.chat()["usage"]["prompt_tokens"]
