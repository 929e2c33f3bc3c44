"""The scheduler against a runner that trusts nothing."""

from __future__ import annotations

import random

import pytest

from tests.scheduler.fake import House, expected, image, random_prompt, request

DEPTHS = pytest.mark.parametrize("depth", [0, 1])


def batch(seed: int, count: int, adapters: int = 0, longest: int = 40, new: int = 20):
    rng = random.Random(seed)
    made = []
    for index in range(count):
        choice = rng.randrange(adapters + 1)
        adapter = image(f"a{choice}") if choice else None
        prompt = random_prompt(rng, rng.randrange(1, longest))
        made.append(request(f"r{index}", prompt, rng.randrange(1, new), adapter, arrival=index))
    return made


@DEPTHS
def test_one_request(depth: int) -> None:
    house = House(depth=depth)
    one = request("a", [1, 2, 3], max_new_tokens=10, eos=False)
    assert house.generate([one])["a"] == expected(one)
    assert house.last["a"].finish == "length"
    usage = house.last["a"].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.generated_tokens, usage.cached_tokens) == (3, 10, 0)
    assert house.first["a"].admitted == 100.0 + house.step_seconds


@DEPTHS
@pytest.mark.parametrize("seed", range(10))
def test_batch_equals_alone(depth: int, seed: int) -> None:
    requests = batch(seed, 12, adapters=3)
    house = House(depth=depth, delay=lambda: seed % 3)
    tokens = house.generate(requests)
    for one in requests:
        assert tokens[one.id] == expected(one), one.id
