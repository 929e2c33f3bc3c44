"""Steps that do not fit into the device's memory: smaller ones follow, nothing is lost, at most one request fails."""

from __future__ import annotations

import random

import pytest

from engine.messages import Request
from engine.scheduler.budget import GROWTH_STEPS, StepBudget
from tests.scheduler.fake import (
    SHORT,
    House,
    exact,
    expected_logprobs,
    image,
    random_prompt,
    request,
)

DEPTHS = pytest.mark.parametrize("depth", [0, 1])
REACHED = pytest.mark.parametrize("reached", [False, True])


def test_the_budget_halves_at_once_and_grows_slowly() -> None:
    budget = StepBudget(1000)
    budget.did_not_fit(300)
    assert budget.tokens == 150
    for _ in range(GROWTH_STEPS - 1):
        budget.fitted()
    assert budget.tokens == 150
    budget.fitted()
    assert budget.tokens == 187
    for _ in range(9):
        budget.did_not_fit(187)
    assert budget.tokens == 1
    seen = [budget.tokens]
    while budget.tokens < 1000:
        budget.fitted()
        if budget.tokens != seen[-1]:
            seen.append(budget.tokens)
    assert seen == sorted(seen) and all(
        b <= max(a * 1.25, a + 1) for a, b in zip(seen, seen[1:], strict=False)
    )
    budget.did_not_fit(1000)
    budget.restore()
    assert budget.tokens == 1000


def mixed(rng: random.Random) -> list[Request]:
    stem = random_prompt(rng, 20)
    return [
        request(
            f"r{i}",
            stem[: rng.randrange(20)] + random_prompt(rng, rng.randrange(1, 20)),
            rng.randrange(2, 30),
            image(f"a{i % 3}") if i % 3 else None,
            arrival=float(i),
            prompt_logprobs=i % 4 == 0,
        )
        for i in range(8)
    ]


@DEPTHS
@REACHED
@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_lost(depth: int, reached: bool, seed: int) -> None:
    """Memory for a number of tokens that changes all the time, but is always enough for one."""
    rng = random.Random(seed)
    house = House(
        depth=depth,
        rows=6,
        blocks=40,
        step_tokens=24,
        fits=lambda flight: flight.num_tokens <= rng.choice([1, 3, 8, 24, 24, 24]),
        reached=reached,
    )
    requests = mixed(rng)
    for one in requests:
        house.add(one)
    house.drain()
    assert len(house.short) > 3 and max(map(len, house.short)) > 1
    exact(house, requests)
    for one in requests:
        if one.sampling.prompt_logprobs:
            assert house.first[one.id].prompt_logprobs == expected_logprobs(one)


@DEPTHS
@REACHED
def test_computed_positions_are_kept(depth: int, reached: bool) -> None:
    """Only the step that did not fit is computed again."""

    def computed(lost: int | None) -> int:
        """Tokens that the runner computes in all if the step of that number does not fit."""
        house = House(depth=depth, step_tokens=64, reached=reached)
        house.fits = lambda flight: flight.plan.step != lost
        requests = [request(f"r{i}", [i + 1] * 20, 10, eos=False) for i in range(3)]
        house.generate(requests)
        exact(house, requests)
        assert len(house.short) == (lost is not None)
        return house.runner.computed_tokens

    assert computed(5) - computed(None) == (3 if reached else 0)


@DEPTHS
def test_the_next_step_holds_half(depth: int) -> None:
    house = House(depth=depth, rows=8, step_tokens=64)
    house.fits = lambda flight: flight.num_tokens <= 32
    requests = [request(f"r{i}", [i + 1] * 10, 20, eos=False) for i in range(8)]
    house.generate(requests)
    assert len(house.short) == 1
    exact(house, requests)


@DEPTHS
@REACHED
def test_who_does_not_fit_alone_fails_alone(depth: int, reached: bool) -> None:
    """No step that holds `heavy` ever fits; the others do not notice."""
    house = House(depth=depth, rows=4, step_tokens=64, reached=reached)
    house.fits = lambda flight: all(s.request.id != "heavy" for s in flight.alive())
    heavy = request("heavy", [9] * 30, 5, eos=False, arrival=1.0)
    others = [request(f"r{i}", [i + 1] * 10, 12, eos=False, arrival=i) for i in (0, 1, 2, 3)]
    house.generate([heavy, *others])
    assert house.last["heavy"].error == SHORT.to_wire()
    assert 1 < len(house.short) < 12
    assert house.scheduler._budget.tokens == 64  # the others have all of it again
    exact(house, others)


@REACHED
def test_a_step_without_sequences_is_asked_again(reached: bool) -> None:
    house = House(arena=256, slots=2, reached=reached)
    house.fits = lambda flight: flight.plan.step > 1
    house.generate([one := request("a", [1, 2, 3], 4, image("a"))])
    assert house.short == [[]]
    exact(house, [one])
