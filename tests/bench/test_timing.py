"""The definition of a step, counted on an engine whose clock only moves when it works."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from engine.bench.timing import ForwardTimer, forward_ms, step_ms, wall
from engine.errors import ConfigError, GenerationError
from engine.messages import Request, SamplingParams, TokenOutput, Update

PREFILL_S, STEP_S = 5.0, 0.25


@dataclass
class FakeEngine:
    """Prefill takes 5 s and gives every first token; a step takes 0.25 s and gives every other one."""

    at_once: int = 100  # requests that run together
    runs_ahead: int = 0  # steps between a token and its update
    now: float = 0.0
    waiting: list[Request] = field(default_factory=list)
    running: dict[str, list[int]] = field(default_factory=dict)  # id -> [tokens so far, most]
    failure: dict[str, Any] | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def clock(self) -> float:
        return self.now

    def submit(self, request: Request) -> None:
        self.waiting.append(request)

    def step(self) -> list[Update]:
        if self.failure:
            return [Update(self.waiting[0].id, [], error=self.failure)]
        room = self.at_once - len(self.running)
        new, self.waiting = self.waiting[:room], self.waiting[room:]
        self.now += PREFILL_S if new else STEP_S
        for request in new:
            self.running[request.id] = [0, request.max_new_tokens]
        updates = []
        moving = [request.id for request in new] if new else list(self.running)
        for id in moving:
            counts = self.running[id]
            counts[0] += 1
            ended = counts[0] == counts[1]
            updates.append(Update(id, [TokenOutput(1)], "length" if ended else None))
            if ended:
                del self.running[id]
        return updates


def requests(number: int, tokens: int) -> list[Request]:
    return [Request(str(i), [1], SamplingParams(), tokens, []) for i in range(number)]


def test_a_step_is_the_difference_over_the_tokens_between() -> None:
    engine = FakeEngine()
    first = wall(engine, requests(4, 1), clock=engine.clock)
    whole = wall(engine, requests(4, 33), clock=engine.clock)
    assert first == PREFILL_S
    assert whole == PREFILL_S + 32 * STEP_S
    assert step_ms(whole, first, 33) == 1000 * STEP_S


def test_other_requests_are_not_awaited() -> None:
    engine = FakeEngine()
    engine.submit(Request("other", [1], SamplingParams(), 1000, []))
    engine.step()
    assert wall(engine, requests(2, 3), clock=engine.clock) == PREFILL_S + 2 * STEP_S
    assert list(engine.running) == ["other"]


def test_a_failed_request_is_raised() -> None:
    engine = FakeEngine(failure=GenerationError("it broke").to_wire())
    with pytest.raises(GenerationError, match="it broke"):
        wall(engine, requests(1, 3))


@dataclass
class FakeGraph:
    """A captured graph, and how often it ran."""

    graph: Any
    runs: int = 0

    def replay(self) -> None:
        self.runs += 1


@dataclass
class FakeRunner:
    model: Any
    graphs: Any = None


def with_runner(engine: FakeEngine, calls: list[int]) -> Any:
    """The engine as the timer sees it: every step calls the runner's model."""
    runner = FakeRunner(lambda batch: calls.append(batch))
    plain = engine.step

    def step() -> list[Update]:
        runner.model(len(engine.running) + len(engine.waiting))
        return plain()

    return SimpleNamespace(
        runner=runner,
        platform=SimpleNamespace(is_cuda=False),
        submit=engine.submit,
        step=step,
    )


def test_the_model_is_timed_in_steps_of_the_whole_batch_and_left_as_it_was() -> None:
    calls: list[int] = []
    engine = with_runner(FakeEngine(), calls)
    model = engine.runner.model
    found = forward_ms(engine, requests(3, 5))
    assert found is not None and found >= 0
    assert engine.runner.model is model
    assert calls == [3] * 5


def test_replays_of_graphs_are_timed_and_the_graphs_are_restored() -> None:
    engine = with_runner(FakeEngine(), [])
    graph = FakeGraph(None)
    captured = {"shape": FakeGraph(graph)}
    engine.runner.graphs = SimpleNamespace(captured=captured)
    plain, seen = engine.step, []

    def step() -> list[Update]:
        one = engine.runner.graphs.captured["shape"]
        seen.append(one.graph is graph)
        one.graph.replay()
        return plain()  # type: ignore[no-any-return]

    engine.step = step
    with ForwardTimer(engine) as timer:
        for timer.on in (False, True, True):
            timer.step()
            engine.submit(requests(1, 1)[0])
            engine.step()
        assert [len(parts) for parts in timer._steps] == [2, 2]  # the graph and the model
    engine.submit(requests(1, 1)[0])
    engine.step()
    assert engine.runner.graphs.captured is captured
    assert seen == [False, False, False, True] and graph.runs == 4


def test_requests_that_never_run_together_are_no_measurement() -> None:
    with pytest.raises(ConfigError, match="3 requests never ran in one step"):
        forward_ms(with_runner(FakeEngine(at_once=2), []), requests(3, 5))
