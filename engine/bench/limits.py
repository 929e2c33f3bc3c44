"""The device's copy and compute rates, and the memory that a workload needs."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial

import torch

from engine.bench_options import Workload
from engine.config import AdapterConfig, EngineConfig
from engine.errors import ConfigError
from engine.runner.memory import ARENA_UNIT

COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
TIMES = 8
SPARE_TOKENS = (
    64  # extra room per request: the scheduler does not admit one that it would soon preempt
)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written: the best of a few large copies, after a warm-up."""
    size = COPY_BYTES[device.type]
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 3)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)
    return 2 * size / _fastest(partial(target.copy_, source), device)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second: the best of a few products of large square matrices, after a warm-up."""
    size = PRODUCT_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = a @ b
    return 2 * size**3 / _fastest(partial(torch.mm, a, b, out=out), device)


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """`copy_bandwidth` and `product_rate`. Frees the device's memory afterwards."""
    found = copy_bandwidth(device), product_rate(device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the best of `TIMES` runs."""
    return min(_seconds(work, device) for _ in range(TIMES))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def needed_fraction(arena_bytes: int, budget: int) -> float:
    """The least --adapter-memory-fraction that holds `arena_bytes` of adapters, to four decimals."""
    units = -(-arena_bytes // ARENA_UNIT) + 1
    return math.ceil(units * ARENA_UNIT / budget * 10_000) / 10_000


def chosen_fraction(config: EngineConfig, needed: float) -> float:
    """The user's fraction; if it has the default value, what the workload needs."""
    given = config.adapters.adapter_memory_fraction
    if given != AdapterConfig().adapter_memory_fraction:
        return given
    if needed >= 1:
        raise ConfigError(
            f"the adapters need {needed:.0%} of the memory budget",
            field="adapters",
            hint="lower --adapters or --ranks, or raise --cpu-memory-gb or --cuda-memory-fraction",
        )
    return needed


def fitting(config: EngineConfig, workload: Workload, positions: int, long: bool) -> EngineConfig:
    """`config` with room for the workload in the settings that are unset.

    `positions` is the model's limit. `long` adds room for the request of --long-context.
    """
    scheduler = config.scheduler
    each = workload.input_tokens + workload.output_tokens
    longest = max(each, workload.long_context) if long else each
    if longest > positions:
        raise ConfigError(
            f"sequences of {longest} tokens exceed the model's limit of {positions}",
            field="long_context" if long else "output_tokens",
            hint="lower --input-tokens, --output-tokens or --long-context",
        )
    if scheduler.max_batch_size is None:
        scheduler = dataclasses.replace(scheduler, max_batch_size=workload.batch)
    if scheduler.max_total_tokens is None:
        total = min(longest + SPARE_TOKENS, positions)
        scheduler = dataclasses.replace(scheduler, max_total_tokens=total)
    if long and scheduler.max_batch_total_tokens is None:
        room = workload.batch * (each + SPARE_TOKENS) + longest + SPARE_TOKENS
        scheduler = dataclasses.replace(scheduler, max_batch_total_tokens=room)
    return dataclasses.replace(config, scheduler=scheduler)


def without_adapters(config: EngineConfig) -> EngineConfig:
    """`config` with LoRA disabled: no arena."""
    adapters = dataclasses.replace(
        config.adapters, adapter_memory_fraction=0.0, max_active_adapters=1
    )
    return dataclasses.replace(config, adapters=adapters)
