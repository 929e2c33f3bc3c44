"""Requests that end early: refused, cancelled, failed; steps that are lost."""

from __future__ import annotations

import pytest

from engine.errors import AdapterTooLarge, ConfigError, GenerationError, InvalidRequest
from engine.messages import Request, StepPlan
from engine.scheduler import SchedulerLimits
from tests.scheduler.fake import (
    House,
    exact,
    expected,
    image,
    request,
)

DEPTHS = pytest.mark.parametrize("depth", [0, 1])
ERROR = GenerationError("injected")


# -- cancelling and failing


@DEPTHS
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancel(depth: int, steps: int) -> None:
    house = House(depth=depth)
    one, other = request("a", [1, 2], 20, eos=False), request("b", [3, 4], 20, eos=False)
    house.add(one)
    house.add(other)
    for _ in range(steps):
        house.step()
    house.scheduler.cancel("a")
    house.scheduler.cancel("a")
    house.scheduler.cancel("nobody")
    house.scheduler.check()
    house.drain()
    assert house.last["a"].finish == "cancelled"
    got = house.tokens["a"]
    assert got == expected(one)[: len(got)] and len(got) < 20
    exact(house, [other])
    house.scheduler.cancel("a")
    assert house.scheduler.take_updates() == []


def test_a_cancelled_request_is_told_without_any_step() -> None:
    house = House()
    house.add(request("a", [1]))
    house.scheduler.cancel("a")
    assert house.scheduler.has_work
    (update,) = house.scheduler.take_updates()
    assert (update.finish, update.admitted, update.tokens) == ("cancelled", None, [])
    assert not house.scheduler.has_work


def test_the_host_image_is_needed_until_the_copy_is_done() -> None:
    house = House(delay=lambda: 5)
    house.add(request("a", [1], 5, image("a")))
    house.step()
    house.scheduler.cancel("a")
    assert house.scheduler.take_updates() == [] and house.scheduler.has_work
    house.drain()
    assert house.last["a"].finish == "cancelled"
    assert not house.runner.copying


@DEPTHS
def test_failing_named_requests_leaves_the_others(depth: int) -> None:
    house = House(depth=depth)
    requests = [request(f"r{i}", [i + 1], 10, eos=False) for i in range(3)]
    for one in requests:
        house.add(one)
    for _ in range(3):
        house.step()
    house.scheduler.fail(["r1", "nobody"], ERROR)
    house.drain()
    assert house.last["r1"].error == ERROR.to_wire() and house.last["r1"].finish is None
    exact(house, [requests[0], requests[2]])


@DEPTHS
@pytest.mark.parametrize("reached", [False, True])
def test_a_lost_step_fails_only_those_in_it(depth: int, reached: bool) -> None:
    """Whether or not the plan had reached the runner when it failed."""
    house = House(rows=2, depth=depth, arena=256, slots=2)
    requests = [
        request("a", [1] * 5, 10, arrival=0, eos=False),
        request("b", [2] * 5, 10, arrival=1, eos=False),
        request("waits", [3] * 5, 10, arrival=2, eos=False),
        request("adapter", [4] * 5, 10, image("a"), arrival=3, eos=False),
    ]
    for one in requests:
        house.add(one)
    plan = house.scheduler.plan()
    assert plan is not None and plan.placements
    if reached:
        house.runner.run(plan)
        house.runner.lose()
    else:
        house.runner.last_step = plan.step
    house.scheduler.fail(None, ERROR)
    house.scheduler.check()
    house.drain()
    assert house.last["a"].error == house.last["b"].error == ERROR.to_wire()
    exact(house, requests[2:])


def lose_next(house: House) -> StepPlan:
    """Plan a step that never reaches the runner."""
    plan = house.scheduler.plan()
    assert plan is not None
    house.runner.last_step = plan.step
    house.scheduler.fail(None, ERROR)
    house.scheduler.check()
    return plan


def test_rows_that_a_lost_step_released_are_released_again() -> None:
    house = House(rows=2, depth=0)
    house.add(request("a", [1], 1))
    house.add(request("b", [2], 5, eos=False))
    house.step()
    assert lose_next(house).release == [1]
    one = request("c", [3], 5)
    house.add(one)
    house.drain()
    exact(house, [one])
    assert house.last["b"].error is not None


def test_slots_that_a_lost_step_freed_are_freed_again() -> None:
    house = House(arena=512, depth=0)
    house.generate([request("a", [1], 1, image("a")), request("b", [1], 1, image("b"))])
    large = request("large", [1], 1, image("large", 512))
    house.add(large)
    plan = lose_next(house)
    assert plan.unplace == [1, 2] and [one.slot for one in plan.placements] == [1]
    rest = [request("c", [1], 1, image("c")), request("d", [1], 1, image("d"))]
    house.generate(rest)
    exact(house, [large, *rest])


def test_a_lost_step_reads_no_adapter_any_more() -> None:
    house = House(arena=256)
    house.add(request("a", [1], 9, image("a"), eos=False))
    house.add(request("b", [1], 1, image("b"), arrival=1))
    while not house.runner.decode:
        house.step()
    house.results.clear()
    house.runner.lose()
    house.scheduler.fail(None, ERROR)
    plan = house.scheduler.plan()
    assert plan is not None and plan.unplace == [1] and plan.placements


# -- refusals


def refused(house: House, one: Request, cls: type[Exception], field: str, remedy: str) -> None:
    before = house.scheduler.stats()
    with pytest.raises(cls) as caught:
        house.scheduler.add(one)
    assert caught.value.field == field  # type: ignore[attr-defined]
    assert remedy in caught.value.hint  # type: ignore[attr-defined]
    assert house.scheduler.stats() == before
    house.scheduler.check()


@pytest.mark.parametrize(
    ("tokens", "new", "field", "remedy"),
    [
        ([], 1, "inputs", "at least one token"),
        ([1], 0, "max_new_tokens", "at least one token"),
        ([1] * 51, 1, "inputs", "--max-input-length"),
        ([1] * 41, 1, "inputs", "--max-batch-total-tokens"),
    ],
)
def test_refuses_lengths(tokens: list[int], new: int, field: str, remedy: str) -> None:
    house = House(blocks=11, block_size=4, max_input=50, max_total=60)
    refused(house, request("a", tokens, new), InvalidRequest, field, remedy)


def test_refuses_a_prompt_that_leaves_no_room_for_output() -> None:
    house = House(max_input=60, max_total=60)
    refused(house, request("a", [1] * 60), InvalidRequest, "inputs", "--max-total-tokens")
    house.generate([request("b", [1] * 59, 5, eos=False)])
    assert len(house.tokens["b"]) == 1


def test_refuses_an_id_that_is_open() -> None:
    house = House()
    house.add(request("a", [1]))
    refused(house, request("a", [1]), InvalidRequest, "id", "another id")
    house.drain()
    assert house.scheduler.add(request("a", [1])) is None


def test_refuses_an_adapter_that_cannot_fit() -> None:
    house = House(arena=1000)
    one = request("a", [1], adapter=image("a", 1001))
    refused(house, one, AdapterTooLarge, "adapter_id", "--adapter-memory-fraction")
    none = House(slots=1)
    one = request("a", [1], adapter=image("a"))
    refused(none, one, AdapterTooLarge, "adapter_id", "--max-active-adapters")


def test_refuses_a_step_smaller_than_its_rows() -> None:
    with pytest.raises(ConfigError, match="cannot decode") as caught:
        SchedulerLimits(8, 7, 10, 10, 1.0)
    assert caught.value.field == "max_batch_prefill_tokens"
