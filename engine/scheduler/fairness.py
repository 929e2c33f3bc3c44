"""Rotates adapters through the arena when not all requested ones fit.

A sequence whose adapter finds no room is *starving*. Once it has waited one cycle it gets a *turn*: an interval is
reserved, and the adapters in it must leave. Idle adapters are chosen first, then the longest placed. A leaving adapter
admits sequences for at least one cycle from its placement. Then it *drains*: it admits no more. One cycle later its
running sequences are paused. The longest waiting sequence gets the next turn, whatever its arrival. A paused sequence
waits from zero, so adapters rotate.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Set
from dataclasses import dataclass
from math import inf
from typing import Protocol

from engine.messages import AdapterImageRef, Placement
from engine.scheduler.sequence import Sequence


class Slots(Protocol):
    """The slot table as the scheduler uses it; `engine.scheduler.slots` documents the semantics."""

    arena_bytes: int
    num_placements: int
    num_evictions: int
    num_placed: int
    place_seconds: deque[float]

    @property
    def num_in_use(self) -> int: ...
    @property
    def used_bytes(self) -> int: ...
    @property
    def num_placing(self) -> int: ...
    def fits(self, image: AdapterImageRef) -> bool: ...
    def slot_of(self, digest: bytes) -> int | None: ...
    def is_placing(self, digest: bytes) -> bool: ...
    def placing(self) -> list[Placement]: ...
    def residents(self) -> list[tuple[str, bytes, int]]: ...
    def num_users(self, slot: int) -> int: ...
    def place(
        self,
        image: AdapterImageRef,
        now: float,
        keep: Set[bytes] = ...,
        permanent: bool = ...,
    ) -> Placement | None: ...
    def reserve(
        self, image: AdapterImageRef, keep: Set[bytes] = ...
    ) -> list[tuple[bytes, float]] | None: ...
    def cancel_reservation(self, digest: bytes) -> None: ...
    def acquire(self, slot: int) -> None: ...
    def release(self, slot: int, step: int) -> None: ...
    def pin(self, digest: bytes) -> None: ...
    def unpin(self, digest: bytes) -> None: ...
    def drop(self, digest: bytes) -> None: ...
    def mark_resident(self, slot: int, now: float = ...) -> bytes: ...
    def commit(self, step: int) -> bool: ...
    def take_unplaced(self) -> list[int]: ...
    def check(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Turn:
    """One sequence's claim on room for its adapter, from the reservation until it is admitted or ends."""

    sequence: Sequence
    leaving: tuple[bytes, ...]  # digests of the adapters that must leave


class Rotation:
    """The turns under way. `cycle_time` is in seconds of the scheduler's clock."""

    def __init__(self, slots: Slots, cycle_time: float) -> None:
        self.turns: dict[bytes, Turn] = {}  # by digest of the sequence's adapter
        self.next_due = inf  # time at which the next starving sequence has waited one cycle
        self._slots = slots
        self._cycle_time = cycle_time
        self._drain_from: dict[bytes, float] = {}  # digest of a leaving adapter -> time

    def is_draining(self, digest: bytes, now: float) -> bool:
        """Whether the adapter has stopped admitting sequences."""
        return bool(self._drain_from) and now >= self._drain_from.get(digest, inf)

    def overdue(self, now: float) -> set[bytes]:
        """Adapters whose running sequences must be paused."""
        limits = self._drain_from.items()
        return {digest for digest, start in limits if now >= start + self._cycle_time}

    def rotate(self, starving: list[Sequence], now: float) -> None:
        """Give turns to the sequences that have waited one cycle, the longest waiting first.

        If a reservation fails (others are in the way), later sequences get none either: otherwise a large adapter
        would never find its interval between small ones.
        """
        self.next_due = inf
        for sequence in sorted(starving, key=lambda sequence: sequence.waiting_since):
            image = sequence.adapter
            assert image is not None
            if image.digest in self.turns:
                continue
            due = sequence.waiting_since + self._cycle_time
            if now < due:
                self.next_due = due
                return
            leaving = self._slots.reserve(image, self.turns.keys())
            if leaving is None:
                return
            self.turns[image.digest] = Turn(sequence, tuple(digest for digest, _ in leaving))
            for digest, since in leaving:
                self._drain_from[digest] = max(now, since + self._cycle_time)

    def placed(self, digest: bytes) -> None:
        """The adapter has its room: the adapters that were to leave for it may stay."""
        turn = self.turns.get(digest)
        if turn is not None:
            for leaving in turn.leaving:
                self._drain_from.pop(leaving, None)

    def end_turn(self, sequence: Sequence) -> None:
        """The sequence was admitted or ended. Ends its turn, if it has one."""
        image = sequence.adapter
        turn = self.turns.get(image.digest) if image is not None else None
        if image is not None and turn is not None and turn.sequence is sequence:
            self.placed(image.digest)
            self._slots.cancel_reservation(image.digest)
            del self.turns[image.digest]

    def check(self) -> None:
        """Assert every invariant."""
        leaving = {digest for turn in self.turns.values() for digest in turn.leaving}
        assert self._drain_from.keys() <= leaving, "an adapter drains without a turn"
        for digest, turn in self.turns.items():
            assert turn.sequence.row == 0, "a running sequence has a turn"
            assert turn.sequence.adapter is not None and turn.sequence.adapter.digest == digest
