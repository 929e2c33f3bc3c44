"""Which adapter is in which slot, and which bytes of the arena it has.

Slot 0 is the base model: it has no bytes and is always resident. An adapter is *placing* from the plan that carries
its placement until the runner reports it *resident*. It is *in use* while a running sequence uses it. A preloaded
adapter is *permanent*: it is never evicted. Any other is evicted only when it is not in use and every launched step
that could read it has been committed, because copies into the arena are not ordered with the steps. A *pinned* adapter
is evicted only for an image that does not fit next to the pinned ones. A *dropped* one is evicted as soon as it may be.
Intervals start at multiples of 256 bytes and never overlap.

Room is found first-fit. If there is no room, the table looks for the fewest least recently used idle adapters without
which a gap is wide enough, and evicts only those of them that are in that gap. A *reservation* promises an interval to
an adapter; nothing else is placed there until the adapters that are there now have left.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from engine.messages import IMAGE_ALIGN, AdapterImageRef, Placement, aligned

REPORTED_PLACEMENTS = 64  # the newest; `place_seconds` has their times


@dataclass(slots=True, eq=False)
class _Entry:
    image: AdapterImageRef
    slot: int
    start: int  # bytes into the arena
    since: float  # time of placement
    resident: bool = False
    permanent: bool = False
    num_users: int = 0  # running sequences that use it
    used: int = 0  # tick of the last use
    last_step: int = 0  # the last launched step that could read it, once it is not in use

    end: int = field(init=False)  # where the next interval may start

    def __post_init__(self) -> None:
        self.end = aligned(self.start + self.image.data_bytes)


@dataclass(frozen=True, slots=True)
class _Reservation:
    start: int
    end: int
    leaving: tuple[bytes, ...]  # digests of the adapters that are there now


class SlotTable:
    """`num_slots` counts slot 0, so `num_slots - 1` adapters can be placed at one time."""

    def __init__(self, num_slots: int, arena_bytes: int) -> None:
        self.num_slots = num_slots
        self.arena_bytes = arena_bytes
        self.num_placements = 0
        self.num_evictions = 0
        self.num_placed = 0  # whose copies have completed
        self.place_seconds: deque[float] = deque(maxlen=REPORTED_PLACEMENTS)
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # least recently used first
        self._by_slot: dict[int, _Entry] = {}
        self._intervals: list[tuple[int, int]] = []  # of the entries, in order
        self._free_slots = list(range(1, num_slots))
        heapify(self._free_slots)
        self._reserved: dict[bytes, _Reservation] = {}
        self._pinned: set[bytes] = set()  # digests, in the arena or not
        self._dropped: set[bytes] = set()  # digests of entries that still leave
        self._unplaced: list[int] = []
        self._num_placing = 0
        self._tick = 0
        self._committed = 0
        self._idle_after = 0  # the last step that could read an adapter that is no longer in use

    # -- questions

    def fits(self, image: AdapterImageRef) -> bool:
        """Whether the image could be placed if only the preloaded adapters were in the arena."""
        if image.digest in self._entries:
            return True
        return self._fits_beside(image, [one for one in self._entries.values() if one.permanent])

    def slot_of(self, digest: bytes) -> int | None:
        """The slot of a resident adapter; None if it is absent or still placing."""
        entry = self._entries.get(digest)
        return entry.slot if entry is not None and entry.resident else None

    def is_placing(self, digest: bytes) -> bool:
        entry = self._entries.get(digest)
        return entry is not None and not entry.resident

    def placing(self) -> list[Placement]:
        """Placements that are not reported resident yet."""
        entries = self._entries.values()
        return [Placement(e.slot, e.start, e.image) for e in entries if not e.resident]

    def residents(self) -> list[tuple[str, bytes, int]]:
        """(name, digest, bytes in the arena) of every resident adapter. A tenant's own are named `private`."""
        images = [entry.image for entry in self._entries.values() if entry.resident]
        return [
            ("private" if image.tenant else image.name, image.digest, image.data_bytes)
            for image in images
        ]

    def num_users(self, slot: int) -> int:
        """Running sequences that use the slot."""
        return self._by_slot[slot].num_users

    @property
    def num_placing(self) -> int:
        return self._num_placing

    @property
    def num_in_use(self) -> int:
        """Adapters that running sequences use."""
        return sum(entry.num_users > 0 for entry in self._by_slot.values())

    @property
    def used_bytes(self) -> int:
        return sum(entry.image.data_bytes for entry in self._entries.values())

    # -- changes

    def place(
        self,
        image: AdapterImageRef,
        now: float,
        keep: Set[bytes] = frozenset(),
        permanent: bool = False,
    ) -> Placement | None:
        """Give the image a slot and an interval; None: no room. Evicts idle adapters if needed, but none in `keep`."""
        assert image.digest not in self._entries, "placed twice"
        reserved = self._reserved.get(image.digest)
        free = self._free_gap(image)
        victims: list[_Entry] = []
        if free is not None:
            start = free
        elif reserved is not None and all(self._evictable(d) for d in reserved.leaving):
            start, victims = reserved.start, [self._entries[d] for d in reserved.leaving]
        else:
            taken = self._leaving() | keep
            movable = [
                entry
                for digest, entry in self._entries.items()
                if self._is_evictable(entry) and digest not in taken and digest not in self._pinned
            ]
            found = self._find(image, movable)
            if found is None:
                return None
            start, victims = found
        self._reserved.pop(image.digest, None)
        for victim in victims:
            self._evict(victim)
        entry = _Entry(image, heappop(self._free_slots), start, now, permanent=permanent)
        self._entries[image.digest] = self._by_slot[entry.slot] = entry
        insort(self._intervals, (entry.start, entry.end))
        self.num_placements += 1
        self._num_placing += 1
        return Placement(entry.slot, entry.start, image)

    def reserve(
        self, image: AdapterImageRef, keep: Set[bytes] = frozenset()
    ) -> list[tuple[bytes, float]] | None:
        """Promise the image an interval. Others must leave: idle ones first, then the longest placed. Pinned ones leave
        last, and only for an image that does not fit next to them.

        Returns (digest, time of placement) of those that must leave. None: other reservations, adapters in `keep` and
        preloaded adapters leave no interval.
        """
        assert image.digest not in self._entries and image.digest not in self._reserved
        taken = self._leaving() | keep

        def order(entry: _Entry) -> tuple[bool, bool, float]:
            active = entry.num_users > 0 or not entry.resident
            pinned = entry.image.digest in self._pinned
            return (pinned, active, entry.since if active else entry.used)

        lasting = [
            entry
            for entry in self._entries.values()
            if entry.permanent or entry.image.digest in self._pinned
        ]
        kept = set(lasting) if self._fits_beside(image, lasting) else set()
        movable = [
            entry
            for entry in sorted(self._entries.values(), key=order)
            if entry.image.digest not in taken and not entry.permanent and entry not in kept
        ]
        found = self._find(image, movable)
        if found is None:
            return None
        start, victims = found
        leaving = tuple(victim.image.digest for victim in victims)
        end = aligned(start + image.data_bytes)
        self._reserved[image.digest] = _Reservation(start, end, leaving)
        return [(victim.image.digest, victim.since) for victim in victims]

    def cancel_reservation(self, digest: bytes) -> None:
        self._reserved.pop(digest, None)

    def pin(self, digest: bytes) -> None:
        """The adapter, once it is in the arena, stays as long as requests find room without it."""
        self._pinned.add(digest)

    def unpin(self, digest: bytes) -> None:
        self._pinned.discard(digest)

    def drop(self, digest: bytes) -> None:
        """The adapter leaves the arena when it is not in use. It stays if a sequence takes it before."""
        self.unpin(digest)
        if (entry := self._entries.get(digest)) is not None:
            entry.permanent = False
            self._dropped.add(digest)
            self._evict_dropped()

    def acquire(self, slot: int) -> None:
        """One more running sequence uses the slot."""
        entry = self._by_slot[slot]
        assert entry.resident, "acquired an adapter that is not resident"
        entry.num_users += 1
        self._dropped.discard(entry.image.digest)

    def release(self, slot: int, step: int) -> None:
        """One sequence less uses the slot. `step` is the last launched step, which may still read the adapter."""
        entry = self._by_slot[slot]
        assert entry.num_users > 0, "released more often than acquired"
        entry.num_users -= 1
        entry.last_step = self._idle_after = step
        self._touch(entry)

    def mark_resident(self, slot: int, now: float = 0.0) -> bytes:
        """The runner reported that the copy into the slot has completed. Returns the adapter's digest."""
        entry = self._by_slot[slot]
        assert not entry.resident, "reported resident twice"
        entry.resident = True
        self.place_seconds.append(now - entry.since)
        self.num_placed += 1
        self._num_placing -= 1
        self._touch(entry)
        return entry.image.digest

    def commit(self, step: int) -> bool:
        """No step up to `step` reads the arena any more. Returns whether an idle adapter became evictable."""
        freed = self._committed < self._idle_after <= step
        self._committed = step
        if self._dropped:
            self._evict_dropped()
        return freed

    def take_unplaced(self) -> list[int]:
        """Slots whose adapters were evicted since the last call."""
        taken, self._unplaced = self._unplaced, []
        return taken

    # -- inside

    def _touch(self, entry: _Entry) -> None:
        self._entries.move_to_end(entry.image.digest)
        self._tick += 1
        entry.used = self._tick

    def _evict_dropped(self) -> None:
        ready = [digest for digest in self._dropped if self._evictable(digest)]
        for digest in (
            set(ready) - self._leaving()
        ):  # those that leave for another are evicted with its placement
            self._evict(self._entries[digest])

    def _leaving(self) -> set[bytes]:
        return {digest for one in self._reserved.values() for digest in one.leaving}

    def _evictable(self, digest: bytes) -> bool:
        return self._is_evictable(self._entries[digest])

    def _is_evictable(self, entry: _Entry) -> bool:
        idle = entry.resident and not entry.num_users and not entry.permanent
        return idle and entry.last_step <= self._committed

    def _evict(self, entry: _Entry) -> None:
        del self._entries[entry.image.digest]
        self._dropped.discard(entry.image.digest)
        del self._by_slot[entry.slot]
        self._intervals.remove((entry.start, entry.end))
        heappush(self._free_slots, entry.slot)
        self._unplaced.append(entry.slot)
        self.num_evictions += 1

    def _fits_beside(self, image: AdapterImageRef, kept: list[_Entry]) -> bool:
        """Whether the image could be placed if only these entries were in the arena."""
        intervals = sorted((entry.start, entry.end) for entry in kept)
        has_slot = len(kept) + 2 <= self.num_slots
        return has_slot and self._gap(image.data_bytes, intervals) is not None

    def _free_gap(self, image: AdapterImageRef) -> int | None:
        """Where the image fits without an eviction. This is the common case, so it is fast."""
        if not self._free_slots:
            return None
        taken = self._intervals
        if promised := self._promised_to_others(image):
            taken = sorted(taken + promised)
        return self._gap(image.data_bytes, taken)

    def _promised_to_others(self, image: AdapterImageRef) -> list[tuple[int, int]]:
        reserved = self._reserved.items()
        return [(one.start, one.end) for digest, one in reserved if digest != image.digest]

    def _find(
        self, image: AdapterImageRef, movable: list[_Entry]
    ) -> tuple[int, list[_Entry]] | None:
        """Where the image fits, and which of `movable`, which is in order of preference, must leave."""
        moving = set(movable)
        fixed = [(e.start, e.end) for e in self._entries.values() if e not in moving]
        fixed += self._promised_to_others(image)
        intervals = [(entry.start, entry.end) for entry in movable]

        def without(count: int) -> int | None:
            return self._gap(image.data_bytes, sorted(fixed + intervals[count:]))

        count = _first(without, len(movable))
        if count is None:
            return None
        start = without(count)
        assert start is not None
        end = start + image.data_bytes
        victims = [entry for entry in movable[:count] if entry.start < end and start < entry.end]
        if not self._free_slots and not victims:
            if not movable:
                return None
            victims = movable[:1]
        return start, victims

    def _gap(self, size: int, intervals: list[tuple[int, int]]) -> int | None:
        """Start of the first gap of `size` bytes between `intervals`, which are aligned, sorted and may overlap."""
        start = 0
        for taken_start, taken_end in intervals:
            if taken_start - start >= size:
                return start
            if taken_end > start:
                start = taken_end
        return start if self.arena_bytes - start >= size else None

    def check(self) -> None:
        """Assert every invariant."""
        entries = list(self._entries.values())
        assert len(entries) == len(self._by_slot)
        assert self._num_placing == sum(not entry.resident for entry in entries)
        for digest, entry in self._entries.items():
            assert entry.image.digest == digest and self._by_slot[entry.slot] is entry
            assert entry.start % IMAGE_ALIGN == 0 and entry.start >= 0
            size = entry.image.data_bytes
            assert entry.start + size <= self.arena_bytes, "an adapter lies outside the arena"
            assert entry.num_users >= 0 and (entry.resident or not entry.num_users)
        assert self._intervals == sorted((entry.start, entry.end) for entry in entries)
        for left, right in zip(self._intervals, self._intervals[1:], strict=False):
            assert left[1] <= right[0], "two adapters overlap"
        slots = sorted([*self._by_slot, *self._free_slots])
        assert slots == list(range(1, self.num_slots)), "a slot is lost or in two states"
        leaving = [digest for one in self._reserved.values() for digest in one.leaving]
        assert len(leaving) == len(set(leaving)), "an adapter must leave for two others"
        assert set(leaving) <= self._entries.keys() and not self._reserved.keys() & self._entries
        promised = sorted((one.start, one.end) for one in self._reserved.values())
        for (_, left_end), (right_start, _) in zip(promised, promised[1:], strict=False):
            assert left_end <= right_start, "two reservations overlap"


def _first(probe: Callable[[int], int | None], most: int) -> int | None:
    """The smallest count in 0 .. most for which `probe` finds something, if a larger count never finds less."""
    if probe(0) is not None:
        return 0
    low, high = 0, 1  # fails at low; few are usual, so the step doubles until it succeeds at high
    while high < most and probe(high) is None:
        low, high = high, 2 * high
    if high >= most:
        high = most
        if high == low or probe(high) is None:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if probe(middle) is None:
            low = middle
        else:
            high = middle
    return high
