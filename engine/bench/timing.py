"""How long things take: a batch from its first step to its last token, and the model alone within a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from engine.errors import ConfigError, from_wire
from engine.messages import Request, Update


class Steps(Protocol):
    """What is asked of `engine.engine.Engine`."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, request: Request) -> None: ...
    def step(self) -> list[Update]: ...


def step_ms(all_tokens_s: float, first_token_s: float, tokens: int) -> float:
    """The definition: (wall time of generating `tokens` - wall time of generating 1) / (tokens - 1)."""
    return (all_tokens_s - first_token_s) / (tokens - 1) * 1000


def wall(
    engine: Steps,
    requests: Iterable[Request],
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], None] = lambda: None,
) -> float:
    """Seconds until all of these requests have ended. Others may run on beside them."""
    open_ids = submit(engine, requests)
    synchronize()
    start = clock()
    while open_ids:
        ended(open_ids, engine.step())
    synchronize()
    return clock() - start


def submit(engine: Steps, requests: Iterable[Request]) -> set[str]:
    """Hands them over; returns their ids."""
    ids = set()
    for request in requests:
        engine.submit(request)
        ids.add(request.id)
    return ids


def ended(open_ids: set[str], updates: Iterable[Update]) -> bool:
    """Takes the ids of requests that ended out of `open_ids`; were there any? Raises the error of one that failed."""
    before = len(open_ids)
    for update in updates:
        if update.error is not None:
            raise from_wire(update.error)
        if update.finish is not None:
            open_ids.discard(update.id)
    return len(open_ids) < before


class ForwardTimer:
    """Times the model within the steps of an engine, while open.

    On a GPU by events around every replay of a graph, or around the model's call without graphs; on a CPU the call.
    """

    def __init__(self, engine: Any) -> None:
        self._runner = engine.runner
        self._cuda: bool = engine.platform.is_cuda
        self._model: Any = None
        self._replay: Any = None
        self._steps: list[list[Any]] = []
        self.on = False

    def __enter__(self) -> Self:
        self._model = self._runner.model
        self._runner.model = self._around(self._model)
        if self._cuda:
            self._replay = torch.cuda.CUDAGraph.replay
            torch.cuda.CUDAGraph.replay = self._around(  # type: ignore[method-assign]
                self._replay
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._runner.model = self._model
        if self._cuda:
            torch.cuda.CUDAGraph.replay = self._replay  # type: ignore[method-assign]

    def step(self) -> None:
        """A step begins."""
        if self.on:
            self._steps.append([])

    def _around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            if not self.on:
                return work(*given)
            begin = self._now()
            done = work(*given)
            self._steps[-1].append((begin, self._now()))
            return done

        return timed

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def median_ms(self) -> float | None:
        """Of the steps in which something was timed; None if there were none."""
        if self._cuda:
            torch.cuda.synchronize()

        def ms(begin: Any, end: Any) -> float:
            return begin.elapsed_time(end) if self._cuda else (end - begin) * 1000

        found = [sum(ms(*part) for part in step) for step in self._steps if step]
        return statistics.median(found) if found else None


def forward_ms(engine: Any, requests: Iterable[Request]) -> float | None:
    """Median time of the model in the decode steps of the whole batch.

    Raises ConfigError if the requests never all ran at the same time: a step of fewer is no measurement.
    """
    ids = submit(engine, requests)
    waiting, open_ids = set(ids), set(ids)
    together = False
    with ForwardTimer(engine) as timer:
        while open_ids:
            timer.step()
            updates = engine.step()
            waiting -= {update.id for update in updates if update.tokens}
            if ended(open_ids, updates):
                timer.on = False
            elif not waiting and len(open_ids) == len(ids):
                timer.on = together = True
        timer.on = False
    if not together:
        raise ConfigError(
            f"{len(ids)} requests never ran together",
            hint="raise --cpu-memory-gb or --cuda-memory-fraction, or lower --batch; "
            "or raise --output-tokens",
        )
    return timer.median_ms()
