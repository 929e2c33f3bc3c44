"""Counts the tokens that are computed, and lets the sequences of one client's request queue as they would be served.

A client may send a thousand prompts in one request. If all of them queued by their arrival, somebody who comes a moment
later would wait for all of them. So requests share the engine fairly: each sequence gets a turn in virtual time, which
runs at the rate of one of the open requests (weighted fair queueing, Demers, Keshav and Shenker 1989). The first
sequence of a request has its turn when it arrives, and each later one when those before it would have been served. A
request that waited for its adapter has the turn of its arrival.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable

from engine.messages import Request

SAMPLE_S = 0.05  # between two remembered moments
MAX_SAMPLES = 8192  # the newest half stays when there are more


class Served:
    """The tokens computed so far, and virtual time: the tokens that each open request of a client had a right to."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.tokens = 0
        self._clock = clock
        self._virtual = 0.0
        self._open: Counter[str] = Counter()  # sequences by client's request
        self._times: list[float] = []  # moments, by the scheduler's clock
        self._virtuals: list[float] = []  # virtual time at each of them

    def opened(self, request: Request) -> float:
        """A sequence is queued. Returns its turn, in virtual time."""
        self._open[request.group or request.id] += 1
        return self._at(request.arrival) + request.behind

    def closed(self, request: Request) -> None:
        """A sequence has ended."""
        group = request.group or request.id
        self._open[group] -= 1
        if not self._open[group]:
            del self._open[group]

    def add(self, tokens: int) -> None:
        """Counts the tokens of a step that was computed."""
        now = self._clock()
        if not self._times or now >= self._times[-1] + SAMPLE_S:
            if len(self._times) >= MAX_SAMPLES:
                del self._times[: MAX_SAMPLES // 2], self._virtuals[: MAX_SAMPLES // 2]
            self._times.append(now)
            self._virtuals.append(self._virtual)
        self.tokens += tokens
        self._virtual += tokens / max(len(self._open), 1)

    def _at(self, moment: float) -> float:
        """Virtual time at a moment, or at the oldest one that is remembered."""
        index = bisect_right(self._times, moment)
        return self._virtuals[max(index - 1, 0)] if self._times else 0.0
