"""LoRAX's routes: shapes, parameters, headers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import TestClient

from engine.adapters.ref import AdapterRef
from engine.config import AdapterConfig, EngineConfig
from engine.lora.recipe import Recipe
from engine.messages import EngineStats
from engine.server.conversation import Conversation
from engine.server.text import Text
from tests.server.fake import EOS, FakeBackend, Json, Start, events_of

SAYING = "né 😀 wörld"


async def post(client: TestClient, path: str, inputs: str = "Hello", **parameters: Any) -> Any:
    response = await client.post(path, json={"inputs": inputs, "parameters": parameters})
    assert response.status == 200, await response.text()
    return await response.json()


async def stream(client: TestClient, inputs: str = "Hello", **parameters: Any) -> list[Json]:
    body = {"inputs": inputs, "parameters": parameters}
    response = await client.post("/generate_stream", json=body)
    assert response.status == 200, await response.text()
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.headers["X-Accel-Buffering"] == "no"
    return [json.loads(event) for event in events_of(await response.read())]


async def test_generate(client: TestClient, backend: FakeBackend, text: Text) -> None:
    backend.say(SAYING)
    assert await post(client, "/generate") == {"generated_text": SAYING}
    found = await post(client, "/generate", details=True)
    details = found["details"]
    tokens = await text.encode(SAYING, special=False)
    assert found["generated_text"] == SAYING
    assert details["finish_reason"] == "eos_token"
    assert details["prompt_tokens"] == len(await text.encode("Hello"))
    assert details["generated_tokens"] == len(tokens) + 1
    assert details["skipped_tokens"] == 0
    assert details["seed"] is None
    assert details["prefill"] == []
    assert "best_of_sequences" not in details
    assert [token["id"] for token in details["tokens"]] == [*tokens, EOS]
    last = details["tokens"][-1]
    assert last == {
        "id": EOS,
        "text": "</s>",
        "logprob": last["logprob"],
        "special": True,
        "skipped": False,
    }
    assert "".join(t["text"] for t in details["tokens"] if not t["special"]) == SAYING


@pytest.mark.parametrize("path", ["/", "/invocations"])
async def test_the_compatible_routes_answer_a_list(
    client: TestClient, backend: FakeBackend, path: str
) -> None:
    backend.say(SAYING)
    assert await post(client, path) == [{"generated_text": SAYING}]
    response = await client.post(path, json={"inputs": "Hello", "stream": True})
    assert json.loads(events_of(await response.read())[-1])["generated_text"] == SAYING


@pytest.mark.parametrize("burst", [1, 100])
async def test_a_stream(client: TestClient, backend: FakeBackend, text: Text, burst: int) -> None:
    backend.say(SAYING)
    backend.burst = burst
    events = await stream(client, details=True, do_sample=True, seed=2**64 - 1)
    assert "".join(e["token"]["text"] for e in events if not e["token"]["special"]) == SAYING
    assert all(set(event) == {"token", "generated_text", "details"} for event in events)
    assert {event["generated_text"] for event in events[:-1]} == {None}
    assert events[-1]["generated_text"] == SAYING
    assert events[-1]["details"] == {
        "finish_reason": "eos_token",
        "prompt_tokens": len(await text.encode("Hello")),
        "generated_tokens": len(events),
        "seed": 2**64 - 1,
    }
    assert all(event["token"]["logprob"] < 0 for event in events)
    assert (await stream(client))[-1]["details"] is None


async def test_an_end_without_tokens_still_has_an_event(
    client: TestClient, backend: FakeBackend
) -> None:
    backend.say(SAYING)
    backend.bare_finish = True
    backend.delay = 0.002
    events = await stream(client)
    assert events[-1]["generated_text"] == SAYING
    assert events[-1]["token"]["special"]


async def test_the_stop_sequence_stays(client: TestClient, backend: FakeBackend) -> None:
    backend.say("one two three")
    found = await post(client, "/generate", stop=["o th"], details=True)
    assert found["generated_text"] == "one two th"
    assert found["details"]["finish_reason"] == "stop_sequence"
    events = await stream(client, stop=["o th"])
    assert events[-1]["generated_text"] == "one two th"
    assert "".join(event["token"]["text"] for event in events) == "one two th"


async def test_full_text(client: TestClient, backend: FakeBackend) -> None:
    backend.say(" there")
    found = await post(client, "/generate", "Hi", return_full_text=True)
    assert found["generated_text"] == "Hi there"
    assert (await stream(client, "Hi", return_full_text=True))[-1]["generated_text"] == "Hi there"


async def test_prefill(client: TestClient, backend: FakeBackend, text: Text) -> None:
    found = await post(client, "/generate", decoder_input_details=True)
    prefill = found["details"]["prefill"]
    assert [entry["id"] for entry in prefill] == await text.encode("Hello")
    assert [entry["logprob"] for entry in prefill][:2] == [None, -0.1]
    assert "".join(entry["text"] for entry in prefill) == "Hello"


async def test_alternatives(client: TestClient, backend: FakeBackend, text: Text) -> None:
    found = await post(client, "/generate", details=True, return_k_alternatives=2)
    assert found["details"]["tokens"][0]["alternative_tokens"] == [
        {"id": 4, "text": text.token_text(4), "logprob": -0.5},
        {"id": 5, "text": text.token_text(5), "logprob": -1.5},
    ]
    assert (await stream(client, return_k_alternatives=1))[0]["token"]["alternative_tokens"]


async def test_best_of(client: TestClient, backend: FakeBackend) -> None:
    found = await post(client, "/generate", best_of=3, do_sample=True, details=True)
    details = found["details"]
    sequences = details["best_of_sequences"]
    assert len(sequences) == 2 and len(backend.requests) == 3
    assert len({details["seed"], *(one["seed"] for one in sequences)}) == 3

    def mean(one: Json) -> float:
        return sum(token["logprob"] for token in one["tokens"]) / len(one["tokens"])

    assert mean(details) >= max(map(mean, sequences))
    assert set(sequences[0]) == {
        "generated_text",
        "finish_reason",
        "generated_tokens",
        "seed",
        "prefill",
        "tokens",
    }


@pytest.mark.parametrize("found_in", ["demo", "local"])
async def test_the_header_tells_where_an_adapter_was_found(
    client: TestClient, backend: FakeBackend, found_in: str
) -> None:
    backend.found_in = found_in
    body = {"inputs": "x", "parameters": {"adapter_id": "mine", "max_new_tokens": 1}}
    response = await client.post("/generate", json=body)
    assert response.headers["x-adapter-source"] == found_in


async def test_headers(client: TestClient, backend: FakeBackend) -> None:
    body = {"inputs": "Hé", "parameters": {"adapter_id": "me/lora", "max_new_tokens": 5}}
    response = await client.post("/generate", json=body)
    headers = response.headers
    assert headers["x-compute-type"] == "cpu"
    assert headers["x-compute-characters"] == "2"
    assert headers["x-model-id"] == "tiny/base"
    assert headers["x-adapter-id"] == "me/lora"
    assert headers["x-adapter-source"] == "hub"
    prompt, made = int(headers["x-prompt-tokens"]), int(headers["x-generated-tokens"])
    assert made == 5
    assert int(headers["x-total-tokens"]) == prompt + made
    for name in ("compute", "total", "validation", "queue", "inference"):
        assert int(headers[f"x-{name}-time"]) >= 0
    for name in ("time-per-token", "time-to-first-token", "time-per-output-token"):
        assert float(headers[f"x-{name}"]) >= 0
    response = await client.post("/generate_stream", json=body)
    assert response.headers["x-adapter-id"] == "me/lora"
    assert "x-total-time" not in response.headers
    response = await client.post("/generate", json={"inputs": "x"})
    assert "x-adapter-id" not in response.headers


async def test_a_gpu_is_told(start: Start, backend: FakeBackend) -> None:
    backend.info = msgspec.structs.replace(backend.info, device="cuda")
    response = await (await start()).post("/generate", json={"inputs": "x"})
    assert response.headers["x-compute-type"] == "gpu+optimized"


@pytest.mark.parametrize("name", [None, "", "base", "__base_model__", "tiny/base"])
async def test_names_of_the_base_model(
    client: TestClient, backend: FakeBackend, name: str | None
) -> None:
    await post(client, "/generate", adapter_id=name)
    assert backend.requests[0].adapter is None and not backend.acquired


TWO = {"ids": ["me/a@main", "me/b"], "weights": [1, -0.5]}


@pytest.mark.parametrize("name", [None, "", "base", "tiny/base"])
async def test_merged_adapters(client: TestClient, backend: FakeBackend, name: str | None) -> None:
    """With every field, on both kinds of routes; the base model may be named next to them."""
    merged = TWO | {"merge_strategy": "dare_ties", "density": 0.25, "seed": 7}
    merged["majority_sign_method"] = "frequency"
    recipe = Recipe((1.0, -0.5), "dare_ties", 0.25, "frequency", 7)
    parameters = {"merged_adapters": merged, "adapter_id": name, "adapter_source": "Hub"}
    body = {"inputs": "x", "parameters": parameters}
    response = await client.post("/generate", json=body, headers={"Authorization": "Bearer t"})
    assert response.headers["x-adapter-id"] == "me/a@main,me/b"
    chat = {"messages": [{"role": "user", "content": "x"}], "model": name, "api_token": "t"}
    chat |= {"merged_adapters": merged, "adapter_source": "hub"}
    response = await client.post("/v1/chat/completions", json=chat)
    assert response.status == 200, await response.text()
    assert response.headers["x-adapter-id"] == "me/a@main,me/b"
    ref = AdapterRef(("me/a@main", "me/b"), "hub", None, recipe)
    assert backend.acquired == [(ref, "t"), (ref, "t")]
    models = await (await client.get("/v1/models")).json()
    assert [model["id"] for model in models["data"]] == ["tiny/base"], "a merge has no model name"


async def test_merged_adapters_have_defaults(start: Start, backend: FakeBackend) -> None:
    """Those of LoRAX. They replace the server's own adapter."""
    adapters = AdapterConfig(adapter_id="mine", adapter_source="local")
    client = await start(config=EngineConfig(adapters=adapters))
    optional = dict.fromkeys(("merge_strategy", "density", "majority_sign_method", "seed"))
    await post(client, "/generate", merged_adapters=TWO)
    await post(client, "/generate", merged_adapters=TWO | optional)
    linear = AdapterRef(("me/a@main", "me/b"), recipe=Recipe((1.0, -0.5)))
    assert [ref for ref, _ in backend.acquired] == [linear, linear]


async def test_the_default_adapter(start: Start, backend: FakeBackend) -> None:
    adapters = AdapterConfig(adapter_id="mine", adapter_source="local")
    client = await start(config=EngineConfig(adapters=adapters))
    await post(client, "/generate")
    await post(client, "/generate", adapter_id="base")
    ((ref, _),) = backend.acquired
    assert (ref.id, ref.source) == ("mine", None)  # found as it was at the start
    assert [request.adapter is None for request in backend.requests] == [False, True]


@pytest.mark.parametrize(
    ("headers", "parameters", "token"),
    [
        ({}, {}, None),
        ({"Authorization": "Bearer abc"}, {}, "abc"),
        ({"Authorization": "Bearer abc"}, {"api_token": "xyz"}, "xyz"),
        ({"Authorization": "Bearer EMPTY"}, {}, None),
        ({"Authorization": "Basic abc"}, {}, None),
    ],
)
async def test_the_token(
    client: TestClient, backend: FakeBackend, headers: Json, parameters: Json, token: str | None
) -> None:
    body = {"inputs": "x", "parameters": {"adapter_id": "a@v2", **parameters}}
    response = await client.post("/generate", json=body, headers=headers)
    assert response.status == 200
    ((ref, found),) = backend.acquired
    assert found == token
    assert (ref.id, ref.revision) == ("a", "v2")


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, {"temperature": 0.0}),
        ({"temperature": 1.0}, {"temperature": 0.0}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0}, {"temperature": 0.0}),
        ({"top_k": 5}, {"temperature": 1.0, "top_k": 5}),
        ({"top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"typical_p": 0.5}, {"temperature": 1.0, "typical_p": 0.5}),
        ({"min_p": 0.1}, {"temperature": 1.0, "min_p": 0.1}),
        ({"top_k": 5, "temperature": 0}, {"temperature": 0.0, "top_k": 0}),
        ({"top_k": 100000}, {"top_k": 400}),
        ({"repetition_penalty": 1.3}, {"temperature": 0.0, "repetition_penalty": 1.3}),
        ({"frequency_penalty": 1}, {"frequency_penalty": 1.0}),
        ({"presence_penalty": -2}, {"presence_penalty": -2.0}),
        ({"seed": 3, "do_sample": True}, {"seed": 3}),
        ({"details": True}, {"logprobs": True}),
        ({}, {"logprobs": False, "num_alternatives": 0, "prompt_logprobs": False}),
        ({"unknown": [1, 2], "apply_chat_template": True}, {"temperature": 0.0}),
        ({"response_format": {"type": "text"}, "watermark": False}, {"temperature": 0.0}),
    ],
)
async def test_sampling(
    client: TestClient, backend: FakeBackend, parameters: Json, expected: Json
) -> None:
    await post(client, "/generate", **parameters)
    sampling = backend.requests[0].sampling
    assert {name: getattr(sampling, name) for name in expected} == expected


async def test_tokenize(client: TestClient, text: Text) -> None:
    response = await client.post("/tokenize", json={"inputs": SAYING})
    tokens = await response.json()
    assert [token["id"] for token in tokens] == await text.encode(SAYING)
    assert all(set(token) == {"id", "text", "start", "stop"} for token in tokens)
    assert tokens[-1]["stop"] == len(SAYING)


async def test_tokens_as_of_vllm(client: TestClient, text: Text) -> None:
    whole = await text.encode(SAYING)
    asked: dict[str, object] = {"prompt": SAYING, "model": "base", "return_token_strs": True}
    found = await (await client.post("/tokenize", json=asked)).json()
    assert found["tokens"] == whole and found["count"] == len(whole)
    assert found["token_strs"] == [text.token_text(token) for token in whole]
    bare = await client.post("/tokenize", json={"prompt": SAYING, "add_special_tokens": False})
    assert (await bare.json())["tokens"] == await text.encode(SAYING, special=False)
    messages = [{"role": "user", "content": SAYING}]
    chat = await (await client.post("/tokenize", json={"messages": messages})).json()
    assert chat["tokens"] == await text.encode_chat(Conversation(messages))
    back = await client.post("/detokenize", json={"tokens": chat["tokens"], "model": "base"})
    assert await back.json() == {"prompt": text.written(chat["tokens"])}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokenize", {}, "inputs"),
        ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [2**40]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)
async def test_tokens_refused(
    client: TestClient, path: str, body: dict[str, object], field: str
) -> None:
    response = await client.post(path, json=body)
    assert response.status == 422 and f"`{field}`" in (await response.json())["error"]


async def test_health_says_that_adapters_cannot_be_loaded(
    client: TestClient, backend: FakeBackend
) -> None:
    backend.exchange_away = True
    response = await client.get("/health")
    assert response.status == 200, "the base model is served"
    assert await response.json() == {"status": "degraded", "adapter_exchange": "restarting"}


@pytest.mark.parametrize("path", ["/health", "/ping", "/"])
async def test_health(client: TestClient, backend: FakeBackend, path: str) -> None:
    response = await client.get(path)
    assert response.status == 200 and await response.read() == b""
    backend.alive = False
    response = await client.get(path)
    assert response.status == 503
    assert await response.json() == {"error": "unhealthy", "error_type": "healthcheck"}


async def test_startup(client: TestClient, backend: FakeBackend) -> None:
    assert (await client.get("/startup")).status == 200
    (request,) = backend.requests
    assert request.max_new_tokens == 1 and request.tokens == [0]
    backend.fail_after = 0
    response = await client.get("/startup")
    assert response.status == 503 and (await response.json())["error_type"] == "engine_dead"


async def test_info(client: TestClient, backend: FakeBackend) -> None:
    backend.stats = EngineStats(resident=[("lora", b"\x01\x02", 64)])
    backend.info = msgspec.structs.replace(backend.info, quantize="bitsandbytes")
    found = await (await client.get("/info")).json()
    assert found["model_id"] == "tiny/base"
    assert found["max_best_of"] == 4
    assert found["max_total_tokens"] == 256
    assert found["version"]
    assert found["quantize"] == "bitsandbytes"
    assert found["memory_plan"] == {"weights": 1000, "kv": 2000}
    assert found["adapters_resident"] == [{"name": "lora", "digest": "0102", "bytes": 64}]


async def test_a_failure_before_the_first_token_has_its_status(
    client: TestClient, backend: FakeBackend
) -> None:
    backend.fail_after = 0
    for path in ("/generate", "/generate_stream", "/"):
        response = await client.post(path, json={"inputs": "x"})
        assert response.status == 503
        assert (await response.json())["error_type"] == "engine_dead"


async def test_a_failure_in_a_stream_is_an_event(client: TestClient, backend: FakeBackend) -> None:
    backend.fail_after = 3
    events = await stream(client)
    assert [set(event) for event in events[:-1]] == [{"token", "generated_text", "details"}] * 3
    assert events[-1] == {"error": "the engine died", "error_type": "engine_dead"}


async def test_silence_is_bridged_by_comments(start: Start, backend: FakeBackend) -> None:
    client = await start(keep_alive_s=0.02)
    backend.first_delay = 0.5
    backend.say("ab")
    response = await client.post("/generate_stream", json={"inputs": "x"})
    raw = await response.read()
    assert raw.startswith(b": keep-alive\n\n: keep-alive\n\n")
    assert json.loads(events_of(raw)[-1])["generated_text"] == "ab"
    backend.first_delay, backend.fail_after = 0.1, 0
    response = await client.post("/generate_stream", json={"inputs": "x"})
    assert response.status == 200  # it was sent with the first comment
    assert json.loads(events_of(await response.read())[-1])["error_type"] == "engine_dead"


async def test_streams_run_side_by_side(client: TestClient, backend: FakeBackend) -> None:
    backend.delay = 0.001
    answers = await asyncio.gather(*(stream(client, f"prompt {index}") for index in range(32)))
    for events in answers:
        whole = "".join(e["token"]["text"] for e in events if not e["token"]["special"])
        assert events[-1]["generated_text"] == whole
