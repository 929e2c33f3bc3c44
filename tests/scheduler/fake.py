"""A runner in pure Python that keeps its tables from plans alone, as a device would, and trusts nothing.

The KV entry of a position is (adapter, hash of the tokens up to it). Every step that computes a position checks the
entries of all positions before it, so that a block of another sequence, a stale prefix or a hole is found at once. The
arena is a list of intervals with the adapter whose bytes lie there. A token is a function of (adapter, all tokens).
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from hashlib import blake2b

from engine.errors import OutOfMemory
from engine.messages import (
    AdapterImageRef,
    Admit,
    Chunk,
    Placement,
    Request,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenOutput,
    Update,
)
from engine.scheduler import BlockPool, Scheduler, SchedulerLimits
from engine.scheduler.slots import SlotTable

EOS = 0
VOCABULARY = 50
SHORT = OutOfMemory("injected")


def image(name: str, size: int = 256) -> AdapterImageRef:
    return AdapterImageRef(name.encode().ljust(16, b"-"), 0, size, 8, name)


def request(
    id: str,
    tokens: list[int],
    max_new_tokens: int = 8,
    adapter: AdapterImageRef | None = None,
    *,
    arrival: float = 0.0,
    eos: bool = True,
    prompt_logprobs: bool = False,
    salt: bytes = b"",
    group: str = "",
    behind: int = 0,
    tenant: str = "",
    weight: float = 1.0,
    priority: int = 0,
) -> Request:
    return Request(
        id=id,
        tokens=tokens,
        sampling=SamplingParams(prompt_logprobs=prompt_logprobs),
        max_new_tokens=max_new_tokens,
        eos_token_ids=[EOS] if eos else [],
        adapter=adapter,
        cache_salt=salt,
        arrival=arrival,
        group=group,
        behind=behind,
        tenant=tenant,
        weight=weight,
        priority=priority,
    )


def _extend(state: bytes, token: int) -> bytes:
    return blake2b(state + token.to_bytes(8, "little"), digest_size=12).digest()


def next_token(digest: bytes, state: bytes) -> int:
    word = blake2b(state, key=digest, digest_size=4).digest()
    return int.from_bytes(word, "little") % VOCABULARY


def logprob(digest: bytes, state: bytes, token: int) -> float:
    return (
        -1.0 - int.from_bytes(blake2b(state, key=digest, digest_size=2).digest(), "little") - token
    )


def expected(one: Request, max_total_tokens: int = 10**9) -> list[int]:
    """The output of the request, generated alone and without any scheduler."""
    digest = one.adapter.digest if one.adapter else b""
    state = b""
    for token in one.tokens:
        state = _extend(state, token)
    output: list[int] = []
    while len(output) < one.max_new_tokens and len(one.tokens) + len(output) < max_total_tokens:
        output.append(next_token(digest, state))
        state = _extend(state, output[-1])
        if output[-1] in one.eos_token_ids:
            break
    return output


def expected_logprobs(one: Request) -> list[float]:
    digest = one.adapter.digest if one.adapter else b""
    state, found = b"", []
    for token, after in zip(one.tokens, one.tokens[1:], strict=False):
        state = _extend(state, token)
        found.append(logprob(digest, state, after))
    return found


@dataclass
class Row:
    slot: int
    tokens: list[int]
    computed: int
    blocks: list[int]
    states: list[bytes] = field(default_factory=list)  # prefix hash up to each known token

    def know(self, upto: int) -> None:
        while len(self.states) < upto:
            last = self.states[-1] if self.states else b""
            self.states.append(_extend(last, self.tokens[len(self.states)]))


class FakeRunner:
    """`delay` draws the number of steps that a copy takes."""

    def __init__(
        self, num_rows: int, num_blocks: int, block_size: int, max_step_tokens: int, delay=lambda: 1
    ) -> None:
        self.num_rows, self.num_blocks, self.block_size = num_rows, num_blocks, block_size
        self.max_step_tokens, self.delay = max_step_tokens, delay
        self.rows: dict[int, Row] = {}
        self.kv: dict[tuple[int, int], tuple[bytes, bytes]] = {}
        self.slots: dict[int, Placement] = {}
        self.copying: dict[int, int] = {}  # slot -> steps left
        self.decode: list[int] | None = None
        self.reading: deque[tuple[int, list[tuple[int, int, int]]]] = deque()  # launched steps
        self.last_step = 0
        self.computed_tokens = 0

    def run(self, plan: StepPlan) -> StepResult:
        assert plan.step == self.last_step + 1
        self.last_step = plan.step
        self._apply(plan)
        slots = [self.rows[row].slot for row in self.decode or []]
        assert slots == sorted(slots), "decode rows are not sorted by slot"
        chunk_slots = [self.rows[chunk.row].slot for chunk in plan.chunks]
        assert chunk_slots == sorted(chunk_slots), "chunks are not sorted by slot"
        rows = [*(self.decode or []), *(chunk.row for chunk in plan.chunks)]
        assert len(rows) == len(set(rows)), "a row is computed twice"
        outputs, prompt = [], {}
        tokens = len(self.decode or [])
        for row in self.decode or []:
            assert len(self.rows[row].tokens) == self.rows[row].computed + 1
            outputs.append(self._compute(row, 1, sample=True))
        for index, chunk in enumerate(plan.chunks):
            tokens += chunk.count
            self._check_chunk(chunk)
            if chunk.scores:
                prompt[index] = self._prompt_logprobs(chunk)
            output = self._compute(chunk.row, chunk.count, chunk.sample)
            if chunk.sample:
                outputs.append(output)
        assert tokens <= self.max_step_tokens, "the step is over its budget"
        self.computed_tokens += tokens
        used = {self.rows[row].slot for row in rows} - {0}
        reading = []
        for slot in used:
            placement = self.slots[slot]
            assert slot not in self.copying, "a row uses an adapter that is not resident"
            end = placement.offset + placement.image.data_bytes
            reading.append((slot, placement.offset, end))
        self.reading.append((plan.step, reading))
        return StepResult(plan.step, outputs, prompt, self._advance())

    def committed(self, step: int) -> None:
        assert self.reading.popleft()[0] == step

    def lose(self) -> None:
        """Forget the launched steps: their results will never be seen."""
        self.reading.clear()

    def _apply(self, plan: StepPlan) -> None:
        for row in plan.release:
            self.rows.pop(row, None)
        read = [one for _, reading in self.reading for one in reading]
        for slot in plan.unplace:
            assert slot not in {one[0] for one in read}, "a slot left that a step in flight reads"
            assert slot not in {row.slot for row in self.rows.values()}, "a slot in use left"
            self.slots.pop(slot, None)
            self.copying.pop(slot, None)
        for placement in plan.placements:
            start, end = placement.offset, placement.offset + placement.image.data_bytes
            assert placement.slot > 0 and placement.slot not in self.slots
            assert start % 16 == 0
            others = [(p.offset, p.offset + p.image.data_bytes) for p in self.slots.values()]
            for taken_start, taken_end in others + [one[1:] for one in read]:
                assert end <= taken_start or taken_end <= start, "overwrites another adapter"
            self.slots[placement.slot] = placement
            self.copying[placement.slot] = self.delay()
        for admit in plan.admit:
            self._admit(admit)
        for row, blocks in plan.extend:
            self._take(self.rows[row], blocks)
        if plan.decode is not None:
            self.decode = list(plan.decode)
        assert self.decode is not None, "the first plan names its decode rows"

    def _admit(self, admit: Admit) -> None:
        assert 1 <= admit.row <= self.num_rows and admit.row not in self.rows
        assert admit.slot == 0 or admit.slot in self.slots
        row = self.rows[admit.row] = Row(admit.slot, list(admit.tokens), admit.computed, [])
        assert admit.computed < len(admit.tokens) and admit.prompt_length <= len(admit.tokens)
        self._take(row, admit.blocks)
        row.know(len(row.tokens))

    def _take(self, row: Row, blocks: list[int]) -> None:
        assert all(0 < block < self.num_blocks for block in blocks)
        row.blocks += blocks
        assert len(set(row.blocks)) == len(row.blocks)

    def _check_chunk(self, chunk: Chunk) -> None:
        row = self.rows[chunk.row]
        assert chunk.start == row.computed and chunk.count > 0, "positions are not contiguous"
        assert chunk.start + chunk.count <= len(row.tokens)
        assert chunk.sample == (chunk.start + chunk.count == len(row.tokens))

    def _digest(self, row: Row) -> bytes:
        return self.slots[row.slot].image.digest if row.slot else b""

    def _compute(self, number: int, count: int, sample: bool) -> TokenOutput:
        row = self.rows[number]
        digest, size = self._digest(row), self.block_size
        row.know(len(row.tokens))
        for position in range(row.computed, row.computed + count):
            place = (row.blocks[position // size], position % size)
            self.kv[place] = (digest, row.states[position])
        row.computed += count
        for position in range(row.computed):
            place = (row.blocks[position // size], position % size)
            assert self.kv[place] == (digest, row.states[position]), "read another sequence's KV"
        if not sample:
            return TokenOutput(-1)
        token = next_token(digest, row.states[row.computed - 1])
        row.tokens.append(token)
        return TokenOutput(token, logprob(digest, row.states[-1], token))

    def _prompt_logprobs(self, chunk: Chunk) -> list[float]:
        row = self.rows[chunk.row]
        known = chunk.count - chunk.sample
        after = row.tokens[chunk.start + 1 : chunk.start + 1 + known]
        states = row.states[chunk.start : chunk.start + known]
        digest = self._digest(row)
        return [logprob(digest, s, token) for s, token in zip(states, after, strict=True)]

    def _advance(self) -> list[int]:
        done = []
        for slot in list(self.copying):
            self.copying[slot] -= 1
            if self.copying[slot] <= 0:
                del self.copying[slot]
                done.append(slot)
        return done


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class House:
    """A scheduler, its pools and a fake runner, stepped like an engine; checks everything after every operation."""

    def __init__(
        self,
        *,
        rows: int = 4,
        blocks: int = 64,
        block_size: int = 4,
        step_tokens: int = 32,
        max_input: int = 1000,
        max_total: int = 1000,
        slots: int = 8,
        arena: int = 1024,
        cycle: float = 2.0,
        prefix_caching: bool = True,
        depth: int = 1,
        step_seconds: float = 0.01,
        delay=lambda: 1,
        chunk_tokens: list[int] | None = None,
        scored_tokens: int | None = None,
        fits=lambda flight: True,
        reached: bool = True,
    ) -> None:
        """`fits` says whether a planned step fits into the device's memory."""
        self.clock = Clock()
        self.fits, self.reached = fits, reached
        self.short: list[list[str]] = []  # ids in the steps that did not fit
        self.pool = BlockPool(blocks, block_size, prefix_caching)
        self.table = SlotTable(slots, arena)
        limits = SchedulerLimits(
            rows, step_tokens, max_input, max_total, cycle, chunk_tokens, scored_tokens
        )
        self.scheduler = Scheduler(limits, self.pool, self.table, self.clock)
        self.runner = FakeRunner(rows, blocks, block_size, step_tokens, delay)
        self.depth, self.step_seconds = depth, step_seconds
        self.results: deque[StepResult] = deque()
        self.plans: list[StepPlan] = []
        self.tokens: dict[str, list[int]] = {}
        self.last: dict[str, Update] = {}
        self.first: dict[str, Update] = {}
        self.order: list[str] = []  # ids in the order of their last updates

    def add(self, one: Request) -> None:
        self.scheduler.add(one)
        self.tokens[one.id] = []
        self.scheduler.check()

    def learn(self, updates: list[Update]) -> None:
        for update in updates:
            assert update.id not in self.last, "an update after the last one"
            self.tokens[update.id] += [output.token for output in update.tokens]
            first = self.first.setdefault(update.id, update)
            assert first is update or update.admitted is None or first.admitted is None
            if update.finish or update.error:
                self.last[update.id] = update
                self.order.append(update.id)
            assert (update.usage is not None) == (update.finish is not None)

    def commit(self) -> None:
        result = self.results.popleft()
        self.runner.committed(result.step)
        self.learn(self.scheduler.commit(result))
        self.scheduler.check()

    def step(self) -> bool:
        """Plan and launch one step, then commit until `depth` are in flight; False: nothing was done."""
        self.clock.now += self.step_seconds
        self.learn(self.scheduler.take_updates())
        plan = self.scheduler.plan()
        self.scheduler.check()
        if plan is not None and not self.fits(self.scheduler.flights[-1]):
            self.fall_short(plan)
            return True
        if plan is not None:
            self.plans.append(plan)
            self.results.append(self.runner.run(plan))
        committed = False
        while self.results and (plan is None or len(self.results) > self.depth):
            self.commit()
            committed = True
        return plan is not None or committed

    def fall_short(self, plan: StepPlan) -> None:
        """The step does not fit into memory, which shows before or after the runner took the plan."""
        if self.reached:
            self.runner.run(plan)
        else:
            self.runner.last_step = plan.step
        while self.results:
            self.commit()
        self.runner.lose()
        self.short.append(self.scheduler.roll_back(SHORT))
        self.scheduler.check()
        self.learn(self.scheduler.take_updates())

    def drain(self, steps: int = 5000) -> None:
        """Step until nothing is left to do, and see that everything is free again."""
        for _ in range(steps):
            if not self.step():
                break
        assert not self.scheduler.has_work, "requests are left but there is nothing to do"
        assert not self.results and not self.runner.rows
        assert self.pool.available == self.pool.usable
        assert not self.scheduler.stats().running
        for _, digest, _ in self.table.residents():
            slot = self.table.slot_of(digest)
            assert slot is not None and not self.table.num_users(slot)

    def generate(self, requests: list[Request]) -> dict[str, list[int]]:
        for one in requests:
            self.add(one)
        self.drain()
        return self.tokens


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1, VOCABULARY) for _ in range(length)]


def exact(house: House, requests: list[Request]) -> None:
    """Every request got what it gets alone."""
    for one in requests:
        assert house.tokens[one.id] == expected(one), one.id
