"""More adapters than fit: draining, pausing, rotation. The clock is the tests' own."""

from __future__ import annotations

import random

import pytest

from engine.messages import Request
from tests.scheduler.fake import House, expected, expected_logprobs, image, random_prompt, request

DEPTHS = pytest.mark.parametrize("depth", [0, 1])


def paused(house: House) -> int:
    """Admissions that went on where an earlier one had stopped."""
    count = 0
    for plan in house.plans:
        count += sum(admit.computed >= admit.prompt_length for admit in plan.admit)
    return count


def test_waiting_less_than_a_cycle_disturbs_nobody() -> None:
    house = House(arena=256, cycle=10.0, step_seconds=0.1)
    house.add(request("a", [1], 50, image("a"), eos=False))
    house.step()
    house.add(request("b", [1], 5, image("b"), arrival=1, eos=False))
    house.add(request("a2", [1], 5, image("a"), arrival=2, eos=False))
    house.drain()
    assert house.order == ["a2", "a", "b"]


def test_after_a_cycle_an_adapter_drains() -> None:
    house = House(arena=256, cycle=1.0, step_seconds=0.1)
    house.add(request("a", [1], 18, image("a"), eos=False))
    house.step()
    house.add(request("b", [1], 5, image("b"), arrival=1, eos=False))
    for _ in range(12):
        house.step()
    house.add(request("a2", [1], 5, image("a"), arrival=0.5, eos=False))
    house.drain()
    assert house.order == ["a", "b", "a2"], "a2 is older, but its adapter admits no more"
    assert paused(house) == 0


def test_an_adapter_admits_for_at_least_a_cycle() -> None:
    house = House(arena=256, cycle=1.0, step_seconds=0.1)
    house.add(request("x", [1], 15, image("x"), arrival=0, eos=False))
    house.step()
    house.add(request("a", [1], 20, image("a"), arrival=1, eos=False))
    house.add(request("b", [1], 3, image("b"), arrival=2, eos=False))
    while not house.table.is_placing(image("a").digest):
        house.step()
    for _ in range(5):
        house.step()  # b has waited for more than a cycle now, but a has just come
    house.add(request("a2", [1], 3, image("a"), arrival=3, eos=False))
    house.drain()
    assert house.order[:2] == ["x", "a2"]


@DEPTHS
def test_after_two_cycles_its_sequences_are_paused(depth: int) -> None:
    house = House(arena=256, cycle=1.0, step_seconds=0.1, depth=depth, prefix_caching=False)
    one = request("a", [1, 2, 3], 60, image("a"), eos=False)
    other = request("b", [4], 5, image("b"), arrival=1, eos=False)
    house.add(one)
    house.step()
    house.add(other)
    house.drain()
    assert house.order == ["b", "a"]
    assert paused(house) == 1 and house.scheduler.stats().preemptions == 0
    for each in (one, other):
        assert house.tokens[each.id] == expected(each)
    # What a paused sequence had computed is not computed again.
    assert house.runner.computed_tokens == (3 + 59) + (1 + 4)


def test_a_sequence_is_paused_in_the_middle_of_its_prompt() -> None:
    house = House(
        arena=256, cycle=1.0, step_seconds=0.5, depth=1, step_tokens=4, prefix_caching=False
    )
    one = request("a", list(range(1, 100)), 3, image("a"), eos=False, prompt_logprobs=True)
    other = request("b", [4], 5, image("b"), arrival=1, eos=False)
    house.add(one)
    house.step()
    house.add(other)
    house.drain()
    assert house.order == ["b", "a"]
    assert any(0 < admit.computed < 99 for plan in house.plans for admit in plan.admit)
    assert house.tokens["a"] == expected(one)
    assert len(house.first["a"].prompt_logprobs or []) == 98


def test_a_paused_sequence_gives_its_blocks_if_they_are_needed() -> None:
    house = House(arena=256, cycle=1.0, step_seconds=0.1, blocks=17, block_size=4)
    one = request("a", [1] * 20, 40, image("a"), eos=False)
    other = request("b", [2] * 30, 5, image("b"), arrival=1, eos=False)
    house.add(one)
    house.step()
    house.add(other)
    house.drain()
    assert house.order == ["b", "a"]
    for each in (one, other):
        assert house.tokens[each.id] == expected(each)
    usage = house.last["a"].usage
    assert usage is not None and usage.preemptions == 1


def test_a_paused_prompt_that_loses_its_blocks_starts_again() -> None:
    house = House(arena=256, cycle=1.0, step_seconds=0.5, step_tokens=4, blocks=31, block_size=4)
    one = request("a", list(range(1, 100)), 3, image("a"), eos=False, prompt_logprobs=True)
    other = request("b", [4] * 40, 5, image("b"), arrival=1, eos=False)
    house.add(one)
    house.step()
    house.add(other)
    house.drain()
    usage = house.last["a"].usage
    assert usage is not None and usage.preemptions > 0
    assert house.first["a"].prompt_logprobs == expected_logprobs(one)
    assert house.tokens["a"] == expected(one)


def test_the_base_model_is_never_paused() -> None:
    house = House(arena=256, cycle=0.1, step_seconds=0.1, rows=4)
    house.add(request("base", [1], 80, eos=False))
    for index in range(6):
        house.add(request(f"r{index}", [1], 20, image(f"a{index}"), arrival=index, eos=False))
    house.drain()
    rows = {admit.row for plan in house.plans for admit in plan.admit if admit.slot == 0}
    assert len(rows) == 1 and len(house.tokens["base"]) == 80


def test_room_for_a_large_adapter_is_made_between_small_ones() -> None:
    """If later turns were given while the large one waits for its, some small adapter would always be in its way."""
    house = House(arena=1024, slots=16, cycle=0.5, step_seconds=0.1, rows=8, blocks=900)
    for index in range(12):
        one = request(f"s{index}", [1, index], 60, image(f"a{index}"), arrival=index, eos=False)
        house.add(one)
        for _ in range(index % 3 + 1):
            house.step()
    house.add(request("large", [1], 3, image("large", 1024), arrival=20, eos=False))
    house.drain()
    assert house.order[0] == "large" and len(house.order) == 13


def test_who_waits_for_a_row_anyway_gets_no_turn() -> None:
    house = House(arena=256, cycle=0.5, step_seconds=0.1, rows=1)
    for index, name in enumerate("aab"):
        house.add(request(f"r{index}", [1], 20, image(name), arrival=index, eos=False))
    while not house.order:
        house.step()
    assert house.order == ["r0"] and paused(house) == 0, "r1 and r2 wait for the row"
    house.drain()
    assert house.order == ["r0", "r1", "r2"], "r2 gets a turn as the row is free, r1 the row"


def test_a_cancelled_turn_gives_the_room_back() -> None:
    house = House(arena=256, cycle=1.0, step_seconds=0.1)
    house.add(request("a", [1], 60, image("a"), eos=False))
    house.step()
    house.add(request("b", [1], 5, image("b"), arrival=1, eos=False))
    for _ in range(15):
        house.step()
    house.scheduler.cancel("b")
    house.add(request("a2", [1], 3, image("a"), arrival=2, eos=False))
    house.drain()
    assert house.order == ["b", "a2", "a"]
    assert house.table.num_evictions == 0 and paused(house) == 0


@DEPTHS
@pytest.mark.parametrize("cycle", [0.0, 0.3])
def test_fifty_adapters_rotate_over_room_for_two(depth: int, cycle: float) -> None:
    rng = random.Random(8)
    house = House(
        arena=512, slots=51, cycle=cycle, step_seconds=0.1, rows=4, blocks=600, depth=depth
    )
    requests = [
        request(f"r{i}", random_prompt(rng, 3), 12, image(f"a{i}"), arrival=i, eos=False)
        for i in range(50)
    ]
    for one in requests:
        house.add(one)
    for _ in range(600):
        house.step()
        if len(house.first) == 50:
            break
    assert len(house.first) == 50, "somebody starves"
    if cycle:
        assert len(house.order) < 50, "nobody had to wait for the end of all others"
    house.drain()
    for one in requests:
        assert house.tokens[one.id] == expected(one)


def test_endless_traffic_for_one_adapter_does_not_starve_another() -> None:
    house = House(arena=256, cycle=0.5, step_seconds=0.1, rows=2)
    house.add(request("first", [1], 10, image("a"), arrival=0, eos=False))
    house.add(request("b", [1], 3, image("b"), arrival=1, eos=False))
    for index in range(60):
        house.add(request(f"a{index}", [1], 10, image("a"), arrival=2 + index, eos=False))
        house.step()
        house.step()
    assert "b" in house.last
    house.drain()


def flood(name: str, arrival: float, count: int) -> list[Request]:
    """The sequences of one client's request."""
    made, behind = [], 0
    for number in range(count):
        id = f"{name}{number}"
        one = request(id, [1] * 8, 8, arrival=arrival, eos=False, group=name, behind=behind)
        made.append(one)
        behind += 16
    return made


@DEPTHS
def test_a_request_of_many_prompts_lets_later_ones_between(depth: int) -> None:
    """It queues as it would be served. Somebody who comes later waits for the rows in use only, and nobody starves."""
    house = House(rows=4, step_seconds=0.1, depth=depth)
    for one in [*flood("a", 0.0, 100), *flood("b", 0.0, 100)]:
        house.add(one)
    for _ in range(40):
        house.step()
    done = len(house.order)
    single = request("single", [1] * 8, 8, arrival=house.clock(), eos=False)
    house.add(single)
    house.drain(50_000)
    assert set(house.order) == {f"{name}{n}" for name in "ab" for n in range(100)} | {"single"}
    assert house.order.index("single") - done < 12, (
        "at most the rows in use, and as many that were due"
    )
    assert house.order.index("a99") > 150 and house.order.index("b99") > 150, "the two take turns"


def test_a_request_of_many_prompts_alone_is_served_in_order() -> None:
    house = House(rows=4, step_seconds=0.1)
    for one in flood("a", 0.0, 30):
        house.add(one)
    house.drain()
    assert house.order == [f"a{n}" for n in range(30)]


def test_who_waited_for_an_adapter_has_the_turn_of_the_arrival() -> None:
    """A request is queued when its adapter has loaded; those who came meanwhile do not go before it."""
    house = House(rows=1, step_seconds=0.1)
    for number in range(12):
        house.add(request(f"r{number}", [1] * 8, 8, arrival=house.clock(), eos=False))
        house.step()
    house.add(request("cold", [1] * 8, 8, arrival=0.25, eos=False))
    house.drain()
    assert house.order.index("cold") < house.order.index("r4")
