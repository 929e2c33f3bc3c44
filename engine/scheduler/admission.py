"""The queue of waiting sequences, and their admission into steps.

A sequence whose adapter is not resident is skipped, never waited for; its placement starts if there is room. A
sequence that lacks a row, blocks or token budget ends admission, so that no later one overtakes it for memory. A
sequence that lacks only scored tokens is skipped; it gets them after the prompts before it.
"""

from __future__ import annotations

from bisect import insort
from itertools import islice
from math import inf
from operator import attrgetter
from typing import Literal

from engine.messages import Admit
from engine.scheduler.backlog import Backlog
from engine.scheduler.fairness import Rotation, Slots
from engine.scheduler.plan_builder import PlanBuilder
from engine.scheduler.rows import Rows
from engine.scheduler.sequence import Sequence
from engine.scheduler.tables import BlockTables

HEADROOM = 32  # decode steps: an admission leaves blocks for these to the running sequences
MAX_QUEUE_SCAN = 256  # waiting sequences that the prompt budget looks at
MAX_PLACING = 32  # copies under way at one time; more would only evict earlier

_age = attrgetter("age")
_queue_order = attrgetter("queue_order")


class Admission:
    """Owns the queue. `admit` reads it only after `wake`, or when a starving sequence's turn is due."""

    def __init__(self, rows: Rows, tables: BlockTables, slots: Slots, rotation: Rotation) -> None:
        self.waiting: list[Sequence] = []  # in `queue_order`
        self.prefix_hits = 0  # prompt tokens found in the cache, in total
        self.prefix_lookups = 0  # prompt tokens looked up, in total
        self._rows = rows
        self._tables = tables
        self._pool = tables.pool
        self._slots = slots
        self._rotation = rotation
        self._awake = False
        self.backlog = Backlog()

    def wake(self) -> None:
        """Call it when a waiting sequence may have become admissible."""
        self._awake = True

    def add(self, sequence: Sequence, now: float) -> None:
        sequence.waiting_since = now
        insort(self.waiting, sequence, key=_queue_order)
        self.wake()

    def remove(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self._rotation.end_turn(sequence)
        self.wake()

    def prompt_budget(self, decoding: int, bounds: list[int], last: int, now: float) -> int:
        """Prompt tokens of the step after step `last`, with `decoding` rows: `bounds[decoding]` or more.

        It grows in proportion when more requests wait for their first token, and only for room, than rows decode, and
        with the time that prompts have lacked room. Only the first MAX_QUEUE_SCAN waiting sequences count.
        """
        ready = sum(
            sequence.adapter is None or self._slots.slot_of(sequence.adapter.digest) is not None
            for sequence in islice(self.waiting, MAX_QUEUE_SCAN)
        )
        num_prompts, bound = len(self._rows.prefilling) + ready, bounds[decoding]
        growth = self.backlog.growth(last, now)
        return max(int(bound * growth), bound * num_prompts // decoding)

    def paused(self) -> list[Sequence]:
        """Waiting sequences that keep their blocks, the youngest first."""
        return sorted((s for s in self.waiting if s.blocks and not s.row), key=_age, reverse=True)

    def admit(self, builder: PlanBuilder, now: float) -> None:
        """Admit the sequences that the plan has room for; start placements for the others."""
        if not self._awake and now < self._rotation.next_due:
            return
        self._awake = False
        keep = set(self._rotation.turns)  # adapters that earlier sequences wait for
        refused = inf  # bytes of the smallest image that found no room: larger ones are not tried
        starving: list[Sequence] = []
        stopped = False
        for sequence in self.waiting:
            image, slot = sequence.adapter, 0
            if image is not None:
                digest = image.digest
                found = self._slots.slot_of(digest)
                if found is None:
                    if self._slots.num_placing < MAX_PLACING and not self._slots.is_placing(digest):
                        may = image.data_bytes < refused or digest in self._rotation.turns
                        placement = self._slots.place(image, now, keep) if may else None
                        if placement is not None:
                            builder.placements.append(placement)
                            self._rotation.placed(digest)
                        elif stopped:
                            break  # no later sequence can be admitted, and no adapter placed
                        else:
                            refused = min(refused, image.data_bytes)
                            starving.append(sequence)
                    keep.add(digest)
                    continue
                if self._rotation.is_draining(digest, now):
                    continue
                keep.add(digest)
                slot = found
            if not stopped:
                stopped = self._try(sequence, slot, builder, now) == "stopped"
        if builder.admit:
            self.waiting = [sequence for sequence in self.waiting if not sequence.row]
        self._rotation.rotate(starving, now)

    def _try(
        self, sequence: Sequence, slot: int, builder: PlanBuilder, now: float
    ) -> Literal["admitted", "deferred", "stopped"]:
        """Give the sequence a row, blocks for its tokens and its first chunk, if all of them are available."""
        if not self._rows.any_free:
            return "stopped"
        found = [] if sequence.blocks else self._tables.find_prefix(sequence)
        if found is None:
            return "deferred"
        start = sequence.computed or len(found) * self._pool.block_size
        count = builder.chunk_size(sequence, start)
        if not count:
            self.wake()  # only this step is full
            return "deferred" if builder.lacks_scored_budget(sequence) else "stopped"
        self._pool.share(found)
        missing = self._pool.blocks_for(len(sequence.tokens)) - len(sequence.blocks) - len(found)
        if not self._reclaim(missing, sequence):
            self._pool.free(found)
            return "stopped"
        if not sequence.blocks:
            self._tables.start_after_prefix(sequence, found)
        self._tables.append(sequence, found + self._pool.allocate(missing))
        self._take_row(sequence, slot, builder, now)
        builder.compute(sequence, count)
        return "admitted"

    def _reclaim(self, missing: int, sequence: Sequence) -> bool:
        """Whether `missing` blocks are available. Takes the blocks of paused sequences if there are too few.

        While others run, some blocks are left for them to grow into: an admission that is preempted right away is
        wasted work.
        """
        needed = missing + len(self._rows.running) * HEADROOM // self._pool.block_size
        if needed <= self._pool.available:
            return True
        paused = [other for other in self.paused() if other is not sequence]
        if needed > self._pool.available + sum(len(other.blocks) for other in paused):
            return False
        for victim in paused:
            self._tables.drop_paused(victim)
            if needed <= self._pool.available:
                return True
        return False  # the paused sequences shared blocks with others

    def _take_row(self, sequence: Sequence, slot: int, builder: PlanBuilder, now: float) -> None:
        self._rows.take(sequence, slot)
        sequence.preempted = False
        if slot:
            self._slots.acquire(slot)
            self._rotation.end_turn(sequence)
        if sequence.admitted is None:
            sequence.admitted = now
            sequence.cached_tokens = sequence.computed
            if not sequence.needs_whole_prompt and self._pool.prefix_caching:
                self.prefix_lookups += sequence.prompt_length
                self.prefix_hits += sequence.cached_tokens
        builder.admit.append(
            Admit(
                row=sequence.row,
                slot=slot,
                tokens=list(sequence.tokens),
                prompt_length=sequence.prompt_length,
                computed=sequence.computed,
                blocks=list(sequence.blocks),
                sampling=sequence.request.sampling,
                kind=sequence.request.kind,
            )
        )

    def check(self) -> None:
        """Assert every invariant."""
        assert sorted(self.waiting, key=_queue_order) == self.waiting, "the queue is out of order"
        for sequence in self.waiting:
            assert not sequence.row and not sequence.slot
            assert not sequence.inflight and not sequence.decoding
            assert sequence.committed == sequence.computed
