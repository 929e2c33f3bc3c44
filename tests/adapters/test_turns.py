"""Turns: keys in turn, within a key first come, first served; no waiter and no turn is lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from engine.adapters.turns import MAX_KEYS, Turns


async def settle() -> None:
    """Lets every task run that can."""
    for _ in range(4):
        await asyncio.sleep(0)


class Users:
    """Tasks that take turns, named by their key and a number; `order` has those that got one."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.order: list[str] = []
        self.waiting: dict[str, asyncio.Task[None]] = {}

    async def ask(self, *names: str) -> None:
        for name in names:
            self.waiting[name] = asyncio.create_task(self._take(name))
            await asyncio.sleep(0)

    async def _take(self, name: str) -> None:
        await self.turns.acquire(name[0])
        self.order.append(name)

    async def end(self, count: int) -> list[str]:
        """Ends so many turns, one after another; those that got one meanwhile."""
        before = len(self.order)
        for _ in range(count):
            self.turns.release()
            await settle()
        return self.order[before:]


async def test_keys_are_served_in_turn() -> None:
    users = Users(Turns(2))
    await users.ask("a1", "a2", "a3", "a4", "a5", "b1", "c1", "b2", "b3")
    assert users.order == ["a1", "a2"]
    assert await users.end(3) == ["b1", "c1", "a3"]
    await users.ask("d1", "c2")
    assert await users.end(4) == ["d1", "b2", "c2", "a4"]
    assert await users.end(3) == ["b3", "a5"]


async def test_one_key_is_first_come_first_served() -> None:
    users = Users(Turns(1))
    names = [f"a{number}" for number in range(30)]
    await users.ask(*names)
    await users.end(29)
    assert users.order == names


async def test_who_comes_again_and_again_gets_no_more_than_its_share() -> None:
    """`b` never has two waiters, so it is forgotten by the queue each time; its last turn is not."""
    users = Users(Turns(1))
    await users.ask("a0", *(f"{key}{number}" for number in range(1, 9) for key in "ac"))
    served = []
    for number in range(6):
        await users.ask(f"b{number}")
        while f"b{number}" not in served:
            served += await users.end(1)
    assert [name[0] for name in served] == [*"cbacbacbacbacbacb"][: len(served)]


async def test_a_free_turn_needs_no_wait() -> None:
    users = Users(Turns(2))
    await users.ask("a1")
    assert await users.end(1) == []
    await users.ask("b1", "b2", "b3")
    assert users.order == ["a1", "b1", "b2"]


async def test_who_gives_up_is_passed_over() -> None:
    users = Users(Turns(1))
    await users.ask("a1", "a2", "b1", "a3", "b2")
    users.waiting["b1"].cancel()
    users.turns.release()  # before the task of b1 has run
    await settle()
    assert users.order == ["a1", "b2"]
    users.turns.release()
    users.waiting["a2"].cancel()  # it has its turn, and has not run yet
    await settle()
    assert users.order == ["a1", "b2", "a3"]
    users.turns.release()
    await users.ask("c1", "c2")
    assert users.order == ["a1", "b2", "a3", "c1"]
    assert await users.end(1) == ["c2"]
    assert users.waiting["b1"].cancelled() and users.waiting["a2"].cancelled()


@pytest.mark.parametrize("seed", range(6))
async def test_nothing_is_lost(seed: int) -> None:
    """Tasks come, give up and end at random: never more holders than turns, and all turns are free at the end."""
    chance, turns, limit = random.Random(seed), Turns(3), 3
    holders, most, done = 0, 0, 0

    async def use(key: str) -> None:
        nonlocal holders, most, done
        await turns.acquire(key)
        holders += 1
        most = max(most, holders)
        try:
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            done += 1
        finally:
            holders -= 1
            turns.release()

    tasks: list[asyncio.Task[None]] = []
    for _ in range(400):
        tasks.append(asyncio.create_task(use(chance.choice("aaab"))))
        if chance.random() < 0.5:
            chance.choice(tasks).cancel()
        if chance.random() < 0.5:
            await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most == limit and holders == 0
    assert done >= sum(not task.cancelled() for task in tasks) > 0
    for _ in range(limit):
        await asyncio.wait_for(turns.acquire("z"), 1)
    waiter = asyncio.create_task(turns.acquire("z"))
    await settle()
    assert not waiter.done()
    waiter.cancel()


async def test_few_keys_are_remembered() -> None:
    turns = Turns(1)
    for number in range(MAX_KEYS + 100):
        await turns.acquire(f"k{number}")
        turns.release()
    assert len(turns._last) == MAX_KEYS
