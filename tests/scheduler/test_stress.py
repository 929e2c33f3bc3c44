"""Random histories: arrivals, cancels, failures, lost steps, steps that do not fit, slow copies, tight pools.

Outputs must still be exact.
"""

from __future__ import annotations

import random

import pytest

from engine.errors import GenerationError
from tests.scheduler.fake import House, expected, image, random_prompt, request


def tight_house(rng: random.Random) -> House:
    block_size = rng.choice([1, 2, 4, 16])
    rows = rng.randrange(1, 7)
    return House(
        rows=rows,
        blocks=1 + -(-rng.randrange(44, 120) // block_size),
        block_size=block_size,
        step_tokens=rows + rng.choice([0, 1, rng.randrange(0, 30)]),
        max_total=rng.choice([44, 1000]),
        slots=rng.randrange(2, 6),
        arena=rng.choice([256, 512, 1024]),
        cycle=rng.choice([0.0, 0.03, 0.2, 2.0]),
        prefix_caching=rng.random() < 0.8,
        depth=rng.randrange(2),
        delay=lambda: rng.randrange(4),
        scored_tokens=rng.choice([None, 1, 6]),
        fits=lambda flight: flight.num_tokens <= 1 or rng.random() < 0.97,
        reached=rng.random() < 0.5,
    )


def random_request(rng: random.Random, index: int, stems: list[list[int]], now: float):
    sizes = [1, 60, 200, 256]
    number = rng.randrange(rng.choice([1, 3, 6]))
    adapter = image(f"a{number}", sizes[number % 4]) if number else None
    prompt = rng.choice(stems)[: rng.randrange(1, 30)] + random_prompt(rng, rng.randrange(6))
    return request(
        f"r{index}",
        prompt or [1],
        rng.randrange(1, 24),
        adapter,
        arrival=now - rng.choice([0.0, 0.0, 1.0]),
        eos=rng.random() < 0.7,
        prompt_logprobs=rng.random() < 0.2,
        salt=rng.choice([b"", b"tenant"]),
        tenant=rng.choice(["", "one", "two"]),
        weight=rng.choice([0.5, 1.0, 4.0]),
        priority=rng.choice([0, 0, 0, 1, -5]),
    )


@pytest.mark.parametrize("seed", range(100))
def test_random_history(seed: int) -> None:
    rng = random.Random(seed)
    house = tight_house(rng)
    stems = [random_prompt(rng, 30) for _ in range(3)]
    requests, disturbed = {}, set()
    total = rng.randrange(5, 40)
    for _ in range(5000):
        if len(requests) < total and rng.random() < 0.3:
            for _ in range(rng.randrange(1, 4)):
                one = random_request(rng, len(requests), stems, house.clock.now)
                requests[one.id] = one
                house.add(one)
        if requests and rng.random() < 0.02:
            victim = rng.choice(list(requests))
            disturbed.add(victim)
            house.scheduler.cancel(victim)
            house.scheduler.check()
        if requests and rng.random() < 0.01:
            victims = rng.sample(list(requests), min(len(requests), 2))
            disturbed.update(victims)
            house.scheduler.fail(victims, GenerationError("injected"))
            house.scheduler.check()
        if rng.random() < 0.01:
            house.results.clear()
            house.runner.lose()
            house.scheduler.fail(None, GenerationError("step lost"))
            house.scheduler.check()
        if not house.step() and len(requests) >= total:
            break
    house.drain()
    assert house.last.keys() == requests.keys()
    longest = min(
        house.scheduler.limits.max_total_tokens, house.pool.usable * house.pool.block_size + 1
    )
    for one in requests.values():
        last = house.last[one.id]
        wanted = expected(one, longest)
        if last.error or last.finish == "cancelled":
            got = house.tokens[one.id]
            assert got == wanted[: len(got)]
        else:
            assert house.tokens[one.id] == wanted, one.id
            assert last.finish == ("eos" if wanted[-1] in one.eos_token_ids else "length")
        if last.finish == "cancelled":
            assert one.id in disturbed
