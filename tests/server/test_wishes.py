"""Wishes that change an answer are served, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp.test_utils import TestClient

from engine.config import EngineConfig, ServerConfig
from engine.server.events import Token
from engine.server.openai.logprobs import completion
from engine.server.text import Text
from tests.server.conftest import Start
from tests.server.fake import EOS, FakeBackend, events_of

HELLO = {"model": "base", "prompt": "Hello"}


async def complete(client: TestClient, **given: Any) -> tuple[int, Any]:
    answer = await client.post("/v1/completions", json={**HELLO, **given})
    return answer.status, await answer.json()


async def generate(client: TestClient, **given: Any) -> tuple[int, Any]:
    answer = await client.post("/generate", json={"inputs": "Hello", "parameters": given})
    return answer.status, await answer.json()


async def test_biases_and_the_tokens_that_end_an_answer(
    client: TestClient, backend: FakeBackend
) -> None:
    status, _ = await complete(
        client, logit_bias={"5": -100, "17": 2.5}, min_tokens=3, stop_token_ids=[9, EOS]
    )
    assert status == 200
    (request,) = backend.requests
    sampling = request.sampling
    assert sampling.logit_bias == {5: -100.0, 17: 2.5}
    ends = {*backend.text.eos_token_ids, 9}
    assert set(request.eos_token_ids) == ends and len(request.eos_token_ids) == len(ends)
    assert (sampling.min_tokens, set(sampling.delayed)) == (3, ends)


async def test_stop_tokens_end_where_end_of_sequence_does_not(
    client: TestClient, backend: FakeBackend
) -> None:
    await complete(client, stop_token_ids=[9], ignore_eos=True)
    assert backend.requests[0].eos_token_ids == [9]


async def test_a_stop_sequence_counts_after_the_minimum(
    client: TestClient, backend: FakeBackend
) -> None:
    backend.say("one stop two stop three")
    _, free = await complete(client, stop=[" two"])
    assert free["choices"][0]["text"] == "one stop"
    least = free["usage"]["completion_tokens"] + 1
    _, later = await complete(client, stop=["stop"], min_tokens=least, max_tokens=100)
    assert later["choices"][0]["text"] == "one stop two "


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 100.5}}, "logit_bias"),
        ({"logit_bias": {str(id): 1 for id in range(1025)}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [3] * 129}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": 5, "guided_regex": "a"}, "min_tokens"),
        ({"stop_token_ids": [5], "guided_regex": "a"}, "stop_token_ids"),
        ({"top_k": 2**70}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"n": 129}, "n"),
        ({"best_of": 5}, "best_of"),
        ({"schema": {"type": "object"}}, "schema"),
        ({"json_schema": {"type": "object"}}, "json_schema"),
        ({"grammar": "start: 'a'"}, "grammar"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"model": "one", "adapter_id": "two"}, "adapter_id"),
    ],
)
async def test_refused_by_name(client: TestClient, given: dict[str, Any], field: str) -> None:
    status, body = await complete(client, **given)
    assert 400 <= status < 500
    named = body["error"]["message"] if field == "adapter_id" else body["error"]["param"]
    assert field in named


@pytest.mark.parametrize(
    "given",
    [
        {"top_k": -1},
        {"top_k": 0},
        {"typical_p": 1},
        {"stop": ""},
        {"stop": []},
        {"logit_bias": {}},
        {"grammar": ""},
        {"skip_special_tokens": True},
        {"use_beam_search": False},
        {"modalities": ["text"]},
        {"min_tokens": 0},
    ],
)
async def test_values_that_mean_off(
    client: TestClient, backend: FakeBackend, given: dict[str, Any]
) -> None:
    await complete(client, seed=1)
    status, _ = await complete(client, seed=1, **given)
    assert status == 200
    plain, same = backend.requests
    assert (same.sampling, same.eos_token_ids) == (plain.sampling, plain.eos_token_ids)


@pytest.mark.parametrize("given", [{"top_k": 0}, {"top_p": 1}, {"typical_p": 1}, {"min_p": 0}])
async def test_a_filter_that_is_off_does_not_sample(
    client: TestClient, backend: FakeBackend, given: dict[str, Any]
) -> None:
    status, _ = await generate(client, **given)
    assert status == 200
    assert backend.requests[0].sampling.temperature == 0


async def test_adapter_id_names_the_adapter(client: TestClient, backend: FakeBackend) -> None:
    assert (await complete(client, adapter_id="mine"))[0] == 200
    assert (await complete(client, model="mine", adapter_id="mine"))[0] == 200
    assert [ref.name for ref, _ in backend.acquired] == ["mine", "mine"]


async def test_every_bit_of_a_seed_counts(client: TestClient, backend: FakeBackend) -> None:
    for seed in (5, 5 + 2**63, 2**64 - 1):
        await complete(client, seed=seed)
    seeds = [request.sampling.seed for request in backend.requests]
    assert [seed % 2**64 for seed in seeds] == [5, 5 + 2**63, 2**64 - 1]
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


async def test_n_has_a_limit_of_its_own(client: TestClient) -> None:
    status, body = await complete(client, n=128, max_tokens=1)
    assert status == 200 and len(body["choices"]) == 128


async def test_text_that_is_not_utf_8_is_refused_anywhere(client: TestClient) -> None:
    raw = b'{"prompt": "Hello", "model": "base", "unknown\xff": 1}'
    answer = await client.post("/v1/completions", data=raw)
    assert answer.status == 400


async def test_the_watermark_and_the_minimum_of_lorax(start: Start, backend: FakeBackend) -> None:
    server = ServerConfig(watermark_gamma=0.25, watermark_delta=3.0)
    client = await start(config=EngineConfig(server=server))
    assert (await generate(client, watermark=True, min_new_tokens=2))[0] == 200
    assert (await generate(client))[0] == 200
    marked, plain = (request.sampling for request in backend.requests)
    assert (marked.watermark_gamma, marked.watermark_delta) == (0.25, 3.0)
    assert (marked.min_tokens, set(marked.delayed)) == (2, set(backend.text.eos_token_ids))
    assert (plain.watermark_gamma, plain.min_tokens, plain.delayed) == (0, 0, ())


async def test_lorax_refuses_a_field_of_tgi(client: TestClient) -> None:
    status, body = await generate(client, top_n_tokens=2)
    assert (status, body["field"]) == (422, "top_n_tokens")


async def test_headers_of_lorax_on_every_route(client: TestClient) -> None:
    plain = await client.post("/generate", json={"inputs": "Hello"})
    asked = await client.post("/v1/completions", json=HELLO)
    names = {name for name in plain.headers if name.startswith("x-")}
    assert names - set(asked.headers) == {"x-compute-characters"}
    usage = (await asked.json())["usage"]
    assert asked.headers["x-total-tokens"] == str(usage["total_tokens"])


async def test_an_echoed_prompt_has_the_true_top(client: TestClient, text: Text) -> None:
    """What lm-evaluation-harness takes for greedy is what the model would have said."""
    _, body = await complete(client, echo=True, logprobs=1, max_tokens=1)
    first, *tops = body["choices"][0]["logprobs"]["top_logprobs"]
    assert first is None
    number = body["usage"]["prompt_tokens"] - 1
    assert number and all(top[text.token_text(4)] == -0.05 for top in tops[:number])


def test_tokens_of_one_text_keep_the_best(text: Text) -> None:
    halves = [id for id in range(400) if "\ufffd" in text.token_text(id)][:3]
    assert len(halves) == 3
    token = Token(0, halves[0], "", "", -3.0, [(halves[1], -0.5), (halves[2], -1.0)], False)
    log = completion(text, [(0, token)], "")
    assert all(name.startswith("bytes:\\x") for name in log.tokens)
    (top,) = log.top_logprobs
    assert top is not None and sorted(top.values()) == [-3.0, -1.0, -0.5]
    token = Token(0, 20, "", "", -3.0, [(20, -0.5)], False)
    assert completion(text, [(0, token)], "").top_logprobs == [{text.token_text(20): -0.5}]


async def test_version_and_routes_of_encoders(client: TestClient) -> None:
    assert set(await (await client.get("/version")).json()) == {"version"}
    for path in ("/embed", "/classify", "/classify_batch", "/v1/embeddings"):
        answer = await client.post(path, json={"inputs": "x"})
        assert answer.status == 404 and "generates text" in await answer.text()


@pytest.mark.parametrize(
    ("path", "body", "ignored"),
    [
        (
            "/generate",
            {"inputs": "x", "wrong": 1, "parameters": {"temprature": 1, "top_k": 3}},
            "wrong, temprature",
        ),
        ("/generate", {"inputs": "x", "parameters": None}, None),
        (
            "/v1/completions",
            {"prompt": "x", "user": "me", "stream_options": None, "\u00e9\r\n": [{}]},
            r"user, \xe9\r\n",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x", "y": 1}], "store": {"a": {}}},
            "store",
        ),
        (
            "/v1/messages",
            {
                "messages": [{"role": "user", "content": "x"}],
                "max_tokens": 2,
                "inference_geo": "eu",
            },
            "inference_geo",
        ),
    ],
)
async def test_ignored_fields_are_named(
    client: TestClient, path: str, body: dict[str, Any], ignored: str | None
) -> None:
    response = await client.post(path, json=body)
    assert response.status == 200, await response.text()
    assert response.headers.get("x-lorax-ignored-fields") == ignored


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_alone_is_scored(
    client: TestClient, backend: FakeBackend, stream: bool
) -> None:
    """As lm-evaluation-harness asks. The scores are those of a request that generates."""
    asked = {"prompt": "one two three", "echo": True, "logprobs": 1, "stream": stream}
    response = await client.post("/v1/completions", json={**asked, "max_tokens": 0})
    assert response.status == 200, await response.text()
    if stream:
        (event, done) = events_of(await response.read())
        assert done == "[DONE]"
        (scored,) = json.loads(event)["choices"]
    else:
        body = await response.json()
        assert body["usage"]["completion_tokens"] == 0
        (scored,) = body["choices"]
    _, longer = await complete(client, prompt="one two three", echo=True, logprobs=1, max_tokens=3)
    (whole,) = longer["choices"]
    number = len(scored["logprobs"]["tokens"])
    assert number == longer["usage"]["prompt_tokens"] > 1
    assert scored["text"] == "one two three" and scored["finish_reason"] == "length"
    assert scored["logprobs"] == {
        name: values[:number] for name, values in whole["logprobs"].items()
    }


async def test_completions_may_have_a_default_length(start: Start, backend: FakeBackend) -> None:
    client = await start({"completion_max_tokens": 3})
    for given in ({}, {"max_tokens": 5}):
        await complete(client, **given)
    assert [one.max_new_tokens for one in backend.requests] == [3, 5]


async def test_without_echo_there_must_be_a_token(client: TestClient) -> None:
    response = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 0})
    assert response.status == 400 and (await response.json())["error"]["param"] == "max_tokens"


async def test_usage_in_every_chunk(client: TestClient) -> None:
    options = {"continuous_usage_stats": True, "include_usage": True}
    asked = {"prompt": "Hello", "stream": True, "stream_options": options, "n": 2, "max_tokens": 5}
    response = await client.post("/v1/completions", json=asked)
    *chunks, last = [json.loads(event) for event in events_of(await response.read())[:-1]]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and len(set(counts)) > 2
    assert chunks[-1]["usage"] == last["usage"]


async def test_the_end_of_a_prompt(client: TestClient, backend: FakeBackend, text: Text) -> None:
    tokens = await text.encode("one two three four")
    _, body = await complete(
        client, prompt="one two three four", truncate_prompt_tokens=2, echo=True
    )
    assert backend.requests[-1].tokens == tokens[-2:]
    assert body["choices"][0]["text"].startswith(text.decode(tokens[-2:]))
    asked = {"prompt": "x", "truncate_prompt_tokens": 0}
    response = await client.post("/v1/completions", json=asked)
    assert (await response.json())["error"]["param"] == "truncate_prompt_tokens"
