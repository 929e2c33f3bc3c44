"""POST /v1/responses, asked by OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from openai import AsyncOpenAI

from engine.server.text import Text
from tests.server.chat.test_tool_parsers import ARGUMENTS, HERMES
from tests.server.fake import FakeBackend, Json, Start, events_of

FUNCTION: Json = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": None,
}
THOUGHT = "<think>\nHm.\n</think>\n\n"


async def ask(openai: AsyncOpenAI, **given: Any) -> Any:
    return await openai.responses.create(**{"model": "", "input": "Weather?", **given})


async def test_text(openai: AsyncOpenAI, backend: FakeBackend, text: Text) -> None:
    backend.say("né 😀 wörld")
    found = await ask(openai, instructions="Be brief.", metadata={"a": "b"})
    assert found.id.startswith("resp_") and found.status == "completed"
    assert found.output_text == "né 😀 wörld" and found.error is None
    assert (found.previous_response_id, found.incomplete_details) == (None, None)
    assert found.metadata == {"a": "b"}
    request = backend.requests[0]
    prompt = text.written(request.tokens)
    assert prompt.endswith(
        "system\nBe brief.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n"
    )
    usage = found.usage
    assert (usage.input_tokens, usage.input_tokens_details.cached_tokens) == (
        len(request.tokens),
        2,
    )
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert request.sampling.temperature == 1.0


@pytest.mark.parametrize("family", ["qwen3"], indirect=True)
@pytest.mark.parametrize("burst", [1, 7, 1000])
async def test_a_stream_is_the_answer(
    openai: AsyncOpenAI, backend: FakeBackend, family: str, burst: int
) -> None:
    """Its events are numbered, every item is begun, filled and done, and the last event has the whole."""
    backend.say(f"{THOUGHT}I look.\n{HERMES}\n{HERMES}")
    backend.burst = burst
    whole = await ask(openai, tools=[FUNCTION], extra_body={"seed": 1})
    kinds = [item.type for item in whole.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert whole.output[0].content[0].text == "Hm." and whole.output_text == "I look."
    assert whole.output[2].arguments == ARGUMENTS and whole.output[2].name == "get_weather"
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    texts: dict[int, str] = {}
    names: list[str] = []
    async with openai.responses.stream(
        model="", input="Weather?", tools=[FUNCTION], extra_body={"seed": 1}
    ) as stream:
        async for event in stream:
            names.append(event.type)
            assert event.sequence_number == len(names) - 1
            if event.type.endswith(".delta"):
                texts[event.output_index] = texts.get(event.output_index, "") + event.delta
            elif event.type == "response.output_item.done":
                assert event.item.status == "completed"
        last = await stream.get_final_response()
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == "response.completed"
    assert texts == {0: "Hm.", 1: "I look.", 2: ARGUMENTS, 3: ARGUMENTS}
    for kind in ("output_item", "content_part"):
        begun = names.count(f"response.{kind}.added")
        assert begun == names.count(f"response.{kind}.done") == (4 if kind == "output_item" else 2)

    assert [_plain(item) for item in last.output] == [_plain(item) for item in whole.output]
    assert last.usage == whole.usage


def _plain(item: Any) -> Json:
    """An item without ids, and without what the client's stream adds."""
    made: Json = item.model_dump(exclude={"id", "call_id", "parsed_arguments"}, exclude_none=True)
    for part in made.get("content", []):
        part.pop("parsed", None)
    return made


async def test_a_round(openai: AsyncOpenAI, backend: FakeBackend, text: Text) -> None:
    backend.say(HERMES)
    found = await ask(openai, tools=[FUNCTION])
    (call,) = found.output
    history: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm."}],
        },
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    backend.say("It rains.")
    found = await ask(openai, input=history, tools=[FUNCTION])
    assert found.output_text == "It rains."
    asked: Json = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "reasoning_content": "Hm.",
                "tool_calls": [
                    {
                        "id": call.call_id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": call.call_id, "content": "rain"},
        ],
        "tools": [
            {"type": "function", "function": {k: FUNCTION[k] for k in ("name", "parameters")}}
        ],
    }
    await openai.chat.completions.create(model="", **asked)
    assert backend.requests[-1].tokens == backend.requests[-2].tokens


async def test_the_length(openai: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.say("one two three four five six")
    found = await ask(openai, max_output_tokens=3)
    assert found.status == "incomplete"
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.output[0].status == "incomplete"
    names = [event.type async for event in await ask(openai, max_output_tokens=3, stream=True)]
    assert names[-1] == "response.incomplete"


async def test_a_failure(openai: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.fail_after = 2
    events = [event async for event in await ask(openai, stream=True)]
    assert events[-1].type == "response.failed"
    assert "the engine died" in events[-1].response.error.message


REFUSED: list[tuple[Json, str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "x"}}, "prompt"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"truncation": "auto"}, "truncation"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"input": []}, "input"),
    ({"input": ""}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"content": "x"}]}, "input[0].role"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        "input[0].content[0].type",
    ),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
    ({"input": "x" * 20_000}, "input"),
]


@pytest.mark.parametrize(("given", "field"), REFUSED)
async def test_refused_by_name(start: Start, backend: FakeBackend, given: Json, field: str) -> None:
    client: TestClient = await start()
    response = await client.post("/v1/responses", json={"input": "x"} | given)
    error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, field), error
    assert error["type"] == "invalid_request_error"
    assert not backend.requests


async def test_what_changes_nothing_is_accepted(start: Start, backend: FakeBackend) -> None:
    backend.say("Yes.")
    given = {"store": True, "include": ["reasoning.encrypted_content"], "truncation": "disabled"}
    client: TestClient = await start()
    response = await client.post("/v1/responses", json={"input": "x", "stream": True, **given})
    last = json.loads(events_of(_data(await response.read()))[-1])
    assert last["response"]["store"] is False and last["response"]["status"] == "completed"


def _data(raw: bytes) -> bytes:
    """A stream without the lines that name its events."""
    lines = raw.split(b"\n")
    return b"\n".join(line for line in lines if not line.startswith(b"event:"))
