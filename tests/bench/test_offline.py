"""Benchmarks of real engines: what the timer measures on each device, and that it restores the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.bench.engine_report import EngineReport
from engine.bench.limits import copy_bandwidth, fitting, needed_fraction, product_rate
from engine.bench.offline import measure
from engine.bench_options import Workload
from engine.config import (
    AdapterConfig,
    EngineConfig,
    MemoryConfig,
    ModelConfig,
    SchedulerConfig,
)
from engine.errors import ConfigError
from engine.platform import detect
from engine.runner.memory import ARENA_UNIT
from tests.tiny import make_model

WORKLOAD = Workload(
    batch=3, input_tokens=9, output_tokens=12, adapters=3, ranks=((4,),), repeat=1, files=1
)


def report_of(folder: Path, workload: Workload, eager: bool = False) -> EngineReport:
    make_model("llama", folder)
    config = EngineConfig(
        model=ModelConfig(model_id=str(folder), dtype="float32"),
        memory=MemoryConfig(cpu_memory_gb=0.1, eager=eager),
    )
    return measure(config, workload)


def test_only_files(tmp_path: Path) -> None:
    workload = Workload(batch=1, files=2, ranks=((5,),), cases=("files",))
    report = report_of(tmp_path, workload)
    assert report.measurements == [] and report.placed is None
    assert report.loaded is not None and report.loaded.adapters == 2
    assert report.adapter_memory_fraction == report.needed_memory_fraction > 0


def test_requests_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    config = EngineConfig(
        model=ModelConfig(model_id=str(tmp_path), dtype="float32"),
        scheduler=SchedulerConfig(max_batch_total_tokens=320),
        memory=MemoryConfig(cpu_memory_gb=0.1),
    )
    with pytest.raises(ConfigError, match="never ran in one step"):
        measure(config, Workload(batch=8, input_tokens=60, output_tokens=40, cases=("base",)))


def test_needed_fraction_is_enough_and_no_more() -> None:
    for budget in (1 << 30, 64_123_456_789):
        for arena in (1, ARENA_UNIT, 10_066_329_600 // 64):
            fraction = needed_fraction(arena, budget)
            units = int(budget * fraction) // ARENA_UNIT
            assert arena <= units * ARENA_UNIT <= arena + 2 * ARENA_UNIT + budget / 10_000


def test_room_for_a_long_context() -> None:
    workload = Workload(batch=4, input_tokens=10, output_tokens=20, long_context=500)
    short = fitting(EngineConfig(), workload, 1000, long=False).scheduler
    assert (short.max_batch_size, short.max_total_tokens) == (4, 94)
    assert short.max_batch_total_tokens is None
    long = fitting(EngineConfig(), workload, 1000, long=True).scheduler
    assert long.max_total_tokens == 564
    assert long.max_batch_total_tokens == 4 * 94 + 564
    given = EngineConfig(
        scheduler=SchedulerConfig(max_batch_size=9, max_total_tokens=600, max_input_length=3)
    )
    assert fitting(given, workload, 1000, long=False) == given


def test_what_a_cpu_moves_and_computes() -> None:
    """More than a slow processor."""
    device = torch.device("cpu")
    assert copy_bandwidth(device) > 1e8
    assert product_rate(device, torch.float32) > 1e8


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [False, True])
def test_on_a_gpu(tmp_path: Path, eager: bool) -> None:
    """The model is timed within its steps, with graphs and without; torch itself is not changed."""
    replay = torch.cuda.CUDAGraph.replay
    report = report_of(tmp_path, WORKLOAD, eager)
    assert torch.cuda.CUDAGraph.replay is replay
    names = [one.case for one in report.measurements]
    assert names == ["base", "LoRA enabled, none used", "1 adapter, rank 4", "3 distinct, rank 4"]
    for one in report.measurements:
        assert one.forward_ms is not None and one.forward_ms > 0
        assert one.resident
    assert report.machine.versions["cuda"] == torch.version.cuda
    assert report.machine.versions["driver"]
    assert report.placed is not None and report.placed.adapters == 3
    assert report.loaded is not None and report.loaded.adapters == 1


@pytest.mark.gpu
def test_what_a_gpu_moves_and_computes() -> None:
    """Between a slow card and twice the fastest of today."""
    device = torch.device("cuda")
    assert 1e11 < copy_bandwidth(device) < 2e13
    assert 1e13 < product_rate(device, torch.bfloat16) < 5e15


@pytest.mark.gpu
def test_the_fraction_fits_the_plan_of_a_gpu(tmp_path: Path) -> None:
    report = report_of(tmp_path, WORKLOAD)
    config = EngineConfig(
        adapters=AdapterConfig(adapter_memory_fraction=report.adapter_memory_fraction)
    )
    budget = detect(config).budget
    assert int(budget * report.needed_memory_fraction) > report.adapter_bytes
