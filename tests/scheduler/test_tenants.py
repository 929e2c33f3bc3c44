"""Shares of tenants and adapters, and priorities, in tokens that are computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from engine.messages import AdapterImageRef, Request
from engine.scheduler.queue import STARVED_EVERY, STARVED_S
from tests.scheduler.fake import House, expected, image, request

DEPTHS = pytest.mark.parametrize("depth", [0, 1])


class Load:
    """Keeps so many requests of one tenant open, each for the next of its adapters. The tenant is `name` by default."""

    def __init__(
        self,
        house: House,
        name: str,
        num_open: int,
        *,
        weight: float = 1.0,
        adapters: list[AdapterImageRef | None] | None = None,
        tenant: str = "",
        priority: int = 0,
        prompts: int = 1,
        output: int = 8,
    ) -> None:
        self.house, self.name, self.num_open = house, name, num_open
        self.adapters = adapters or [None]
        self.fields = {"tenant": tenant or name, "weight": weight, "priority": priority}
        self.prompts, self.output = prompts, output
        self.made: list[Request] = []

    def refill(self) -> None:
        running = sum(one.id not in self.house.last for one in self.made[-2 * self.num_open :])
        for _ in range(running, self.num_open, self.prompts):
            self.send()

    def send(self) -> None:
        first = len(self.made)
        for number in range(self.prompts):
            one = request(
                f"{self.name}{first + number}",
                [1] * 8,
                self.output,
                self.adapters[len(self.made) % len(self.adapters)],
                arrival=self.house.clock(),
                eos=False,
                group=f"{self.name}{first}",
                behind=number * (8 + self.output),
                **self.fields,
            )
            self.made.append(one)
            self.house.add(one)

    def received(self) -> int:
        """Tokens so far."""
        return sum(
            len(self.house.tokens[one.id]) + 8 for one in self.made if self.house.tokens[one.id]
        )


def shares(house: House, loads: list[Load], steps: int) -> list[float]:
    """Of the tokens of the later half, while all loads wait for more."""
    before: list[int] = []
    for step in range(steps):
        for load in loads:
            load.refill()
        house.step()
        if step == steps // 2:
            before = [load.received() for load in loads]
    got = [load.received() - first for load, first in zip(loads, before, strict=True)]
    return [tokens / sum(got) for tokens in got]


@DEPTHS
@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 0.1)])
def test_tenants_share_by_weight_however_much_they_send(
    depth: int, weights: tuple[float, float]
) -> None:
    house = House(rows=8, blocks=400, depth=depth)
    few, many = weights
    loads = [Load(house, "few", 12, weight=few), Load(house, "many", 100, weight=many)]
    found = shares(house, loads, 600)
    assert found[0] == pytest.approx(few / (few + many), rel=0.1)


@DEPTHS
@pytest.mark.parametrize("cycle", [0.1, 0.3, 2.0])
def test_a_flood_of_adapters_does_not_take_another_tenants_share(depth: int, cycle: float) -> None:
    """The arena holds 4 adapters. One tenant asks for 50 of them, the other for one."""
    house = House(rows=8, blocks=400, arena=1024, slots=60, cycle=cycle, depth=depth)
    flood = [image(f"f{number}") for number in range(50)]
    loads = [
        Load(house, "flood", 100, adapters=flood),
        Load(house, "one", 12, adapters=[image("one")]),
    ]
    found = shares(house, loads, 1500)
    assert found[1] > 0.45
    house.drain(50_000)
    for load in loads:
        for one in load.made[-50:]:
            assert house.tokens[one.id] == expected(one)


@DEPTHS
def test_requests_of_many_prompts_do_not_take_another_tenants_share(depth: int) -> None:
    house = House(rows=8, blocks=400, depth=depth)
    loads = [Load(house, "many", 200, prompts=200), Load(house, "single", 12)]
    assert shares(house, loads, 600)[1] > 0.45


def test_adapters_of_one_tenant_share_alike() -> None:
    house = House(rows=8, blocks=400)
    rare = Load(house, "rare", 6, tenant="one", adapters=[image("rare")])
    popular = Load(house, "popular", 60, tenant="one", adapters=[image("popular")])
    assert shares(house, [rare, popular], 600)[0] == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("tenants", [("early", "late"), ("one", "one")])
def test_time_without_requests_earns_nothing(tenants: tuple[str, str]) -> None:
    """Who comes back has its share from then on, not what it did not ask for: a tenant, or an adapter of one tenant."""
    house = House(rows=8, blocks=400)
    early, late = (
        Load(house, name, 20, tenant=tenant, adapters=[image(name)])
        for name, tenant in zip(("early", "late"), tenants, strict=True)
    )
    late.send()
    fields = {"tenant": tenants[1], "adapter": image("late")}
    house.add(request("runs all the while", [1], 500, eos=False, **fields))
    for _ in range(400):
        early.refill()
        house.step()
    before, late_before = early.received(), late.received()
    for _ in range(400):
        early.refill()
        late.refill()
        house.step()
    got, late_got = early.received() - before, late.received() - late_before
    assert got / (got + late_got) == pytest.approx(0.5, rel=0.1)


def admissions(house: House) -> Iterator[str]:
    """Ids in the order of their first tokens."""
    seen: set[str] = set()
    while True:
        busy = house.step()
        for id in list(house.first):
            if id not in seen:
                seen.add(id)
                yield id
        if not busy:
            return


def test_a_higher_priority_goes_first() -> None:
    house = House(rows=1)
    for number in range(12):
        priority = (0, 5, -5)[number % 3]
        one = request(f"{priority} {number}", [1] * 4, 2, eos=False, priority=priority)
        house.add(one)
    order = [int(id.split()[0]) for id in admissions(house)]
    assert order == sorted(order, reverse=True)


def test_a_starved_priority_gets_one_of_ten() -> None:
    """Whatever else is sent, a request of the lowest priority is served."""
    house = House(rows=1, step_seconds=1.0)
    high = Load(house, "high", 3, priority=1, output=1)
    low = Load(house, "low", 40, priority=0, output=1)
    low.refill()
    served: list[str] = []
    for _ in range(400):
        high.refill()
        house.step()
        served += [id for id in house.first if id not in served]
    first_low = next(index for index, id in enumerate(served) if id.startswith("low"))
    assert first_low >= STARVED_S / 4, "the high priority is alone at first"
    kinds = Counter(id.startswith("low") for id in served[first_low:])
    assert kinds[True] == pytest.approx(len(served[first_low:]) / STARVED_EVERY, abs=2)


def test_the_lowest_priority_is_preempted() -> None:
    house = House(rows=3, blocks=25, block_size=4)
    for id, priority in (("low", -1), ("high", 1), ("middle", 0)):
        house.add(request(id, [1] * 4, 30, arrival=0, eos=False, priority=priority))
    house.drain()
    preemptions = {id: last.usage.preemptions for id, last in house.last.items() if last.usage}
    assert preemptions["low"] and not preemptions["high"]


@DEPTHS
@pytest.mark.parametrize("tenant", ["other", "same"])
@pytest.mark.parametrize("long", [8, 300])
def test_others_prompts_delay_a_single_request_by_two_steps(
    depth: int, tenant: str, long: int
) -> None:
    """Two requests of 200 prompts, or of long ones, came before. There are rows and memory for all."""

    def steps_to_first_token(num_prompts: int) -> int:
        house = House(rows=410, blocks=40_000, step_tokens=450, depth=depth)
        for flood in range(2):
            for number in range(num_prompts):
                house.add(
                    request(
                        f"{flood}-{number}",
                        [1 + flood, number % 7] * (long // 2),
                        8,
                        group=f"flood {flood}",
                        behind=number * (long + 8),
                        arrival=house.clock(),
                        tenant="many",
                    )
                )
        for _ in range(3):
            house.step()
        single = request(
            "single",
            [3] * 8,
            4,
            arrival=house.clock(),
            tenant="one" if tenant == "other" else "many",
        )
        house.add(single)
        steps = 0
        while not house.tokens["single"]:
            house.step()
            steps += 1
        return steps

    assert steps_to_first_token(200) <= steps_to_first_token(0) + 2
