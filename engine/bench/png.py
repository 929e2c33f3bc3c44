"""Draws a plot as PNG with matplotlib, which is an optional package."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from engine.bench.drawing import (
    COLOURS,
    LIMIT_COLOUR,
    MODEL_COLOUR,
    ROOF_AXIS,
    STEP_COLOUR,
    Bars,
    Drawing,
    Figure,
    Roofline,
    ticks,
)
from engine.errors import ConfigError


def figure_class() -> Any:
    """matplotlib's Figure. Raises ConfigError if matplotlib is not installed."""
    try:
        import_module("matplotlib.backends.backend_agg")  # draws without a display
        return import_module("matplotlib.figure").Figure
    except ImportError:
        raise ConfigError(
            "--plot: a PNG needs matplotlib, which is not installed",
            field="plot",
            hint="pip install matplotlib, or use a file name that ends in .html",
        ) from None


def write_png(drawing: Drawing, path: Path) -> None:
    count = len(drawing.figures)
    heights = [_height(one) for one in drawing.figures]
    canvas = figure_class()(figsize=(9, sum(heights) + 1), layout="constrained")
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
    for index, (case, points) in enumerate(figure.cases.items()):
        colour = COLOURS[index % len(COLOURS)]
        for point in points:
            at, name = (point.flops_per_byte, point.flops_per_s), None if point.prefill else case
            size = 130 / (1 + index)  # rings of different sizes: equal points stay visible
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
    ax.barh(at, [bar.step_ms for bar in figure.bars], color=STEP_COLOUR, label="step")
    forward = [bar.forward_ms or 0.0 for bar in figure.bars]
    ax.barh(at, forward, height=0.4, color=MODEL_COLOUR, label="model alone")
    ax.scatter(
        [bar.limit_ms for bar in figure.bars],
        at,
        marker="|",
        s=400,
        color=LIMIT_COLOUR,
        label="limit",
    )
    ax.set_yticks(at, [bar.label for bar in figure.bars], fontsize=8)
    ax.invert_yaxis()
    for index, bar in enumerate(figure.bars):
        ax.text(bar.step_ms, index, f" {bar.share:.0%}", va="center", fontsize=8)
    ax.legend(fontsize=8)
