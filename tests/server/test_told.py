"""The limits that the OpenAPI document tells are those of the server: both sides of each are sent."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from aiohttp.test_utils import TestClient

from engine.server.front import FRONT
from engine.server.openapi import document
from engine.server.parameters import Limits, Parameters
from engine.server.told import LIMITS, REQUIRED
from tests.server.fake import Json, Start

TALK = [{"role": "user", "content": "x"}]
MERGED = {"ids": ["a"], "weights": [1], "merge_strategy": "linear"}

# Struct -> path, a valid body, and where the struct is in it.
BODIES: dict[str, tuple[str, Json, tuple[Any, ...]]] = {
    "GenerateBody": ("/generate", {"inputs": "x"}, ()),
    "GenerateParameters": ("/generate", {"inputs": "x", "parameters": {}}, ("parameters",)),
    "ChatBody": (
        "/v1/chat/completions",
        {"messages": TALK, "logprobs": True, "tool_choice": "none"},
        (),
    ),
    "CompletionBody": ("/v1/completions", {"prompt": "x"}, ()),
    "ResponsesBody": ("/v1/responses", {"input": "x"}, ()),
    "MessagesBody": ("/v1/messages", {"messages": TALK, "max_tokens": 2}, ()),
    "CountBody": ("/v1/messages/count_tokens", {"messages": TALK}, ()),
    "InMessage": ("/v1/messages", {"messages": TALK, "max_tokens": 2}, ("messages", 0)),
    "MergedAdapters": (
        "/v1/completions",
        {"prompt": "x", "merged_adapters": MERGED},
        ("merged_adapters",),
    ),
    "ResponseFormat": (
        "/v1/completions",
        {"prompt": "x", "response_format": {"type": "choice", "choice": ["x"]}},
        ("response_format",),
    ),
    "AdapterBody": ("/adapters/load", {"adapter_id": "a"}, ()),
    "PinBody": ("/adapters/pin", {"adapter_id": "a"}, ()),
    "LoadLoraBody": ("/v1/load_lora_adapter", {"lora_name": "n", "lora_path": "a"}, ()),
    "UnloadLoraBody": ("/v1/unload_lora_adapter", {"lora_name": "n"}, ()),
}
ITEMS = {
    "tools": [{"type": "function", "function": {"name": f"t{at}"}} for at in range(129)],
    "messages": TALK * 2,
    "documents": [{"text": "x"}] * 129,
    "stop_token_ids": [5] * 129,
    "choice": [f"x{at}" for at in range(1025)],
    "ids": [f"a{at}" for at in range(17)],
    "weights": [1] * 17,
    "prompt": ["x"],
    "input": [{"role": "user", "content": "x"}],
}
STEP = 0.5


def sides(field: str, keyword: str, limit: Any) -> Iterator[tuple[Any, bool]]:
    """Values next to a limit, and whether the document allows them."""
    whole = field not in ("weights", "logit_bias") and isinstance(limit, int)
    step = 1 if whole and field not in FRACTIONS else STEP
    if keyword == "minimum":
        yield from ((limit, True), (limit - step, False))
    elif keyword == "maximum":
        yield from ((limit, True), (limit + step, False))
    elif keyword == "exclusiveMinimum":
        yield from ((limit + 1e-3, True), (limit, False), (limit - step, False))
    elif keyword == "minLength":
        yield from (("x" * limit, True), ("", False))
    elif keyword == "maxLength":
        yield from (("x" * limit, True), ("x" * (limit + 1), False))
    elif keyword == "minItems":
        yield from ((ITEMS[field][:limit], True), ([], False))
    elif keyword == "maxItems":
        yield from ((ITEMS[field][:limit], True), (ITEMS[field][: limit + 1], False))
    elif keyword == "maxProperties":
        most = {str(at): 1 for at in range(limit + 1)}
        yield from ((dict(list(most.items())[:200]), True), (most, False))
    elif keyword == "propertyNames":
        yield from (({"5": 1}, True), ({"x": 1}, False), ({"1" * 11: 1}, False))
    elif keyword == "enum":
        yield from ((value, True) for value in limit)
        yield "nonsense", False
    elif keyword in ("items", "additionalProperties"):
        for inner, bound in limit.items():
            if inner != "type":
                for value, allowed in sides(field, inner, bound):
                    yield ([value] if keyword == "items" else {"5": value}), allowed
    else:
        raise AssertionError(keyword)


FRACTIONS = {
    *("temperature", "top_p", "typical_p", "min_p", "repetition_penalty"),
    *("frequency_penalty", "presence_penalty"),
}
CASES = [
    (struct, field, value, allowed)
    for struct, fields in LIMITS.items()
    for field, keywords in fields.items()
    for keyword, limit in keywords.items()
    for value, allowed in sides(field, keyword, limit)
]


async def refused_field(client: TestClient, struct: str, field: str, value: Any) -> str | None:
    """The field that the answer complains of; None: it does not."""
    path, body, place = BODIES[struct]
    body = copy.deepcopy(body)
    inner: Any = body
    for key in place:
        inner = inner[key]
    inner[field] = value
    response = await client.post(path, json=body)
    if response.status == 200:
        return None
    answer = await response.json()
    assert response.status in (400, 404, 422), answer
    if "field" in answer:
        return str(answer["field"])
    error = answer["error"]
    named = str(error["param"]) if isinstance(error, dict) else ""
    return named if named != "None" else f"{error['message']}"


async def test_both_sides_of_every_limit(start: Start) -> None:
    client = await start({"max_concurrent_requests": 64})
    wrong = []
    for struct, field, value, allowed in CASES:
        complaint = await refused_field(client, struct, field, value)
        named = complaint is not None and field in complaint.replace("model", "adapter_id")
        if named == allowed:
            wrong.append((struct, field, str(value)[:60], allowed, complaint))
    await client.app[FRONT].pins.close()
    assert not wrong
    assert len(CASES) > 200


def test_every_limit_is_told() -> None:
    schemas = document()["components"]["schemas"]
    for struct, fields in LIMITS.items():
        for field, keywords in fields.items():
            told = str(schemas[struct]["properties"][field])
            assert all(keyword in told for keyword in keywords), (struct, field)
    assert all(schemas[struct]["required"] == names for struct, names in REQUIRED.items())


EXTREMES = (5e-324, 1e-45, 1e-38, 1e-5, 1e38, 1e39, 1e308)


@pytest.mark.parametrize("value", EXTREMES)
def test_no_number_is_too_extreme_for_the_engine(value: float) -> None:
    """It computes with 32 bits, where these or their reciprocals would be 0 or infinite."""
    limits = Limits(200, 256, 400, 4, 4, 4, 4, 64)
    given = Parameters(sample=True, temperature=value, repetition_penalty=value)
    sampling = given.sampling(1, limits)
    for factor in (sampling.temperature or 1.0, sampling.repetition_penalty):
        for one in (np.float32(factor), np.float32(1) / np.float32(factor)):
            assert np.isfinite(one) and one > np.finfo(np.float32).tiny
