"""Adapter copies into a GPU's arena: alone, and beside decode steps, with what they cost the steps.

    python -m tools.bench_copy [--shape mistral-7b] [--batch 64] [--adapters 32] [--rank 16] [--seconds 3]

The model's weights and the adapters are random. Three phases: copies without steps, steps without copies, both. A copy
begins anew as soon as it has landed, at the same place, so the arena is written all the time; the steps are of the base
model and read none of it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.engine import Engine
from engine.messages import AdapterImageRef, Placement, Request, SamplingParams, aligned
from engine.runner.placement import Budget
from tools.profile_step import engine_of

PROMPT, LONGEST = 128, 4096
WARM_UP_STEPS = 20


class Copies:
    """Stands before an engine's placer: the scheduler learns nothing of the copies that it keeps going."""

    def __init__(self, engine: Engine, refs: list[AdapterImageRef]) -> None:
        self.placer = engine.runner.placer
        self.going = False
        self.landed = 0  # bytes
        self._advance = self.placer.advance
        self._placements: dict[int, Placement] = {}
        offset = 0
        for slot, image in enumerate(refs, 1):
            self._placements[slot] = Placement(slot, offset, image)
            offset += aligned(image.data_bytes)
        self._idle = set(self._placements)
        self.placer.advance = self.advance  # type: ignore[method-assign]

    def advance(self, budget: Budget) -> list[int]:
        for slot in self._idle if self.going else ():
            self.placer.start(self._placements[slot])
        if self.going:
            self._idle = set()
        for slot in self._advance(budget):
            self.landed += self._placements[slot].image.data_bytes
            self._idle.add(slot)
        return []

    def settle(self) -> None:
        """Stops, and waits for what is on its way."""
        self.going = False
        while len(self._idle) < len(self._placements):
            self.advance(self.placer.idle)


def submit(engine: Engine, batch: int) -> None:
    """Requests that decode for longer than any phase."""
    for number in range(batch):
        tokens = [(number * 31 + i) % engine.spec.vocab for i in range(PROMPT)]
        engine.submit(Request(str(number), tokens, SamplingParams(), LONGEST - PROMPT - 1, []))
    for _ in range(WARM_UP_STEPS):
        engine.step()


def phase(seconds: float, turn: Callable[[], object]) -> tuple[list[float], float]:
    """(seconds of every turn, seconds in all)."""
    torch.cuda.synchronize()
    started = last = time.perf_counter()
    turns = []
    while last - started < seconds:
        turn()
        now = time.perf_counter()
        turns.append(now - last)
        last = now
    return turns, last - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="mistral-7b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine, images = engine_of(
            Path(folder),
            given.shape,
            batch=given.batch,
            adapters=given.adapters,
            rank=given.rank,
            total=LONGEST,
        )
    (refs,) = images.mixes
    copies = Copies(engine, refs)
    size = refs[0].data_bytes / 1e6
    print(f"{engine.platform.name}: {len(refs)} adapters of {size:.1f} MB, {given.batch} rows")

    def copy() -> None:
        copies.advance(copies.placer.idle)
        time.sleep(0.0002)  # what the engine's loop leaves between two looks

    copies.going = True
    _, took = phase(given.seconds, copy)
    alone = copies.landed / took
    print(f"copies alone          {alone / 1e9:7.2f} GB/s")
    copies.settle()
    submit(engine, given.batch)
    before, _ = phase(given.seconds, engine.step)
    copies.going, copies.landed = True, 0
    beside, took = phase(given.seconds, engine.step)
    rate = copies.landed / took
    copies.settle()
    after, _ = phase(given.seconds, engine.step)
    quiet = statistics.median(before + after) * 1000
    loaded = statistics.median(beside) * 1000
    slowest = sorted(beside)[len(beside) * 99 // 100] * 1000
    print(f"copies beside steps   {rate / 1e9:7.2f} GB/s, {rate / alone:.0%} of alone")
    print(f"step without copies   {quiet:7.3f} ms")
    print(
        f"step beside copies    {loaded:7.3f} ms, {loaded / quiet:.3f} times; p99 {slowest:.3f} ms"
    )
    engine.close()
    images.region.close()


if __name__ == "__main__":
    main()
