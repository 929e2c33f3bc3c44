"""The loop of one engine: messages, steps, failures and reports."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from engine.errors import EngineDead, GenerationError, LoraxError
from engine.messages import EngineStats, Request, Update
from engine.process.parts import Engine
from engine.process.pipe_messages import Cancel, Drop, Pin, ToEngine

MAX_FAILURES = 3  # steps in a row
BUSY_REPORT_S = 0.2  # between two reports while there is work
IDLE_REPORT_S = 0.02  # between two reports without work
EMPTY_STEP_S = 0.0005  # a quicker step without updates computed nothing
EMPTY_STEPS = 3  # in a row, before the loop pauses
PAUSE_S = 0.001

logger = logging.getLogger(__name__)


class Stepper:
    """Drives one engine, one `turn` at a time, from one thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._failures = 0  # steps in a row
        self._empty = 0  # steps in a row that computed nothing
        self._unreported = False
        self._reported = 0.0  # time.monotonic()

    def turn(self, messages: Sequence[ToEngine]) -> list[Update]:
        """Takes the messages, then steps once if there is work.

        A failed submission or step fails only its requests. Raises EngineDead after MAX_FAILURES failed steps in a
        row, or at once if the device is in an unrecoverable state.
        """
        updates: list[Update] = []
        for message in messages:
            updates += self._take(message)
        if self.engine.has_work:
            self._unreported = True
            updates += self._step()
        return updates

    def report(self) -> EngineStats | None:
        """The engine's stats if it is time to send them."""
        if not self._unreported or self._until_report() > 0:
            return None
        self._unreported = self.engine.has_work
        self._reported = time.monotonic()
        return self.engine.stats

    @property
    def wait_s(self) -> float | None:
        """Seconds to wait for messages before the next turn; None: no limit."""
        if self.engine.has_work:
            return 0 if self._empty < EMPTY_STEPS else PAUSE_S
        return max(self._until_report(), 0.0) if self._unreported else None

    def _until_report(self) -> float:
        interval = BUSY_REPORT_S if self.engine.has_work else IDLE_REPORT_S
        return self._reported + interval - time.monotonic()

    def _take(self, message: ToEngine) -> list[Update]:
        self._empty = 0
        self._unreported = True
        if isinstance(message, Cancel):
            self.engine.cancel(message.id)
            return []
        if isinstance(message, Pin):
            self.engine.pin(message.digest, message.pinned)
            return []
        if isinstance(message, Drop):
            self.engine.drop(message.digest)
            return []
        try:
            self.engine.submit(message.request)
        except LoraxError as error:
            return [_refusal(message.request, error)]
        except Exception as error:
            logger.exception("request %s could not be submitted", message.request.id)
            return [_refusal(message.request, GenerationError(f"the engine refused: {error!r}"))]
        return []

    def _step(self) -> list[Update]:
        started = time.monotonic()
        try:
            updates = self.engine.step()
        except Exception as error:
            return self._fail(error)
        self._failures = 0
        empty = not updates and time.monotonic() - started < EMPTY_STEP_S
        self._empty = self._empty + 1 if empty else 0
        return updates

    def _fail(self, error: Exception) -> list[Update]:
        logger.error("a step failed", exc_info=error)
        self._failures += 1
        if self._failures == MAX_FAILURES:
            raise EngineDead(f"{MAX_FAILURES} steps in a row failed") from error
        if not isinstance(error, LoraxError):
            error = GenerationError(f"the step failed: {error!r}")
        return self.engine.fail(error)


def _refusal(request: Request, error: LoraxError) -> Update:
    return Update(request.id, [], error=error.to_wire())
