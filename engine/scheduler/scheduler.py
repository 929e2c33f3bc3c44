"""Plans the steps and commits their results. Pure Python: it sees lists and numbers, never the device.

There are no phases. Each step computes more positions of the sequences, under a budget of tokens: first the rows that
decode (one position each), then chunks of the others, in the order of their turns.

`plan` may be called once more before the result of the previous step is committed (run-ahead of depth 1). Sequences
end, and blocks of output get keys, at commit only: both need token ids. A sequence that left its row gets no results.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable

from engine.errors import InvalidRequest, LoraxError
from engine.messages import (
    AdapterImageRef,
    EngineStats,
    FinishReason,
    Placement,
    Request,
    StepPlan,
    StepResult,
    TokenOutput,
    Update,
)
from engine.scheduler.admission import Admission
from engine.scheduler.blocks import BlockPool, root_key
from engine.scheduler.budget import StepBudget
from engine.scheduler.fairness import Rotation, Slots
from engine.scheduler.limits import SchedulerLimits, adapter_too_large, not_finite
from engine.scheduler.outbox import Outbox
from engine.scheduler.plan_builder import Flight, PlanBuilder
from engine.scheduler.queue import Queue
from engine.scheduler.rows import Rows
from engine.scheduler.sequence import Sequence
from engine.scheduler.served import Served
from engine.scheduler.tables import BlockTables


class Scheduler:
    """Owns the sequences, the rows and the KV blocks. Only it may change the pool and the slot table."""

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockPool,
        slots: Slots,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.blocks = blocks
        self.slots = slots
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}
        self._rows = Rows(limits.max_rows)
        self._tables = BlockTables(blocks)
        self._rotation = Rotation(slots, limits.adapter_cycle_time)
        self._served = Served(clock)
        self._queue = Queue()
        self._admission = Admission(self._queue, self._rows, self._tables, slots, self._rotation)
        self._outbox = Outbox(slots)
        self.flights: deque[Flight] = deque()  # launched steps, the oldest first
        self._budget = StepBudget(limits.max_step_tokens)
        self._step = 0  # the last planned one
        self._decode_rows: list[int] | None = None  # of that step; None: list them again
        self._unplace: list[int] = []  # for the next plan
        self._placements: list[Placement] = []  # for the next plan
        self._submitted = 0

    # -- requests

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest or AdapterTooLarge and then changes nothing."""
        kv_positions = self.blocks.usable * self.blocks.block_size
        image = request.adapter
        if request.id in self._sequences:
            raise InvalidRequest(
                f"a request with id {request.id!r} is open", field="id", hint="use another id"
            )
        self.limits.validate(request, kv_positions)
        if image is not None and not self.slots.fits(image):
            raise adapter_too_large(image, self.slots.arena_bytes)
        self._submitted += 1
        sequence = Sequence(
            request=request,
            number=self._submitted,
            limit=self.limits.last_length(request, kv_positions),
            turn=self._served.opened(request),
            root=root_key(image.digest if image else None, request.cache_salt),
            tokens=list(request.tokens),
            prompt_logprobs=[] if request.sampling.prompt_logprobs else None,
        )
        self._tables.compute_keys(sequence, len(sequence.tokens))
        self._sequences[request.id] = sequence
        self._queue.opened(sequence)
        self._admission.add(sequence, self._clock())

    def cancel(self, id: str) -> None:
        """End a request if it is still open; its last update comes with the next commit or `take_updates`."""
        sequence = self._sequences.get(id)
        if sequence is not None:
            self._end(sequence, finish="cancelled")

    def fail(self, ids: Iterable[str] | None, error: LoraxError) -> None:
        """End the given requests with an error.

        None: the steps in flight are lost, and the device no longer works on them. Only the requests in them end. The
        next plan repeats their releases and placements, so the runner may get these twice.
        """
        if ids is not None:
            for id in ids:
                if (sequence := self._sequences.get(id)) is not None:
                    self._end(sequence, error=error)
            return
        lost, self.flights = self.flights, deque()
        for flight in lost:
            for sequence in flight.alive():
                self._end(sequence, error=error)
        self._resend(lost)

    def roll_back(self, error: LoraxError) -> list[str]:
        """Undo the steps in flight, which did not fit into the device's memory; later plans are smaller.

        Their sequences wait at the front of the queue and keep the positions that earlier steps computed. Sampling
        again gives the same tokens (see `_make_room`). A sequence alone in a step of one token ends with `error`.
        Returns the ids of the requests in the steps; none: no smaller step would help. The rest is as in `fail`.
        """
        lost, self.flights = self.flights, deque()
        involved = list(dict.fromkeys(s for flight in lost for s in flight.alive()))
        tokens = max((flight.num_tokens for flight in lost), default=0)
        if len(involved) == 1 and tokens == 1:
            self._end(involved[0], error=error)
            self._budget.restore()
        elif involved:
            for sequence in involved:
                self._leave_row(sequence)
                sequence.computed = sequence.committed
                sequence.preempted = True
                self._admission.add(sequence, self._clock())
            self._budget.did_not_fit(tokens)
        self._resend(lost)
        return [sequence.request.id for sequence in involved]

    def _resend(self, lost: Iterable[Flight]) -> None:
        """Repeat the releases and placements of lost plans in the next plan."""
        self._rows.release_again({row for flight in lost for row in flight.plan.release})
        self._placements = self.slots.placing()
        unplaced = {slot for flight in lost for slot in flight.plan.unplace}
        self._unplace = sorted(unplaced | {placement.slot for placement in self._placements})
        self._decode_rows = None
        self.slots.commit(self._step)
        self._admission.wake()

    def preload(self, image: AdapterImageRef) -> None:
        """Place an adapter with the next plan and never evict it. For the start, before any request."""
        placement = self.slots.place(image, self._clock(), permanent=True)
        if placement is None:
            raise adapter_too_large(image, self.slots.arena_bytes)
        self._placements.append(placement)

    def pin(self, digest: bytes, pinned: bool) -> None:
        """See `SlotTable.pin`. The adapter is placed when a request needs it."""
        (self.slots.pin if pinned else self.slots.unpin)(digest)

    def drop(self, digest: bytes) -> None:
        """See `SlotTable.drop`."""
        self.slots.drop(digest)
        self._admission.wake()

    def take_updates(self) -> list[Update]:
        """The updates of cancelled and failed requests, which need no step."""
        return self._outbox.take()

    # -- planning

    def plan(self) -> StepPlan | None:
        """The next step; None if there is nothing to do before the next request or commit."""
        now = self._clock()
        budget = self._budget.tokens
        scored = self.limits.scored_budget(budget)
        builder = PlanBuilder(budget, scored, self._rows, self._tables, self._placements)
        held = self._pause_overdue(now)
        decode = self._plan_decode(builder, held)
        if decode and (bounds := self.limits.chunk_tokens):
            prompts = self._admission.prompt_budget(len(decode), bounds, self._step, now)
            builder.budget = min(builder.budget, prompts)
        self._plan_chunks(builder, held)
        self._admission.admit(builder, now)
        self._unplace += self.slots.take_unplaced()
        work = decode or builder.chunks or self._rows.any_released or self._unplace
        if not work and not self._placements and (self.flights or not self.slots.num_placing):
            return None  # an empty step only serves to learn of finished copies
        self._step += 1
        if builder.left_over:
            self._admission.backlog.left_over(self._step, now)
        rows = [sequence.row for sequence, _ in decode]
        flight = builder.launch(self._step, self._unplace, decode, same=rows == self._decode_rows)
        self._decode_rows, self._unplace, self._placements = rows, [], []
        self.flights.append(flight)
        return flight.plan

    def _plan_decode(self, builder: PlanBuilder, held: set[Sequence]) -> list[tuple[Sequence, int]]:
        """Advance every decoding row by one position; add a block where the last one is full."""
        decode = self._rows.decode()
        growing = [sequence for sequence, _ in decode if sequence.computed == sequence.capacity]
        if held:
            growing = [sequence for sequence in growing if sequence not in held]
        if len(growing) > self.blocks.available:
            growing = self._make_room(growing)
            decode = self._rows.decode()
        if held:
            decode = [entry for entry in decode if entry[0] not in held]
        for sequence in growing:
            builder.grow(sequence)
        for sequence, _ in decode:
            sequence.inflight += 1
            sequence.computed += 1
            if sequence.computed + 1 == sequence.limit:
                self._rows.last_planned()
        builder.budget = max(builder.budget - len(decode), 0)
        return decode

    def _make_room(self, growing: list[Sequence]) -> list[Sequence]:
        """Take blocks from paused sequences, then from the youngest, until the rest of `growing` can have one each.

        Tokens in flight for a preempted sequence are dropped. Sampling them again gives the same tokens, because
        sampling is keyed by (seed, position). A sequence that runs alone fits, so the oldest always continues.
        """
        for victim in self._admission.paused() + self._rows.victims():
            if len(growing) <= self.blocks.available:
                break
            if victim.row:
                victim.preempted = True
                self._requeue(victim)
                self._tables.drop(victim)
            else:
                self._tables.drop_paused(victim)
            growing = [sequence for sequence in growing if sequence is not victim]
        return growing

    def _plan_chunks(self, builder: PlanBuilder, held: set[Sequence]) -> None:
        for sequence in list(self._rows.prefilling):
            if sequence in held:
                continue
            if count := builder.chunk_size(sequence, sequence.computed):
                builder.compute(sequence, count)
            elif not builder.lacks_scored_budget(sequence):
                break

    def _pause_overdue(self, now: float) -> set[Sequence]:
        """Pause the sequences of overdue adapters; returns those that wait for their steps in flight first."""
        held: set[Sequence] = set()
        if not self._rotation.turns or not (overdue := self._rotation.overdue(now)):
            return held
        for sequence in list(self._rows.running.values()):
            image = sequence.adapter
            if image is None or image.digest not in overdue or not sequence.pausable:
                continue
            if sequence.committed < sequence.computed:
                held.add(sequence)
            else:
                self._requeue(sequence)
        return held

    # -- leaving

    def _leave_row(self, sequence: Sequence) -> None:
        """Row and slot become free for the next plan."""
        if sequence.slot:
            self.slots.release(sequence.slot, self._step)
        self._tables.stop_filling(sequence)
        self._rows.leave(sequence)
        self._admission.wake()

    def _requeue(self, sequence: Sequence) -> None:
        self._leave_row(sequence)
        self._admission.add(sequence, self._clock())

    def _end(
        self,
        sequence: Sequence,
        output: TokenOutput | None = None,
        finish: FinishReason | None = None,
        error: LoraxError | None = None,
    ) -> None:
        """End the request with its last update; its row, slot and blocks are free for the next plan."""
        if sequence.row:
            self._leave_row(sequence)
        else:
            self._admission.remove(sequence)
        self.blocks.free(sequence.blocks)
        del self._sequences[sequence.request.id]
        self._served.closed(sequence.request)
        self._queue.closed(sequence)
        self._outbox.put_last(sequence, output, finish, error)

    # -- results

    def commit(self, result: StepResult) -> list[Update]:
        """Apply the result of the oldest step in flight; returns the updates of the requests."""
        flight = self.flights.popleft()
        assert flight.plan.step == result.step, "results come in the order of the plans"
        self._budget.fitted()
        self._served.add(flight.num_tokens)
        outputs = iter(result.outputs)
        for sequence, epoch in flight.decode:
            output = next(outputs)
            if sequence.epoch == epoch:
                sequence.committed += 1
                if not sequence.committed % self.blocks.block_size:
                    self._tables.register(sequence)
                self._take_token(sequence, output)
        for index, (sequence, epoch, chunk) in enumerate(flight.chunks):
            sampled = next(outputs) if chunk.sample else None
            if sequence.epoch != epoch:
                continue
            sequence.committed += chunk.count
            self._tables.register(sequence)
            self._admission.wake()  # others may have waited for these blocks
            if chunk.scores and sequence.prompt_logprobs is not None:
                sequence.prompt_logprobs += result.prompt_logprobs.get(index, [])
                sequence.prompt_tops += result.prompt_tops.get(index, [])
                del sequence.prompt_logprobs[sequence.prompt_length - 1 :]
                del sequence.prompt_tops[sequence.prompt_length - 1 :]
            if chunk.pooled:
                sequence.add_pooled(result.pooled[index])
            if sampled is not None:
                self._take_token(sequence, sampled)
            elif sequence.committed == sequence.limit:
                self._end(sequence, finish="pooled")
        if self.slots.commit(result.step):
            self._admission.wake()
        for slot in result.resident:
            self._outbox.copied(self.slots.mark_resident(slot, self._clock()))
            self._admission.wake()
        return self._outbox.take()

    def _take_token(self, sequence: Sequence, output: TokenOutput) -> None:
        sequence.inflight -= 1
        if output.token < 0:
            self._end(sequence, error=not_finite(sequence.adapter))
            return
        sequence.tokens.append(output.token)
        if output.token in sequence.request.eos_token_ids:
            self._end(sequence, output, finish="eos")
        elif len(sequence.tokens) == sequence.limit:
            self._end(sequence, output, finish="length")
        else:
            self._outbox.put(sequence, output)

    @property
    def has_work(self) -> bool:
        """Whether a plan or a commit may still be needed: for open requests, waiting updates, copies under way."""
        return bool(self._sequences or len(self._outbox) or self.slots.num_placing)

    def stats(self) -> EngineStats:
        return EngineStats(
            waiting=len(self._queue),
            running=len(self._rows.running),
            rows=self.limits.max_rows,
            free_blocks=self.blocks.available,
            total_blocks=self.blocks.usable,
            cached_blocks=self.blocks.num_keys,
            steps=self._step,
            step_tokens=self._served.tokens,
            preemptions=self._tables.num_drops,
            prefix_hits=self._admission.prefix_hits,
            prefix_lookups=self._admission.prefix_lookups,
            resident=self.slots.residents(),
            arena_bytes=self.slots.arena_bytes,
            arena_used=self.slots.used_bytes,
            in_use=self.slots.num_in_use,
            placements=self.slots.num_placements,
            placed=self.slots.num_placed,
            place_seconds=list(self.slots.place_seconds),
            evictions=self.slots.num_evictions,
        )

    def check(self) -> None:
        """Assert every invariant, of the pool and the slot table too."""
        sequences = list(self._sequences.values())
        self._tables.check(sequences)
        self.slots.check()
        self._rotation.check()
        self._rows.check()
        self._admission.check()
        waiting, running = list(self._queue), self._rows.running.values()
        assert Counter([*waiting, *running]) == Counter(sequences)
        pins = Counter(sequence.slot for sequence in sequences if sequence.slot)
        for sequence in sequences:
            sequence.check()
            assert sequence.inflight <= len(self.flights)
        for _, digest, _ in self.slots.residents():
            slot = self.slots.slot_of(digest)
            assert slot is not None and self.slots.num_users(slot) == pins.pop(slot, 0)
        assert not pins, "a sequence runs in a slot that holds no adapter"
