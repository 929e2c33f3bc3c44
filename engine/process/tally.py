"""The counters of the exchange over all its processes: each of these starts at zero."""

from __future__ import annotations

import msgspec

from engine.messages import TierCounts, TierStats


class Tally:
    """Adds up. What a process counted after it was last read is lost with it, so no sum decreases."""

    def __init__(self) -> None:
        self._ended = TierCounts()  # of processes that have ended
        self._read = TierStats()  # of the current one

    @property
    def stats(self) -> TierStats:
        """The newest levels, and the sums."""
        return msgspec.structs.replace(self._read, counts=self._ended.plus(self._read.counts))

    def read(self, stats: TierStats) -> None:
        """The current process has answered."""
        self._read = stats

    def restarted(self) -> None:
        """The current process has ended. Its levels stay until the next one answers."""
        self._ended = self._ended.plus(self._read.counts)
        self._read = msgspec.structs.replace(self._read, counts=TierCounts())
