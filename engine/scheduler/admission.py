"""The admission of waiting sequences into steps.

A sequence whose adapter is not resident is skipped, never waited for; its placement starts if there is room. A
sequence that lacks a row, blocks or token budget ends admission, so that no later one overtakes it for memory. A
sequence that lacks only scored tokens is skipped; it gets them after the prompts before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from math import inf
from operator import attrgetter
from typing import Literal

from engine.messages import AdapterImageRef, Admit
from engine.scheduler.backlog import Backlog
from engine.scheduler.fairness import Rotation, Slots
from engine.scheduler.plan_builder import PlanBuilder
from engine.scheduler.queue import Outcome, Queue
from engine.scheduler.rows import Rows
from engine.scheduler.sequence import Sequence
from engine.scheduler.tables import BlockTables

HEADROOM = 32  # decode steps: an admission leaves blocks for these to the running sequences
MAX_QUEUE_SCAN = 256  # adapters that wait that the prompt budget looks at
MAX_PLACING = 32  # copies under way at one time; more would only evict earlier

_age = attrgetter("age")
_waiting_since = attrgetter("waiting_since")


class Admission:
    """Moves sequences from the queue into rows. `admit` looks at it only after `wake`, or when a turn is due."""

    def __init__(
        self,
        queue: Queue,
        rows: Rows,
        tables: BlockTables,
        slots: Slots,
        rotation: Rotation,
    ) -> None:
        self.prefix_hits = 0  # prompt tokens found in the cache, in total
        self.prefix_lookups = 0  # prompt tokens looked up, in total
        self._queue = queue
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
        self._queue.push(sequence)
        self.wake()

    def remove(self, sequence: Sequence) -> None:
        self._queue.remove(sequence)
        self._rotation.end_turn(sequence)
        self.wake()

    def prompt_budget(self, decoding: int, bounds: list[int], last: int, now: float) -> int:
        """Prompt tokens of the step after step `last`, with `decoding` rows: `bounds[decoding]` or more.

        It grows in proportion when more requests wait for their first token, and only for room, than rows decode, and
        with the time that prompts have lacked room. Only the first MAX_QUEUE_SCAN adapters that wait count.
        """
        ready = len(self._queue.preempted) + sum(
            len(flow.waiting)
            for flow in islice(self._queue.flows(), MAX_QUEUE_SCAN)
            if not flow.digest or self._slots.slot_of(flow.digest) is not None
        )
        num_prompts, bound = len(self._rows.prefilling) + ready, bounds[decoding]
        growth = self.backlog.growth(last, now)
        return max(int(bound * growth), bound * num_prompts // decoding)

    def paused(self) -> list[Sequence]:
        """Waiting sequences that keep their blocks, the youngest first."""
        return sorted((s for s in self._queue if s.blocks and not s.row), key=_age, reverse=True)

    def admit(self, builder: PlanBuilder, now: float) -> None:
        """Admit the sequences that the plan has room for; start placements for the others."""
        if not self._awake and now < self._rotation.next_due:
            return
        self._awake = False
        keep, full = set(self._rotation.turns), not self._rows.any_free
        visit = _Visit(self, builder, now, keep, stopped=full)
        if self._queue:
            for sequence in self._rows.running.values():
                sequence.flow.charge(sequence, sequence.computed)
            self._queue.serve(visit.offer, now)
        self._rotation.rotate(visit.starving, now)

    def _try(
        self, sequence: Sequence, slot: int, builder: PlanBuilder, now: float
    ) -> Literal["served", "next", "stopped"]:
        """Give the sequence a row, blocks for its tokens and its first chunk, if all of them are available."""
        found = [] if sequence.blocks else self._tables.find_prefix(sequence)
        if found is None:
            return "next"
        start = sequence.computed or len(found) * self._pool.block_size
        count = builder.chunk_size(sequence, start)
        if not count:
            self.wake()  # only this step is full
            return "next" if builder.lacks_scored_budget(sequence) else "stopped"
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
        return "served"

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
        if slot:
            self._slots.acquire(slot)
            self._rotation.end_turn(sequence)
        if sequence.admitted is None:
            sequence.admitted = now
            sequence.cached_tokens = sequence.charged = sequence.computed
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
        self._queue.check()
        for sequence in self._queue:
            assert not sequence.row and not sequence.slot
            assert not sequence.inflight and not sequence.decoding
            assert sequence.committed == sequence.computed


@dataclass(slots=True)
class _Visit:
    """One pass over the queue."""

    admission: Admission
    builder: PlanBuilder
    now: float
    keep: set[bytes]  # digests of adapters that earlier sequences wait for
    refused: float = (
        inf  # bytes of the smallest image that found no room: larger ones are not tried
    )
    stopped: bool = False  # a sequence lacked room, so no later one is admitted
    starving: list[Sequence] = field(default_factory=list)  # one per adapter that found no room

    def offer(self, sequence: Sequence) -> Outcome:
        """See `Queue.serve`."""
        slot, image = 0, sequence.adapter
        if image is not None:
            found = self.admission._slots.slot_of(image.digest)
            if found is None:
                return self._place(sequence, image)
            if self.admission._rotation.is_draining(image.digest, self.now):
                return "next adapter"
            self.keep.add(image.digest)
            slot = found
        if self.stopped:
            return "next adapter"
        outcome = self.admission._try(sequence, slot, self.builder, self.now)
        self.stopped = outcome == "stopped" or not self.admission._rows.any_free
        return "next adapter" if outcome == "stopped" else outcome

    def _place(self, sequence: Sequence, image: AdapterImageRef) -> Outcome:
        """Starts the placement of an adapter that is not on the device, if there is room."""
        slots, rotation = self.admission._slots, self.admission._rotation
        if slots.num_placing < MAX_PLACING and not slots.is_placing(image.digest):
            may = image.data_bytes < self.refused or image.digest in rotation.turns
            placement = slots.place(image, self.now, self.keep) if may else None
            if placement is not None:
                self.builder.placements.append(placement)
                rotation.placed(image.digest)
            elif self.stopped:
                return "end"  # no later sequence can be admitted, and no adapter placed
            else:
                self.refused = min(self.refused, image.data_bytes)
                self.starving.append(_longest_waiting(sequence))
        self.keep.add(image.digest)
        return "next adapter"


def _longest_waiting(sequence: Sequence) -> Sequence:
    """Of those for its adapter."""
    return min((sequence, *sequence.flow.waiting), key=_waiting_since)
