"""The OpenAPI document: valid, complete, and true to the routes and their types."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from aiohttp.test_utils import TestClient
from openapi_spec_validator import OpenAPIV31SpecValidator

from engine.server.openapi import OPERATIONS, document
from engine.server.routes import routes
from tests.server.fake import FakeBackend


async def test_the_document_is_valid_and_served(client: TestClient) -> None:
    OpenAPIV31SpecValidator(document()).validate()
    for path in ("/openapi.json", "/api-doc/openapi.json"):
        assert await (await client.get(path)).json() == json.loads(json.dumps(document()))


def test_every_route_is_in_it() -> None:
    served = {(one.method, re.sub(r":[^}]*}", "}", one.path)) for one in routes()}
    assert served == set(OPERATIONS)


def exact(schema: object) -> object:
    """The schema, without room for fields that it does not name."""
    if isinstance(schema, list):
        return [exact(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: exact(value) for key, value in schema.items()}
    return made | ({"additionalProperties": False} if "properties" in made else {})


def resolved(schema: dict[str, object]) -> dict[str, object]:
    return schema | {"components": document()["components"]}


BODIES = [
    ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 2, "details": True}}),
    ("/invocations", {"inputs": "x"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "logprobs": True}),
    ("/v1/completions", {"prompt": "x", "logprobs": 1}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_answers_are_as_it_says(
    client: TestClient, backend: FakeBackend, path: str, body: dict[str, object]
) -> None:
    operation = document()["paths"][path]["post"]
    asked = operation["requestBody"]["content"]["application/json"]["schema"]
    jsonschema.validate(body, resolved(asked))
    response = await client.post(path, json=body)
    assert response.status == 200, await response.text()
    given = operation["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(await response.json(), resolved(given))
    refused = await client.post(path, json={"max_tokens": "x", "inputs": 5, "prompt": {}})
    shape = operation["responses"][str(refused.status)]["content"]["application/json"]["schema"]
    jsonschema.validate(await refused.json(), resolved(shape))


ADAPTER = {"adapter_id": "a"}
EXACT = [  # in this order: later ones need earlier ones
    ("POST", "/tokenize", {"inputs": "x y"}, 200),
    ("POST", "/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x"}]}, 200),
    ("POST", "/v1/responses", {"input": "x", "max_output_tokens": 3}, 200),
    ("POST", "/v1/embeddings", {}, 404),
    ("POST", "/embed", {}, 404),
    ("POST", "/adapters/load", ADAPTER, 200),
    ("POST", "/adapters/prefetch", ADAPTER, 202),
    ("POST", "/adapters/prefetch", {"adapter_id": ""}, 422),
    ("POST", "/adapters/pin", ADAPTER, 200),
    ("GET", "/adapters", None, 200),
    ("GET", "/adapters/{a}", None, 200),
    ("GET", "/adapters/{nothing}", None, 404),
    ("PUT", "/adapters/aliases/{prod}", ADAPTER, 201),
    ("PUT", "/adapters/aliases/{prod}", {"adapter_id": "b"}, 200),
    ("GET", "/adapters/aliases", None, 200),
    ("GET", "/adapters/aliases/{prod}", None, 200),
    ("DELETE", "/adapters/aliases/{prod}", None, 200),
    ("GET", "/v1/models", None, 200),
    ("GET", "/v1/models/{a}", None, 200),
    ("GET", "/v1/models/{nothing}", None, 404),
    ("POST", "/v1/load_lora_adapter", {}, 400),
    ("POST", "/v1/messages", {"max_tokens": 1}, 400),
    ("GET", "/cache", None, 200),
    ("GET", "/info", None, 200),
    ("GET", "/version", None, 200),
    ("POST", "/adapters/unload", ADAPTER, 200),
]


async def test_answers_have_these_fields_and_no_others(client: TestClient) -> None:
    for method, route, body, status in EXACT:
        path = re.sub(r"{(\w+)}", r"\1", route)
        response = await client.request(method, path, json=body)
        answer = await response.json()
        assert response.status == status, (path, answer)
        documented = next(
            one
            for one in document()["paths"]
            if re.sub(r"{.*}", "{}", one) == re.sub(r"{.*}", "{}", route)
        )
        told = document()["paths"][documented][method.lower()]["responses"][str(status)]
        schema = told["content"]["application/json"]["schema"]
        jsonschema.validate(answer, exact(resolved(schema)))


STREAMS = [
    ("/generate_stream", {"inputs": "x"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True}),
    ("/v1/completions", {"prompt": "x", "stream": True, "logprobs": 1}),
    ("/v1/responses", {"input": "x", "stream": True}),
    (
        "/v1/messages",
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "stream": True},
    ),
]


@pytest.mark.parametrize(("path", "body"), STREAMS)
async def test_events_are_as_it_says(
    client: TestClient, path: str, body: dict[str, object]
) -> None:
    told = document()["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    (data,) = told["schema"]["properties"].values()
    data = data.get("anyOf", [None, data])[1]
    schema = resolved(data["contentSchema"]["anyOf"][0])  # the other is an error
    raw = await (await client.post(path, json=body)).read()
    lines = (line.partition(":") for line in raw.decode().split("\n"))
    events = [text for name, _, text in lines if name == "data" and text != " [DONE]"]
    assert len(events) > 2
    for event in events:
        jsonschema.validate(json.loads(event), schema)


async def test_the_page_needs_nobody_else(client: TestClient) -> None:
    response = await client.get("/docs")
    text = await response.text()
    assert response.content_type == "text/html"
    assert "http" not in text
    assert "<script" not in text and "src=" not in text
    for method, path in OPERATIONS:
        assert f"{method} {path}" in text
