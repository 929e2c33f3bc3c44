"""Plots of a report, as self-contained HTML or as PNG.

The report of an engine becomes bars (each step next to its limit) and a roofline. Those of a server and of a simulation
become curves (the share of times below each value).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.bench.drawing import Bar, Bars, Curves, Drawing, Figure, Point, Roofline
from engine.bench.engine_report import EngineReport
from engine.bench.html import page
from engine.bench.load.load_report import LoadReport
from engine.bench.machine import Machine
from engine.bench.png import figure_class, write_png
from engine.bench.quantiles import Times
from engine.bench.simulate.report import SimulationReport
from engine.errors import ConfigError

Report = EngineReport | LoadReport | SimulationReport


def drawing_of(report: Report) -> Drawing:
    """The figures and conditions of a report."""
    if isinstance(report, EngineReport):
        return _of_engine(report)
    return _of_server(report) if isinstance(report, LoadReport) else _of_simulation(report)


def _of_engine(report: EngineReport) -> Drawing:
    workload = report.workload
    bars = tuple(
        Bar(one.case, one.step_ms, one.forward_ms, one.limit_ms, one.share)
        for one in report.measurements
    )
    requests = f"{workload.batch} x ({workload.input_tokens} + {workload.output_tokens}) tokens"
    facts = [
        ("model", f"{report.model_id}, {report.dtype}"),
        ("requests", requests),
        ("copy bandwidth, read plus written", f"{report.copy_bytes_per_s / 1e9:.1f} GB/s"),
        ("product of large matrices", f"{report.product_flops_per_s / 1e12:.2f} TFLOP/s"),
        ("--adapter-memory-fraction", f"{report.adapter_memory_fraction:.4f}"),
    ]
    title = f"Decode step, {report.model_id}"
    figures: list[Figure] = [Bars(f"{requests}: step, model alone, memory limit", bars)]
    if report.measurements:
        figures.append(_roofline_of(report))
    return Drawing(title, tuple(figures), (*facts, *_machine(report.machine)))


def _roofline_of(report: EngineReport) -> Roofline:
    points = []
    for one in report.measurements:
        for work, ms in ((one.decode, one.step_ms), (one.prefill, one.prefill_ms)):
            if ms <= 0:  # a difference of two wall times, on a noisy machine
                continue
            prefill = work is one.prefill
            intensity = work.flops / work.num_bytes
            points.append(Point(one.case, prefill, intensity, work.flops / ms * 1000))
    rates = report.copy_bytes_per_s, report.product_flops_per_s
    return Roofline(
        "Decode steps and prefills under the roofline of the device", *rates, tuple(points)
    )


def _of_server(report: LoadReport) -> Drawing:
    figures = [
        _curves(
            "Time to first token", all=report.ttft, cold=report.ttft_cold, warm=report.ttft_warm
        )
        if report.ttft_cold
        else _curves("Time to first token", requests=report.ttft),
        _curves("Time between tokens", requests=report.itl),
    ]
    if background := report.background:
        figures.append(
            _curves(
                "Time between tokens of the background streams",
                alone=background.alone,
                **{
                    "no cold adapter loads": background.outside,
                    "a cold adapter loads": background.inside,
                },
            )
        )
    figures.append(_curves("Time to the last token", requests=report.latency))
    facts = [
        ("server", f"{report.url}, {report.model}"),
        *((name, value) for name, value in report.server.items()),
        ("requests", f"{report.completed} of {report.sent} in {report.seconds:.1f} s"),
        ("errors", ", ".join(f"{n} x {kind}" for kind, n in report.errors.items()) or "none"),
        ("tokens", f"{report.tokens_per_s:.1f} per second"),
    ]
    shown = tuple(one for one in figures if one.curves)
    return Drawing(f"Load on {report.model}", shown, (*facts, *_machine(report.machine)))


def _of_simulation(report: SimulationReport) -> Drawing:
    traffic, server, found = report.options.traffic, report.options.server, report.acquisitions
    figures = [
        _curves(
            "Time to first token, by the tier of the adapter at the arrival",
            all=report.ttft,
            device=report.ttft_device,
            host=report.ttft_host,
            source=report.ttft_source,
        ),
        _curves("Time between tokens", requests=report.itl),
        _curves("Time to the last token", requests=report.latency),
    ]
    facts = [
        ("requests", f"{report.completed} of {report.sent}, {traffic.rate:g}/s"),
        ("adapters", f"{traffic.adapters}, Zipf {traffic.zipf:g}"),
        ("arena, host tier", f"{server.arena_gb:g} GiB, {server.host_cache_gb:g} GiB"),
        ("--adapter-cycle-time-s", f"{server.adapter_cycle_time_s:g}"),
        ("hits on the device", f"{found.share(found.device):.1%}"),
        ("hits in host memory", f"{found.share(found.host):.1%}"),
        ("tokens", f"{report.tokens_per_s:.1f} per second"),
        ("lorax", report.version),
    ]
    shown = tuple(one for one in figures if one.curves)
    return Drawing(f"Simulation of {traffic.adapters} adapters", shown, tuple(facts))


def _curves(title: str, **times: Times | None) -> Curves:
    return Curves(title, {name: one.curve for name, one in times.items() if one})


def _machine(machine: Machine) -> Sequence[tuple[str, str]]:
    versions = ", ".join(f"{name} {value}" for name, value in machine.versions.items())
    return [("device", machine.device), ("versions", versions), ("date", machine.date)]


def check_plot(path: Path) -> None:
    """Raises ConfigError if `draw` does not support the file, so that nothing is measured in vain."""
    if path.suffix not in (".html", ".png"):
        raise ConfigError(
            f"--plot {path}: unknown file type",
            field="plot",
            hint="use a file name that ends in .html or .png",
        )
    if path.suffix == ".png":
        figure_class()


def draw(report: Report, path: Path) -> None:
    """Writes the plot as the file type says. Raises ConfigError."""
    check_plot(path)
    drawing = drawing_of(report)
    if path.suffix == ".html":
        path.write_text(page(drawing), encoding="utf-8")
    else:
        write_png(drawing, path)
