"""Sharing what was computed: prefix cache, bursts, log-probabilities of the prompt."""

from __future__ import annotations

import random

import pytest

from tests.scheduler.fake import (
    House,
    exact,
    expected_logprobs,
    image,
    random_prompt,
    request,
)

DEPTHS = pytest.mark.parametrize("depth", [0, 1])


def test_at_least_one_token_is_recomputed() -> None:
    house = House(block_size=4)
    house.generate([request("a", [1] * 8, 1, eos=False)])
    house.generate([request("b", [1] * 8, 1, eos=False)])
    usage = house.last["b"].usage
    assert usage is not None and usage.cached_tokens == 4
    assert house.runner.computed_tokens == 8 + 4


def test_generated_tokens_are_cached_too() -> None:
    house = House(block_size=4)
    one = request("a", [1, 2, 3], 10, eos=False)
    house.generate([one])
    house.generate([request("b", [*one.tokens, *house.tokens["a"], 7], 2)])
    usage = house.last["b"].usage
    assert usage is not None and usage.cached_tokens == 12


@DEPTHS
def test_a_burst_of_equal_prompts_is_computed_once(depth: int) -> None:
    house = House(rows=8, step_tokens=256, depth=depth)
    prompt = random_prompt(random.Random(0), 41)
    requests = [request(f"r{i}", prompt, 1, eos=False) for i in range(8)]
    house.generate(requests)
    exact(house, requests)
    assert house.runner.computed_tokens == 41 + 7 * 1


@DEPTHS
def test_a_sequence_that_waits_for_a_prefix_holds_up_nobody(depth: int) -> None:
    house = House(rows=8, step_tokens=16, depth=depth)
    prompt = random_prompt(random.Random(0), 41)
    house.add(request("first", prompt, 60, eos=False))
    house.add(request("same", prompt, 5, eos=False))
    house.add(request("other", [7, 8], 1))
    house.drain()
    assert house.order == ["other", "same", "first"]
    usage = house.last["same"].usage
    assert usage is not None and usage.cached_tokens == 40


@DEPTHS
def test_a_sequence_waits_for_a_prefix_no_longer_than_needed(depth: int) -> None:
    house = House(depth=depth)
    house.add(request("first", [1] * 9, 60, eos=False))
    house.add(request("same", [1] * 9, 5, eos=False))
    house.drain()
    assert house.order == ["same", "first"]


def test_a_prefix_is_shared_by_neither_adapters_nor_tenants() -> None:
    house = House()
    prompt = [1] * 9
    for id, adapter, salt in (
        ("base", None, b""),
        ("a", image("a"), b""),
        ("b", image("b"), b""),
        ("a for tenant", image("a"), b"tenant"),
    ):
        house.generate([request(id, prompt, 1, adapter, salt=salt)])
        usage = house.last[id].usage
        assert usage is not None and usage.cached_tokens == 0, id
    house.generate([request("again", prompt, 1, image("a"), salt=b"tenant")])
    usage = house.last["again"].usage
    assert usage is not None and usage.cached_tokens == 8


@DEPTHS
@pytest.mark.parametrize("step_tokens", [4, 7, 64])
@pytest.mark.parametrize("blocks", [14, 64])
def test_prompt_logprobs(depth: int, step_tokens: int, blocks: int) -> None:
    house = House(step_tokens=step_tokens, depth=depth, blocks=blocks)
    prompt = random_prompt(random.Random(7), 23)
    requests = [
        request(f"r{i}", prompt[: 23 - i], 9, arrival=i, prompt_logprobs=True) for i in range(5)
    ]
    requests.append(request("one", [5], 2, prompt_logprobs=True))
    house.generate(requests)
    exact(house, requests)
    for one in requests:
        assert house.first[one.id].tokens and house.last[one.id].usage is not None
        assert house.first[one.id].prompt_logprobs == expected_logprobs(one)
        usage = house.last[one.id].usage
        assert usage is not None and usage.cached_tokens == 0
    assert house.scheduler.stats().prefix_lookups == 0
    house.generate([request("after", prompt, 1)])
    if blocks == 64:
        assert house.scheduler.stats().prefix_hits == 20, "they feed the cache"
