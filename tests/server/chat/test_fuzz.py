"""Bodies with a wrong part: refused in the protocol's shape, or served; never an error of the server."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.server.chat.test_chat_templates import ROUND, USER, WEATHER
from tests.server.fake import FakeBackend, Json, Start

NUM_BODIES = 200
LEAVES: list[Any] = [
    *(None, True, 0, -1, 10**30, 1e308, "", "x", "{", "[1]", "<tool_call>"),
    *("auto", "required", "none", "function", "object"),
    *([], {}, [None], {"a": 10**30}, {"type": "function"}, {"type": "object"}),
]
SCHEMA: Json = {"type": "object", "properties": {"a": {"type": "string"}}}
BODIES: dict[str, Json] = {
    "/v1/chat/completions": {
        "messages": ROUND,
        "tools": [WEATHER],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "documents": [{"text": "x"}],
        "chat_template": "default",
        "chat_template_kwargs": {"a": 1},
        "max_tokens": 5,
        "add_generation_prompt": True,
        "reasoning_effort": "low",
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "x"},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]},
        ],
        "instructions": "x",
        "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
        "max_output_tokens": 5,
        "stream": True,
    },
    "/v1/messages": {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "x"},
                    {"type": "tool_use", "id": "a", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "a", "content": "x"}],
            },
        ],
        "max_tokens": 5,
        "system": "x",
        "tools": [{"name": "f", "input_schema": SCHEMA}],
        "tool_choice": {"type": "any"},
        "thinking": {"type": "enabled"},
        "output_config": {"effort": "low"},
        "stop_sequences": ["a"],
    },
}
BODIES["/v1/messages/count_tokens"] = BODIES["/v1/messages"]


def changed(value: Any, chance: random.Random) -> Any:
    """The value with one part, or all of it, replaced or removed."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.15:
        return chance.choice(LEAVES)
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    made: Any = value.copy()
    key = chance.choice(keys)
    if chance.random() < 0.1:
        del made[key]
    else:
        made[key] = changed(made[key], chance)
    return made


@pytest.mark.parametrize("path", BODIES)
async def test_wrong_bodies(start: Start, backend: FakeBackend, path: str) -> None:
    client, chance = await start(), random.Random(path)
    served = 0
    for _ in range(NUM_BODIES):
        body = changed(BODIES[path], chance)
        response = await client.post(path, json=body)
        text = await response.text()
        assert response.status in (200, 400, 404, 422), (text, body)
        served += response.status == 200
        if response.status != 200:
            assert "message" in (await response.json())["error"]
    assert 0 < served < NUM_BODIES
