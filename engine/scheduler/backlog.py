"""Raises a step's share of prompt tokens above its usual bound while prompts lack room."""

from __future__ import annotations

PATIENCE = 0.25  # seconds of steps that all lack room for prompts, before the bound grows
MAX_GROWTH = 8.0


class Backlog:
    """Measures how long every step has left prompt tokens to later ones."""

    def __init__(self) -> None:
        self._step = 0  # the last step that left some
        self._since = 0.0  # seconds of the scheduler's clock

    def growth(self, step: int, now: float) -> float:
        """Factor on the usual bound for the step after `step`: 1, or more the longer prompts have lacked room."""
        if self._step != step:
            return 1.0
        return min(max((now - self._since) / PATIENCE, 1.0), MAX_GROWTH)

    def left_over(self, step: int, now: float) -> None:
        """Step `step` had too little room for prompts."""
        if self._step != step - 1:
            self._since = now
        self._step = step
