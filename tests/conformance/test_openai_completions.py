"""`openai`: completions, models, errors and keys."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.conformance.wire import ADAPTERS, MESSAGES, PROMPT, Server

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
ENDLESS: dict[str, Any] = {  # takes several seconds
    "model": "base",
    "prompt": PROMPT,
    "max_tokens": 900,
    "n": 64,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.v1, api_key=server.key, max_retries=0) as client:
        yield client


@pytest.fixture
async def later(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=server.v1, api_key=server.key, max_retries=0) as client:
        yield client


# -- completions


@pytest.mark.parametrize("model", ["base", *ADAPTERS])
def test_same_as_on_other_routes(client: OpenAI, server: Server, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, **GREEDY)
    native = server.generates(None if model == "base" else model)
    assert answer.object == "text_completion" and answer.model == model
    assert answer.choices[0].text == native["generated_text"] == server.completes(model) != ""
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == native["details"]["prompt_tokens"] == server.count(PROMPT)
    assert answer.usage.completion_tokens == native["details"]["generated_tokens"]


@pytest.mark.parametrize("model", ["base", "pirate"])
def test_stream_joined_is_the_whole(client: OpenAI, server: Server, model: str) -> None:
    stream = client.completions.create(model=model, prompt=PROMPT, stream=True, **GREEDY)
    chunks = list(stream)
    assert "".join(one.choices[0].text for one in chunks) == server.completes(model)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert {one.object for one in chunks} == {"text_completion"}


def test_usage_of_a_stream(client: OpenAI) -> None:
    whole = client.completions.create(model="base", prompt=PROMPT, **GREEDY).usage
    options: Any = {"include_usage": True}
    *_, last = client.completions.create(
        model="base", prompt=PROMPT, stream=True, stream_options=options, **GREEDY
    )
    assert whole is not None and last.usage is not None and last.choices == []
    assert last.usage.total_tokens == whole.total_tokens


def test_prompts_are_each_alone(client: OpenAI, server: Server) -> None:
    prompts = [PROMPT, "The dog", "Once upon a time"]
    answer = client.completions.create(model="base", prompt=prompts, **GREEDY)
    assert [one.index for one in answer.choices] == [0, 1, 2]
    alone = [server.completes(prompt=one) for one in prompts]
    assert [one.text for one in answer.choices] == alone and len(set(alone)) == 3


def test_tokens_as_prompts(client: OpenAI, server: Server) -> None:
    tokens = [one["id"] for one in server.ask("/tokenize", {"inputs": PROMPT})]
    one = client.completions.create(model="base", prompt=tokens, **GREEDY)
    two = client.completions.create(model="base", prompt=[tokens, tokens], **GREEDY)
    assert {choice.text for choice in (*one.choices, *two.choices)} == {server.completes()}
    assert len(two.choices) == 2


def test_n_of_prompts(client: OpenAI) -> None:
    given: Any = {"prompt": [PROMPT, "The dog"], "n": 2, "temperature": 1.2, "max_tokens": 12}
    answer = client.completions.create(model="base", seed=4, **given)
    again = client.completions.create(model="base", seed=4, **given)
    assert [one.index for one in answer.choices] == [0, 1, 2, 3]
    assert [one.text for one in again.choices] == [one.text for one in answer.choices]
    assert len({one.text for one in answer.choices}) > 2


def test_echo(client: OpenAI, server: Server) -> None:
    answer = client.completions.create(model="base", prompt=PROMPT, echo=True, **GREEDY)
    assert answer.choices[0].text == PROMPT + server.completes()


def test_stop(client: OpenAI, server: Server) -> None:
    choice = client.completions.create(model="base", prompt=PROMPT, stop=["castle"], **GREEDY)
    whole = server.completes()
    assert choice.choices[0].text == whole.partition("castle")[0] != whole
    assert choice.choices[0].finish_reason == "stop"


def test_logprobs(client: OpenAI, server: Server) -> None:
    choice = client.completions.create(model="base", prompt=PROMPT, logprobs=2, **GREEDY).choices[0]
    told = choice.logprobs
    assert told and told.tokens and told.token_logprobs and told.top_logprobs and told.text_offset
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset)
    native = [one for one in server.generates()["details"]["tokens"] if not one["special"]]
    for ours, theirs in zip(told.token_logprobs, native, strict=True):
        assert ours is not None and math.isclose(ours, theirs["logprob"], abs_tol=1e-3)
    assert "".join(told.tokens) == choice.text
    assert all(len(one) == 2 for one in told.top_logprobs)


def test_logprobs_of_the_prompt(client: OpenAI, server: Server) -> None:
    told = (
        client.completions.create(model="base", prompt=PROMPT, echo=True, logprobs=1, **GREEDY)
        .choices[0]
        .logprobs
    )
    native = server.generates(decoder_input_details=True)["details"]["prefill"]
    assert told and told.token_logprobs and told.token_logprobs[0] is None
    for ours, theirs in zip(told.token_logprobs[1:], native[1:], strict=False):
        assert ours is not None and math.isclose(ours, theirs["logprob"], abs_tol=1e-3)


def test_best_of(client: OpenAI) -> None:
    """The winner is one of the choices, the one with the highest mean log-probability."""
    given: Any = {"prompt": PROMPT, "temperature": 1.2, "max_tokens": 12, "seed": 11}
    two = client.completions.create(model="base", n=2, logprobs=0, **given)
    best = client.completions.create(model="base", n=1, best_of=2, **given)
    means = []
    for choice in two.choices:
        assert choice.logprobs and choice.logprobs.token_logprobs
        values = [one for one in choice.logprobs.token_logprobs if one is not None]
        means.append(sum(values) / len(values))
    assert best.choices[0].text == two.choices[means.index(max(means))].text


async def test_asyncio(later: AsyncOpenAI, server: Server) -> None:
    stream = await later.completions.create(model="pirate", prompt=PROMPT, stream=True, **GREEDY)
    texts = [chunk.choices[0].text async for chunk in stream]
    assert "".join(texts) == server.completes("pirate")


async def test_a_cancelled_task_cancels_the_request(
    later: AsyncOpenAI, server: Server, until_cancelled: Callable[[], None]
) -> None:
    """An answer that is not streamed ends, too, when nobody waits for it."""
    asking = asyncio.create_task(later.completions.create(**ENDLESS))
    while not await asyncio.to_thread(server.running):
        await asyncio.sleep(0.02)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.to_thread(until_cancelled)


def test_a_timeout_cancels_the_request(client: OpenAI, until_cancelled: Callable[[], None]) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1.5).completions.create(**ENDLESS)
    until_cancelled()


# -- models


def test_models(client: OpenAI, server: Server) -> None:
    for name in ADAPTERS:
        server.says(name, max_tokens=1)
    models = {one.id: one for one in client.models.list()}
    assert set(models) >= {"demo", *ADAPTERS}
    assert {one.object for one in models.values()} == {"model"}
    assert all(one.created > 0 and one.owned_by for one in models.values())


@pytest.mark.parametrize("name", ["demo", "pirate"])
def test_one_model(client: OpenAI, server: Server, name: str) -> None:
    server.says("pirate", max_tokens=1)
    listed = {one.id: one for one in client.models.list()}
    assert client.models.retrieve(name) == listed[name]


async def test_models_in_asyncio(later: AsyncOpenAI) -> None:
    assert "demo" in [one.id async for one in later.models.list()]


# -- errors

BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"extra_body": {"use_beam_search": True}}, "use_beam_search"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
]


@pytest.mark.parametrize(
    ("given", "param"), BAD, ids=[f"{name}{at}" for at, (_, name) in enumerate(BAD)]
)
def test_bad_request(client: OpenAI, given: Any, param: str) -> None:
    body = {"model": "base", "messages": MESSAGES, "max_tokens": 4} | given
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**body)
    error = refused.value
    assert error.status_code == 400 and error.param is not None and error.param.startswith(param)
    assert error.type == "invalid_request_error" and param in error.message


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_model(client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="zebra", messages=MESSAGES, stream=stream)
    assert refused.value.code == "model_not_found" and refused.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="zebra", prompt=PROMPT, stream=stream)


def test_unknown_model_is_not_retrieved(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("zebra")
    assert refused.value.code == "model_not_found"


def test_unknown_route(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.files.list()
    with pytest.raises(openai.NotFoundError, match="generates text"):
        client.embeddings.create(model="base", input="x")


@pytest.mark.parametrize("key", ["sk-wrong", "EMPTY"])
def test_wrong_key(server: Server, key: str) -> None:
    with OpenAI(base_url=server.v1, api_key=key, max_retries=0) as stranger:
        for call in (
            lambda: stranger.models.list(),
            lambda: stranger.chat.completions.create(model="base", messages=MESSAGES),
            lambda: stranger.completions.create(model="base", prompt=PROMPT, stream=True),
        ):
            with pytest.raises(openai.AuthenticationError) as refused:
                call()
            assert refused.value.status_code == 401 and refused.value.code == "unauthorized"


async def test_errors_in_asyncio(later: AsyncOpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError):
        await later.chat.completions.create(model="base", messages=MESSAGES, temperature=-1)
    with pytest.raises(openai.NotFoundError):
        await later.chat.completions.create(model="zebra", messages=MESSAGES)
    with pytest.raises(openai.AuthenticationError):
        await later.with_options(api_key="sk-wrong").models.list()


def test_no_server() -> None:
    with (
        OpenAI(base_url="http://127.0.0.1:9/v1", api_key="x", max_retries=0) as nobody,
        pytest.raises(openai.APIConnectionError),
    ):
        nobody.models.list()
