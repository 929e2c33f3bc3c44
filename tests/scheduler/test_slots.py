"""The slot table: intervals, use, eviction, reservations."""

from __future__ import annotations

import random

import msgspec
import pytest

from engine.messages import Placement
from engine.scheduler.slots import SlotTable, _first
from tests.scheduler.fake import image


def settle(table: SlotTable, placement: Placement | None) -> int:
    assert placement is not None
    table.mark_resident(placement.slot)
    table.check()
    return placement.slot


def put(table: SlotTable, name: str, size: int = 256, now: float = 0.0) -> int:
    return settle(table, table.place(image(name, size), now))


def names(table: SlotTable) -> list[str]:
    return sorted(name for name, _, _ in table.residents())


def test_a_tenants_adapter_has_no_name() -> None:
    table = SlotTable(4, 1024)
    settle(table, table.place(msgspec.structs.replace(image("a"), tenant=b"t"), 0.0))
    put(table, "b")
    assert names(table) == ["b", "private"]


def test_places_first_fit_and_aligned() -> None:
    table = SlotTable(4, 4096)
    offsets = []
    for name, size in (("a", 100), ("b", 300), ("c", 16)):
        placement = table.place(image(name, size), 0.0)
        assert placement is not None
        offsets.append((placement.slot, placement.offset))
    assert offsets == [(1, 0), (2, 256), (3, 768)]
    assert table.num_placing == 3 and table.used_bytes == 416


def test_is_resident_only_once_the_runner_says_so() -> None:
    table = SlotTable(4, 4096)
    one = image("a")
    placement = table.place(one, 0.0)
    assert placement is not None
    assert table.is_placing(one.digest) and table.slot_of(one.digest) is None
    assert table.placing() == [placement]
    with pytest.raises(AssertionError):
        table.acquire(placement.slot)
    assert table.mark_resident(placement.slot) == one.digest
    assert table.slot_of(one.digest) == placement.slot
    assert not table.is_placing(one.digest) and table.num_placing == 0


def test_the_whole_arena_can_be_one_adapter() -> None:
    table = SlotTable(2, 1000)
    assert table.fits(image("a", 1000)) and not table.fits(image("b", 1001))
    put(table, "a", 1000)


def test_an_adapter_without_bytes_needs_only_a_slot() -> None:
    table = SlotTable(3, 256)
    put(table, "a", 256)
    put(table, "b", 0)
    assert names(table) == ["a", "b"]


def test_evicts_the_least_recently_used_idle_adapter() -> None:
    table = SlotTable(8, 768)
    slots = {name: put(table, name) for name in "abc"}
    for name in "bac":
        table.acquire(slots[name])
        table.release(slots[name], 0)
    placement = table.place(image("d"), 0.0)
    assert placement is not None and placement.offset == 256
    assert table.take_unplaced() == [slots["b"]]
    assert table.take_unplaced() == []
    assert names(table) == ["a", "c"]
    assert table.num_evictions == 1 and table.num_placements == 4


def test_evicts_only_what_lies_in_the_gap() -> None:
    table = SlotTable(8, 1024)
    for name in "abcd":
        put(table, name)
    slot = table.slot_of(image("b").digest)
    assert slot is not None
    table.acquire(slot)  # a, [b], c, d: the least recently used, a, would be no use
    placement = table.place(image("big", 512), 0.0)
    assert placement is not None and placement.offset == 512
    assert names(table) == ["a", "b"]


def test_never_evicts_used_placing_permanent_or_kept() -> None:
    table = SlotTable(8, 1024)
    used = put(table, "used")
    table.acquire(used)
    settle(table, table.place(image("permanent"), 0.0, permanent=True))
    put(table, "kept")
    assert table.place(image("placing"), 0.0) is not None
    assert table.place(image("new"), 0.0, keep={image("kept").digest}) is None
    assert table.place(image("new"), 0.0) is not None
    assert names(table) == ["permanent", "used"]


def test_a_slot_is_as_scarce_as_bytes() -> None:
    table = SlotTable(3, 1 << 20)
    first, second = put(table, "a"), put(table, "b")
    table.acquire(first)
    table.acquire(second)
    assert table.place(image("c"), 0.0) is None
    table.release(second, 0)
    placement = table.place(image("c"), 0.0)
    assert placement is not None and placement.slot == second


def test_is_not_reused_while_a_launched_step_could_read_it() -> None:
    table = SlotTable(2, 256)
    slot = put(table, "a")
    table.commit(4)
    table.acquire(slot)
    table.release(slot, 6)  # steps 5 and 6 are in flight
    assert table.place(image("b"), 0.0) is None
    assert not table.commit(5)
    assert table.place(image("b"), 0.0) is None
    assert table.commit(6), "worth another look"
    assert table.place(image("b"), 0.0) is not None


def test_fits_counts_only_preloaded_adapters_as_taken() -> None:
    table = SlotTable(3, 1024)
    settle(table, table.place(image("p", 512), 0.0, permanent=True))
    slot = put(table, "a", 512)
    table.acquire(slot)
    assert table.fits(image("b", 512)) and not table.fits(image("b", 513))
    assert table.fits(image("p", 512))
    full = SlotTable(2, 1024)
    settle(full, full.place(image("p"), 0.0, permanent=True))
    assert not full.fits(image("b"))


def test_a_reservation_names_the_idle_then_the_longest_placed() -> None:
    table = SlotTable(8, 768)
    slots = {name: put(table, name, now=now) for now, name in enumerate("abc")}
    table.acquire(slots["a"])
    table.acquire(slots["c"])
    table.acquire(slots["b"])
    assert table.reserve(image("d")) == [(image("a").digest, 0.0)]
    table.check()
    table.release(slots["c"], 0)
    assert table.reserve(image("e")) == [(image("c").digest, 2.0)]
    table.check()


def test_a_reserved_interval_is_nobody_elses() -> None:
    table = SlotTable(8, 512)
    slots = {name: put(table, name) for name in "ab"}
    for slot in slots.values():
        table.acquire(slot)
    assert table.reserve(image("big", 512)) is not None
    table.release(slots["a"], 0)
    assert table.place(image("small"), 0.0) is None
    assert table.place(image("big", 512), 0.0) is None
    table.release(slots["b"], 0)
    assert table.place(image("small"), 0.0) is None
    placement = table.place(image("big", 512), 0.0)
    assert placement is not None and placement.offset == 0
    table.check()


def test_a_cancelled_reservation_frees_the_interval() -> None:
    table = SlotTable(8, 256)
    slot = put(table, "a")
    table.acquire(slot)
    assert table.reserve(image("b")) is not None
    table.release(slot, 0)
    assert table.place(image("c"), 0.0) is None
    table.cancel_reservation(image("b").digest)
    assert table.place(image("c"), 0.0) is not None


def test_reservations_do_not_share_adapters() -> None:
    table = SlotTable(8, 256)
    table.acquire(put(table, "a"))
    assert table.reserve(image("b")) is not None
    assert table.reserve(image("c")) is None


def test_a_pinned_adapter_leaves_last_and_only_for_a_reservation() -> None:
    table = SlotTable(8, 512)
    pinned, other = put(table, "pinned"), put(table, "other")
    table.pin(image("pinned").digest)
    for slot in (other, pinned):  # the pinned one is the more recently used
        table.acquire(slot)
    table.release(pinned, 0)
    assert table.place(image("new"), 0.0) is None, "the pinned one is idle, but it stays"
    assert table.reserve(image("new")) == [(image("other").digest, 0.0)]
    table.cancel_reservation(image("new").digest)
    left = table.reserve(image("whole", 512))
    assert left is not None and {digest for digest, _ in left} == {
        image("pinned").digest,
        image("other").digest,
    }
    table.cancel_reservation(image("whole", 512).digest)
    table.unpin(image("pinned").digest)
    settle(table, table.place(image("new"), 0.0))
    assert names(table) == ["new", "other"]


def test_a_pinned_adapter_stays_while_the_others_can_take_turns() -> None:
    table = SlotTable(8, 768)
    for name in ("pinned", "a", "b"):
        table.acquire(put(table, name))
    table.pin(image("pinned").digest)
    assert table.reserve(image("c")) == [(image("a").digest, 0.0)]
    assert table.reserve(image("d")) == [(image("b").digest, 0.0)]
    assert table.reserve(image("e")) is None, "it waits for the end of a turn"
    table.cancel_reservation(image("c").digest)
    assert table.reserve(image("e")) == [(image("a").digest, 0.0)]
    table.check()


def test_a_dropped_adapter_leaves_when_it_is_not_in_use() -> None:
    table = SlotTable(8, 1024)
    idle, used, again = put(table, "idle"), put(table, "used"), put(table, "again")
    settle(table, table.place(image("permanent"), 0.0, permanent=True))
    for slot in (used, again):
        table.acquire(slot)
    for name in ("idle", "used", "again", "permanent", "unknown"):
        table.drop(image(name).digest)
    assert names(table) == ["again", "used"] and idle in table.take_unplaced()
    table.acquire(again)  # a request takes it again: it stays
    for slot in (used, again, again):
        table.release(slot, 5)
    table.commit(4)
    assert names(table) == ["again", "used"], "step 5 may still read them"
    table.commit(5)
    assert names(table) == ["again"] and table.take_unplaced() == [used]
    table.check()


@pytest.mark.parametrize("seed", range(30))
def test_random_use(seed: int) -> None:
    rng = random.Random(seed)
    table = SlotTable(rng.randrange(2, 12), rng.randrange(256, 8192))
    images = [image(f"a{index}", rng.randrange(0, 2000)) for index in range(20)]
    acquired: list[int] = []
    step = committed = 0
    for now in range(400):
        one = rng.choice(images)
        known = table.slot_of(one.digest)
        if known is not None:
            table.acquire(known)
            acquired.append(known)
        elif not table.is_placing(one.digest) and table.fits(one):
            keep = {other.digest for other in rng.sample(images, 3)}
            if table.place(one, now, keep) is None and rng.random() < 0.5:
                table.cancel_reservation(one.digest)
                table.reserve(one, keep)
        if rng.random() < 0.3:
            table.cancel_reservation(rng.choice(images).digest)
        if rng.random() < 0.2:
            change = rng.choice([table.pin, table.unpin, table.drop])
            change(rng.choice(images).digest)
        for placement in table.placing():
            if rng.random() < 0.5:
                table.mark_resident(placement.slot)
        step += 1
        while acquired and rng.random() < 0.6:
            table.release(acquired.pop(rng.randrange(len(acquired))), step)
        committed = rng.randrange(committed, step + 1)
        table.commit(committed)
        table.check()
        table.take_unplaced()
    # Without use, steps in flight, pins or reservations, whatever fits finds room.
    for slot in acquired:
        table.release(slot, step)
    table.commit(step)
    for one in images:
        table.cancel_reservation(one.digest)
        table.unpin(one.digest)
    for placement in table.placing():
        table.mark_resident(placement.slot)
    for one in images:
        if table.fits(one) and table.slot_of(one.digest) is None:
            settle(table, table.place(one, 0.0))


@pytest.mark.parametrize("most", range(18))
def test_the_fewest_that_must_leave(most: int) -> None:
    """The search gives what trying one count after the other gives."""
    for least in range(most + 2):
        found = _first(lambda count, least=least: count if count >= least else None, most)
        assert found == next((count for count in range(most + 1) if count >= least), None)
