"""Which grammar a request gets: the same for every way to write it."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp.test_utils import TestClient

from engine.grammar import of_json_schema, of_lark, of_regex
from tests.server.fake import FakeBackend

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
ANY = of_json_schema({"type": "object"})
OWN = of_json_schema(SCHEMA)
CHOICE = of_lark('start: "yes" | "no \\"way\\""')
CHOICES = ["yes", 'no "way"']
LARK = 'start: "a" | "b" start'

FORMATS: list[tuple[dict[str, Any] | None, str]] = [
    (None, ""),
    ({"type": "text"}, ""),
    ({"type": "json_object"}, ANY),
    ({"type": "json_object", "schema": SCHEMA}, OWN),
    ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}, OWN),
    ({"type": "json_schema", "schema": SCHEMA}, OWN),
    ({"type": "regex", "regex": r"\d+"}, of_regex(r"\d+")),
    ({"type": "choice", "choice": CHOICES}, CHOICE),
    ({"type": "lark", "grammar": LARK}, of_lark(LARK)),
]
# As TGI has them, and `huggingface_hub` sends them: the type and its value.
TGI: list[tuple[dict[str, Any], str]] = [
    ({"type": "json", "value": SCHEMA}, OWN),
    ({"type": "json_object", "value": SCHEMA}, OWN),
    ({"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}, OWN),
    ({"type": "regex", "value": r"\d+"}, of_regex(r"\d+")),
]
OPENAI: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"json": SCHEMA}}, OWN),
    ({"structured_outputs": {"json": '{"type": "object"}'}}, ANY),
    ({"structured_outputs": {"json_object": True}}, ANY),
    ({"structured_outputs": {"regex": r"\d+"}}, of_regex(r"\d+")),
    ({"structured_outputs": {"choice": CHOICES}}, CHOICE),
    ({"structured_outputs": {"grammar": LARK}}, of_lark(LARK)),
    ({"guided_json": SCHEMA}, OWN),
    ({"guided_regex": r"\d+"}, of_regex(r"\d+")),
    ({"guided_choice": CHOICES}, CHOICE),
    ({"guided_grammar": LARK, "response_format": {"type": "text"}}, of_lark(LARK)),
]


@pytest.mark.parametrize(("given", "grammar"), FORMATS + TGI)
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
async def test_response_format(
    client: TestClient, backend: FakeBackend, path: str, given: dict[str, Any] | None, grammar: str
) -> None:
    asked = {} if given is None else {"response_format": given}
    body: dict[str, Any] = {"inputs": "x", "prompt": "x", "parameters": asked}
    body |= {"messages": [{"role": "user", "content": "x"}]} | asked
    response = await client.post(path, json=body)
    assert response.status == 200, await response.text()
    assert backend.requests[-1].grammar == grammar


@pytest.mark.parametrize(("given", "grammar"), TGI)
async def test_grammar_of_tgi(
    client: TestClient, backend: FakeBackend, given: dict[str, Any], grammar: str
) -> None:
    parameters = {"grammar": given, "response_format": {"type": "text"}}
    response = await client.post("/generate", json={"inputs": "x", "parameters": parameters})
    assert response.status == 200, await response.text()
    assert backend.requests[-1].grammar == grammar


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"grammar": {"type": "magic", "value": "x"}}, "grammar.type"),
        ({"grammar": {"type": "regex", "value": "(?=a)"}}, "grammar"),
        ({"grammar": {"type": "regex", "value": {}}}, "grammar.regex"),
        ({"grammar": {"type": "json_schema", "value": {}}}, "grammar.json_schema.schema"),
        ({"grammar": {"type": "json", "value": "{"}}, "grammar.schema"),
        ({"grammar": {"type": "json"}, "response_format": {"type": "json_object"}}, "grammar"),
    ],
)
async def test_a_refused_grammar_of_tgi(
    client: TestClient, given: dict[str, Any], field: str
) -> None:
    response = await client.post("/generate", json={"inputs": "x", "parameters": given})
    error = await response.json()
    assert (response.status, error["field"]) == (422, field), error


@pytest.mark.parametrize(("given", "grammar"), OPENAI)
async def test_extensions(
    client: TestClient, backend: FakeBackend, given: dict[str, Any], grammar: str
) -> None:
    response = await client.post("/v1/completions", json={"prompt": "x"} | given)
    assert response.status == 200, await response.text()
    assert backend.requests[-1].grammar == grammar


async def test_every_choice_has_the_grammar(client: TestClient, backend: FakeBackend) -> None:
    body = {"prompt": ["x", "y"], "n": 2, "response_format": {"type": "json_object"}}
    assert (await client.post("/v1/completions", json=body)).status == 200
    assert [one.grammar for one in backend.requests[-4:]] == [ANY] * 4


async def test_a_refusal_names_the_field_of_its_own_request(client: TestClient) -> None:
    """Also when the same grammar was refused in another field before."""
    for field in ("response_format", "structured_outputs", "response_format"):
        given = {"regex": "(?=a)"} | ({"type": "regex"} if field == "response_format" else {})
        response = await client.post("/v1/completions", json={"prompt": "x", field: given})
        error = (await response.json())["error"]
        assert response.status == 400 and error["param"] == field
        assert f"`{field}`" in error["message"]


SCHEMA_TEXTS = [
    ('{"enum": [18446744073709551616]}', "18446744073709551616"),
    ('{"enum": [-9223372036854775809]}', "-9223372036854775809"),
    ('{"enum": ["\\ud800"]}', "is not JSON"),
    ('{"\\ud800": 1}', "is not JSON"),
    ('{"minimum": NaN}', "is not JSON"),
    ('{"minimum": Infinity}', "is not JSON"),
    ('{"a":' * 5000 + "1" + "}" * 5000, "is not JSON"),
]


@pytest.mark.parametrize(("schema", "named"), SCHEMA_TEXTS)
async def test_a_schema_that_cannot_be_served_is_refused(
    client: TestClient, schema: str, named: str
) -> None:
    """As a text, which is decoded apart from the body."""
    response = await client.post("/v1/completions", json={"prompt": "x", "guided_json": schema})
    error = (await response.json())["error"]
    assert response.status == 400 and error["param"] == "structured_outputs.json"
    assert named in error["message"]


async def test_a_large_number_in_a_schema_is_refused(client: TestClient) -> None:
    asked = {"response_format": {"type": "json_object", "schema": {"enum": [2**70]}}}
    response = await client.post("/generate", json={"inputs": "x", "parameters": asked})
    error = await response.json()
    assert (response.status, error["field"]) == (422, "response_format.schema")
    assert str(2**70) in error["error"]
