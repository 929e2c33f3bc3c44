"""One decode step on a GPU, profiled: time in kernels against wall time, so the gaps; the longest kernels.

    python -m tools.profile_step [--shape mistral-7b] [--batch 64] [--adapters 0] [--steps 30]

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
    scheduler = SchedulerConfig(max_batch_size=batch, max_total_tokens=total, prefix_caching=False)
    config = EngineConfig(model, scheduler=scheduler, memory=MemoryConfig(device="cuda"))
    fraction = needed_fraction(images.arena_bytes, detect(config).budget)
    arena = AdapterConfig(adapter_memory_fraction=fraction)
    return Engine(replace(config, adapters=arena), images.region), images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="mistral-7b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=0, help="distinct, of rank 16; 0: base")
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    new = WARM_UP_STEPS + TIMED_STEPS + given.steps + given.batch + 64
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine, images = engine_of(
            folder, given.shape, given.batch, max(given.adapters, 1), 16, PROMPT + new + 1
        )
        refs = images.mixes[0] if given.adapters else [None]
        for number in range(given.batch):
            tokens = [(number * 31 + i) % engine.spec.vocab for i in range(PROMPT)]
            adapter = refs[number % len(refs)]
            engine.submit(Request(str(number), tokens, SamplingParams(), new, [], adapter))
        while engine.stats.running < given.batch or engine.stats.placed < given.adapters:
            engine.step()
        for _ in range(WARM_UP_STEPS):
            engine.step()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(TIMED_STEPS):
            engine.step()
        torch.cuda.synchronize()
        plain = (time.perf_counter() - started) / TIMED_STEPS
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(given.steps):
                engine.step()
            torch.cuda.synchronize()
        profiler.export_chrome_trace(str(folder / "trace.json"))
        events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    what = f"{given.adapters} distinct adapters" if given.adapters else "base"
    print(f"{engine.platform.name}, {given.batch} rows, {what}")
    print(f"step without the profiler {plain * 1000:.3f} ms")
    print("\n".join(report(events, given.steps)))
    engine.close()
    images.region.close()


if __name__ == "__main__":
    main()
