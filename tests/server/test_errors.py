"""Everything a client can get wrong: the status, the type, the name of the parameter, on both families of routes."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import openai as sdk
import pytest
from aiohttp.test_utils import TestClient
from openai import AsyncOpenAI

from engine.errors import (
    AdapterForbidden,
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterTooLarge,
    EngineDead,
    GenerationError,
    LoraxError,
    OutOfMemory,
)
from engine.server.native.token_routes import MAX_TOKENIZED
from engine.server.text import Text, TextStream
from tests.server.fake import FakeBackend, Json, Start

HELLO: Any = [{"role": "user", "content": "Hello"}]

NATIVE: list[tuple[Json, str]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"typical_p": 0}, "typical_p"),
    ({"typical_p": 1.5}, "typical_p"),
    ({"min_p": 1.5}, "min_p"),
    ({"min_p": -1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"frequency_penalty": 2.1}, "frequency_penalty"),
    ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": 256}, "max_new_tokens"),
    ({"max_new_tokens": 255}, "max_new_tokens"),
    ({"max_new_tokens": True}, "max_new_tokens"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": "a"}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"truncate": 0}, "truncate"),
    ({"truncate": 201}, "truncate"),
    ({"best_of": 0}, "best_of"),
    ({"best_of": 5, "do_sample": True}, "best_of"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "best_of"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"return_k_alternatives": 0}, "return_k_alternatives"),
    ({"return_k_alternatives": 21}, "return_k_alternatives"),
    ({"min_new_tokens": -1}, "min_new_tokens"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_object", "schema": {"not": {}}}}, "response_format"),
    ({"response_format": {"type": "json_object", "schema": "{"}}, "response_format.schema"),
    ({"response_format": {"type": "json_object", "schema": 5}}, "response_format.schema"),
    ({"response_format": {"type": "regex"}}, "response_format.regex"),
    ({"response_format": {"type": "regex", "regex": "(?=a)"}}, "response_format"),
    ({"response_format": {"type": "choice", "choice": []}}, "response_format.choice"),
    ({"response_format": {"type": "lark", "grammar": "begin: 1"}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "ignore_eos_token": True}, "response_format"),
    ({"adapter_id": " "}, "adapter_id"),
    ({"adapter_id": "a", "adapter_source": "ftp"}, "adapter_source"),
    ({"adapter_id": 3}, "adapter_id"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"cache_salt": 5}, "cache_salt"),
    ({"priority": 1}, "priority"),
    ({"priority": -1001}, "priority"),
    ({"priority": 0.5}, "priority"),
]


@pytest.mark.parametrize(("parameters", "field"), NATIVE)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
async def test_native_parameters(
    client: TestClient, backend: FakeBackend, path: str, parameters: Json, field: str
) -> None:
    response = await client.post(path, json={"inputs": "Hello", "parameters": parameters})
    body = await response.json()
    assert response.status == 422, body
    assert body["error_type"] == "validation"
    assert body["field"] == field
    assert field.split("[")[0] in body["error"]
    assert not backend.requests


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"inputs": ""}, "inputs"),
        ({}, "inputs"),
        ({"inputs": 3}, "inputs"),
        ({"inputs": "xyz " * 500}, "inputs"),
        ({"inputs": "x", "parameters": []}, "parameters"),
        ({"inputs": "x", "stream": "yes"}, "stream"),
        (
            {"inputs": "x", "stream": True, "parameters": {"best_of": 2, "do_sample": True}},
            "best_of",
        ),
        (
            {"inputs": "x", "stream": True, "parameters": {"decoder_input_details": True}},
            "decoder_input_details",
        ),
    ],
)
async def test_native_bodies(client: TestClient, body: Json, field: str) -> None:
    response = await client.post("/", json=body)
    found = await response.json()
    assert (response.status, found["error_type"], found["field"]) == (422, "validation", field)


TWO: Json = {"ids": ["a", "b"], "weights": [1, 1]}
MERGED: list[tuple[Json, str]] = [
    ({}, "ids"),
    ({"ids": ["a"]}, "weights"),
    ({"ids": "a", "weights": [1]}, "ids"),
    ({"ids": ["a", 1], "weights": [1, 1]}, "ids[1]"),
    ({"ids": [], "weights": []}, "ids"),
    ({"ids": ["a"] * 17, "weights": [1] * 17}, "ids"),
    ({"ids": ["a", ""], "weights": [1, 1]}, "ids[1]"),
    (TWO | {"weights": [1]}, "weights"),
    (TWO | {"weights": [1, "1"]}, "weights[1]"),
    (TWO | {"weights": [1, 1e300]}, "weights"),
    (TWO | {"merge_strategy": "slerp"}, "merge_strategy"),
    (TWO | {"merge_strategy": "ties_svd", "density": 0.5}, "merge_strategy"),
    (TWO | {"merge_strategy": 1}, "merge_strategy"),
    (TWO | {"merge_strategy": "ties"}, "density"),
    (TWO | {"merge_strategy": "ties", "density": 0}, "density"),
    (TWO | {"merge_strategy": "dare_ties", "density": 1.5}, "density"),
    (TWO | {"majority_sign_method": "most"}, "majority_sign_method"),
    (TWO | {"seed": -1}, "seed"),
    (TWO | {"seed": 0.5}, "seed"),
]


@pytest.mark.parametrize(("merged", "field"), MERGED)
async def test_merged_adapters(
    client: TestClient, backend: FakeBackend, merged: Json, field: str
) -> None:
    """The same field in the same words on both kinds of routes."""
    body: Json = {"inputs": "Hello", "parameters": {"merged_adapters": merged}}
    response = await client.post("/generate", json=body)
    native = await response.json()
    assert (response.status, native["error_type"]) == (422, "validation")
    assert native["field"] == f"merged_adapters.{field}" and native["field"] in native["error"]
    response = await client.post("/v1/completions", json={"prompt": "x", "merged_adapters": merged})
    error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, native["field"])
    assert error["message"] == native["error"]
    assert not backend.requests


async def test_merged_adapters_and_an_adapter(client: TestClient, backend: FakeBackend) -> None:
    body: Json = {"inputs": "x", "parameters": {"merged_adapters": TWO, "adapter_id": "a"}}
    response = await client.post("/generate", json=body)
    error = await response.json()
    assert (response.status, error["field"]) == (422, "merged_adapters")
    assert "`adapter_id`" in error["error"]
    chat: Json = {"messages": [{"role": "user", "content": "x"}], "model": "a"}
    response = await client.post("/v1/chat/completions", json=chat | {"merged_adapters": TWO})
    error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, "merged_adapters")
    assert "`model`" in error["message"]
    assert not backend.requests


CHAT: list[tuple[Json, str]] = [
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 1000}, "max_completion_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 255}, "max_tokens"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": 3}, "stop"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        "response_format.json_schema.schema",
    ),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"json": {"type": "thing"}}}, "structured_outputs"),
    ({"guided_regex": "(?=a)"}, "structured_outputs"),
    ({"guided_choice": ["a"], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
    ),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "forbidden", "content": "x"}]}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}],
                }
            ]
        },
        "messages[0].content[0].type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
    ),
    ({"messages": [{"role": "user", "content": "xyz " * 500}]}, "messages"),
    ({"model": "a", "adapter_source": "ftp"}, "adapter_source"),
    ({"model": " "}, "model"),
    ({"model": 7}, "model"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"priority": 1}, "priority"),
]

COMPLETION: list[tuple[Json, str]] = [
    ({"suffix": "x"}, "suffix"),
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"n": 1, "best_of": 2, "stream": True}, "best_of"),
    ({"best_of": 5}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [400]}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": {"a": 5}}, "prompt"),
    ({"prompt": ["a"] * 2000}, "prompt"),
    ({"prompt": [5] * 201}, "prompt"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
]


@pytest.mark.parametrize(
    ("path", "given", "field"),
    [("chat/completions", *case) for case in CHAT]
    + [("completions", *case) for case in COMPLETION],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_openai_parameters(
    client: TestClient, backend: FakeBackend, path: str, given: Json, field: str, stream: bool
) -> None:
    if stream and field == "stream_options":
        return
    asked = {"messages": HELLO, "prompt": "Hello", "stream": stream}
    response = await client.post(f"/v1/{path}", json=asked | given)
    body = await response.json()
    assert response.status == 400, body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", field)
    assert error["code"] == "validation"
    assert not backend.requests


FAILURES: list[tuple[LoraxError, int, str]] = [
    (AdapterForbidden("a"), 403, "adapter_forbidden"),
    (AdapterIncompatible("a"), 422, "adapter_incompatible"),
    (AdapterTooLarge("a"), 413, "adapter_too_large"),
    (AdapterLoadFailed("a"), 424, "adapter_load_failed"),
    (OutOfMemory("a"), 503, "out_of_memory"),
    (EngineDead("a"), 503, "engine_dead"),
]


@pytest.mark.parametrize(("error", "status", "kind"), FAILURES, ids=lambda value: str(value))
async def test_adapter_errors(
    client: TestClient, backend: FakeBackend, error: LoraxError, status: int, kind: str
) -> None:
    backend.adapter_errors["bad"] = error
    for path in ("/generate", "/generate_stream"):
        body = {"inputs": "x", "parameters": {"adapter_id": "bad"}}
        response = await client.post(path, json=body)
        assert response.status == status
        assert (await response.json())["error_type"] == kind
    for stream in (False, True):
        body = {"messages": HELLO, "model": "bad", "stream": stream}
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status == (400 if status == 422 else status)
        found = (await response.json())["error"]
        assert found["code"] == kind
        assert found["param"] == (None if status == 503 else "model")


async def test_an_unknown_adapter(client: TestClient, openai: AsyncOpenAI) -> None:
    body = {"inputs": "x", "parameters": {"adapter_id": "missing"}}
    response = await client.post("/generate_stream", json=body)
    assert response.status == 404
    assert (await response.json())["error_type"] == "adapter_not_found"
    with pytest.raises(sdk.NotFoundError) as caught:
        await openai.chat.completions.create(model="missing", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


async def test_the_engine_fails(client: TestClient, backend: FakeBackend) -> None:
    backend.fail_after, backend.failure = 0, GenerationError("broken")
    response = await client.post("/generate", json={"inputs": "x"})
    assert (response.status, (await response.json())["error_type"]) == (500, "generation")
    response = await client.post("/v1/completions", json={"prompt": "x"})
    assert (response.status, (await response.json())["error"]["type"]) == (500, "server_error")


async def test_a_bug_fails_its_own_request(
    client: TestClient, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """What is not foreseen is a plain 500 and a traceback in the log, and the engine need not go on."""
    backend.delay = 0.001
    push = TextStream.push

    def broken(self: TextStream, token: int) -> str:
        if token == 77:
            raise RuntimeError("a bug")
        return push(self, token)

    monkeypatch.setattr(TextStream, "push", broken)
    backend.answer = lambda request: ([77] if request.tokens[-1] == 77 else [10]) * 20
    answers = [client.post("/v1/completions", json={"prompt": [5, last]}) for last in (77, 78)]
    bad, good = await asyncio.gather(*answers)
    assert (bad.status, good.status) == (500, 200)
    assert "a bug" not in await bad.text()
    assert "a bug" in caplog.text
    assert len(backend.cancelled) == 1


@pytest.mark.parametrize(
    "body", [b"", b"{", b"nonsense", b"[]", b"3", b"\xff\xfe", b'{"inputs": NaN}']
)
@pytest.mark.parametrize("path", ["/generate", "/tokenize", "/v1/completions"])
async def test_malformed_bodies(client: TestClient, path: str, body: bytes) -> None:
    response = await client.post(path, data=body)
    found = await response.json()
    assert response.status == 400
    kind = found["error"]["code"] if path.startswith("/v1") else found["error_type"]
    assert kind == "malformed_request"


async def test_a_body_that_is_nested_too_deeply(client: TestClient) -> None:
    for path in ("/generate", "/v1/completions"):
        body = b'{"inputs": "a", "prompt": "a", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}"
        response = await client.post(path, data=body)
        assert response.status == 400
        assert "nested" in await response.text()


async def test_a_body_that_is_not_what_its_header_says(client: TestClient) -> None:
    """And the next request of the client is served."""
    headers = {"Content-Encoding": "gzip"}
    response = await client.post("/generate", data=b"not gzip", headers=headers)
    assert response.status == 400
    assert (await response.json())["error_type"] == "malformed_request"
    assert (await client.post("/generate", json={"inputs": "x"})).status == 200


@pytest.mark.parametrize("header", [True, False])
async def test_a_token_that_cannot_be_one(
    client: TestClient, backend: FakeBackend, header: bool
) -> None:
    body: Json = {"inputs": "a", "parameters": {"adapter_id": "x/y"}}
    headers = {"Authorization": "Bearer caf\xe9"} if header else {}
    if not header:
        body["parameters"]["api_token"] = "caf\xe9"
    response = await client.post("/generate", json=body, headers=headers)
    assert response.status == 422
    found = await response.json()
    assert ("Authorization" if header else "api_token") in str(found)
    assert not backend.acquired


async def test_a_text_that_cannot_fit_is_not_tokenized(
    client: TestClient, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With truncate its end is, which gives the same tokens as the whole."""
    text = "".join(chr(ord("a") + index * index % 26) for index in range(200_000))
    asked: list[int] = []
    encode = Text.encode

    async def counted(self: Text, text: str, *, special: bool = True) -> list[int]:
        asked.append(len(text))
        return await encode(self, text, special=special)

    monkeypatch.setattr(Text, "encode", counted)
    for path, body, field in (
        ("/generate", {"inputs": text}, "inputs"),
        ("/v1/completions", {"prompt": text}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}, "messages"),
    ):
        response = await client.post(path, json=body)
        assert response.status in (400, 422)
        assert f"`{field}` has 200000 characters" in await response.text()
    assert not asked
    body = {"inputs": text, "parameters": {"truncate": 20, "max_new_tokens": 1}}
    assert (await client.post("/generate", json=body)).status == 200
    whole = await encode(backend.text, text)
    assert backend.requests[0].tokens == whole[-20:]
    assert asked[0] < len(text)


async def test_a_text_to_tokenize_that_is_too_long(client: TestClient) -> None:
    body = json.dumps({"inputs": "a" * (MAX_TOKENIZED + 1)}).encode()
    response = await client.post("/tokenize", data=io.BytesIO(body))
    assert response.status == 422
    assert "inputs" in await response.text()


@pytest.mark.parametrize("inputs", [r'"\ud800"', r'"a\u0000b"'])
async def test_strange_strings(client: TestClient, inputs: str) -> None:
    response = await client.post("/generate", data=b'{"inputs": %s}' % inputs.encode())
    assert response.status in (200, 400)
    assert response.status == 200 or json.loads(await response.read())["error_type"]


async def test_a_body_that_is_too_large(start: Start) -> None:
    client = await start(max_body_bytes=1000)
    response = await client.post("/generate", json={"inputs": "x" * 2000})
    assert response.status == 413
    assert (await response.json())["error_type"] == "request_too_large"
    response = await client.post("/v1/completions", json={"prompt": "x" * 2000})
    assert response.status == 413
    assert (await response.json())["error"]["code"] == "request_too_large"


async def test_routes_that_are_not(client: TestClient) -> None:
    response = await client.get("/nowhere")
    assert (response.status, (await response.json())["error_type"]) == (404, "not_found")
    response = await client.get("/v1/nowhere")
    assert (response.status, (await response.json())["error"]["code"]) == (404, "not_found")
    response = await client.get("/generate")
    assert response.status == 405
    assert "POST" in (await response.json())["error"]
    assert response.headers["Allow"] == "POST"


async def test_a_dead_engine(client: TestClient, backend: FakeBackend, openai: AsyncOpenAI) -> None:
    backend.alive = False
    response = await client.post("/generate", json={"inputs": "x"})
    assert response.status == 503
    with pytest.raises(sdk.InternalServerError) as caught:
        await openai.chat.completions.create(model="", messages=HELLO)
    assert caught.value.status_code == 503
    assert (await client.get("/metrics")).status == 200
