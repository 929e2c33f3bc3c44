"""Pictures of a report: self-contained HTML with drawings in it, or PNG by matplotlib.

An engine's report becomes bars (a step beside its limit), a server's becomes curves (which share of the times is
below a value).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from engine.bench.html import page
from engine.bench.load.report import LoadReport
from engine.bench.machine import Machine
from engine.bench.quantiles import Times
from engine.bench.report import Report
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    step_ms: float
    forward_ms: float | None
    limit_ms: float
    share: float


@dataclass(frozen=True, slots=True)
class Bars:
    title: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Curves:
    """Cumulative distributions: name -> quantiles in equal steps from 0 to 1, in milliseconds."""

    title: str
    curves: dict[str, tuple[float, ...]]


Figure = Bars | Curves


@dataclass(frozen=True, slots=True)
class Drawing:
    """What is drawn, and the conditions beneath it."""

    title: str
    figures: tuple[Figure, ...]
    facts: tuple[tuple[str, str], ...]


def drawing_of(report: Report | LoadReport) -> Drawing:
    """What there is to see in a report."""
    return _of_engine(report) if isinstance(report, Report) else _of_server(report)


def _of_engine(report: Report) -> Drawing:
    workload = report.workload
    bars = tuple(
        Bar(one.case, one.step_ms, one.forward_ms, one.limit_ms, one.share)
        for one in report.measurements
    )
    asked = f"{workload.batch} x ({workload.input_tokens} + {workload.output_tokens}) tokens"
    facts = [
        ("model", f"{report.model_id}, {report.dtype}"),
        ("requests", asked),
        ("copy bandwidth, read plus written", f"{report.copy_bytes_per_s / 1e9:.1f} GB/s"),
        ("--adapter-memory-fraction", f"{report.adapter_memory_fraction:.4f}"),
    ]
    title = f"Decode step, {report.model_id}"
    figure = Bars(f"{asked}: step, model alone, and limit by memory", bars)
    return Drawing(title, (figure,), (*facts, *_machine(report.machine)))


def _of_server(report: LoadReport) -> Drawing:
    figures = [
        _curves(
            "Time to first token", all=report.ttft, cold=report.ttft_cold, warm=report.ttft_warm
        )
        if report.ttft_cold
        else _curves("Time to first token", requests=report.ttft),
        _curves("Time between tokens", requests=report.itl),
    ]
    if beside := report.background:
        figures.append(
            _curves(
                "Time between tokens of the endless streams",
                alone=beside.alone,
                **{"no cold adapter loads": beside.outside, "a cold adapter loads": beside.inside},
            )
        )
    figures.append(_curves("Time to the last token", requests=report.latency))
    facts = [
        ("server", f"{report.url}, {report.model}"),
        *((name, value) for name, value in report.server.items()),
        ("requests", f"{report.completed} of {report.sent} in {report.seconds:.1f} s"),
        ("errors", ", ".join(f"{n} x {kind}" for kind, n in report.errors.items()) or "none"),
        ("tokens", f"{report.tokens_per_s:.1f} a second"),
    ]
    shown = tuple(one for one in figures if one.curves)
    return Drawing(f"Load on {report.model}", shown, (*facts, *_machine(report.machine)))


def _curves(title: str, **times: Times | None) -> Curves:
    return Curves(title, {name: one.curve for name, one in times.items() if one})


def _machine(machine: Machine) -> Sequence[tuple[str, str]]:
    versions = ", ".join(f"{name} {value}" for name, value in machine.versions.items())
    return [("device", machine.device), ("versions", versions), ("date", machine.date)]


def check_plot(path: Path) -> None:
    """Raises ConfigError for a file that `draw` could not write, before anything is measured."""
    if path.suffix not in (".html", ".png"):
        raise ConfigError(
            f"--plot {path}: neither .html nor .png", field="plot", hint="name it so, to say which"
        )
    if path.suffix == ".png":
        _matplotlib()


def _matplotlib() -> Any:
    try:
        import_module("matplotlib.backends.backend_agg")  # draws without a display
        return import_module("matplotlib.figure").Figure
    except ImportError:
        raise ConfigError(
            "--plot: a PNG is drawn by matplotlib, which is not installed",
            field="plot",
            hint="pip install 'lorax-engine[bench]', or name the file .html",
        ) from None


def draw(report: Report | LoadReport, path: Path) -> None:
    """Writes the picture; the file's ending says which kind. Raises ConfigError."""
    check_plot(path)
    drawing = drawing_of(report)
    if path.suffix == ".html":
        path.write_text(page(drawing), encoding="utf-8")
    else:
        _png(drawing, path)


def _png(drawing: Drawing, path: Path) -> None:
    count = len(drawing.figures)
    heights = [1 + 0.5 * len(one.bars) if isinstance(one, Bars) else 3.5 for one in drawing.figures]
    canvas = _matplotlib()(figsize=(9, sum(heights) + 1), layout="constrained")
    canvas.suptitle(drawing.title)
    axes = canvas.subplots(count, 1, squeeze=False, height_ratios=heights)[:, 0] if count else ()
    for figure, ax in zip(drawing.figures, axes, strict=True):
        ax.set_title(figure.title, fontsize=10)
        ax.set_xlabel("milliseconds", fontsize=9)
        if isinstance(figure, Bars):
            _bars(figure, ax)
        else:
            for name, curve in figure.curves.items():
                ax.plot(curve, [at / (len(curve) - 1) for at in range(len(curve))], label=name)
            ax.set_xscale("log")
            ax.set_ylim(0, 1)
            ax.legend(fontsize=8)
            ax.grid(alpha=0.3)
    canvas.savefig(path, dpi=130)


def _bars(figure: Bars, ax: Any) -> None:
    at = range(len(figure.bars))
    ax.barh(at, [bar.step_ms for bar in figure.bars], color="#b8c7dc", label="step")
    forward = [bar.forward_ms or 0.0 for bar in figure.bars]
    ax.barh(at, forward, height=0.4, color="#4c72b0", label="model alone")
    ax.scatter(
        [bar.limit_ms for bar in figure.bars], at, marker="|", s=400, color="#c44e52", label="limit"
    )
    ax.set_yticks(at, [bar.label for bar in figure.bars], fontsize=8)
    ax.invert_yaxis()
    for index, bar in enumerate(figure.bars):
        ax.text(bar.step_ms, index, f" {bar.share:.0%}", va="center", fontsize=8)
    ax.legend(fontsize=8)
