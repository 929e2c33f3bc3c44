"""What the engine counts of its steps: how long they take, how many sequences they have, how many fail."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from engine.messages import Buckets, StepPlan

SECONDS = tuple(0.0005 * 2**power for power in range(16))  # 0.5 ms to 16 s
SIZES = tuple(float(2**power) for power in range(12))  # 1 to 2,048 sequences


class StepCounts:
    """Steps are launched in order and committed in the same order."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._launched: deque[float] = deque()  # when; of steps that are not committed
        self._committed = 0.0  # when; the newest
        self._seconds, self._sizes = _Histogram(SECONDS), _Histogram(SIZES)
        self._failed = self._joined = 0

    def launched(self, plan: StepPlan, size: int) -> None:
        """`size`: sequences of the step."""
        self._launched.append(self._clock())
        self._sizes.observe(size)
        if size > len(plan.admit):
            self._joined += len(plan.admit)

    def committed(self) -> None:
        """A step counts from its launch, or from the end of the step before if that was later."""
        now = self._clock()
        self._seconds.observe(now - max(self._launched.popleft(), self._committed))
        self._committed = now

    def failed(self) -> None:
        """A step failed; it and those in flight are dropped."""
        self._failed += 1
        self._launched.clear()

    def stats(self) -> dict[str, Any]:
        """Fields of EngineStats."""
        return {
            "step_seconds": self._seconds.buckets(),
            "step_sizes": self._sizes.buckets(),
            "failed_steps": self._failed,
            "joined": self._joined,
        }


class _Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def buckets(self) -> Buckets:
        return Buckets(list(self._bounds), list(self._counts), self._total)
