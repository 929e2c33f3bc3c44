"""`openai`: structured output, and answers parsed into pydantic models."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from enum import StrEnum
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from tests.conformance.wire import CITY, MESSAGES, Server, is_weather

GREEDY: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 200}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "stay", "schema": CITY}}


class Kind(StrEnum):
    TOWER = "tower"
    GATE = "gate"


class Stay(BaseModel):
    city: Literal["Lyon", "Rome"]
    days: int = Field(ge=1, le=9)


class Part(BaseModel):
    kind: Kind
    steps: int = Field(ge=0, le=99)


class Castle(BaseModel):
    name: str = Field(max_length=12)
    parts: list[Part] = Field(min_length=1, max_length=2)
    owner: Stay | None
    open: bool


MODELS = [Stay, Part, Castle]


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.v1, api_key=server.key, max_retries=0) as client:
        yield client


@pytest.fixture
async def later(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=server.v1, api_key=server.key, max_retries=0) as client:
        yield client


def said(client: OpenAI, **given: Any) -> str:
    answer = client.chat.completions.create(**{"model": "base"} | GREEDY | given)
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.content
    return answer.choices[0].message.content


@pytest.mark.parametrize("model", ["base", "pirate", "json"])
def test_json_schema(client: OpenAI, model: str) -> None:
    assert is_weather(said(client, model=model, response_format=FORMAT))


def test_json_schema_at_any_temperature(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="base", response_format=FORMAT, n=8, seed=3, **GREEDY | {"temperature": 1.8}
    )
    assert len(answer.choices) == 8
    assert all(is_weather(one.message.content or "") for one in answer.choices)


def test_json_object(client: OpenAI) -> None:
    """The adapter writes JSON and ends; the format keeps it to an object where chance would not."""
    sentence = [{"role": "user", "content": "While in Lyon, Maria bought 3 apples."}]
    given = GREEDY | {"messages": sentence, "temperature": 1.8, "n": 16, "seed": 1}
    free, kept = (
        [
            one.message.content or ""
            for one in client.chat.completions.create(
                model="json", response_format={"type": kind}, **given
            ).choices
            if one.finish_reason == "stop"
        ]
        for kind in ("text", "json_object")
    )
    assert kept and all(isinstance(json.loads(text), dict) for text in kept)
    assert not all(text.startswith("{") and text.endswith("}") for text in free)


def test_text_is_free(client: OpenAI, server: Server) -> None:
    assert said(client, response_format={"type": "text"}) == server.says(max_tokens=200)


def test_stream_joined_is_the_whole(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="base", response_format=FORMAT, stream=True, **GREEDY
    )
    joined = "".join(one.choices[0].delta.content or "" for one in stream)
    assert joined == said(client, response_format=FORMAT)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("beta", [False, True], ids=["chat", "beta"])
def test_parse(client: OpenAI, model: type[BaseModel], beta: bool) -> None:
    completions = client.beta.chat.completions if beta else client.chat.completions
    answer = completions.parse(model="base", response_format=model, **GREEDY)
    message = answer.choices[0].message
    assert isinstance(message.parsed, model) and message.content
    assert message.parsed == model.model_validate_json(message.content)


@pytest.mark.parametrize("adapter", ["pirate", "math"])
def test_parse_with_an_adapter(client: OpenAI, adapter: str) -> None:
    answer = client.chat.completions.parse(model=adapter, response_format=Castle, **GREEDY)
    assert isinstance(answer.choices[0].message.parsed, Castle)


def test_parse_of_several_choices(client: OpenAI) -> None:
    given = GREEDY | {"temperature": 1.5, "n": 4, "seed": 2}
    answer = client.chat.completions.parse(model="base", response_format=Part, **given)
    assert [isinstance(one.message.parsed, Part) for one in answer.choices] == [True] * 4


def test_parse_of_a_stream(client: OpenAI) -> None:
    with client.chat.completions.stream(model="base", response_format=Castle, **GREEDY) as stream:
        done = [event for event in stream if event.type == "content.done"]
        final = stream.get_final_completion().choices[0].message
    assert isinstance(final.parsed, Castle) and [one.parsed for one in done] == [final.parsed]
    whole = client.chat.completions.parse(model="base", response_format=Castle, **GREEDY)
    assert whole.choices[0].message.parsed == final.parsed


def test_a_cut_answer_is_told(client: OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="base", response_format=Castle, **GREEDY | {"max_tokens": 3}
        )


async def test_asyncio(later: AsyncOpenAI, client: OpenAI) -> None:
    answer = await later.chat.completions.parse(model="base", response_format=Stay, **GREEDY)
    same = client.chat.completions.parse(model="base", response_format=Stay, **GREEDY)
    assert answer.choices[0].message.parsed == same.choices[0].message.parsed is not None


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"structured_outputs": {"regex": "[a-f]{4}"}}, "[a-f]{4}"),
        ({"guided_regex": "[a-f]{4}"}, "[a-f]{4}"),
        ({"guided_grammar": 'start: "up" | "down"'}, "up|down"),
        ({"response_format": {"type": "regex", "regex": "[0-9]{3}"}}, "[0-9]{3}"),
    ],
    ids=["choice", "guided_choice", "regex", "guided_regex", "grammar", "format"],
)
def test_fields_of_vllm(client: OpenAI, body: Any, pattern: str) -> None:
    assert re.fullmatch(pattern, said(client, extra_body=body))


@pytest.mark.parametrize(
    "given",
    [
        {"type": "magic"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "zebra"}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}},
    ],
    ids=["type", "schema", "keyword"],
)
def test_refused(client: OpenAI, given: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="base", response_format=given, **GREEDY)
    assert str(refused.value.param).startswith("response_format")
