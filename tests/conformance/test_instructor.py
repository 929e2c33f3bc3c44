"""`instructor`: pydantic models from the `openai` SDK, in its modes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import instructor
import pytest
from instructor import Mode
from instructor.core import InstructorRetryException
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field, field_validator

from tests.conformance.wire import MESSAGES, Server

GREEDY: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 120}
SCHEMA_MODES = [Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON, Mode.JSON_SCHEMA]
MODES = [*SCHEMA_MODES, Mode.MD_JSON]
FENCED = r"```json\n\{\"city\": \"(Lyon|Rome)\", \"days\": [1-9]\}\n```"
CALL = (
    r'<tool_call>\{"name": "Stay", "arguments": \{"city": "Rome", "days": [1-9]\}\}</tool_call>'
    r'<tool_call>\{"name": "Stay", "arguments": \{"city": "Lyon", "days": [1-9]\}\}</tool_call>'
)


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Stay(Closed):
    """A stay in a city."""

    city: Literal["Lyon", "Rome"]
    days: int = Field(ge=1, le=9)


class Trip(Closed):
    """A trip with at most two stays."""

    stays: list[Stay] = Field(min_length=1, max_length=2)
    by: Literal["train", "boat"]


def forced(mode: Mode, kind: type[BaseModel]) -> dict[str, Any]:
    """What keeps a small model to the schema in the modes that only ask for it in the prompt."""
    if mode == Mode.JSON:
        format = {"type": "json_object", "schema": kind.model_json_schema()}
        return {"extra_body": {"response_format": format}}
    if mode == Mode.MD_JSON:
        return {"extra_body": {"structured_outputs": {"regex": FENCED}}}
    return {}


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.v1, api_key=server.key, max_retries=0) as client:
        yield client


def asking(mode: Mode, kind: Any, **given: Any) -> dict[str, Any]:
    """Arguments of a call."""
    asked = {"model": "base", "response_model": kind, "max_retries": 0}
    return asked | GREEDY | forced(mode, kind) | given


def ask(client: OpenAI, mode: Mode, kind: Any = Stay, **given: Any) -> Any:
    made = instructor.from_openai(client, mode=mode)
    return made.chat.completions.create(**asking(mode, kind, **given))


@pytest.mark.parametrize("adapter", ["base", "pirate"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_model(client: OpenAI, mode: Mode, adapter: str) -> None:
    found = ask(client, mode, Stay, model=adapter)
    assert isinstance(found, Stay) and found.city in ("Lyon", "Rome") and 1 <= found.days <= 9


@pytest.mark.parametrize("mode", SCHEMA_MODES, ids=lambda mode: mode.name)
def test_nested_model(client: OpenAI, mode: Mode) -> None:
    found = ask(client, mode, Trip)
    assert isinstance(found, Trip) and 1 <= len(found.stays) <= 2


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_with_completion(client: OpenAI, mode: Mode) -> None:
    """The model is what the raw answer says, and asking again says the same."""
    made = instructor.from_openai(client, mode=mode)
    found, raw = made.chat.completions.create_with_completion(**asking(mode, Stay))
    message = raw.choices[0].message
    text = message.tool_calls[0].function.arguments if message.tool_calls else message.content
    bare = text.removeprefix("```json\n").removesuffix("\n```")
    assert json.loads(bare) == found.model_dump() == ask(client, mode).model_dump()
    assert raw.usage.completion_tokens > 0


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA], ids=lambda mode: mode.name)
def test_partial_models_of_a_stream(client: OpenAI, mode: Mode) -> None:
    made = instructor.from_openai(client, mode=mode)
    *parts, last = made.chat.completions.create_partial(**asking(mode, Trip))
    whole = ask(client, mode, Trip)
    assert parts and last.model_dump() == whole.model_dump()


def test_parallel_tools(client: OpenAI) -> None:
    made = instructor.from_openai(client, mode=Mode.PARALLEL_TOOLS)
    given = {"model": "base", "max_retries": 0} | GREEDY
    found = list(
        made.chat.completions.create(
            response_model=Iterable[Stay | Trip],
            extra_body={"structured_outputs": {"regex": CALL}},
            **given,
        )
    )
    assert found and all(isinstance(one, Stay) for one in found)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
async def test_asyncio(server: Server, client: OpenAI, mode: Mode) -> None:
    async with AsyncOpenAI(base_url=server.v1, api_key=server.key, max_retries=0) as later:
        made = instructor.from_openai(later, mode=mode)
        found = await made.chat.completions.create(**asking(mode, Stay))
    assert found.model_dump() == ask(client, mode).model_dump()


def test_a_retry_sends_the_failure(client: OpenAI) -> None:
    """A model that never validates: instructor asks again with the errors, as messages of a tool."""

    class Never(Closed):
        city: Literal["Lyon"]

        @field_validator("city")
        @classmethod
        def refuse(cls, value: str) -> str:
            raise ValueError("not this one")

    with pytest.raises(InstructorRetryException) as failed:
        ask(client, Mode.TOOLS, Never, max_retries=2)
    assert failed.value.n_attempts == 3 and failed.value.total_usage.total_tokens > 0


def test_errors_pass(client: OpenAI) -> None:
    with pytest.raises(Exception, match="temperature"):
        ask(client, Mode.TOOLS, temperature=-1)
