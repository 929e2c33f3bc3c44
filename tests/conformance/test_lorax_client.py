"""`lorax-client`: the published one, and ours, which must answer the same scripts."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from lorax import AsyncClient, Client, MergedAdapters
from lorax.errors import GenerationError, NotFoundError, UnprocessableEntityError, ValidationError
from lorax.types import FinishReason
from tests.conformance.wire import ADAPTERS, CITY, PROMPT, Server, is_weather

LONG = 24


class Stay(BaseModel):
    model_config = ConfigDict(extra="forbid")

    city: Literal["Lyon", "Rome"]
    days: int = Field(ge=1, le=9)


def headers(server: Server, key: str | None = None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key or server.key}"}


@pytest.fixture
def client(server: Server) -> Client:
    return Client(server.url, headers=headers(server))


@pytest.fixture
def later(server: Server) -> AsyncClient:
    return AsyncClient(server.url, headers=headers(server))


def text_of(parts: Any) -> str:
    return "".join(one.token.text for one in parts if not one.token.special)


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_generate(client: Client, server: Server, adapter: str | None) -> None:
    answer = client.generate(PROMPT, adapter_id=adapter, max_new_tokens=LONG)
    same = server.generates(adapter)
    assert answer.generated_text == same["generated_text"] != ""
    details, told = answer.details, same["details"]
    assert details is not None and details.finish_reason == FinishReason(told["finish_reason"])
    assert details.generated_tokens == told["generated_tokens"] == len(details.tokens)
    assert details.prompt_tokens == told["prompt_tokens"] == server.count(PROMPT)
    assert [one.id for one in details.tokens] == [one["id"] for one in told["tokens"]]
    assert details.seed is None and details.prefill == []


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_stream(client: Client, server: Server, adapter: str | None) -> None:
    parts = list(client.generate_stream(PROMPT, adapter_id=adapter, max_new_tokens=LONG))
    same = server.generates(adapter)
    assert text_of(parts) == parts[-1].generated_text == same["generated_text"]
    assert [one.token.id for one in parts] == [one["id"] for one in same["details"]["tokens"]]
    assert all(one.generated_text is None and one.details is None for one in parts[:-1])
    last = parts[-1].details
    assert last is not None and last.generated_tokens == len(parts)
    assert last.prompt_tokens == same["details"]["prompt_tokens"]


def test_adapters_change_the_text(client: Client) -> None:
    answers = [client.generate(PROMPT, adapter_id=name, max_new_tokens=LONG) for name in ADAPTERS]
    assert len({one.generated_text for one in answers}) == 3


def test_without_details(client: Client, server: Server) -> None:
    answer = client.generate(PROMPT, max_new_tokens=LONG, details=False)
    assert answer.details is None
    assert answer.generated_text == server.generates()["generated_text"]
    *_, last = client.generate_stream(PROMPT, max_new_tokens=LONG, details=False)
    assert last.details is None and last.generated_text == answer.generated_text


def test_prefill(client: Client, server: Server) -> None:
    answer = client.generate(PROMPT, max_new_tokens=2, decoder_input_details=True)
    assert answer.details is not None
    prefill = answer.details.prefill
    tokens = server.ask("/tokenize", {"inputs": PROMPT})
    assert [one.id for one in prefill] == [one["id"] for one in tokens]
    assert prefill[0].logprob is None and all(one.logprob < 0 for one in prefill[1:])


def test_alternatives(client: Client) -> None:
    answer = client.generate(PROMPT, max_new_tokens=8, return_k_alternatives=3)
    assert answer.details is not None
    for token in answer.details.tokens:
        others = token.alternative_tokens
        assert others is not None and len(others) == 3 and others[0].id == token.id
        assert math.isclose(others[0].logprob, token.logprob, abs_tol=1e-4)
        assert [one.logprob for one in others] == sorted(one.logprob for one in others)[::-1]


def test_full_text(client: Client) -> None:
    plain = client.generate(PROMPT, max_new_tokens=LONG)
    full = client.generate(PROMPT, max_new_tokens=LONG, return_full_text=True)
    assert full.generated_text == PROMPT + plain.generated_text


def test_stop_sequences(client: Client) -> None:
    whole = client.generate(PROMPT, max_new_tokens=LONG).generated_text
    answer = client.generate(PROMPT, max_new_tokens=LONG, stop_sequences=["zebra", "castle"])
    assert answer.generated_text == whole.partition("castle")[0] + "castle" != whole
    assert answer.details is not None
    assert answer.details.finish_reason == FinishReason.StopSequence


def test_length_and_end(client: Client) -> None:
    cut = client.generate(PROMPT, max_new_tokens=3).details
    ended = client.generate(PROMPT, adapter_id="pirate", max_new_tokens=100).details
    going = client.generate(
        PROMPT, adapter_id="pirate", max_new_tokens=100, ignore_eos_token=True
    ).details
    assert cut and cut.finish_reason == FinishReason.Length and cut.generated_tokens == 3
    assert ended and ended.finish_reason == FinishReason.EndOfSequenceToken
    assert going and going.finish_reason == FinishReason.Length
    assert ended.generated_tokens < going.generated_tokens == 100


def test_seed(client: Client) -> None:
    def said(seed: int) -> str:
        given: Any = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12}
        answer = client.generate(PROMPT, seed=seed, **given)
        assert answer.details is not None and answer.details.seed == seed
        return answer.generated_text

    first = [said(seed) for seed in range(4)]
    assert [said(seed) for seed in range(4)] == first and len(set(first)) > 1


def test_seed_of_a_stream(client: Client) -> None:
    given: Any = {"do_sample": True, "temperature": 1.5, "seed": 5, "max_new_tokens": 12}
    whole = client.generate(PROMPT, **given).generated_text
    *_, last = client.generate_stream(PROMPT, **given)
    assert last.generated_text == whole


def test_a_drawn_seed_says_the_same_again(client: Client) -> None:
    given: Any = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12}
    first = client.generate(PROMPT, **given)
    assert first.details is not None and first.details.seed is not None
    again = client.generate(PROMPT, seed=first.details.seed, **given)
    assert again.generated_text == first.generated_text


@pytest.mark.parametrize("given", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0}])
def test_filters_keep_the_greedy_text(client: Client, server: Server, given: Any) -> None:
    answer = client.generate(PROMPT, max_new_tokens=LONG, do_sample=True, seed=3, **given)
    assert answer.generated_text == server.generates()["generated_text"]
    assert answer.details is not None
    assert answer.details.seed == (None if given == {"temperature": 0} else 3)


@pytest.mark.parametrize(
    "given", [{"typical_p": 0.5}, {"top_p": 0.9, "top_k": 20}, {"temperature": 0.7}]
)
def test_filters_sample_the_same_with_a_seed(client: Client, given: Any) -> None:
    one, two = (client.generate(PROMPT, max_new_tokens=12, seed=8, **given) for _ in range(2))
    assert one.generated_text == two.generated_text and one.details and one.details.seed == 8


def test_repetition_penalty(client: Client, server: Server) -> None:
    given: Any = {"max_new_tokens": 60, "ignore_eos_token": True}
    plain = client.generate(PROMPT, **given).generated_text
    punished = client.generate(PROMPT, repetition_penalty=2.0, **given).generated_text
    assert punished != plain
    same = server.generates(repetition_penalty=2.0, **given)
    assert punished == same["generated_text"]


def test_watermark(client: Client) -> None:
    given: Any = {"do_sample": True, "seed": 3, "max_new_tokens": 40, "ignore_eos_token": True}
    plain = client.generate(PROMPT, **given).generated_text
    assert client.generate(PROMPT, watermark=True, **given).generated_text != plain


def test_truncate(client: Client, server: Server) -> None:
    answer = client.generate(PROMPT, truncate=3, max_new_tokens=4, decoder_input_details=True)
    tokens = server.ask("/tokenize", {"inputs": PROMPT})
    assert answer.details is not None and answer.details.prompt_tokens == 3
    assert [one.id for one in answer.details.prefill] == [one["id"] for one in tokens[-3:]]


def test_best_of(client: Client) -> None:
    answer = client.generate(PROMPT, do_sample=True, best_of=2, max_new_tokens=12)
    assert answer.details is not None
    (other,) = answer.details.best_of_sequences or ()

    def mean(one: Any) -> float:
        return sum(token.logprob for token in one.tokens) / len(one.tokens)

    assert mean(answer.details) >= mean(other) and other.seed != answer.details.seed


@pytest.mark.parametrize("adapter", [None, "pirate"])
def test_response_format(client: Client, adapter: str | None) -> None:
    given: Any = {"type": "json_object", "schema": CITY}
    answer = client.generate(PROMPT, adapter_id=adapter, response_format=given, max_new_tokens=60)
    assert is_weather(answer.generated_text)
    *_, last = client.generate_stream(
        PROMPT, adapter_id=adapter, response_format=given, max_new_tokens=60
    )
    assert last.generated_text == answer.generated_text


def test_response_format_of_pydantic(client: Client) -> None:
    """As LoRAX's guide has it."""
    given: Any = {"type": "json_object", "schema": Stay.model_json_schema()}
    answer = client.generate(PROMPT, response_format=given, max_new_tokens=60)
    assert Stay.model_validate_json(answer.generated_text).city in ("Lyon", "Rome")


@pytest.mark.parametrize("source", ["local", "hub"])
def test_adapter_source(client: Client, source: str) -> None:
    """The demo's adapters belong to the server itself; no other source has them."""
    with pytest.raises((GenerationError, NotFoundError)):
        client.generate(PROMPT, adapter_id="pirate", adapter_source=source, max_new_tokens=1)


def test_merged_adapters(client: Client, server: Server) -> None:
    """The merge of one adapter is the adapter."""
    merged = MergedAdapters(ids=["pirate"], weights=[1.0], merge_strategy="linear", density=1.0)
    answer = client.generate(PROMPT, merged_adapters=merged, max_new_tokens=LONG)
    assert answer.generated_text == server.generates("pirate")["generated_text"]


@pytest.mark.parametrize("strategy", ["linear", "ties", "dare_linear", "dare_ties"])
def test_merge_strategies(client: Client, server: Server, strategy: str) -> None:
    given: Any = {
        "ids": ["pirate", "pirate"],
        "weights": [0.7, 0.3],
        "merge_strategy": strategy,
        "density": 0.5,
        "majority_sign_method": "total",
    }
    answer = client.generate(PROMPT, merged_adapters=MergedAdapters(**given), max_new_tokens=LONG)
    same = server.generates(merged_adapters=given)
    assert answer.generated_text == same["generated_text"]


def test_a_merge_of_unequal_ranks(client: Client) -> None:
    merged = MergedAdapters(
        ids=["pirate", "math"], weights=[0.5, 0.5], merge_strategy="linear", density=1.0
    )
    with pytest.raises(UnprocessableEntityError, match="equal ranks"):
        client.generate(PROMPT, merged_adapters=merged, max_new_tokens=1)


# -- errors


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_adapter(client: Client, stream: bool) -> None:
    call: Any = client.generate_stream if stream else client.generate
    with pytest.raises((GenerationError, NotFoundError), match="zebra"):
        list(call(PROMPT, adapter_id="zebra", max_new_tokens=1))


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": -1.0},
        {"top_k": -5},
        {"top_p": 2.0},
        {"typical_p": 2.0},
        {"repetition_penalty": -1.0},
        {"truncate": 0},
        {"best_of": 2},
        {"max_new_tokens": -1},
        {"max_new_tokens": 5000},
        {"stop_sequences": ["a", "b", "c", "d", "e"]},
        {"response_format": {"type": "json_object", "schema": {"not": {}}}},
    ],
    ids=lambda given: "-".join(given),
)
def test_validation(client: Client, given: Any) -> None:
    """By the client or by the server; the class is one."""
    with pytest.raises(ValidationError):
        client.generate(PROMPT, **given)


def test_empty_prompt(client: Client) -> None:
    with pytest.raises(ValidationError):
        client.generate("")


def test_prompt_that_is_too_long(client: Client) -> None:
    with pytest.raises(ValidationError):
        client.generate("word " * 2000, max_new_tokens=1)


def test_wrong_key(server: Server) -> None:
    stranger = Client(server.url, headers=headers(server, "sk-wrong"))
    with pytest.raises(Exception, match="API key"):
        stranger.generate(PROMPT, max_new_tokens=1)


def test_embed_and_classify_are_refused(client: Client) -> None:
    for call in (client.embed, client.classify):
        with pytest.raises(NotFoundError, match="generates text"):
            call("x")


# -- asyncio


@pytest.mark.parametrize("adapter", [None, "pirate"])
async def test_asyncio(later: AsyncClient, server: Server, adapter: str | None) -> None:
    answer = await later.generate(PROMPT, adapter_id=adapter, max_new_tokens=LONG)
    stream = later.generate_stream(PROMPT, adapter_id=adapter, max_new_tokens=LONG)
    parts = [part async for part in stream]
    assert answer.generated_text == text_of(parts) == server.generates(adapter)["generated_text"]
    assert answer.details is not None and answer.details.generated_tokens == len(parts)


async def test_many_at_once_are_each_alone(later: AsyncClient, server: Server) -> None:
    names = [None, *ADAPTERS] * 4
    answers = await asyncio.gather(
        *[later.generate(PROMPT, adapter_id=name, max_new_tokens=LONG) for name in names]
    )
    alone = {name: server.generates(name)["generated_text"] for name in (None, *ADAPTERS)}
    assert [one.generated_text for one in answers] == [alone[name] for name in names]


async def test_format_in_asyncio(later: AsyncClient) -> None:
    given: Any = {"type": "json_object", "schema": CITY}
    answer = await later.generate(PROMPT, response_format=given, max_new_tokens=60)
    assert is_weather(json.loads(answer.generated_text))


async def test_errors_in_asyncio(later: AsyncClient) -> None:
    with pytest.raises(ValidationError):
        await later.generate(PROMPT, max_new_tokens=5000)
    with pytest.raises((GenerationError, NotFoundError), match="zebra"):
        await later.generate(PROMPT, adapter_id="zebra")
    with pytest.raises((GenerationError, NotFoundError), match="zebra"):
        async for _ in later.generate_stream(PROMPT, adapter_id="zebra"):
            pass
