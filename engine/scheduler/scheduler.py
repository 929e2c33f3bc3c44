"""Decides what each step computes. Pure Python: it sees lists and numbers, never the device.

There are no phases. Every sequence has tokens and a number of computed positions, and each step lets the latter catch
up with the former under a budget of tokens: first the rows that decode (one position each), then chunks of those that
have more to compute, first come, first served.

`plan` may be called once more before the result of the step before is committed (run-ahead of depth 1). What depends
on token ids, hashing of blocks and recomputing after preemption, therefore never touches a sequence with tokens in
flight; such a sequence is held back for one step first.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from operator import attrgetter
from typing import Literal

from engine.errors import AdapterTooLarge, ConfigError, InvalidRequest, LoraxError
from engine.messages import (
    AdapterImageRef,
    Admit,
    Chunk,
    EngineStats,
    FinishReason,
    Placement,
    Request,
    StepPlan,
    StepResult,
    TokenOutput,
    Update,
)
from engine.scheduler.blocks import BlockPool, extend_keys, root_key
from engine.scheduler.fairness import Rotation, Slots
from engine.scheduler.sequence import Sequence

CHUNK_TILE = 64  # positions; a chunk that does not reach the end stops at a multiple of this
HEADROOM = 32  # decode steps of the running sequences that an admission leaves blocks for

_turn = attrgetter("turn")
_age = attrgetter("age")


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What a step and a request may hold. Lengths are in tokens."""

    max_rows: int  # sequences that run at one time
    max_step_tokens: int
    max_input_length: int
    max_total_tokens: int
    adapter_cycle_time: float  # seconds

    def __post_init__(self) -> None:
        if self.max_step_tokens < self.max_rows:
            raise ConfigError(
                f"a step of {self.max_step_tokens} tokens cannot decode {self.max_rows} sequences",
                field="max_batch_prefill_tokens",
                hint="raise --max-batch-prefill-tokens or lower --max-batch-size",
            )


@dataclass(slots=True)
class _Draft:
    """The plan being made."""

    step: int
    budget: int  # tokens that the step can still take
    placements: list[Placement]
    admit: list[Admit] = field(default_factory=list)
    extend: list[tuple[int, list[int]]] = field(default_factory=list)
    chunks: list[tuple[Sequence, Chunk]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A launched step. Each sequence is noted with its epoch: if that has changed, its result is dropped."""

    plan: StepPlan
    decode: list[tuple[Sequence, int]]
    chunks: list[tuple[Sequence, int, Chunk]]


class Scheduler:
    """Owns the sequences, the rows and the KV blocks; shares the slot table with nobody."""

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
        self._rotation = Rotation(slots, limits.adapter_cycle_time)
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # in the order of `turn`
        self._running: dict[int, Sequence] = {}  # by row, in the order of admission
        self._prefilling: list[Sequence] = []  # running, more than one position to compute; by age
        self._free_rows = list(range(1, limits.max_rows + 1))  # a heap
        self._filling: set[bytes] = set()  # keys of blocks that steps in flight fill
        self._flights: deque[_Flight] = deque()
        self._step = 0
        self._decode: list[tuple[Sequence, int]] = []  # (sequence, epoch), sorted by slot
        self._decode_stale = False
        self._decode_rows: list[int] | None = (
            None  # of the last plan; None: the runner's are unknown
        )
        self._release: list[int] = []
        self._unplace: list[int] = []
        self._placements: list[Placement] = []
        self._recheck = False  # something happened that may let a waiting sequence go on
        self._updates: list[Update] = []
        self._withheld: dict[bytes, list[Update]] = {}  # by adapter that is being copied
        self._submitted = 0
        self._preemptions = 0
        self._step_tokens = 0
        self._prefix_hits = 0
        self._prefix_lookups = 0

    # -- requests

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest or AdapterTooLarge, and then nothing has changed."""
        self._validate(request)
        self._submitted += 1
        image = request.adapter
        limit = min(
            len(request.tokens) + request.max_new_tokens,
            self.limits.max_total_tokens,
            self.blocks.usable * self.blocks.block_size + 1,  # the last token needs no KV entry
        )
        sequence = Sequence(
            request=request,
            number=self._submitted,
            limit=limit,
            root=root_key(image.digest if image else None, request.cache_salt),
            waiting_since=self._clock(),
            tokens=list(request.tokens),
            prompt_logprobs=[] if request.sampling.prompt_logprobs else None,
        )
        self._know_keys(sequence, len(sequence.tokens))
        self._sequences[request.id] = sequence
        insort(self._waiting, sequence, key=_turn)
        self._recheck = True

    def cancel(self, id: str) -> None:
        """End a request if it is still open; its last update comes with the next commit or `take_updates`."""
        sequence = self._sequences.get(id)
        if sequence is not None:
            self._end(sequence, finish="cancelled")

    def fail(self, ids: Iterable[str] | None, error: LoraxError) -> None:
        """End the given requests with an error.

        None: the steps in flight are lost and will not be committed. Only the requests that took part in them end; what
        else their plans asked for (releases, placements) is asked for again, so the runner must take it twice. The
        device must have stopped working on the lost steps.
        """
        if ids is not None:
            for id in ids:
                if (sequence := self._sequences.get(id)) is not None:
                    self._end(sequence, error=error)
            return
        lost, self._flights = self._flights, deque()
        for flight in lost:
            for sequence, epoch in flight.decode:
                if sequence.epoch == epoch:
                    self._end(sequence, error=error)
            for sequence, epoch, _ in flight.chunks:
                if sequence.epoch == epoch:
                    self._end(sequence, error=error)
        released = {row for flight in lost for row in flight.plan.release}
        self._release = sorted((released | set(self._release)) - self._running.keys())
        self._placements = self.slots.placing()
        unplaced = {slot for flight in lost for slot in flight.plan.unplace}
        self._unplace = sorted(unplaced | {placement.slot for placement in self._placements})
        self._decode_rows = None
        self.slots.commit(self._step)
        self._recheck = True

    def preload(self, image: AdapterImageRef) -> None:
        """Place an adapter with the next plan and never evict it. For the start, before any request."""
        placement = self.slots.place(image, self._clock(), permanent=True)
        if placement is None:
            raise self._too_large(image)
        self._placements.append(placement)

    def take_updates(self) -> list[Update]:
        """Updates that came without a step: of cancelled and failed requests."""
        taken, self._updates = self._updates, []
        return taken

    def _validate(self, request: Request) -> None:
        limits, length = self.limits, len(request.tokens)
        room = self.blocks.usable * self.blocks.block_size
        if request.id in self._sequences:
            raise InvalidRequest(
                f"a request with id {request.id!r} is open", field="id", hint="use another id"
            )
        if not length:
            raise InvalidRequest(
                "the prompt is empty", field="inputs", hint="send at least one token"
            )
        if request.max_new_tokens < 1:
            raise InvalidRequest(
                f"max_new_tokens is {request.max_new_tokens}",
                field="max_new_tokens",
                hint="ask for at least one token",
            )
        for most, what, remedy in (
            (limits.max_input_length, "a prompt may have", "raise --max-input-length"),
            (limits.max_total_tokens - 1, "leave room for output", "raise --max-total-tokens"),
            (room, "fit into the KV cache", "raise --cuda-memory-fraction or --cpu-memory-gb"),
        ):
            if length > most:
                raise InvalidRequest(
                    f"the prompt has {length} tokens, more than the {most} that {what}",
                    field="inputs",
                    hint=f"shorten the prompt, or {remedy}",
                )
        if request.adapter is not None and not self.slots.fits(request.adapter):
            raise self._too_large(request.adapter)

    def _too_large(self, image: AdapterImageRef) -> AdapterTooLarge:
        return AdapterTooLarge(
            f"adapter {image.name or image.digest.hex()} needs {image.data_bytes} bytes; beside preloaded adapters, "
            f"the arena of {self.slots.arena_bytes} bytes has no such room or no slot",
            field="adapter_id",
            hint="raise --adapter-memory-fraction or --max-active-adapters, or preload fewer",
        )

    # -- planning

    def plan(self) -> StepPlan | None:
        """The next step; None if there is nothing to do before another event (a request, a commit)."""
        now = self._clock()
        draft = _Draft(self._step + 1, self.limits.max_step_tokens, self._placements)
        held = self._pause_overdue(now)
        decode = self._plan_decode(draft, held)
        self._plan_chunks(draft, held)
        if self._recheck or now >= self._rotation.next_due:
            self._admit_waiting(draft, now)
        return self._launch(draft, decode)

    def _plan_decode(self, draft: _Draft, held: set[Sequence]) -> list[tuple[Sequence, int]]:
        """Advance every decoding row by one position, with a further block where the last is full."""
        if self._decode_stale:
            self._rebuild_decode()
        decode = self._decode
        needy = [sequence for sequence, _ in decode if sequence.computed == sequence.capacity]
        if held:
            needy = [sequence for sequence in needy if sequence not in held]
        if len(needy) > self.blocks.available:
            needy = self._make_room(needy, held)
            self._rebuild_decode()
            decode = self._decode
        if held:
            decode = [entry for entry in decode if entry[0] not in held]
        for sequence in needy:
            self._grow(sequence, 1, draft)
        for sequence, _ in decode:
            sequence.inflight += 1
            sequence.computed += 1
            if sequence.computed + 1 == sequence.limit:
                self._decode_stale = True  # its last token is being sampled
        draft.budget -= len(decode)
        return decode

    def _rebuild_decode(self) -> None:
        rows = [s for s in self._running.values() if s.decoding and s.computed + 1 < s.limit]
        rows.sort(key=attrgetter("slot"))
        self._decode = [(sequence, sequence.epoch) for sequence in rows]
        self._decode_stale = False

    def _make_room(self, needy: list[Sequence], held: set[Sequence]) -> list[Sequence]:
        """Take blocks from the youngest until each of `needy` can have one; returns those that can.

        Paused sequences give first. A running sequence with tokens in flight cannot be preempted: it is held back, and
        so are the youngest of `needy` for this step. The next plan finds it without tokens in flight.
        """
        paused = sorted((s for s in self._waiting if s.blocks), key=_age, reverse=True)
        for victim in paused + sorted(self._running.values(), key=_age, reverse=True):
            if len(needy) <= self.blocks.available:
                break
            if victim.inflight:
                held.add(victim)
                break
            self._preempt(victim)
            if victim in needy:
                needy.remove(victim)
        needy = sorted(needy, key=_age)
        held.update(needy[self.blocks.available :])
        return [s for s in needy if s not in held]

    def _plan_chunks(self, draft: _Draft, held: set[Sequence]) -> None:
        for sequence in list(self._prefilling):
            if sequence not in held:
                count = self._chunk_size(sequence.computed, len(sequence.tokens), draft)
                if not count:
                    break
                self._compute_chunk(sequence, count, draft)

    def _chunk_size(self, start: int, end: int, draft: _Draft) -> int:
        """How many positions from `start` the step computes; 0: none, a later step has more room."""
        if end - start <= draft.budget:
            return end - start
        tile = min(self.blocks.block_size, CHUNK_TILE)
        aligned = (start + draft.budget) // tile * tile - start
        if aligned > 0:
            return aligned
        return 0 if draft.chunks else draft.budget  # a fragment only if there is no other chunk

    def _compute_chunk(self, sequence: Sequence, count: int, draft: _Draft) -> None:
        start, end = sequence.computed, sequence.computed + count
        size = self.blocks.block_size
        self._filling.update(sequence.keys[start // size : end // size])
        sequence.computed = end
        sample = end == len(sequence.tokens)
        if sample:
            sequence.inflight += 1
            sequence.decoding = True
            self._prefilling.remove(sequence)
            self._decode_stale = True
        wanted = sequence.prompt_logprobs is not None
        draft.chunks.append((sequence, Chunk(sequence.row, start, count, sample, wanted)))
        draft.budget -= count

    def _grow(self, sequence: Sequence, count: int, draft: _Draft) -> None:
        new = self.blocks.allocate(count)
        sequence.blocks += new
        sequence.capacity += count * self.blocks.block_size
        draft.extend.append((sequence.row, new))

    def _launch(self, draft: _Draft, decode: list[tuple[Sequence, int]]) -> StepPlan | None:
        """The draft as a plan, noted as in flight; None if it asks for nothing."""
        unplace = [*self._unplace, *self.slots.take_unplaced()]
        rows = [sequence.row for sequence, _ in decode]
        work = rows or draft.chunks
        if not (work or self._release or unplace or draft.placements) and (
            self._flights or not self.slots.placing()
        ):
            return None
        draft.chunks.sort(key=lambda entry: entry[0].slot)
        plan = StepPlan(
            step=draft.step,
            release=self._release,
            unplace=unplace,
            placements=draft.placements,
            admit=draft.admit,
            extend=draft.extend,
            decode=None if rows == self._decode_rows else rows,
            chunks=[chunk for _, chunk in draft.chunks],
        )
        self._step = draft.step
        self._decode_rows = rows
        self._release, self._unplace, self._placements = [], [], []
        chunks = [(sequence, sequence.epoch, chunk) for sequence, chunk in draft.chunks]
        self._flights.append(_Flight(plan, decode, chunks))
        return plan

    # -- admission

    def _admit_waiting(self, draft: _Draft, now: float) -> None:
        """Give rows to waiting sequences, and start the placements that they wait for.

        A sequence whose adapter is not resident is passed over. One that lacks a row, blocks or budget ends admission,
        so that nobody overtakes it for memory; placements go on behind it.
        """
        self._recheck = False
        keep = set(self._rotation.turns)  # adapters that earlier sequences wait for
        refused = inf  # the smallest image that found no room: larger ones need not try
        starving: list[Sequence] = []
        admitted: set[Sequence] = set()
        stopped = False
        for sequence in self._waiting:
            image, slot = sequence.adapter, 0
            if image is not None:
                digest = image.digest
                found = self.slots.slot_of(digest)
                if found is None and not self.slots.is_placing(digest):
                    may = image.data_bytes < refused or digest in self._rotation.turns
                    if not (may and self._place(image, keep, draft, now)):
                        refused = min(refused, image.data_bytes)
                        if not stopped:
                            starving.append(sequence)
                if found is not None and self._rotation.drains(digest, now):
                    continue
                keep.add(digest)
                if found is None:
                    continue
                slot = found
            if not stopped:
                outcome = self._try_admit(sequence, slot, draft, now)
                if outcome == "admitted":
                    admitted.add(sequence)
                stopped = outcome == "stopped"
        if admitted:
            self._waiting = [s for s in self._waiting if s not in admitted]
        self._rotation.give_turns(starving, now)

    def _place(self, image: AdapterImageRef, keep: set[bytes], draft: _Draft, now: float) -> bool:
        placement = self.slots.place(image, now, keep)
        if placement is None:
            return False
        draft.placements.append(placement)
        self._rotation.placed(image.digest)
        return True

    def _try_admit(
        self, sequence: Sequence, slot: int, draft: _Draft, now: float
    ) -> Literal["admitted", "deferred", "stopped"]:
        """Give the sequence a row, blocks for its known tokens and its first chunk, if all can be had."""
        if not self._free_rows:
            return "stopped"
        length = len(sequence.tokens)
        found = [] if sequence.blocks else self._find_prefix(sequence)
        if found is None:
            return "deferred"
        start = sequence.computed if sequence.blocks else len(found) * self.blocks.block_size
        count = self._chunk_size(start, length, draft)
        if not count:
            self._recheck = True  # only this step is full
            return "stopped"
        self.blocks.share(found)
        missing = self.blocks.blocks_for(length) - len(sequence.blocks) - len(found)
        if not self._reclaim(missing, sequence):
            self.blocks.free(found)
            return "stopped"
        sequence.blocks += found + self.blocks.allocate(missing)
        sequence.capacity = len(sequence.blocks) * self.blocks.block_size
        if found:
            sequence.computed = sequence.committed = start
            sequence.registered = len(found)
        self._take_row(sequence, slot, draft, now)
        self._compute_chunk(sequence, count, draft)
        return "admitted"

    def _find_prefix(self, sequence: Sequence) -> list[int] | None:
        """Cached blocks that the sequence can start with; None: its next one is just being computed for another.

        The last token is always computed, for its logits. Log-probabilities of the prompt need all of it computed.
        """
        if sequence.prompt_logprobs is not None:
            return []
        keys = sequence.keys[: (len(sequence.tokens) - 1) // self.blocks.block_size]
        found = self.blocks.match(keys)
        if len(found) < len(keys) and keys[len(found)] in self._filling:
            return None
        return found

    def _reclaim(self, missing: int, sequence: Sequence) -> bool:
        """Whether `missing` blocks are available, if need be by taking those of paused sequences.

        While others run, some blocks are left for them to grow into: an admission that has to be preempted right away
        helps nobody.
        """
        needed = missing + len(self._running) * HEADROOM // self.blocks.block_size
        if needed <= self.blocks.available:
            return True
        paused = [s for s in self._waiting if s.blocks and not s.row and s is not sequence]
        if needed > self.blocks.available + sum(len(s.blocks) for s in paused):
            return False
        for victim in sorted(paused, key=_age, reverse=True):
            self._forget_computed(victim)
            if needed <= self.blocks.available:
                return True
        return False

    def _take_row(self, sequence: Sequence, slot: int, draft: _Draft, now: float) -> None:
        sequence.row = heappop(self._free_rows)
        sequence.slot = slot
        sequence.preempted = False
        self._running[sequence.row] = sequence
        insort(self._prefilling, sequence, key=_age)
        if slot:
            self.slots.pin(slot)
            self._recheck |= self._rotation.left_waiting(sequence)
        if sequence.admitted is None:
            sequence.admitted = now
            sequence.cached_tokens = sequence.computed
            if sequence.prompt_logprobs is None and self.blocks.prefix_caching:
                self._prefix_lookups += sequence.prompt_length
                self._prefix_hits += sequence.cached_tokens
        draft.admit.append(
            Admit(
                row=sequence.row,
                slot=slot,
                tokens=list(sequence.tokens),
                prompt_length=sequence.prompt_length,
                computed=sequence.computed,
                blocks=list(sequence.blocks),
                sampling=sequence.request.sampling,
            )
        )

    # -- leaving a row

    def _leave_row(self, sequence: Sequence) -> None:
        """Row and slot become free; results of steps in flight for it will be dropped."""
        del self._running[sequence.row]
        heappush(self._free_rows, sequence.row)
        self._release.append(sequence.row)
        if sequence.slot:
            self.slots.unpin(sequence.slot, self._step)
        if sequence.decoding:
            self._decode_stale = True
        else:
            self._prefilling.remove(sequence)
        size = self.blocks.block_size
        unfinished = sequence.keys[sequence.committed // size : sequence.computed // size]
        self._filling.difference_update(unfinished)
        sequence.row = sequence.slot = sequence.inflight = 0
        sequence.decoding = False
        sequence.epoch += 1
        self._recheck = True

    def _wait_again(self, sequence: Sequence) -> None:
        sequence.waiting_since = self._clock()
        insort(self._waiting, sequence, key=_turn)

    def _preempt(self, sequence: Sequence) -> None:
        """Take the blocks of a sequence; if it was running, it waits in front of those that never ran."""
        if sequence.row:
            assert not sequence.inflight, "preempted with unknown tokens"
            self._leave_row(sequence)
            sequence.preempted = True
            self._wait_again(sequence)
        self._forget_computed(sequence)

    def _forget_computed(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.blocks)
        sequence.blocks = []
        sequence.capacity = sequence.computed = sequence.committed = sequence.registered = 0
        if sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs = []
        sequence.preemptions += 1
        self._preemptions += 1
        self._recheck = True

    def _pause_overdue(self, now: float) -> set[Sequence]:
        """Pause what uses an adapter that should have left; what has work in flight is held back until it is done."""
        held: set[Sequence] = set()
        if not self._rotation.turns or not (overdue := self._rotation.overdue(now)):
            return held
        for sequence in list(self._running.values()):
            image = sequence.adapter
            if image is None or image.digest not in overdue:
                continue
            if sequence.committed < sequence.computed:
                held.add(sequence)
            else:
                self._leave_row(sequence)
                self._wait_again(sequence)
        return held

    def _end(
        self,
        sequence: Sequence,
        output: TokenOutput | None = None,
        finish: FinishReason | None = None,
        error: LoraxError | None = None,
    ) -> None:
        """Close the request with its last update; everything it held is free for the next plan."""
        if sequence.row:
            self._leave_row(sequence)
        else:
            self._waiting.remove(sequence)
            self._rotation.left_waiting(sequence)
            self._recheck = True
        self.blocks.free(sequence.blocks)
        sequence.blocks = []
        sequence.epoch += 1
        del self._sequences[sequence.request.id]
        update = self._update(sequence, output, finish, error)
        image = sequence.adapter
        if image is not None and self.slots.is_placing(image.digest):
            # The copy reads the host image, which the front may give up once the request has ended.
            self._withheld.setdefault(image.digest, []).append(update)
        else:
            self._updates.append(update)

    # -- results

    def commit(self, result: StepResult) -> list[Update]:
        """Take in the result of the oldest step in flight; returns what the requests learn."""
        flight = self._flights.popleft()
        assert flight.plan.step == result.step, "results come in the order of the plans"
        outputs = iter(result.outputs)
        size = self.blocks.block_size
        for (sequence, epoch), output in zip(flight.decode, outputs, strict=False):
            if sequence.epoch == epoch:
                sequence.committed += 1
                if not sequence.committed % size:
                    self._register(sequence)
                self._take_token(sequence, output)
        self._step_tokens += len(flight.decode)
        for index, (sequence, epoch, chunk) in enumerate(flight.chunks):
            self._step_tokens += chunk.count
            sampled = next(outputs) if chunk.sample else None
            if sequence.epoch != epoch:
                continue
            sequence.committed += chunk.count
            self._register(sequence)
            self._recheck = True  # others may have waited for these blocks
            if chunk.prompt_logprobs and sequence.prompt_logprobs is not None:
                sequence.prompt_logprobs += result.prompt_logprobs.get(index, [])
                del sequence.prompt_logprobs[sequence.prompt_length - 1 :]
            if sampled is not None:
                self._take_token(sequence, sampled)
        if self.slots.commit(result.step):
            self._recheck = True
        for slot in result.resident:
            digest = self.slots.mark_resident(slot)
            if digest is not None:
                self._updates += self._withheld.pop(digest, [])
            self._recheck = True
        return self.take_updates()

    def _take_token(self, sequence: Sequence, output: TokenOutput) -> None:
        sequence.inflight -= 1
        sequence.tokens.append(output.token)
        if output.token in sequence.request.eos_token_ids:
            self._end(sequence, output, finish="eos")
        elif len(sequence.tokens) == sequence.limit:
            self._end(sequence, output, finish="length")
        else:
            self._updates.append(self._update(sequence, output))

    def _update(
        self,
        sequence: Sequence,
        output: TokenOutput | None = None,
        finish: FinishReason | None = None,
        error: LoraxError | None = None,
    ) -> Update:
        admitted = None
        if not sequence.announced:
            admitted = sequence.admitted
            sequence.announced = admitted is not None
        prompt_logprobs = None
        if output is not None and sequence.prompt_logprobs is not None:
            prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        return Update(
            sequence.request.id,
            [output] if output is not None else [],
            finish,
            error.to_wire() if error is not None else None,
            sequence.usage() if finish is not None else None,
            admitted,
            prompt_logprobs,
        )

    def _know_keys(self, sequence: Sequence, positions: int) -> None:
        if self.blocks.prefix_caching:
            size = self.blocks.block_size
            extend_keys(sequence.keys, sequence.root, sequence.tokens, size, positions // size)

    def _register(self, sequence: Sequence) -> None:
        """Tell the prefix cache of the blocks that committed steps have filled."""
        self._know_keys(sequence, sequence.committed)
        full = min(sequence.committed // self.blocks.block_size, len(sequence.keys))
        for index in range(sequence.registered, full):
            self.blocks.register(sequence.blocks[index], sequence.keys[index])
            self._filling.discard(sequence.keys[index])
        sequence.registered = full

    # -- views

    @property
    def num_open(self) -> int:
        """Requests that have not got their last update yet."""
        return len(self._sequences) + sum(map(len, self._withheld.values()))

    @property
    def has_work(self) -> bool:
        """Whether a plan or a commit may still be needed: open requests, updates not taken, copies under way."""
        return bool(self.num_open or self._updates or self._placements or self.slots.placing())

    def stats(self) -> EngineStats:
        return EngineStats(
            waiting=len(self._waiting),
            running=len(self._running),
            rows=self.limits.max_rows,
            free_blocks=self.blocks.available,
            total_blocks=self.blocks.usable,
            cached_blocks=self.blocks.num_keys,
            steps=self._step,
            step_tokens=self._step_tokens,
            preemptions=self._preemptions,
            prefix_hits=self._prefix_hits,
            prefix_lookups=self._prefix_lookups,
            resident=self.slots.residents(),
            arena_bytes=self.slots.arena_bytes,
            arena_used=self.slots.used_bytes,
            placements=self.slots.num_placements,
            evictions=self.slots.num_evictions,
        )

    def check(self) -> None:
        """Assert every invariant, of the pool and the slot table too."""
        everyone = list(self._sequences.values())
        self.blocks.check([sequence.blocks for sequence in everyone])
        self.slots.check()
        self._rotation.check()
        rows = sorted([*self._running, *self._free_rows])
        assert rows == list(range(1, self.limits.max_rows + 1)), "a row is lost or in two states"
        waiting = [sequence for sequence in everyone if not sequence.row]
        assert sorted(waiting, key=_turn) == self._waiting, "the queue is out of order"
        prefilling = [s for s in self._running.values() if not s.decoding]
        assert sorted(prefilling, key=_age) == self._prefilling
        pins: dict[int, int] = {}
        filling: set[bytes] = set()
        size = self.blocks.block_size
        for sequence in everyone:
            assert sequence.capacity == len(sequence.blocks) * size
            assert sequence.computed <= sequence.capacity, "computes beyond its blocks"
            length = len(sequence.tokens) + sequence.inflight
            assert sequence.committed <= sequence.computed <= length <= sequence.limit
            assert sequence.registered == min(sequence.committed // size, len(sequence.keys))
            if sequence.decoding:
                assert sequence.computed == length - 1, "decodes with more than one to compute"
            if sequence.row:
                assert self._running[sequence.row] is sequence and sequence.blocks
                filling.update(sequence.keys[sequence.registered : sequence.computed // size])
                if sequence.slot:
                    pins[sequence.slot] = pins.get(sequence.slot, 0) + 1
            else:
                assert not sequence.inflight and not sequence.slot and not sequence.decoding
                assert sequence.committed == sequence.computed
        assert self._filling <= filling, "a block is awaited that nobody computes"
        for _, digest, _ in self.slots.residents():
            slot = self.slots.slot_of(digest)
            assert slot is not None and self.slots.pins(slot) == pins.pop(slot, 0)
        assert not pins, "a sequence runs in a slot that holds no adapter"
