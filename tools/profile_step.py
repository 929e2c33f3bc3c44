"""Steps on a GPU, profiled: time in kernels against wall time, so the gaps; the longest kernels.

    python -m tools.profile_step [--shape mistral-7b] [--batch 64] [--adapters 0] [--modes prefill,decode,mixed]

Prefill is one step that takes a prompt of every row; decode a step of rows that all have their prompt; mixed such a
step that takes one more prompt, as long as such a step has room for.

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
SPARE_ROWS = 8  # for prompts beside decoding rows


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
        max_batch_size=batch + SPARE_ROWS,
        max_batch_prefill_tokens=batch * PROMPT,
        max_total_tokens=total,
        prefix_caching=False,
    )
    config = EngineConfig(model, scheduler=scheduler, memory=MemoryConfig(device="cuda"))
    fraction = needed_fraction(images.arena_bytes, detect(config).budget)
    arena = AdapterConfig(adapter_memory_fraction=fraction)
    return Engine(replace(config, adapters=arena), images.region), images


class Steps:
    """An engine's steps in one mode after the other."""

    def __init__(self, engine: Engine, images: Images, batch: int, adapters: int) -> None:
        """Prompts are of `adapters` adapters in turn (0: base)."""
        self.engine, self.batch, self.adapters = engine, batch, adapters
        self.refs = images.mixes[0][:adapters] if adapters else [None]
        self.submitted = 0
        # tokens of a mixed step's prompt
        beside = engine.scheduler.limits.chunk_tokens
        self.beside = min(beside[batch], PROMPT) if beside else PROMPT

    def submit(self, requests: int, new: int, length: int = PROMPT) -> None:
        """So many prompts of `length` tokens, and `new` tokens for each."""
        for number in range(self.submitted, self.submitted + requests):
            tokens = [(number * 31 + i) % self.engine.spec.vocab for i in range(length)]
            adapter = self.refs[number % len(self.refs)]
            request = Request(
                id=str(number),
                tokens=tokens,
                sampling=SamplingParams(),
                max_new_tokens=new,
                eos_token_ids=[],
                adapter=adapter,
            )
            self.engine.submit(request)
        self.submitted += requests

    def prepare(self, mode: str, new: int) -> None:
        """Adapters are placed, graphs and libraries warm; but for prefill, `batch` rows run."""
        if mode == "prefill":
            for _ in range(2):
                self.run(mode, 1)
        elif self.engine.stats.running < self.batch:
            self.submit(self.batch, new)
            while (
                self.engine.stats.running < self.batch or self.engine.stats.placed < self.adapters
            ):
                self.engine.step()
        self.run(mode, WARM_UP_STEPS if mode != "prefill" else 1)

    def run(self, mode: str, steps: int) -> float:
        """Seconds a step."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            if mode == "prefill":
                self.submit(self.batch, 1)
                while self.engine.has_work:
                    self.engine.step()
            else:
                self.submit(mode == "mixed", 1, self.beside)
                self.engine.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps

    def profile(self, mode: str, steps: int, folder: Path) -> list[dict[str, Any]]:
        """The events of so many steps."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            self.run(mode, steps)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        events: list[dict[str, Any]] = json.loads((folder / "trace.json").read_text())[
            "traceEvents"
        ]
        return events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="mistral-7b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=0, help="distinct, of rank 16; 0: base")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--modes", default="decode", help="of prefill, decode, mixed, in order")
    given = parser.parse_args()
    new = 2 * (WARM_UP_STEPS + TIMED_STEPS + given.steps) + given.batch + 64
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine, images = engine_of(
            folder,
            given.shape,
            batch=given.batch,
            adapters=max(given.adapters, 1),
            rank=16,
            total=PROMPT + new + 1,
        )
        steps = Steps(engine, images, given.batch, given.adapters)
        what = f"{given.adapters} distinct adapters" if given.adapters else "base"
        for mode in given.modes.split(","):
            steps.prepare(mode, new)
            times, profiled = (3, 1) if mode == "prefill" else (TIMED_STEPS, given.steps)
            plain = steps.run(mode, times)
            events = steps.profile(mode, profiled, folder)
            print(f"{engine.platform.name}, {given.batch} rows, {what}, {mode}")
            print(f"step without the profiler {plain * 1000:.3f} ms")
            print("\n".join(report(events, profiled)))
    engine.close()
    images.region.close()


if __name__ == "__main__":
    main()
