"""Builds a plan, and keeps it as a step in flight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.messages import NOTHING, SCORES, TOKEN, Admit, Chunk, Placement, StepPlan
from engine.scheduler.rows import Rows
from engine.scheduler.sequence import Sequence
from engine.scheduler.tables import BlockTables

CHUNK_TILE = 64  # positions; a chunk that does not reach the end stops at a multiple of this


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step. Each sequence has its epoch at launch: if the epoch has changed, the result is dropped."""

    plan: StepPlan
    decode: list[tuple[Sequence, int]]
    chunks: list[tuple[Sequence, int, Chunk]]

    @property
    def num_tokens(self) -> int:
        return len(self.decode) + sum(chunk.count for _, _, chunk in self.chunks)

    def sampled(self) -> list[Sequence | None]:
        """The sequences whose tokens are sampled, in the order of the plan; None: it has left its row."""
        rows = [*self.decode, *((s, epoch) for s, epoch, chunk in self.chunks if chunk.sample)]
        return [sequence if sequence.epoch == epoch else None for sequence, epoch in rows]

    def alive(self) -> Iterator[Sequence]:
        """The sequences that still hold the row in which they were planned."""
        for sequence, epoch in (*self.decode, *(entry[:2] for entry in self.chunks)):
            if sequence.epoch == epoch:
                yield sequence


@dataclass(slots=True)
class PlanBuilder:
    """Collects the parts of one plan. Budgets are the tokens that the step can still take."""

    budget: int
    scored_budget: int  # the part of `budget` for prompts that need log-probabilities
    rows: Rows
    tables: BlockTables
    placements: list[Placement] = field(default_factory=list)
    admit: list[Admit] = field(default_factory=list)
    extend: list[tuple[int, list[int]]] = field(default_factory=list)
    chunks: list[tuple[Sequence, Chunk]] = field(default_factory=list)
    left_over: bool = False  # prompt tokens that `budget` had no room for

    def grow(self, sequence: Sequence) -> None:
        """One more block for a running sequence."""
        blocks = self.tables.pool.allocate(1)
        self.tables.append(sequence, blocks)
        self.extend.append((sequence.row, blocks))

    def chunk_size(self, sequence: Sequence, start: int) -> int:
        """Tokens of the sequence, from `start` on, that the step computes; 0: none, a later step has more room."""
        end, room = len(sequence.tokens), self._room(sequence)
        if end - start <= room:
            return end - start
        self.left_over |= not self.lacks_scored_budget(sequence)
        tile = min(self.tables.pool.block_size, CHUNK_TILE)
        aligned = (start + room) // tile * tile - start
        if aligned > 0:
            return aligned
        return 0 if self.chunks else room  # a fragment only if there is no other chunk

    def lacks_scored_budget(self, sequence: Sequence) -> bool:
        """Whether the scored budget limits the sequence, so that others may still be admitted."""
        return self._room(sequence) < self.budget

    def _room(self, sequence: Sequence) -> int:
        """Tokens of the sequence that the step can still take."""
        if sequence.prompt_logprobs is None:
            return self.budget
        return min(self.budget, self.scored_budget)

    def compute(self, sequence: Sequence, count: int) -> None:
        """Compute the next `count` positions of a running sequence; sample after its last token."""
        start, end = sequence.computed, sequence.computed + count
        self.tables.fill(sequence, start, end)
        sequence.computed = end
        last = end == len(sequence.tokens)
        wants = sequence.kind.wants(last)
        if last:
            sequence.inflight += bool(wants & TOKEN)
            self.rows.end_prefill(sequence)
        scores = sequence.prompt_logprobs is not None
        wants |= SCORES if scores else NOTHING
        self.chunks.append((sequence, Chunk(sequence.row, start, count, wants)))
        self.budget -= count
        self.scored_budget -= count if scores else 0

    def launch(
        self, step: int, unplace: list[int], decode: list[tuple[Sequence, int]], same: bool
    ) -> Flight:
        """The finished plan. `same`: it decodes the same rows as the previous plan."""
        self.chunks.sort(key=lambda entry: entry[0].slot)
        plan = StepPlan(
            step=step,
            release=self.rows.take_released(),
            unplace=unplace,
            placements=self.placements,
            admit=self.admit,
            extend=self.extend,
            decode=None if same else [sequence.row for sequence, _ in decode],
            chunks=[chunk for _, chunk in self.chunks],
        )
        return Flight(plan, decode, [(s, s.epoch, chunk) for s, chunk in self.chunks])
