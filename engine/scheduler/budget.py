"""Tokens that a step may hold: the configured limit, and fewer for a while after a step did not fit into memory."""

from __future__ import annotations

GROWTH_STEPS = 32  # steps that must fit before the next may be larger
GROWTH = 1.25


class StepBudget:
    """Shrinks at once to half of the step that did not fit; grows back by a quarter at a time."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.tokens = max_tokens
        self._fitted = 0  # steps since the last change

    def did_not_fit(self, tokens: int) -> None:
        """A step of `tokens` did not fit into the device's memory."""
        self.tokens = max(min(self.tokens, tokens) // 2, 1)
        self._fitted = 0

    def fitted(self) -> None:
        """A step was computed."""
        if self.tokens == self.max_tokens:
            return
        self._fitted += 1
        if self._fitted == GROWTH_STEPS:
            self.tokens = min(max(int(self.tokens * GROWTH), self.tokens + 1), self.max_tokens)
            self._fitted = 0

    def restore(self) -> None:
        """The request that did not fit is gone: steps may be full again."""
        self.tokens = self.max_tokens
        self._fitted = 0
