"""`openai`: chat completions, streamed and whole, in threads and in asyncio."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI

from tests.conformance.wire import ADAPTERS, MESSAGES, Server

GREEDY: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 24}


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.v1, api_key=server.key, max_retries=0) as client:
        yield client


@pytest.fixture
async def later(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=server.v1, api_key=server.key, max_retries=0) as client:
        yield client


def text_of(chunks: Any) -> str:
    return "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)


@pytest.mark.parametrize("model", ["base", "demo", *ADAPTERS])
def test_same_as_without_the_sdk(client: OpenAI, server: Server, model: str) -> None:
    answer = client.chat.completions.create(model=model, **GREEDY)
    assert answer.object == "chat.completion" and answer.model == model and answer.created > 0
    assert answer.id.startswith("chatcmpl-") and answer.system_fingerprint
    message = answer.choices[0].message
    assert message.role == "assistant" and message.tool_calls is None and message.refusal is None
    assert message.content and message.content == server.says(model)


def test_adapters_change_the_text(client: OpenAI) -> None:
    answers = [client.chat.completions.create(model=name, **GREEDY) for name in ("base", *ADAPTERS)]
    assert len({one.choices[0].message.content for one in answers}) == 4


@pytest.mark.parametrize("model", ["base", *ADAPTERS])
def test_stream_joined_is_the_whole(client: OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, **GREEDY).choices[0]
    chunks = list(client.chat.completions.create(model=model, stream=True, **GREEDY))
    assert text_of(chunks) == whole.message.content
    assert {(one.object, one.model, one.id) for one in chunks} == {
        ("chat.completion.chunk", model, chunks[0].id)
    }
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [one.choices[0].finish_reason for one in chunks]
    assert reasons[-1] == whole.finish_reason and not any(reasons[:-1])
    assert all(one.usage is None for one in chunks)


def test_usage_adds_up(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="base", **GREEDY)
    usage = answer.usage
    assert usage is not None and usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details and usage.completion_tokens_details
    assert usage.completion_tokens_details.reasoning_tokens == 0


def test_usage_of_a_stream(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="base", **GREEDY).usage
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model="base", stream=True, stream_options=options, **GREEDY)
    )
    last = chunks[-1]
    assert last.choices == [] and last.usage is not None and whole is not None
    assert last.usage.completion_tokens == whole.completion_tokens
    assert last.usage.total_tokens == whole.total_tokens
    assert all(one.usage is None for one in chunks[:-1])


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_length(client: OpenAI, field: str) -> None:
    given: Any = {field: 3}
    answer = client.chat.completions.create(
        model="base", messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}, **given
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 3


@pytest.mark.parametrize("stop", ["castle", ["zebra", "castle"]])
def test_stop(client: OpenAI, stop: Any) -> None:
    whole = client.chat.completions.create(model="pirate", **GREEDY).choices[0].message.content
    choice = client.chat.completions.create(model="pirate", stop=stop, **GREEDY).choices[0]
    assert whole is not None and choice.finish_reason == "stop"
    assert choice.message.content == whole.partition("castle")[0] != whole


def test_seed(client: OpenAI) -> None:
    def said(seed: int) -> Any:
        given = GREEDY | {"temperature": 1.5, "seed": seed}
        return client.chat.completions.create(model="base", **given).choices[0].message.content

    first = [said(seed) for seed in range(4)]
    assert [said(seed) for seed in range(4)] == first and len(set(first)) > 1


def test_n(client: OpenAI) -> None:
    given = GREEDY | {"temperature": 1.2, "n": 3, "seed": 5}
    answer = client.chat.completions.create(model="base", **given)
    assert [one.index for one in answer.choices] == [0, 1, 2]
    texts = [one.message.content for one in answer.choices]
    assert len(set(texts)) > 1
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(model="base", stream=True, **given):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts


def test_logprobs(client: OpenAI) -> None:
    choice = client.chat.completions.create(
        model="base", logprobs=True, top_logprobs=3, **GREEDY
    ).choices[0]
    assert choice.logprobs and choice.logprobs.content
    told = choice.logprobs.content
    text = "".join(bytes(one.bytes or ()).decode() for one in told)
    assert text.strip() == (choice.message.content or "").strip()
    for one in told:
        assert len(one.top_logprobs) == 3 and one.logprob <= 0
        best = one.top_logprobs[0]
        assert best.token == one.token and math.isclose(best.logprob, one.logprob, abs_tol=1e-4)


def test_logprobs_of_a_stream(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="base", logprobs=True, **GREEDY).choices[0]
    told = [
        (one.token, round(one.logprob, 3))
        for chunk in client.chat.completions.create(
            model="base", logprobs=True, stream=True, **GREEDY
        )
        if chunk.choices and chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content or ()
    ]
    assert whole.logprobs and whole.logprobs.content and told
    assert told == [(one.token, round(one.logprob, 3)) for one in whole.logprobs.content]


def test_logit_bias(client: OpenAI, server: Server) -> None:
    token = server.generates()["details"]["tokens"][0]["id"]
    only = client.chat.completions.create(
        model="base", logit_bias={str(token): 100}, **GREEDY | {"max_tokens": 4}
    )
    assert only.choices[0].message.content == server.says(max_tokens=4, logit_bias={token: 100})
    chosen = client.chat.completions.create(
        model="base", logit_bias={str(token): 100}, logprobs=True, **GREEDY | {"max_tokens": 4}
    ).choices[0]
    assert chosen.logprobs and chosen.logprobs.content
    assert len({one.token for one in chosen.logprobs.content}) == 1


def test_penalties_change_the_text(client: OpenAI, server: Server) -> None:
    long = GREEDY | {"max_tokens": 60, "extra_body": {"ignore_eos": True}}
    plain = client.chat.completions.create(model="base", **long).choices[0].message.content
    punished = client.chat.completions.create(
        model="base", frequency_penalty=2, presence_penalty=2, **long
    )
    same = server.says(max_tokens=60, ignore_eos=True, frequency_penalty=2, presence_penalty=2)
    assert punished.choices[0].message.content == same != plain


def test_greedy_filters_keep_the_text(client: OpenAI) -> None:
    plain = client.chat.completions.create(model="base", **GREEDY).choices[0].message.content
    one = client.chat.completions.create(
        model="base", messages=MESSAGES, max_tokens=24, temperature=1, extra_body={"top_k": 1}
    )
    least = client.chat.completions.create(
        model="base", messages=MESSAGES, max_tokens=24, temperature=1, top_p=1e-6
    )
    assert one.choices[0].message.content == least.choices[0].message.content == plain


def test_parts_and_developer_messages(client: OpenAI) -> None:
    """A list of parts is its text; a message of the developer is one of the system."""
    parts: Any = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    plain: Any = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
    ]
    made = [
        client.chat.completions.create(model="base", **GREEDY | {"messages": one})
        for one in (parts, plain)
    ]
    assert made[0].choices[0].message.content == made[1].choices[0].message.content
    assert made[0].usage and made[1].usage
    assert made[0].usage.prompt_tokens == made[1].usage.prompt_tokens > 6


def test_turns_grow_the_prompt(client: OpenAI) -> None:
    first = client.chat.completions.create(model="base", **GREEDY)
    said: Any = first.choices[0].message.to_dict()
    turns: Any = [*MESSAGES, said, {"role": "user", "content": "And then?"}]
    second = client.chat.completions.create(model="base", **GREEDY | {"messages": turns})
    assert first.usage and second.usage and second.choices[0].message.content is not None
    grown = second.usage.prompt_tokens - first.usage.prompt_tokens
    assert grown > first.usage.completion_tokens


def test_headers(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="pirate", **GREEDY)
    answer = raw.parse()
    assert raw.headers["x-adapter-id"] == "pirate" and raw.headers["x-request-id"]
    assert answer._request_id == raw.headers["x-request-id"]
    assert answer.usage and int(raw.headers["x-total-tokens"]) == answer.usage.total_tokens


def test_lines_of_a_stream(client: OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(
        model="base", stream=True, **GREEDY
    ) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data:")]
    assert lines[-1] == "data: [DONE]" and len(lines) > 2


def test_stream_helper(client: OpenAI, server: Server) -> None:
    with client.chat.completions.stream(model="pirate", **GREEDY) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == server.says("pirate")


def test_closing_a_stream_cancels_it(client: OpenAI, until_cancelled: Callable[[], None]) -> None:
    given = GREEDY | {"max_tokens": 900, "extra_body": {"ignore_eos": True}}
    with client.chat.completions.create(model="base", stream=True, **given) as stream:
        next(iter(stream))
    until_cancelled()


async def test_asyncio(later: AsyncOpenAI, server: Server) -> None:
    answer = await later.chat.completions.create(model="pirate", **GREEDY)
    stream = await later.chat.completions.create(model="pirate", stream=True, **GREEDY)
    chunks = [chunk async for chunk in stream]
    assert answer.choices[0].message.content == text_of(chunks) == server.says("pirate")


async def test_many_at_once_are_each_alone(later: AsyncOpenAI, server: Server) -> None:
    """Requests of the base and of every adapter in one batch."""
    names = ["base", *ADAPTERS] * 4
    answers = await asyncio.gather(
        *[later.chat.completions.create(model=name, **GREEDY) for name in names]
    )
    alone = {name: server.says(name) for name in ("base", *ADAPTERS)}
    assert [one.choices[0].message.content for one in answers] == [alone[name] for name in names]


async def test_a_cancelled_task_cancels_the_request(
    later: AsyncOpenAI, until_cancelled: Callable[[], None]
) -> None:
    given = GREEDY | {"max_tokens": 900, "extra_body": {"ignore_eos": True}}
    stream = await later.chat.completions.create(model="base", stream=True, **given)
    await anext(stream)
    await stream.close()
    await asyncio.to_thread(until_cancelled)


def test_merged_adapters(client: OpenAI, server: Server) -> None:
    merged = {"ids": ["pirate"], "weights": [1.0], "merge_strategy": "linear"}
    one = client.chat.completions.create(
        model="base", extra_body={"merged_adapters": merged}, **GREEDY
    )
    assert one.choices[0].message.content == server.says("pirate")


def test_adapter_id_and_model(client: OpenAI, server: Server) -> None:
    body = {"adapter_id": "pirate"}
    named = client.chat.completions.create(model="pirate", extra_body=body, **GREEDY)
    assert named.choices[0].message.content == server.says("pirate")
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(model="math", extra_body=body, **GREEDY)
    assert "adapter_id" in refused.value.message
