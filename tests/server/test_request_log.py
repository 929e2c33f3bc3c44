"""The line that a request leaves in the log."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from aiohttp.test_utils import TestClient

from engine.adapters.ref import AdapterRef
from engine.errors import AdapterNotFound
from engine.logs import JsonFormatter
from engine.server.request_log import _shown
from tests.server.fake import FakeBackend, Start

TARGET = "engine.server.request_log"


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    format = JsonFormatter("front").format
    return [json.loads(format(one)) for one in caplog.records if one.name == TARGET]


async def test_an_answer(
    client: TestClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, TARGET)
    body = {"prompt": "Hello", "model": "me/lora", "api_token": "s3cret"}
    answer = await client.post("/v1/completions", json=body)
    usage = (await answer.json())["usage"]
    (line,) = lines(caplog)
    assert line["id"] == answer.headers["x-request-id"]
    assert (line["route"], line["finish"]) == ("/v1/completions", "eos_token")
    assert (line["tokens_in"], line["tokens_out"]) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert line["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert {"queue_ms", "first_token_ms", "total_ms"} <= set(line)
    assert "error" not in line and "tenant" not in line
    assert "s3cret" not in caplog.text


async def test_errors_and_tenants(
    start: Start, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, TARGET)
    client = await start({"api_key": ("k1",)})
    backend.adapter_errors["gone"] = AdapterNotFound("gone")
    headers = {"x-api-key": "k1"}
    body = {"inputs": "x", "parameters": {"adapter_id": "gone"}}
    await client.post("/generate", json=body, headers=headers)
    (line,) = lines(caplog)
    assert (line["error"], line["tenant"]) == ("adapter_not_found", "default")
    assert "k1" not in caplog.text


@pytest.mark.parametrize("name", ["a b", "a\x1b[31m", "a\nb", "a\u2028b", "a\x85b", "\ud800"])
def test_no_name_forges_a_line(name: str) -> None:
    shown = _shown(AdapterRef((name,)).name)
    assert shown.isascii() and shown.isprintable()
    assert json.loads(shown) == name


async def test_a_private_adapter_is_not_named(
    client: TestClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, TARGET)
    backend.private |= {"me/own"}
    for name in ("me/own", "me/lora", "base"):
        body = {"prompt": "Hello", "model": name, "api_token": "t"}
        assert (await client.post("/v1/completions", json=body)).status == 200
    assert [line["adapter"] for line in lines(caplog)] == ["private", "me/lora", "base"]
    assert "me/own" not in caplog.text
