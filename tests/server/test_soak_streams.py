"""The soak of many streams: a small part against the real server, and that it sees what is not complete."""

from __future__ import annotations

import pytest
from aiohttp.test_utils import TestClient

from tests.server.fake import FakeBackend
from tools.questions import ROUTES, Question
from tools.soak_streams import arguments, run

SMALL = ["--streams", "24", "--requests", "40", "--seconds", "0", "--max-tokens", "24"]


@pytest.mark.slow
def test_streams_are_as_alone_and_nothing_is_left() -> None:
    found = run(arguments(SMALL))
    assert found["faults"] == []
    assert found["streams"]["complete"] >= 20
    assert found["streams"]["left"] + found["streams"].get("left early", 0) > 0
    assert found["different answers"] > 16, "the prompts, the models and the routes differ"


@pytest.mark.parametrize("route", ROUTES)
async def test_a_stream_is_the_whole_answer_and_no_part_of_it_is(
    client: TestClient, backend: FakeBackend, route: str
) -> None:
    backend.say(" one two three")
    question = Question(route, None, "Hello", 20)
    async with client.post(question.path(False), json=question.body(False)) as response:
        whole = question.whole(await response.json())
    async with client.post(question.path(True), json=question.body(True)) as response:
        data = await response.read()
    assert question.streamed(data) == whole
    assert "two" in whole.text and whole.output_tokens > 2
    events = data.split(b"\n\n")
    for count in range(len(events) - 1):
        with pytest.raises(ValueError):
            question.streamed(b"\n\n".join(events[:count]))


@pytest.mark.parametrize("route", ROUTES)
async def test_an_error_in_a_stream_is_seen(
    client: TestClient, backend: FakeBackend, route: str
) -> None:
    question = Question(route, None, "Hello", 20)
    backend.fail_after = 2
    async with client.post(question.path(True), json=question.body(True)) as response:
        data = await response.read()
    with pytest.raises(ValueError):
        question.streamed(data)
