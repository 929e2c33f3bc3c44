"""OpenAI's routes, asked by OpenAI's own client; what it cannot send is asked by hand."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import openai as sdk
import pytest
from aiohttp.test_utils import TestClient
from openai import AsyncOpenAI

from engine.server.conversation import Conversation
from engine.server.openai.logprobs import prompt_offsets
from engine.server.text import Text
from tests.server.fake import FakeBackend, Json, events_of

SAYING = "né 😀 wörld"
HELLO: Any = [{"role": "user", "content": "Hello"}]


async def chat(openai: AsyncOpenAI, **given: Any) -> Any:
    return await openai.chat.completions.create(**{"model": "", "messages": HELLO, **given})


async def complete(openai: AsyncOpenAI, **given: Any) -> Any:
    return await openai.completions.create(**{"model": "", "prompt": "Hello", **given})


async def test_chat(openai: AsyncOpenAI, backend: FakeBackend, text: Text) -> None:
    backend.say(SAYING)
    found = await chat(openai, model="base")
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", found.id)
    assert found.object == "chat.completion"
    assert abs(found.created - time.time()) < 10
    assert found.model == "base"
    assert found.system_fingerprint.startswith("lorax-")
    (choice,) = found.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", SAYING)
    prompt = await text.encode_chat(Conversation(HELLO))
    assert backend.requests[0].tokens == prompt
    made = len(await text.encode(SAYING, special=False)) + 1
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), made)
    assert usage.total_tokens == len(prompt) + made
    assert usage.prompt_tokens_details.cached_tokens == 2


async def test_cached_tokens_of_an_answer_that_ends_at_a_stop_sequence(
    openai: AsyncOpenAI, backend: FakeBackend
) -> None:
    """The engine still works on it then."""
    backend.say(SAYING)
    found = await chat(openai, model="base", stop=SAYING[8:12])
    assert found.choices[0].message.content == SAYING[:8]
    assert found.usage.prompt_tokens_details.cached_tokens == 2


@pytest.mark.parametrize("burst", [1, 4, 100])
async def test_chat_streamed(openai: AsyncOpenAI, backend: FakeBackend, burst: int) -> None:
    backend.say(SAYING)
    backend.burst = burst
    chunks = [chunk async for chunk in await chat(openai, stream=True)]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAYING
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)


async def test_usage_of_a_stream(openai: AsyncOpenAI, backend: FakeBackend) -> None:
    options = {"include_usage": True}
    chunks = [chunk async for chunk in await chat(openai, stream=True, stream_options=options)]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    whole = await chat(openai, seed=backend.requests[0].sampling.seed)
    assert chunks[-1].usage == whole.usage


async def test_the_stream_is_done(client: TestClient) -> None:
    for path, asked in (
        ("chat/completions", {"messages": HELLO}),
        ("completions", {"prompt": "x"}),
    ):
        response = await client.post(f"/v1/{path}", json={"stream": True, **asked})
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert events_of(await response.read())[-1] == "[DONE]"


async def test_n_choices(openai: AsyncOpenAI, backend: FakeBackend) -> None:
    whole = await chat(openai, n=3, seed=5)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) == 3
    backend.delay = 0.001
    texts = ["", "", ""]
    order: list[int] = []
    async for chunk in await chat(openai, n=3, seed=5, stream=True):
        (choice,) = chunk.choices
        order.append(choice.index)
        texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert order != sorted(order)


@pytest.mark.parametrize("stop", ["o th", ["zzz", "o th"]])
async def test_stop_is_removed(openai: AsyncOpenAI, backend: FakeBackend, stop: Any) -> None:
    backend.say("one two three")
    found = await chat(openai, stop=stop)
    assert found.choices[0].message.content == "one tw"
    assert found.choices[0].finish_reason == "stop"
    chunks = [chunk async for chunk in await chat(openai, stop=stop, stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one tw"
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_length(openai: AsyncOpenAI, backend: FakeBackend, name: str) -> None:
    backend.say(SAYING)
    found = await chat(openai, **{name: 3})
    assert found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("given", "temperature"), [({}, 1.0), ({"temperature": 0}, 0.0), ({"temperature": 0.3}, 0.3)]
)
async def test_temperature(
    openai: AsyncOpenAI, backend: FakeBackend, given: Json, temperature: float
) -> None:
    await chat(openai, **given)
    await complete(openai, **given)
    assert [request.sampling.temperature for request in backend.requests] == [temperature] * 2


async def test_extras(openai: AsyncOpenAI, backend: FakeBackend) -> None:
    extra = {
        "top_k": 7,
        "min_p": 0.2,
        "typical_p": 0.9,
        "repetition_penalty": 1.1,
        "ignore_eos_token": True,
        "adapter_source": "local",
        "api_token": "t",
        "user": "me",
        "nothing_we_know": {"a": 1},
    }
    await chat(openai, model="me/lora@v1", extra_body=extra, seed=-3, top_p=0.5, presence_penalty=1)
    ((ref, token),) = backend.acquired
    assert (ref.id, ref.revision, ref.source, token) == ("me/lora", "v1", "local", "t")
    (request,) = backend.requests
    sampling = request.sampling
    assert (sampling.top_k, sampling.top_p, sampling.min_p) == (7, 0.5, 0.2)
    assert (sampling.typical_p, sampling.repetition_penalty) == (0.9, 1.1)
    assert sampling.presence_penalty == 1.0 and sampling.seed == -3
    assert request.eos_token_ids == []


async def test_parts_of_text_are_joined(openai: AsyncOpenAI, backend: FakeBackend) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    await chat(openai)
    await chat(openai, messages=[{"role": "user", "content": parts}])
    assert backend.requests[0].tokens == backend.requests[1].tokens


async def test_chat_logprobs(openai: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.say(SAYING)
    found = await chat(openai, logprobs=True, top_logprobs=2)
    entries = found.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries) == SAYING.encode()
    assert all(entry.logprob < 0 for entry in entries)
    assert all([top.logprob for top in entry.top_logprobs] == [-0.5, -1.5] for entry in entries)
    streamed = []
    async for chunk in await chat(openai, logprobs=True, top_logprobs=2, stream=True, seed=1):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    again = await chat(openai, logprobs=True, top_logprobs=2, seed=1)
    assert streamed == again.choices[0].logprobs.content


async def test_logprobs_leave_the_stop_sequence_out(
    openai: AsyncOpenAI, backend: FakeBackend
) -> None:
    backend.say("one😀STOP")
    found = await chat(openai, logprobs=True, stop="STOP", seed=1)
    entries = found.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries) == "one😀".encode()
    streamed = []
    async for chunk in await chat(openai, logprobs=True, stop="STOP", seed=1, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == entries


async def test_completion(openai: AsyncOpenAI, backend: FakeBackend, text: Text) -> None:
    backend.say(SAYING)
    found = await complete(openai)
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", found.id)
    assert (found.object, found.model) == ("text_completion", "tiny/base")
    (choice,) = found.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, SAYING, "stop")
    assert backend.requests[0].tokens == await text.encode("Hello")
    chunks = [chunk async for chunk in await complete(openai, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == SAYING
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("prompt", [["Hello", "there"], [[5, 6], [7]], [5, 6], "Hello"])
async def test_prompts(openai: AsyncOpenAI, backend: FakeBackend, prompt: Any) -> None:
    count = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    found = await complete(openai, prompt=prompt, n=2, seed=3)
    assert [choice.index for choice in found.choices] == list(range(2 * count))
    requests = backend.requests[:]
    assert found.usage.prompt_tokens == sum(len(request.tokens) for request in requests[::2])
    if prompt == [[5, 6], [7]]:
        assert [request.tokens for request in requests[::2]] == prompt
    texts = [""] * 2 * count
    async for chunk in await complete(openai, prompt=prompt, n=2, seed=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in found.choices]


async def test_best_of_answers_with_the_best(openai: AsyncOpenAI, backend: FakeBackend) -> None:
    everything = await complete(openai, n=4, seed=3, logprobs=0)
    found = await complete(openai, n=2, best_of=4, seed=3, logprobs=0)

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    assert [choice.index for choice in found.choices] == [0, 1]
    assert len(found.choices) == 2 and len(everything.choices) == 4
    assert {choice.text for choice in found.choices} < {c.text for c in everything.choices}
    assert found.usage.completion_tokens == everything.usage.completion_tokens
    assert mean(found.choices[0]) >= mean(found.choices[1]) - 0.5


@pytest.mark.parametrize("kind", ["text", "sentencepiece"])
@pytest.mark.parametrize(
    "prompt", ["hello wörld", " a  b", "é😀é", "né\n😀😀 wörld", "<s>hi</s> there", ""]
)
async def test_offsets_of_a_prompt_are_the_tokenizers(
    request: pytest.FixtureRequest, kind: str, prompt: str
) -> None:
    """Each token begins where the tokenizer's own does, but for those within a character and those not in the text."""
    text: Text = request.getfixturevalue(kind)
    spans = await text.tokenize(prompt)
    found = prompt_offsets(text, [span.id for span in spans], prompt)
    assert found == sorted(found) and all(0 <= at <= len(prompt) for at in found)
    begun = -1
    for span, at in zip(spans, found, strict=True):
        if span.stop > span.start > begun:
            begun = span.start
            skipped = prompt[min(at, begun) : max(at, begun)]
            assert skipped.strip() == "", (span, at)


@pytest.mark.parametrize("prompt", ["Hi 😀", [40, 41, 42]])
async def test_echo(openai: AsyncOpenAI, backend: FakeBackend, text: Text, prompt: Any) -> None:
    backend.say(" there")
    shown = prompt if isinstance(prompt, str) else text.decode(prompt)
    found = await complete(openai, prompt=prompt, echo=True, logprobs=1, max_tokens=3)
    (choice,) = found.choices
    assert choice.text.startswith(shown)
    log = choice.logprobs
    ids = prompt if isinstance(prompt, list) else await text.encode(prompt)
    assert len(log.tokens) == len(ids) + 3
    assert log.token_logprobs[0] is None and log.token_logprobs[1] == -0.1
    assert len(log.top_logprobs) == len(log.text_offset) == len(log.tokens)
    assert log.text_offset[len(ids)] == len(shown)
    streamed = ""
    entries = 0
    async for chunk in await complete(
        openai, prompt=prompt, echo=True, logprobs=1, max_tokens=3, stream=True
    ):
        streamed += chunk.choices[0].text
        if chunk.choices[0].logprobs:
            entries += len(chunk.choices[0].logprobs.tokens)
    assert streamed == choice.text and entries == len(log.tokens)


async def test_completion_logprobs(openai: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.say("abc def")
    found = await complete(openai, logprobs=2)
    log = found.choices[0].logprobs
    assert "".join(log.tokens) == "abc def"
    for token, offset in zip(log.tokens, log.text_offset, strict=True):
        assert "abc def"[offset:].startswith(token)
    assert all(len(top) in (2, 3) for top in log.top_logprobs)


async def test_models(openai: AsyncOpenAI) -> None:
    await chat(openai, model="me/lora")
    found = (await openai.models.list()).data
    assert [model.id for model in found] == ["tiny/base", "me/lora"]
    assert {model.object for model in found} == {"model"}
    assert [model.parent for model in found] == [None, "tiny/base"]  # type: ignore[attr-defined]
    assert (await openai.models.retrieve("me/lora")).id == "me/lora"
    assert (await openai.models.retrieve("base")).id == "tiny/base"
    with pytest.raises(sdk.NotFoundError) as caught:
        await openai.models.retrieve("nobody/knows")
    assert caught.value.code == "model_not_found"


async def test_a_failure_in_a_stream(openai: AsyncOpenAI, backend: FakeBackend) -> None:
    backend.fail_after = 3
    texts: list[Any] = []
    with pytest.raises(sdk.APIError, match="the engine died"):
        async for chunk in await chat(openai, stream=True):
            texts.append(chunk)
    assert texts


async def test_a_failed_stream_is_not_done(client: TestClient, backend: FakeBackend) -> None:
    backend.fail_after = 3
    response = await client.post("/v1/completions", json={"prompt": "x", "stream": True})
    events = events_of(await response.read())
    assert json.loads(events[-1])["error"]["code"] == "engine_dead"


async def test_the_key_is_the_tenants_token(client: TestClient, backend: FakeBackend) -> None:
    for key, expected in (("EMPTY", None), ("secret", "secret")):
        async with AsyncOpenAI(base_url=str(client.make_url("/v1")), api_key=key) as openai:
            await chat(openai, model="a")
        assert backend.acquired.pop()[1] == expected


async def test_a_tenants_adapter_is_named_to_nobody_else(
    client: TestClient, backend: FakeBackend
) -> None:
    """Neither in the list of models nor in the metrics, which are open to everybody."""
    backend.private.add("secret/name")
    alice = {"Authorization": "Bearer alice"}
    for model in ("secret/name", "open/name"):
        body = {"model": model, "prompt": "x", "max_tokens": 1}
        assert (await client.post("/v1/completions", json=body, headers=alice)).status == 200
    for headers, named in (({}, False), ({"Authorization": "Bearer bob"}, False), (alice, True)):
        listed = (await (await client.get("/v1/models", headers=headers)).json())["data"]
        names = {model["id"] for model in listed}
        assert "open/name" in names and ("secret/name" in names) == named
        one = await client.get("/v1/models/secret/name", headers=headers)
        assert one.status == (200 if named else 404)
    metrics = await (await client.get("/metrics")).text()
    assert "secret" not in metrics and 'adapter="private"' in metrics.replace(
        "adapter_id", "adapter"
    )
