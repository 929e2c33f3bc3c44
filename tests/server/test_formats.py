"""A response format of this file alone: a parser and a formatter, served once they stand in the table."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import pytest
from aiohttp.test_utils import TestClient
from msgspec import Struct

from engine.adapters.ref import AdapterRef
from engine.config import EngineConfig
from engine.errors import EngineDead, InvalidRequest, LoraxError
from engine.server.decoding import decode
from engine.server.events import Event, FinishedChoice, Token
from engine.server.formats import Answer, Context, Format, Formatter, GenerationRequest
from engine.server.generation import Generation
from engine.server.parameters import Parameters
from engine.server.reading import Reading
from engine.server.routes import FORMATS
from engine.server.text import Text
from tests.server.fake import FakeBackend, Start

SAYING = "né 😀 wörld"


class Question(Struct):
    ask: str
    who: str | None = None
    live: bool = False
    times: int = 1
    most: int | None = None


class Shout:
    """Every choice in capitals; a stream ends with the number of tokens."""

    def __init__(self, who: str, generation: Generation, text: Text) -> None:
        self.who = who
        self.generation = generation

    def events(self, events: list[Event]) -> bytes:
        return "".join(one.delta.upper() for one in events if isinstance(one, Token)).encode()

    def end(self) -> bytes:
        return b"|%d" % self.generation.generated_tokens

    def failure(self, error: LoraxError) -> bytes:
        return f"|{error.error_type}".encode()

    def answer(self, choices: Sequence[FinishedChoice]) -> Answer:
        said = [choice.finish.text.upper() for choice in choices]
        return Answer({"who": self.who, "said": said}, {"x-said": str(len(said))})


def parse(raw: bytes | bytearray, context: Context, /) -> GenerationRequest:
    body = decode(raw, Question)
    return GenerationRequest(
        prompts=[body.ask],
        parameters=Parameters(
            adapter=context.adapter(body.who, None),
            api_token=context.token(None),
            sample=body.times > 1,
            best_of=body.times,
            max_new_tokens=body.most,
            names={"inputs": "ask", "max_new_tokens": "most", "best_of": "times"},
        ),
        formatter=partial(Shout, body.who or context.model_id),
        stream=body.live,
        id="question-1",
        headers={"x-asked": str(len(body.ask))},
    )


def error_body(error: LoraxError) -> object:
    return {"sorry": error.error_type, "about": error.field}


SHOUT = Format(parse, None, error_body)
PATH = "/v1/shout"


@pytest.fixture
async def client(start: Start) -> TestClient:
    return await start(formats={**FORMATS, PATH: SHOUT})


async def test_an_answer(client: TestClient, backend: FakeBackend) -> None:
    backend.say(SAYING)
    headers = {"Authorization": "Bearer secret"}
    response = await client.post(PATH, json={"ask": "Hé", "who": "me/lora"}, headers=headers)
    assert response.status == 200, await response.text()
    assert await response.json() == {"who": "me/lora", "said": [SAYING.upper()]}
    assert response.headers["x-said"] == "1"
    assert response.headers["x-asked"] == "2"
    assert response.headers["x-adapter-id"] == "me/lora"
    assert response.headers["x-request-id"] == "question-1"
    assert backend.acquired == [(AdapterRef(("me/lora",)), "secret")]


async def test_several_choices(client: TestClient) -> None:
    found = await (await client.post(PATH, json={"ask": "Hello", "times": 3})).json()
    assert found["who"] == "tiny/base" and len(set(found["said"])) == 3


@pytest.mark.parametrize("burst", [1, 4, 100])
async def test_a_stream(client: TestClient, backend: FakeBackend, burst: int) -> None:
    backend.say(SAYING)
    backend.burst = burst
    response = await client.post(PATH, json={"ask": "Hello", "live": True})
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.headers["x-asked"] == "5"
    said, _, count = (await response.read()).decode().partition("|")
    assert said == SAYING.upper()
    assert int(count) == len(backend.text._tokenizer.encode(SAYING).ids) + 1


async def test_a_stream_that_fails(client: TestClient, backend: FakeBackend) -> None:
    """Before its first token with a status, later with the formatter's bytes."""
    backend.fail_after = 0
    response = await client.post(PATH, json={"ask": "Hello", "live": True})
    assert (response.status, (await response.json())["sorry"]) == (503, "engine_dead")
    backend.fail_after = 3
    response = await client.post(PATH, json={"ask": "Hello", "live": True})
    assert response.status == 200 and (await response.read()).endswith(b"|engine_dead")


@pytest.mark.parametrize(
    ("method", "body", "status", "kind", "field"),
    [
        ("POST", {}, 422, "validation", "ask"),
        ("POST", {"ask": "xyz " * 500}, 422, "validation", "ask"),
        ("POST", {"ask": "x", "most": 0}, 422, "validation", "most"),
        ("POST", {"ask": "x", "times": 5}, 422, "validation", "times"),
        ("POST", {"ask": "x", "who": "missing"}, 404, "adapter_not_found", "adapter_id"),
        ("POST", [], 400, "malformed_request", None),
        ("GET", {}, 405, "method_not_allowed", None),
    ],
)
async def test_errors_have_the_shape_of_the_format(
    client: TestClient, method: str, body: object, status: int, kind: str, field: str | None
) -> None:
    response = await client.request(method, PATH, json=body)
    found = await response.json()
    assert (response.status, found) == (status, {"sorry": kind, "about": field})


async def test_requests_are_admitted_and_counted(start: Start) -> None:
    client = await start({"max_concurrent_requests": 4}, formats={PATH: SHOUT})
    assert (await client.post(PATH, json={"ask": "x"})).status == 200
    assert (await client.post(PATH, json={})).status == 422
    text = await (await client.get("/metrics")).text()
    assert "lorax_request_count 2.0" in text and "lorax_request_success 1.0" in text
    assert 'lorax_request_failure{err="validation"} 1.0' in text
    assert (await client.post("/generate", json={"inputs": "x"})).status == 404


async def test_what_is_not_http_gets_the_shape_of_the_format(client: TestClient) -> None:
    headers = {"Content-Encoding": "secret"}
    response = await client.post(PATH, data=b"{}", headers=headers)
    assert (response.status, (await response.json())["sorry"]) == (415, "unsupported_encoding")


# -- without a server


def context(authorization: str = "") -> Context:
    return Context(authorization, "tiny/base", EngineConfig())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "Hello"}),
        ("/generate_stream", {"inputs": "Hello"}),
        ("/", {"inputs": "Hello", "stream": True}),
        ("/v1/completions", {"prompt": "Hello"}),
        ("/v1/completions", {"prompt": ["Hello"], "stream": True}),
    ],
)
def test_a_parser_needs_no_server(path: str, body: dict[str, object]) -> None:
    asked = FORMATS[path].parse(json.dumps(body).encode(), context("Bearer abc"))
    assert list(asked.prompts) == ["Hello"]
    assert asked.stream is (path == "/generate_stream" or "stream" in body)
    assert asked.parameters.api_token == "abc" and asked.parameters.adapter is None
    with pytest.raises(InvalidRequest, match="is required"):
        FORMATS[path].parse(b"{}", context())


@pytest.mark.parametrize("path", FORMATS)
def test_a_formatter_needs_no_server(path: str, text: Text) -> None:
    """A token, as the bytes of a stream; and then the error that ends it."""
    body = {"inputs": "x", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    body |= {"input": "x", "max_tokens": 9}
    if path == "/v1/responses":
        del body["prompt"]
    asked = FORMATS[path].parse(json.dumps(body).encode(), context())
    generation = SimpleNamespace(
        id="a", num_choices=1, parameters=asked.parameters, reading=Reading(), prompt_tokens=1
    )
    formatter: Formatter = asked.formatter(generation, text)  # type: ignore[arg-type]
    token = Token(
        choice=0, id=40, text="word", delta="word", logprob=None, alternatives=None, special=False
    )
    for sent in (formatter.events([token]), formatter.failure(EngineDead("gone"))):
        events = [part.rpartition(b"data:")[2] for part in sent.split(b"\n\n")]
        assert events.pop() == b"" and all(map(json.loads, events))
    assert b"word" in formatter.events([token]) and b"gone" in sent
    if path != "/v1/responses":  # there the event has the whole response
        assert json.loads(events[0]) == FORMATS[path].error_body(EngineDead("gone"))


def test_parsers_and_formatters_know_nothing_of_http() -> None:
    program = (
        "import sys, engine.server.native, engine.server.openai, engine.server.anthropic\n"
        "print([name for name in ('aiohttp', 'torch', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr
