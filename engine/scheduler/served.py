"""Counts the tokens that are computed, and lets the sequences of one client's request queue as they would be served.

A client may send a thousand prompts in one request. If all of them queued by their arrival, somebody who comes a moment
later would wait for all of them. So requests share the engine fairly: each sequence gets a turn in virtual time, which
runs at the rate of one of the open requests (weighted fair queueing, Demers, Keshav and Shenker 1989). The first
sequence of a request has its turn at once, and each later one when those before it would have been served.
"""

from __future__ import annotations

from collections import Counter

from engine.messages import Request


class Served:
    """The tokens computed so far, and virtual time: the tokens that each open request of a client had a right to."""

    def __init__(self) -> None:
        self.tokens = 0
        self._virtual = 0.0
        self._open: Counter[str] = Counter()  # sequences by client's request

    def opened(self, request: Request) -> float:
        """A sequence is queued. Returns its turn, in virtual time."""
        self._open[request.group or request.id] += 1
        return self._virtual + request.behind

    def closed(self, request: Request) -> None:
        """A sequence has ended."""
        group = request.group or request.id
        self._open[group] -= 1
        if not self._open[group]:
            del self._open[group]

    def add(self, tokens: int) -> None:
        """A step of so many tokens was computed."""
        self.tokens += tokens
        self._virtual += tokens / max(len(self._open), 1)
