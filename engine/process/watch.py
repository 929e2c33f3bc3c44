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
    away_ticks: int = 2  # unanswered: it is not waited for where there is another way
    dead_ticks: int = 40  # unanswered: it is killed
    ready_s: float = 90.0  # that a new process gets to start
    patience_s: float = 60.0  # that a question waits for an exchange that is away
    max_ends: int = 5  # within `window_s`: the program gives up
    window_s: float = 60.0
    max_deaths: int = (
        2  # of the exchange within `window_s` while it loaded the same adapter: that is refused
    )


class Starting:
    """A process that starts: before its loop runs it answers nothing, but it works."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._started = self._worked = time.monotonic()
        self._cpu_seconds: float | None = None

    def hangs(self, cpu_seconds: float | None) -> bool:
        """Whether it is to be killed: it takes too long, or no processor time, as one that is stopped.

        `cpu_seconds`: what it has taken so far; None: the system does not say.
        """
        now, watch = time.monotonic(), self._watch
        if now - self._started > watch.ready_s:
            logger.error("the exchange did not start within %.0f s; it is killed", watch.ready_s)
            return True
        if cpu_seconds is None or cpu_seconds != self._cpu_seconds:
            self._cpu_seconds, self._worked = cpu_seconds, now
        idle = now - self._worked
        if idle < watch.dead_ticks * watch.tick_s:
            return False
        logger.error("the exchange has done nothing for %.0f s while starting; it is killed", idle)
        return True
