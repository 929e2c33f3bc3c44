"""Pictures of a report: self-contained HTML with drawings in it, or PNG by matplotlib.

An engine's report becomes bars (a step beside its limit) and a roofline, a server's becomes curves (which share of the
times is below a value).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from engine.bench.html import COLOURS, ROOF_AXIS, by_case, page, ticks
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


@dataclass(frozen=True, slots=True)
class Point:
    """A case's decode step, or its prefill."""

    label: str
    prefill: bool
    flops_per_byte: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """What was reached, below what the device moves and computes at most (Williams, Waterman and Patterson 2009)."""

    title: str
    bytes_per_s: float
    flops_per_s: float
    points: tuple[Point, ...]

    @property
    def ridge(self) -> float:
        """Operations a byte from which computing takes longer than moving."""
        return self.flops_per_s / self.bytes_per_s

    @property
    def corners(self) -> tuple[tuple[float, float], ...]:
        """The roof, from left to right: (operations a byte, operations a second)."""
        at = [self.ridge, *(point.flops_per_byte for point in self.points)]
        left, right = min(at) / 2, max(at) * 2
        return (
            (left, left * self.bytes_per_s),
            (self.ridge, self.flops_per_s),
            (right, self.flops_per_s),
        )

    @property
    def floor(self) -> float:
        """Of the drawing: below every point and the roof."""
        return min(self.corners[0][1], *(point.flops_per_s for point in self.points)) / 2

    @property
    def ceiling(self) -> float:
        """And above them."""
        return 2 * self.flops_per_s


Figure = Bars | Curves | Roofline


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
        ("products of large matrices", f"{report.product_flops_per_s / 1e12:.2f} TFLOP/s"),
        ("--adapter-memory-fraction", f"{report.adapter_memory_fraction:.4f}"),
    ]
    title = f"Decode step, {report.model_id}"
    figures: list[Figure] = [Bars(f"{asked}: step, model alone, and limit by memory", bars)]
    if report.measurements:
        figures.append(_roofline_of(report))
    return Drawing(title, tuple(figures), (*facts, *_machine(report.machine)))


def _roofline_of(report: Report) -> Roofline:
    points = []
    for one in report.measurements:
        for work, ms in ((one.decode, one.step_ms), (one.prefill, one.prefill_ms)):
            if ms <= 0:  # a difference of two walls, on a machine too noisy for it
                continue
            prefill = work is one.prefill
            intensity = work.flops / work.num_bytes
            points.append(Point(one.case, prefill, intensity, work.flops / ms * 1000))
    rates = report.copy_bytes_per_s, report.product_flops_per_s
    return Roofline("Decode steps and prefills under the roof of the device", *rates, tuple(points))


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
            hint="pip install matplotlib, or name the file .html",
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
    heights = [_height(one) for one in drawing.figures]
    canvas = _matplotlib()(figsize=(9, sum(heights) + 1), layout="constrained")
    canvas.suptitle(drawing.title)
    axes = canvas.subplots(count, 1, squeeze=False, height_ratios=heights)[:, 0] if count else ()
    for figure, ax in zip(drawing.figures, axes, strict=True):
        ax.set_title(figure.title, fontsize=10)
        ax.set_xlabel("milliseconds", fontsize=9)
        if isinstance(figure, Bars):
            _bars(figure, ax)
        elif isinstance(figure, Roofline):
            _roofline(figure, ax)
        else:
            for name, curve in figure.curves.items():
                ax.plot(curve, [at / (len(curve) - 1) for at in range(len(curve))], label=name)
            ax.set_xscale("log")
            ax.set_ylim(0, 1)
            ax.legend(fontsize=8)
            ax.grid(alpha=0.3)
    canvas.savefig(path, dpi=130)


def _height(figure: Figure) -> float:
    """Inches."""
    if isinstance(figure, Bars):
        return 1 + 0.5 * len(figure.bars)
    return 4.0 if isinstance(figure, Roofline) else 3.5


def _roofline(figure: Roofline, ax: Any) -> None:
    ax.loglog(*zip(*figure.corners, strict=True), color="#222")
    for index, (case, points) in enumerate(by_case(figure).items()):
        colour = COLOURS[index % len(COLOURS)]
        for point in points:
            at, name = (point.flops_per_byte, point.flops_per_s), None if point.prefill else case
            size = 130 / (1 + index)  # of rings: equal points are seen as one in the other
            mark = "s" if point.prefill else "o"
            ax.scatter(*at, size, marker=mark, facecolors="none", edgecolors=colour, label=name)
    rates = list(ticks(figure.floor, figure.ceiling))
    ax.set_yticks(rates, [f"{rate / 1e12:g} TFLOP/s" for rate in rates], fontsize=8)
    ax.minorticks_off()
    ax.set_ylim(bottom=figure.floor)
    ax.set_xlabel(ROOF_AXIS, fontsize=9)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


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
