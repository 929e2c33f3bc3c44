"""When steps may take more prompt tokens beside decoding rows than they are meant to: once prompts do not keep up."""

from __future__ import annotations

PATIENCE = 0.25  # seconds that prompts lack room in every step, before steps take more
MOST = 8.0  # times as much, at most


class Backlog:
    """Counts the time since when every step has left prompt tokens to later ones."""

    def __init__(self) -> None:
        self._step = 0  # the last that did
        self._since = 0.0  # of the scheduler's clock

    def growth(self, step: int, now: float) -> float:
        """How many times the usual bound the step behind number `step` takes: 1, or more the longer prompts wait."""
        if self._step != step:
            return 1.0
        return min(max((now - self._since) / PATIENCE, 1.0), MOST)

    def left_over(self, step: int, now: float) -> None:
        """Step number `step` had not enough room."""
        if self._step != step - 1:
            self._since = now
        self._step = step
