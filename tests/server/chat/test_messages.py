"""POST /v1/messages and its count of tokens, in the shapes of Anthropic's API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient

from engine.server.text import Text
from tests.server.chat.test_chat_templates import TEMPLATES
from tests.server.chat.test_tool_parsers import ARGUMENTS, HERMES
from tests.server.fake import FakeBackend, Json, Start
from tests.server.own import read

USER: Json = {"role": "user", "content": "Weather?"}
TOOL: Json = {
    "name": "get_weather",
    "description": "The weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
THOUGHT = "<think>\nHm.\n</think>\n\n"


@pytest.fixture
async def client(start: Start) -> TestClient:
    return await start()


async def ask(client: TestClient, status: int = 200, **given: Any) -> Json:
    asked = {"model": "", "max_tokens": 800, "messages": [USER], **given}
    response = await client.post("/v1/messages", json=asked)
    found: Json = await response.json()
    assert response.status == status, found
    return found


async def streamed(client: TestClient, **given: Any) -> tuple[list[Json], Json]:
    """The events, and the message that they make."""
    asked = {"model": "", "max_tokens": 800, "messages": [USER], "stream": True, **given}
    response = await client.post("/v1/messages", json=asked)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    events: list[Json] = []
    for entry in (await response.read()).decode().split("\n\n")[:-1]:
        name, data = entry.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    message: Json = {}
    for event in events:
        _apply(event, message)
    return events, message


def _apply(event: Json, message: Json) -> None:
    kind = event["type"]
    if kind == "message_start":
        message |= event["message"]
    elif kind == "content_block_start":
        assert event["index"] == len(message["content"])
        message["content"].append(event["content_block"] | {"json": ""})
    elif kind == "content_block_delta":
        block, delta = message["content"][event["index"]], event["delta"]
        field, name = {
            "text_delta": ("text", "text"),
            "thinking_delta": ("thinking", "thinking"),
            "input_json_delta": ("json", "partial_json"),
        }[delta["type"]]
        block[field] += delta[name]
    elif kind == "content_block_stop":
        block = message["content"][event["index"]]
        text = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(text)
    elif kind == "message_delta":
        message |= event["delta"]
        message["usage"] |= event["usage"]


async def test_text(client: TestClient, backend: FakeBackend, text: Text) -> None:
    backend.say("né 😀 wörld")
    found = await ask(client, system=[{"type": "text", "text": "Be brief."}], temperature=0.5)
    request = backend.requests[0]
    assert text.written(request.tokens).startswith("<s><|im_start|>system\nBe brief.<|im_end|>\n")
    assert found.pop("id").startswith("msg_")
    assert found == {
        "type": "message",
        "role": "assistant",
        "model": "tiny/base",
        "content": [{"type": "text", "text": "né 😀 wörld"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(request.tokens) - 2,
            "cache_read_input_tokens": 2,
            "cache_creation_input_tokens": 0,
            "output_tokens": found["usage"]["output_tokens"],
        },
    }
    assert request.sampling.temperature == 0.5 and request.max_new_tokens == 800


@pytest.mark.parametrize("family", ["qwen3"], indirect=True)
@pytest.mark.parametrize("burst", [1, 7, 1000])
async def test_a_stream_is_the_answer(
    client: TestClient, backend: FakeBackend, family: str, burst: int
) -> None:
    backend.say(f"{THOUGHT}I look.\n{HERMES}\n{HERMES}")
    backend.burst = burst
    whole = await ask(client, tools=[TOOL])
    kinds = [block["type"] for block in whole["content"]]
    assert kinds == ["thinking", "text", "tool_use", "tool_use"]
    assert whole["content"][0]["thinking"] == "Hm."
    assert whole["content"][2]["input"] == json.loads(ARGUMENTS)
    assert whole["stop_reason"] == "tool_use"
    events, made = await streamed(client, tools=[TOOL])
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    for message in (whole, made):
        del message["id"]
        for block in message["content"]:
            block.pop("id", None)
    assert made == whole


async def test_a_round(client: TestClient, backend: FakeBackend) -> None:
    backend.say(f"I look.\n{HERMES}")
    found = await ask(client, tools=[TOOL])
    id = found["content"][1]["id"]
    result = {
        "type": "tool_result",
        "tool_use_id": id,
        "content": [{"type": "text", "text": "rain"}],
    }
    more = {"type": "text", "text": "So?"}
    history = [
        USER,
        {"role": "assistant", "content": found["content"]},
        {"role": "user", "content": [result, more]},
    ]
    backend.say("It rains.")
    found = await ask(client, messages=history, tools=[TOOL])
    assert found["content"] == [{"type": "text", "text": "It rains."}]
    function = {"name": "get_weather", "arguments": ARGUMENTS}
    function_of_tool = {
        "name": TOOL["name"],
        "description": TOOL["description"],
        "parameters": TOOL["input_schema"],
    }
    asked: Json = {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [{"id": id, "function": function}],
            },
            {"role": "tool", "tool_call_id": id, "content": "rain"},
            {"role": "user", "content": "So?"},
        ],
        "tools": [{"type": "function", "function": function_of_tool}],
    }
    assert (await client.post("/v1/chat/completions", json=asked)).status == 200
    assert backend.requests[-1].tokens == backend.requests[-2].tokens


async def test_the_end(client: TestClient, backend: FakeBackend) -> None:
    backend.say("one two three")
    found = await ask(client, stop_sequences=["x", " th"])
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", " th")
    assert found["content"] == [{"type": "text", "text": "one two"}]
    found = await ask(client, max_tokens=2)
    assert (found["stop_reason"], found["stop_sequence"]) == ("max_tokens", None)
    backend.say(HERMES)
    found = await ask(client, tools=[TOOL], max_tokens=50)
    assert found["stop_reason"] == "max_tokens" and found["content"][0]["input"] == {}


async def test_a_prefill_is_continued(client: TestClient, backend: FakeBackend, text: Text) -> None:
    await ask(client, messages=[USER, {"role": "assistant", "content": "The sky"}])
    assert text.written(backend.requests[0].tokens).endswith("<|im_start|>assistant\nThe sky")


@pytest.mark.parametrize("family", ["qwen3"], indirect=True)
async def test_thinking_that_is_not_wanted(
    client: TestClient, backend: FakeBackend, text: Text, family: str
) -> None:
    await ask(client, thinking={"type": "disabled"})
    await ask(client, thinking={"type": "enabled", "budget_tokens": 1024})
    ends = [text.written(request.tokens).endswith("</think>\n\n") for request in backend.requests]
    assert ends == [True, False]


async def test_tool_choice(client: TestClient, backend: FakeBackend, text: Text) -> None:
    backend.say(f"{HERMES}\n{HERMES}")
    for choice, count in (
        ({"type": "auto"}, 2),
        ({"type": "auto", "disable_parallel_tool_use": True}, 1),
        ({"type": "any"}, 2),
        ({"type": "tool", "name": "get_weather"}, 2),
        ({"type": "none"}, 0),
    ):
        found = await ask(client, tools=[TOOL], tool_choice=choice)
        assert [block["type"] for block in found["content"]].count("tool_use") == count, choice


async def test_count_tokens(
    client: TestClient, backend: FakeBackend, folder: Path, tmp_path: Path
) -> None:
    """Those of the prompt that the message would have, of the base model and of an adapter."""
    (tmp_path / "chat_template.jinja").write_text((TEMPLATES / "qwen2_5.jinja").read_text())
    found = read(folder, tmp_path).text
    assert found is not None
    backend.adapter_texts["me/own"], backend.adapter_vocab = found, 500
    counts = set()
    for model in ("", "me/own"):
        asked: Json = {"model": model, "messages": [USER], "system": "Be brief.", "tools": [TOOL]}
        response = await client.post("/v1/messages/count_tokens", json=asked)
        await ask(client, **asked)
        count = len(backend.requests[-1].tokens)
        assert await response.json() == {"input_tokens": count}
        counts.add(count)
    assert len(counts) == 2
    response = await client.post("/v1/messages/count_tokens", json={"messages": []})
    assert response.status == 400 and (await response.json())["type"] == "error"
    response = await client.post(
        "/v1/messages/count_tokens", json={"messages": [USER], "model": "missing"}
    )
    assert (await response.json())["error"]["type"] == "not_found_error"


IMAGE = {"type": "image", "source": {}}
REFUSED: list[tuple[Json, str]] = [
    ({"max_tokens": 0}, "`max_tokens`"),
    ({"messages": []}, "`messages`"),
    ({"messages": [{"role": "system", "content": "x"}]}, "`messages[0].role`"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "`messages[0].content[0].type`"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "`messages[0].content[0].text`",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
        "`messages[0].content[0].tool_use_id`",
    ),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}],
                }
            ]
        },
        "`messages[0].content[0].content[0].type`",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f"}]}]},
        "`messages[0].content[0].type`",
    ),
    ({"system": [IMAGE]}, "`system[0].type`"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "`tools[0].type`"),
    ({"tools": [TOOL | {"name": "a b"}]}, "`tools[0].name`"),
    ({"tools": [TOOL | {"input_schema": []}]}, "`tools[0].input_schema`"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "`tool_choice`"),
    ({"tool_choice": {"type": "sometimes"}}, "`tool_choice.type`"),
    ({"stop_sequences": ["a"] * 5}, "`stop_sequences`"),
    ({"mcp_servers": [{"name": "x"}]}, "`mcp_servers`"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "`output_config.format`"),
    ({"messages": [{"role": "user", "content": "x" * 20_000}]}, "`messages`"),
]


@pytest.mark.parametrize(("given", "name"), REFUSED)
async def test_refused_by_name(
    client: TestClient, backend: FakeBackend, given: Json, name: str
) -> None:
    found = await ask(client, 400, **given)
    assert found["type"] == "error" and found["error"]["type"] == "invalid_request_error"
    assert name in found["error"]["message"]
    assert not backend.requests


async def test_errors_have_the_shape_of_the_protocol(start: Start, backend: FakeBackend) -> None:
    client = await start({"api_key": ("k",)})
    found = await ask(client, 401)
    assert found["error"]["type"] == "authentication_error"
    headers = {"x-api-key": "k"}
    asked = {"messages": [USER], "max_tokens": 5}
    assert (await client.post("/v1/messages", json=asked, headers=headers)).status == 200
    backend.fail_after = 2
    response = await client.post("/v1/messages", json=asked | {"stream": True}, headers=headers)
    last = (await response.read()).decode().split("\n\n")[-2]
    assert last.startswith("event: error\n") and "the engine died" in last
