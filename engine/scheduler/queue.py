"""The waiting sequences: by priority, then fair between tenants by weight, then between the adapters of each tenant.

Fairness is by *virtual token counters* (VTC, Sheng et al. 2024): a tenant's counter is the tokens computed for it over
its weight, an adapter's the tokens computed for it. The next sequence is of the tenant with the lowest counter, and of
its adapter with the lowest. Who had nothing waiting rejoins at the counter that was served last, so that idle time
earns nothing. Sequences of one adapter are in `queue_order`. Preempted sequences go before all others.

A higher priority goes first. But of ten sequences served, one may be of a lower priority that has waited STARVED_S.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from itertools import count
from operator import attrgetter
from typing import Literal

from engine.messages import Request
from engine.scheduler.sequence import Sequence

STARVED_S = 30.0
STARVED_EVERY = 10  # sequences served, of which one may be starved
MAX_IDLE = 1024  # tenants or adapters without sequences whose counters are remembered

# What an offer of a sequence comes to: it has a row; not now; nor any other of its adapter; nor any other at all.
Outcome = Literal["served", "next", "next adapter", "end"]
Offer = Callable[[Sequence], Outcome]

_queue_order = attrgetter("queue_order")


@dataclass(slots=True, eq=False)
class Flow:
    """The sequences of one tenant for one adapter, at one priority."""

    share: Share
    digest: bytes  # of the adapter; empty: the base model
    counter: float
    waiting: list[Sequence] = field(default_factory=list)  # in `queue_order`
    num_open: int = 0  # sequences that wait or run

    def charge(self, sequence: Sequence, computed: int) -> None:
        """Counts the positions of a sequence up to `computed`, each once however often it is computed."""
        if (tokens := computed - sequence.charged) > 0:
            sequence.charged = computed
            self.counter += tokens
            self.share.counter += tokens / self.share.weight


@dataclass(slots=True, eq=False)
class Share:
    """One tenant at one priority."""

    level: Level
    number: int  # order of creation
    weight: float
    counter: float
    flows: dict[bytes, Flow] = field(default_factory=dict)  # by digest
    reached: float = 0.0  # the counter of the flow that was served last, when it was
    num_waiting: int = 0
    num_open: int = 0

    def order(self) -> list[tuple[float, tuple[bool, float, float, int], int, Flow]]:
        """A heap of the flows with waiting sequences: counter, first sequence, its index, flow."""
        heap = [
            (flow.counter, flow.waiting[0].queue_order, 0, flow)
            for flow in self.flows.values()
            if flow.waiting
        ]
        heapify(heap)
        return heap


@dataclass(slots=True, eq=False)
class Level:
    """One priority."""

    shares: dict[str, Share] = field(default_factory=dict)  # by tenant
    reached: float = 0.0  # the counter of the share that was served last, when it was
    num_waiting: int = 0


class Queue:
    """All waiting sequences."""

    def __init__(self) -> None:
        self.preempted: list[Sequence] = []  # in `queue_order`
        self._levels: dict[int, Level] = {}  # by priority
        self._numbers = count()
        self._length = 0
        self._since_starved = STARVED_EVERY

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        """All waiting sequences, in no particular order."""
        yield from self.preempted
        for flow in self.flows():
            yield from flow.waiting

    def flows(self) -> Iterator[Flow]:
        """Those with waiting sequences that were not preempted."""
        for level in self._levels.values():
            for share in level.shares.values():
                if share.num_waiting:
                    yield from (flow for flow in share.flows.values() if flow.waiting)

    # -- sequences come, wait and end

    def opened(self, sequence: Sequence) -> None:
        """A new sequence: finds or makes its flow."""
        request = sequence.request
        level = self._levels.setdefault(request.priority, Level())
        share = level.shares.get(request.tenant) or self._new_share(level, request)
        share.weight = request.weight  # the newest request has the newest setting
        digest = request.adapter.digest if request.adapter is not None else b""
        flow = share.flows.get(digest)
        if flow is None:
            if len(share.flows) > share.num_open + MAX_IDLE:
                share.flows = {key: one for key, one in share.flows.items() if one.num_open}
            flow = share.flows[digest] = Flow(share, digest, share.reached)
        sequence.flow = flow
        flow.num_open += 1
        share.num_open += 1

    def _new_share(self, level: Level, request: Request) -> Share:
        if len(level.shares) > MAX_IDLE:
            level.shares = {name: one for name, one in level.shares.items() if one.num_open}
        share = Share(level, next(self._numbers), request.weight, level.reached)
        level.shares[request.tenant] = share
        return share

    def push(self, sequence: Sequence) -> None:
        """The sequence waits."""
        self._length += 1
        if sequence.preempted:
            insort(self.preempted, sequence, key=_queue_order)
            return
        flow = sequence.flow
        share, level = flow.share, flow.share.level
        if not share.num_waiting:
            share.counter = max(share.counter, level.reached)
        if not flow.waiting:
            flow.counter = max(flow.counter, share.reached)
        insort(flow.waiting, sequence, key=_queue_order)
        share.num_waiting += 1
        level.num_waiting += 1

    def remove(self, sequence: Sequence) -> None:
        """The sequence no longer waits."""
        self._length -= 1
        if sequence.preempted:
            self.preempted.remove(sequence)
            return
        flow = sequence.flow
        flow.waiting.remove(sequence)
        flow.share.num_waiting -= 1
        flow.share.level.num_waiting -= 1

    def closed(self, sequence: Sequence) -> None:
        """The sequence has ended. A flow without debt is forgotten."""
        flow = sequence.flow
        share = flow.share
        flow.charge(sequence, sequence.committed)
        flow.num_open -= 1
        share.num_open -= 1
        if not flow.num_open and flow.counter <= share.reached:
            del share.flows[flow.digest]

    # -- order

    def serve(self, offer: Offer, now: float) -> None:
        """Offers the sequences in their order. Those that are served leave the queue and are charged their prompt."""
        for sequence in tuple(self.preempted):
            if self._offered(sequence, offer) == "end":
                return
        waiting = [level for level in self._levels.items() if level[1].num_waiting]
        waiting.sort(key=lambda level: level[0], reverse=True)
        starved = self._starved([level for _, level in waiting[1:]], now)
        if starved is not None and self._offered(starved, offer) == "end":
            return
        for _, level in waiting:
            if not self._serve_level(level, offer):
                return

    def _serve_level(self, level: Level, offer: Offer) -> bool:
        """False: the queue ends here."""
        heaps = {
            share.number: share.order() for share in level.shares.values() if share.num_waiting
        }
        shares = [
            (share.counter, share.number, share)
            for share in level.shares.values()
            if share.num_waiting
        ]
        heapify(shares)
        while shares:
            _, number, share = shares[0]
            outcome = self._serve_one(heaps[number], offer)
            if outcome == "end":
                return False
            if outcome == "served":
                heapreplace(shares, (share.counter, number, share))
            else:
                heappop(shares)
        return True

    def _serve_one(
        self, heap: list[tuple[float, tuple[bool, float, float, int], int, Flow]], offer: Offer
    ) -> Outcome:
        """Offers the sequences of one tenant until one is served. "next": none was."""
        while heap:
            _, _, index, flow = heap[0]
            outcome = self._offered(flow.waiting[index], offer)
            if outcome == "end":
                return outcome
            index += outcome == "next"
            if outcome == "next adapter" or index >= len(flow.waiting):
                heappop(heap)
            else:
                order = flow.waiting[index].queue_order
                heapreplace(heap, (flow.counter, order, index, flow))
            if outcome == "served":
                return outcome
        return "next"

    def _offered(self, sequence: Sequence, offer: Offer) -> Outcome:
        outcome = offer(sequence)
        if outcome == "served":
            self.remove(sequence)
            sequence.preempted = False
            flow, share = sequence.flow, sequence.flow.share
            share.reached = max(share.reached, flow.counter)
            share.level.reached = max(share.level.reached, share.counter)
            flow.charge(sequence, len(sequence.tokens))
            self._since_starved += 1
        return outcome

    def _starved(self, lower: list[Level], now: float) -> Sequence | None:
        """The sequence of a lower priority that has waited longest, if it is its turn."""
        if not lower or self._since_starved < STARVED_EVERY:
            return None
        heads = (
            flow.waiting[0]
            for level in lower
            for share in level.shares.values()
            for flow in share.flows.values()
            if flow.waiting
        )
        oldest = min(heads, key=attrgetter("waiting_since"))
        if now - oldest.waiting_since < STARVED_S:
            return None
        self._since_starved = 0
        return oldest

    def check(self) -> None:
        """Assert every invariant."""
        assert sorted(self.preempted, key=_queue_order) == self.preempted
        assert all(sequence.preempted for sequence in self.preempted)
        length = len(self.preempted)
        for level in self._levels.values():
            for share in level.shares.values():
                for digest, flow in share.flows.items():
                    assert flow.digest == digest and flow.share is share
                    assert sorted(flow.waiting, key=_queue_order) == flow.waiting, "out of order"
                    assert not any(sequence.preempted for sequence in flow.waiting)
                    assert all(sequence.flow is flow for sequence in flow.waiting)
                waiting = sum(len(flow.waiting) for flow in share.flows.values())
                assert share.num_waiting == waiting
                assert share.num_open == sum(flow.num_open for flow in share.flows.values())
            assert level.num_waiting == sum(one.num_waiting for one in level.shares.values())
            length += level.num_waiting
        assert length == self._length
