"""Decode steps on a GPU, or a prefill, profiled: time in kernels against wall time, so the gaps; the longest kernels.

    python -m tools.profile_step [--shape mistral-7b] [--batch 64] [--adapters 0] [--steps 30] [--prefill]

Gaps are the moments in which the device does nothing, from the first kernel of the profiled steps to the last. Copies
of adapters are not counted as work. The profiler itself slows the host; the step without it is printed beside.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.bench.adapters import Images
from engine.bench.limits import needed_fraction
from engine.bench.shapes import write_model
from engine.config import AdapterConfig, EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.messages import Request, SamplingParams
from engine.models import adapter_layout
from engine.platform import detect

PROMPT, WARM_UP_STEPS, TIMED_STEPS = 128, 30, 100
LONGEST_KERNELS = 14


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def report(events: list[dict[str, Any]], steps: int) -> list[str]:
    """Lines about a trace's kernels; times in microseconds."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if not kernels:
        return ["the profiler saw no kernels"]
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in kernels]
    wall = max(end for _, end in spans) - min(begin for begin, _ in spans)
    working = busy(spans)
    lines = [
        f"profiled step {wall / steps / 1000:.3f} ms, of which kernels {working / steps / 1000:.3f} ms: "
        f"gap {1 - working / wall:.2%}, {len(kernels) / steps:.0f} kernels a step"
    ]
    of_kernel: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        of_kernel[event["name"]].append(event["dur"])
    longest = sorted(of_kernel.items(), key=lambda item: -sum(item[1]))[:LONGEST_KERNELS]
    for name, durations in longest:
        share = sum(durations) / steps
        lines.append(f"{share:9.1f} us {len(durations) / steps:6.1f} times  {name[:90]}")
    return lines


def engine_of(
    folder: Path, shape: str, batch: int, adapters: int, rank: int, total: int
) -> tuple[Engine, Images]:
    """An engine of made-up weights on the GPU, for sequences of `total` tokens, and adapters that its arena holds."""
    model = ModelConfig(
        str(write_model(folder / shape, shape)), dtype="bfloat16", load_format="dummy"
    )
    images = Images(adapter_layout(model, "cuda")[0], [[rank]], adapters)
    scheduler = SchedulerConfig(
        max_batch_size=batch,
        max_batch_prefill_tokens=batch * PROMPT,
        max_total_tokens=total,
        prefix_caching=False,
    )
    config = EngineConfig(model, scheduler=scheduler, memory=MemoryConfig(device="cuda"))
    fraction = needed_fraction(images.arena_bytes, detect(config).budget)
    arena = AdapterConfig(adapter_memory_fraction=fraction)
    return Engine(replace(config, adapters=arena), images.region), images


def submit(engine: Engine, images: Images, batch: int, adapters: int, new: int, name: str) -> None:
    """`batch` prompts of PROMPT tokens, of `adapters` adapters in turn (0: base)."""
    refs = images.mixes[0] if adapters else [None]
    for number in range(batch):
        tokens = [(number * 31 + i) % engine.spec.vocab for i in range(PROMPT)]
        adapter = refs[number % len(refs)]
        engine.submit(Request(f"{name}{number}", tokens, SamplingParams(), new, [], adapter))


def timed(engine: Engine, steps: int) -> float:
    """Seconds a step; 0 steps: until nothing is left, all of it."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        engine.step()
    while not steps and engine.has_work:
        engine.step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / max(steps, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="mistral-7b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=0, help="distinct, of rank 16; 0: base")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prefill", action="store_true", help="one step that takes all prompts")
    given = parser.parse_args()
    new = WARM_UP_STEPS + TIMED_STEPS + given.steps + given.batch + 64
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine, images = engine_of(
            folder, given.shape, given.batch, max(given.adapters, 1), 16, PROMPT + new + 1
        )
        load = partial(submit, engine, images, given.batch, given.adapters)
        if given.prefill:
            steps = 1
            for turn in ("placed", "warm"):  # adapters stay where they are
                load(1, turn)
                timed(engine, 0)
            load(1, "plain")
            plain = timed(engine, 0)
            load(1, "profiled")
        else:
            steps = given.steps
            load(new, "")
            while engine.stats.running < given.batch or engine.stats.placed < given.adapters:
                engine.step()
            timed(engine, WARM_UP_STEPS)
            plain = timed(engine, TIMED_STEPS)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            timed(engine, 0 if given.prefill else steps)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    what = f"{given.adapters} distinct adapters" if given.adapters else "base"
    print(f"{engine.platform.name}, {given.batch} rows, {what}")
    print(f"step without the profiler {plain * 1000:.3f} ms")
    print("\n".join(report(events, steps)))
    engine.close()
    images.region.close()


if __name__ == "__main__":
    main()
