"""Times a batch from its first step to its last token, and the model alone within a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Protocol, Self

import torch

from engine.errors import ConfigError, from_wire
from engine.messages import Request, Update


class Steps(Protocol):
    """The part of `engine.engine.Engine` that runs requests."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, request: Request) -> None: ...
    def step(self) -> list[Update]: ...


def step_ms(all_tokens_s: float, first_token_s: float, tokens: int) -> float:
    """Time of a decode step: (wall time of `tokens` tokens - wall time of 1) / (tokens - 1)."""
    return (all_tokens_s - first_token_s) / (tokens - 1) * 1000


def wall(
    engine: Steps,
    requests: Iterable[Request],
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], None] = lambda: None,
) -> float:
    """Seconds until all of these requests end. Other requests may continue to run."""
    open_ids = submit(engine, requests)
    synchronize()
    start = clock()
    while open_ids:
        ended(open_ids, engine.step())
    synchronize()
    return clock() - start


def submit(engine: Steps, requests: Iterable[Request]) -> set[str]:
    """Submits requests and returns their ids."""
    ids = set()
    for request in requests:
        engine.submit(request)
        ids.add(request.id)
    return ids


def ended(open_ids: set[str], updates: Iterable[Update]) -> bool:
    """Removes ended requests from `open_ids` and returns whether there were any. Raises the error of a failed one."""
    before = len(open_ids)
    for update in updates:
        if update.error is not None:
            raise from_wire(update.error)
        if update.finish is not None:
            open_ids.discard(update.id)
    return len(open_ids) < before


class ForwardTimer:
    """Times the model within the steps of an engine, while the timer is open and `on`.

    It replaces the runner's model, and its captured graphs if there are any, by timed ones. Times are from CUDA events
    on a GPU, from the clock on a CPU.
    """

    def __init__(self, engine: Any) -> None:
        self._runner = engine.runner
        self._cuda: bool = engine.platform.is_cuda
        self._restore = ExitStack()
        self._steps: list[list[Any]] = []
        self.on = False

    def __enter__(self) -> Self:
        self._replace(self._runner, "model", self._timed(self._runner.model))
        if (graphs := self._runner.graphs) is not None:
            timed = {
                key: replace(one, graph=SimpleNamespace(replay=self._timed(one.graph.replay)))
                for key, one in graphs.captured.items()
            }
            self._replace(graphs, "captured", timed)
        return self

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._restore.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def __exit__(self, *failure: object) -> None:
        self._restore.close()

    def step(self) -> None:
        """Begins a step."""
        if self.on:
            self._steps.append([])

    def _timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
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
        """The median over the timed steps; None if there were none."""
        if self._cuda:
            torch.cuda.synchronize()

        def ms(begin: Any, end: Any) -> float:
            return begin.elapsed_time(end) if self._cuda else (end - begin) * 1000

        found = [sum(ms(*part) for part in step) for step in self._steps if step]
        return statistics.median(found) if found else None


def forward_ms(engine: Any, requests: Iterable[Request]) -> float | None:
    """Median time of the model in decode steps of the whole batch.

    Raises ConfigError if the requests never all ran in one step.
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
            f"the {len(ids)} requests never ran in one step",
            hint="raise --cpu-memory-gb, --cuda-memory-fraction or --output-tokens, or lower --batch",
        )
    return timer.median_ms()
