"""Order, failures, reports and waits, with an engine that does as it is told."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest

from engine.adapters.tiers import HostRegion
from engine.errors import EngineDead, Overloaded
from engine.messages import Request, Update
from engine.process.pipe_messages import Cancel, Submit
from engine.process.stepper import EMPTY_STEPS, MAX_FAILURES, PAUSE_S, Stepper
from tests.process.fakes import CONFIG, POISON, EchoEngine, request


class ToldEngine(EchoEngine):
    """Raises `failure` from every step, and has nothing to say while it is `stuck`."""

    failure: Exception | None = None
    stuck = False

    def step(self) -> list[Update]:
        if self.failure is not None:
            raise self.failure
        return [] if self.stuck else super().step()

    def submit(self, request: Request) -> None:
        if not request.tokens:
            raise IndexError("no first token")
        super().submit(request)


@pytest.fixture
def engine() -> Iterator[ToldEngine]:
    engine = ToldEngine(CONFIG, HostRegion.create(1 << 20))
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


def test_messages_are_taken_before_the_step(engine: ToldEngine) -> None:
    stepper = Stepper(engine)
    assert stepper.wait_s is None
    updates = stepper.turn([Submit(request("a", [1, 2])), Submit(request("b", [3])), Cancel("b")])
    assert [(u.id, u.finish) for u in updates] == [("b", "cancelled"), ("a", None)]
    assert stepper.wait_s == 0
    assert [u.finish for u in stepper.turn([])] == ["length"]


def test_unforeseen_refusal_is_one_requests(engine: ToldEngine) -> None:
    stepper = Stepper(engine)
    updates = stepper.turn([Submit(request("bad", [])), Submit(request("good", [1]))])
    assert [(u.id, u.error is None) for u in updates] == [("bad", False), ("good", True)]


def test_error_of_a_step_keeps_its_type(engine: ToldEngine) -> None:
    stepper = Stepper(engine)
    stepper.turn([Submit(request("a", [1, 2]))])
    engine.failure = Overloaded("full")
    (update,) = stepper.turn([])
    assert update.error is not None and update.error["class"] == "Overloaded"


def test_failures_in_a_row_are_fatal(engine: ToldEngine) -> None:
    stepper = Stepper(engine)
    for number in range(2 * MAX_FAILURES):  # a good step between failures forgives them
        (update,) = stepper.turn([Submit(request(f"bad {number}", [POISON]))])
        assert update.error is not None
        assert stepper.turn([Submit(request(f"good {number}", [1]))])
    engine.failure = RuntimeError("for good")
    for _ in range(MAX_FAILURES - 1):
        stepper.turn([Submit(request("a", [1]))])
    with pytest.raises(EngineDead):
        stepper.turn([Submit(request("a", [1]))])


def test_reports_are_few_and_the_last_one_says_idle(engine: ToldEngine) -> None:
    stepper = Stepper(engine)
    messages = [Submit(request("a", [1], 1_000_000))]
    reports = []
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        stepper.turn(messages)
        messages = []
        reports.append(stepper.report())
    assert 2 <= sum(report is not None for report in reports) <= 4
    stepper.turn([Cancel("a")])
    end = time.monotonic() + 1
    while (report := stepper.report()) is None and time.monotonic() < end:
        time.sleep(stepper.wait_s or 0)
    assert report is not None and report.running == 0
    assert stepper.report() is None and stepper.wait_s is None


def test_engine_that_waits_for_something_is_not_asked_in_a_tight_loop(engine: ToldEngine) -> None:
    stepper = Stepper(engine)
    engine.stuck = True
    stepper.turn([Submit(request("a", [1]))])
    for _ in range(EMPTY_STEPS):
        stepper.turn([])
    assert stepper.wait_s == PAUSE_S
    engine.stuck = False
    stepper.turn([])
    assert stepper.wait_s != PAUSE_S
