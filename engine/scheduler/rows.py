"""Assigns rows to running sequences, and lists those that decode. Row 0 is scratch and never assigned."""

from __future__ import annotations

from bisect import insort
from heapq import heappop, heappush
from operator import attrgetter

from engine.scheduler.sequence import Sequence

_age = attrgetter("age")
_slot = attrgetter("slot")
_priority = attrgetter("request.priority")


class Rows:
    """A running sequence has a row. It is *prefilling* (tokens to compute), decoding, or waits for its vector."""

    def __init__(self, num_rows: int) -> None:
        self.running: dict[int, Sequence] = {}  # by row, in the order of admission
        self.prefilling: list[Sequence] = []  # by age
        self._num_rows = num_rows
        self._free = list(range(1, num_rows + 1))  # a heap
        self._released: list[int] = []
        self._decode: list[tuple[Sequence, int]] = []
        self._stale = False

    @property
    def any_free(self) -> bool:
        return bool(self._free)

    def take(self, sequence: Sequence, slot: int) -> None:
        sequence.row, sequence.slot = heappop(self._free), slot
        self.running[sequence.row] = sequence
        insort(self.prefilling, sequence, key=_age)

    def leave(self, sequence: Sequence) -> None:
        """The row is free; results of steps in flight for the sequence will be dropped."""
        del self.running[sequence.row]
        heappush(self._free, sequence.row)
        self._released.append(sequence.row)
        if sequence.decoding:
            self._stale = True
        else:
            self.prefilling.remove(sequence)
        sequence.row = sequence.slot = sequence.inflight = 0
        sequence.decoding = False
        sequence.epoch += 1

    def end_prefill(self, sequence: Sequence) -> None:
        """All of `tokens` are planned. If the next token is being sampled, the row decodes from the next step on."""
        sequence.decoding = True
        self.prefilling.remove(sequence)
        self._stale = True

    def last_planned(self) -> None:
        """A decoding row's last token is being sampled: it leaves the decoding rows."""
        self._stale = True

    def decode(self) -> list[tuple[Sequence, int]]:
        """(sequence, epoch) of the rows that can decode, sorted by slot; the same list object until they change."""
        if self._stale:
            ready = [s for s in self.running.values() if s.decoding and s.computed + 1 < s.limit]
            ready.sort(key=_slot)
            self._decode = [(sequence, sequence.epoch) for sequence in ready]
            self._stale = False
        return self._decode

    def victims(self) -> list[Sequence]:
        """Running sequences in the order in which they lose their blocks: lowest priority first, then the youngest."""
        youngest_first = sorted(self.running.values(), key=_age, reverse=True)
        return sorted(youngest_first, key=_priority)

    @property
    def any_released(self) -> bool:
        return bool(self._released)

    def take_released(self) -> list[int]:
        """Rows released since the last call."""
        taken, self._released = self._released, []
        return taken

    def release_again(self, rows: set[int]) -> None:
        """The plan that released `rows` was lost."""
        self._released = sorted((rows | set(self._released)) - self.running.keys())

    def check(self) -> None:
        """Assert every invariant."""
        rows = sorted([*self.running, *self._free])
        assert rows == list(range(1, self._num_rows + 1)), "a row is lost or in two states"
        prefilling = [s for s in self.running.values() if not s.decoding]
        assert sorted(prefilling, key=_age) == self.prefilling
        assert all(sequence.row == row for row, sequence in self.running.items())
