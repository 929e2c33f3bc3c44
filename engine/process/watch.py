"""When the exchange's process counts as silent."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Watch:
    """When the exchange counts as silent, and how long others wait for it."""

    tick_s: float = 0.25  # between two heartbeats
    away_ticks: int = 2  # unanswered: requests with a grant do not wait
    dead_ticks: int = 40  # unanswered: it is killed
    ready_s: float = 90.0  # limit of the start of a new process
    patience_s: float = 60.0  # limit of the wait for an exchange that is away
    max_ends: int = 5  # within `window_s`: the program gives up
    window_s: float = 60.0
    max_deaths: int = 2  # within `window_s` while one adapter was loading: it is refused


class Starting:
    """A starting process. It does not answer before its loop runs, but it takes processor time."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._started = self._worked = time.monotonic()
        self._cpu_seconds: float | None = None

    def hangs(self, cpu_seconds: float | None) -> bool:
        """Whether it must be killed: it takes too long, or it takes no processor time.

        `cpu_seconds`: taken so far; None: unknown.
        """
        now, watch = time.monotonic(), self._watch
        if now - self._started > watch.ready_s:
            logger.error("the exchange did not start within %.0f s; killing it", watch.ready_s)
            return True
        if cpu_seconds is None or cpu_seconds != self._cpu_seconds:
            self._cpu_seconds, self._worked = cpu_seconds, now
        idle = now - self._worked
        if idle < watch.dead_ticks * watch.tick_s:
            return False
        logger.error("the exchange has done nothing for %.0f s while starting; killing it", idle)
        return True
