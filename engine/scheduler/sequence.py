"""A sequence: the mutable state of one open request.

Positions are counted from the start of the prompt. Of the positions of a sequence

    0 .. committed        have KV entries written by committed steps,
    committed .. computed have KV entries being written by steps in flight,
    computed .. length    are still to be computed, where length = len(tokens) + inflight.

A token in flight is being sampled by a launched step; so far its id is on the device only. A *decoding* sequence has
exactly one position to compute, and the id of its token is in the row's table on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.kinds import KINDS, RequestKind
from engine.messages import POOLED, AdapterImageRef, Request, Usage

if TYPE_CHECKING:
    from engine.scheduler.queue import Flow


@dataclass(slots=True, eq=False)
class Sequence:
    """`row` 0 means waiting; a waiting sequence that has blocks was paused and keeps what it computed."""

    request: Request
    number: int  # order of submission
    limit: int  # tokens of prompt and output at which it ends
    turn: float  # in virtual time; see `engine.scheduler.served`
    root: bytes  # start of its chain of block keys
    tokens: list[int]  # prompt and committed output
    flow: Flow = field(init=False)  # set by the queue
    charged: int = 0  # positions that its flow was charged
    keys: list[bytes] = field(default_factory=list)  # of the first full blocks of `tokens`
    waiting_since: float = 0.0  # seconds of the scheduler's clock
    computed: int = 0
    committed: int = 0
    inflight: int = 0
    blocks: list[int] = field(default_factory=list)
    capacity: int = 0  # positions that `blocks` hold
    registered: int = 0  # leading blocks that were added to the prefix cache
    row: int = 0
    slot: int = 0  # 0: the base model
    epoch: int = 0  # number of rows it has left; a result for an older epoch is dropped
    decoding: bool = False
    preempted: bool = False  # waits before sequences that never ran
    pausable: bool = True  # false once it was paused and lost its blocks
    preemptions: int = 0
    cached_tokens: int = 0  # of the prompt, found in the prefix cache at the first admission
    admitted: float | None = None  # time of the first admission
    announced: bool = False  # an update carried `admitted`
    prompt_logprobs: list[float] | None = None  # collected so far; None: not requested, or sent
    prompt_tops: list[tuple[int, float]] = field(default_factory=list)  # with them
    pooled: list[float] | None = None  # sum of the vectors so far

    @property
    def adapter(self) -> AdapterImageRef | None:
        return self.request.adapter

    @property
    def kind(self) -> RequestKind:
        return KINDS[self.request.kind]

    @property
    def needs_whole_prompt(self) -> bool:
        """Its result depends on the hidden states of every prompt token, so no cached prefix can be used."""
        return self.prompt_logprobs is not None or bool(self.kind.of_each_chunk & POOLED)

    def add_pooled(self, vector: list[float]) -> None:
        """Add the vector of one more chunk."""
        if self.pooled is not None:
            vector = [one + other for one, other in zip(self.pooled, vector, strict=True)]
        self.pooled = vector

    @property
    def prompt_length(self) -> int:
        return len(self.request.tokens)

    @property
    def age(self) -> tuple[float, int]:
        """Smaller is older."""
        return (self.request.arrival, self.number)

    @property
    def queue_order(self) -> tuple[bool, float, float, int]:
        """Sort key of the queue: preempted sequences first, then by turn, then by arrival."""
        return (not self.preempted, self.turn, self.request.arrival, self.number)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_length,
            cached_tokens=self.cached_tokens,
            generated_tokens=len(self.tokens) - self.prompt_length,
            preemptions=self.preemptions,
        )

    def check(self) -> None:
        """Assert every invariant."""
        length = len(self.tokens) + self.inflight
        assert self.committed <= self.computed <= length <= self.limit
        if self.decoding:
            left = int(self.kind.generates)
            assert self.computed == length - left, "decodes with more than one to compute"
