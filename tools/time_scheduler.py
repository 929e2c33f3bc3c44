"""Microseconds (of CPU time) of plan and commit in steady state: every row decodes, no request comes or goes.

python tools/time_scheduler.py [rows] [adapters] [waiting]
"""

from __future__ import annotations

import statistics
import sys
import time

from engine.messages import AdapterImageRef, Request, SamplingParams, StepResult, TokenOutput
from engine.scheduler import BlockPool, Scheduler, SchedulerLimits
from engine.scheduler.slots import SlotTable

STEPS = 1000


def main(rows: int = 64, adapters: int = 16, waiting: int = 0) -> None:
    limits = SchedulerLimits(rows, 4096, 4096, 8192, 2.0)
    pool = BlockPool(rows * 512 + 1, 16)
    scheduler = Scheduler(limits, pool, SlotTable(adapters + 1, adapters << 20))
    for index in range(rows + waiting):
        number = index % (adapters + 1)
        digest = number.to_bytes(16, "little")
        image = AdapterImageRef(digest, 0, 1 << 20, 8) if number else None
        request = Request(
            id=str(index),
            tokens=[index + 1] * 32,
            sampling=SamplingParams(),
            max_new_tokens=8000,
            eos_token_ids=[0],
            adapter=image,
        )
        scheduler.add(request)
    plans: list[float] = []
    commits: list[float] = []
    decoding, flight = 0, None
    while len(plans) < STEPS:
        start = time.thread_time()
        plan = scheduler.plan()
        planned = time.thread_time() - start
        assert plan is not None
        decoding = decoding if plan.decode is None else len(plan.decode)
        count = decoding + sum(chunk.sample for chunk in plan.chunks)
        resident = [placement.slot for placement in plan.placements]
        result = StepResult(plan.step, [TokenOutput(7) for _ in range(count)], {}, resident)
        flight, ready = result, flight
        if ready is None:
            continue
        start = time.thread_time()
        scheduler.commit(ready)
        if decoding == rows:
            plans.append(planned * 1e6)
            commits.append((time.thread_time() - start) * 1e6)
    for name, times in (("plan", plans), ("commit", commits)):
        ordered = sorted(times)
        worst = ordered[len(ordered) * 99 // 100]
        print(f"{name:7} median {statistics.median(times):6.1f} us   p99 {worst:6.1f} us")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
