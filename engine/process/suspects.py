"""Adapters that were loading when the exchange ended. After too many ends an adapter is refused for a while."""

from __future__ import annotations

import time
from collections.abc import Iterable

from engine.adapters.ref import AdapterRef
from engine.errors import AdapterLoadFailed


class Suspects:
    """A reference that saw `max_ends` ends within `window_s` seconds is refused until they are older."""

    def __init__(self, max_ends: int, window_s: float) -> None:
        self._max_ends = max_ends
        self._window_s = window_s
        self._ends: dict[AdapterRef, list[float]] = {}  # time.monotonic() of each

    def record_end(self, refs: Iterable[AdapterRef]) -> None:
        """The exchange ended while it loaded these."""
        now = time.monotonic()
        self._ends = {ref: recent for ref in self._ends if (recent := self._recent(ref, now))}
        for ref in set(refs):
            self._ends.setdefault(ref, []).append(now)

    def check(self, ref: AdapterRef) -> None:
        """Raises AdapterLoadFailed for a reference that is refused now."""
        now = time.monotonic()
        recent = self._recent(ref, now)
        if len(recent) >= self._max_ends:
            left = recent[-self._max_ends] + self._window_s - now
            raise AdapterLoadFailed(
                f"the adapter exchange ended {len(recent)} times while it loaded {ref.name}",
                field="adapter_id",
                hint=f"try again in {left:.0f} s",
            )

    def _recent(self, ref: AdapterRef, now: float) -> list[float]:
        return [one for one in self._ends.get(ref, ()) if now - one < self._window_s]
