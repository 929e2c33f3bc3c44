"""Simulates a server over ranges of its settings; prints tables and draws docs/notebook/simulation.png.

python -m tools.sweep_simulation [requests]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.bench.png import figure_class
from engine.bench.simulate.report import SimulationReport
from engine.bench.simulate.run import simulate
from engine.bench_options import SimulatedServer, Simulation, Span, Traffic

PLOT = Path(__file__).resolve().parent.parent / "docs" / "notebook" / "simulation.png"
REQUESTS = 10_000
ROOMY, TIGHT = (
    SimulatedServer(host_cache_gb=64.0),
    SimulatedServer(host_cache_gb=64.0, arena_gb=2.0),
)
LONG = Traffic(rate=10.0, zipf=0.6, output_tokens=Span(512, 512))  # a tight arena is all in use


COLUMNS = (
    "device",
    "host",
    "source",
    "first token p50, ms",
    "p99",
    "max",
    "gap p99, ms",
    "last token p50, ms",
    "p99",
    "tokens/s",
    "placements",
    "Jain",
)


@dataclass(frozen=True, slots=True)
class Sweep:
    """One setting over some values; the rest stays."""

    setting: str
    values: Sequence[float]
    server: SimulatedServer
    traffic: Traffic = Traffic()
    share: float = 1.0  # of the requests


SWEEPS = (
    Sweep("host_cache_gb", (2, 4, 8, 16, 32, 64, 128), SimulatedServer()),
    Sweep("arena_gb", (2, 4, 8, 12.5, 25, 50), ROOMY),
    Sweep("adapter_cycle_time_s", (0.5, 1, 2, 4), TIGHT, LONG, 1 / 5),
    Sweep("max_active_adapters", (16, 32, 64, 128, 256, 1024), ROOMY, Traffic(adapter_mb=(21.0,))),
)


def main(requests: int = REQUESTS) -> None:
    reports = []
    for sweep in SWEEPS:
        print(f"\n| {' | '.join((sweep.setting, *COLUMNS))} |")
        print(f"|{'---|' * (len(COLUMNS) + 1)}")
        found = []
        for value in sweep.values:
            traffic = replace(sweep.traffic, requests=int(requests * sweep.share))
            changed: dict[str, Any] = {sweep.setting: value}
            report = simulate(Simulation(traffic, replace(sweep.server, **changed)))
            print(f"| {value:g} | {' | '.join(cells(report))} |", flush=True)
            found.append(report)
        reports.append(found)
    draw(reports)


def cells(report: SimulationReport) -> list[str]:
    """The figures of one row."""
    found, fair = report.acquisitions, report.fairness
    assert report.ttft is not None and report.itl is not None
    assert report.latency is not None and fair is not None
    shares = [f"{found.share(one):.1%}" for one in (found.device, found.host, found.source)]
    times = [report.ttft.p50, report.ttft.p99, report.ttft.max, report.itl.p99]
    times += [report.latency.p50, report.latency.p99]
    return [
        *shares,
        *(f"{one:.1f}" for one in times),
        f"{report.tokens_per_s:.0f}",
        f"{report.placements}",
        f"{fair.jain:.3f}",
    ]


def draw(reports: list[list[SimulationReport]]) -> None:
    """Times to the first and last token above, shares of the tiers below, a column per setting."""
    canvas = figure_class()(figsize=(4 * len(SWEEPS), 6.5), layout="constrained")
    axes = canvas.subplots(2, len(SWEEPS), squeeze=False, sharex="col")
    for column, (sweep, found) in enumerate(zip(SWEEPS, reports, strict=True)):
        times, shares = axes[0, column], axes[1, column]
        at = range(len(sweep.values))
        for field, name in (("ttft", "p50"), ("ttft", "p99"), ("latency", "p50")):
            label = f"{'first' if field == 'ttft' else 'last'} token, {name}"
            values = [getattr(getattr(one, field), name) for one in found]
            times.plot(at, values, marker="o", label=label)
        times.set_yscale("log")
        for tier in ("device", "host", "source"):
            counts = [one.acquisitions for one in found]
            values = [100 * one.share(getattr(one, tier)) for one in counts]
            shares.plot(at, values, marker="o", label=tier)
        shares.set_xticks(at, [f"{value:g}" for value in sweep.values], fontsize=8)
        shares.set_xlabel(sweep.setting)
        for one in (times, shares):
            one.grid(alpha=0.3)
    axes[0, 0].set_ylabel("milliseconds")
    axes[1, 0].set_ylabel("requests by tier of their adapter, %")
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].legend(fontsize=8)
    canvas.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
