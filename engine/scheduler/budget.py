"""How many tokens a step may hold: all that the user allows, and less for a while after a step did not fit."""

from __future__ import annotations

GROWTH_STEPS = 32  # steps that must fit before the next may be larger
GROWTH = 1.25


class StepBudget:
    """Shrinks at once to half of what did not fit; grows back by a quarter at a time."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.tokens = most
        self._fitted = 0  # steps since the last change

    def did_not_fit(self, tokens: int) -> None:
        """A step of `tokens` was more than the device's memory could take."""
        self.tokens = max(min(self.tokens, tokens) // 2, 1)
        self._fitted = 0

    def fitted(self) -> None:
        """A step was computed."""
        if self.tokens == self.most:
            return
        self._fitted += 1
        if self._fitted == GROWTH_STEPS:
            self.tokens = min(max(int(self.tokens * GROWTH), self.tokens + 1), self.most)
            self._fitted = 0

    def restore(self) -> None:
        """What made steps too large is gone."""
        self.tokens = self.most
        self._fitted = 0
