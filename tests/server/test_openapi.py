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


async def test_the_page_needs_nobody_else(client: TestClient) -> None:
    response = await client.get("/docs")
    text = await response.text()
    assert response.content_type == "text/html"
    assert "http" not in text
    assert "<script" not in text and "src=" not in text
    for method, path in OPERATIONS:
        assert f"{method} {path}" in text
