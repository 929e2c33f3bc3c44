"""Draws a plot as one file of well-formed XHTML and SVG, without scripts and external resources."""

from __future__ import annotations

import math
from html import escape

from engine.bench.drawing import (
    COLOURS,
    LIMIT_COLOUR,
    MODEL_COLOUR,
    ROOF_AXIS,
    STEP_COLOUR,
    Bars,
    Curves,
    Drawing,
    Roofline,
    ticks,
)

WIDTH = 900
LEFT, RIGHT = 250, 110  # margins of the bars: labels and figures
ROW = 34
CURVE_HEIGHT, CURVE_LEFT = 260, 60
ROOF_HEIGHT = 380
STYLE = """
body { font: 15px system-ui, sans-serif; max-width: 940px; margin: 2em auto; color: #222; }
svg { font: 12px system-ui, sans-serif; width: 100%; height: auto; }
h2 { font-size: 1.1em; margin-top: 2em; }
td { padding: 2px 12px 2px 0; vertical-align: top; }
"""


def page(drawing: Drawing) -> str:
    """The whole file."""
    title = escape(drawing.title)
    parts = [
        "<!DOCTYPE html>",
        '<html xmlns="http://www.w3.org/1999/xhtml" lang="en"><head><meta charset="utf-8" />',
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
    ]
    for figure in drawing.figures:
        parts.append(f"<h2>{escape(figure.title)}</h2>")
        if isinstance(figure, Bars):
            parts.append(_bars(figure))
        else:
            parts.append(_roofline(figure) if isinstance(figure, Roofline) else _curves(figure))
    parts.append("<h2>Conditions</h2><table>")
    parts += [
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in drawing.facts
    ]
    parts.append("</table></body></html>\n")
    return "\n".join(parts)


def _svg(height: float, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img">'
    return "\n".join([head, *parts, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    size = f'width="{max(width, 0):.1f}" height="{height:.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{colour}" />'


def _line(points: list[tuple[float, float]], colour: str, width: float = 1.0) -> str:
    at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="{width}" />'


def _bars(figure: Bars) -> str:
    """One row per case: the step, in it the model alone, and a line at the limit."""
    longest = max((max(bar.step_ms, bar.limit_ms) for bar in figure.bars), default=1.0)
    scale = (WIDTH - LEFT - RIGHT) / longest
    parts = [
        _box(LEFT, 4, 12, 12, STEP_COLOUR),
        _text(LEFT + 18, 14, "step"),
        _box(LEFT + 70, 4, 12, 12, MODEL_COLOUR),
        _text(LEFT + 88, 14, "model alone"),
        _box(LEFT + 180, 4, 4, 12, LIMIT_COLOUR),
        _text(LEFT + 190, 14, "memory limit"),
    ]
    for index, bar in enumerate(figure.bars):
        top = 26 + index * ROW
        parts += [
            _text(LEFT - 8, top + 17, bar.label, "end"),
            _box(LEFT, top, bar.step_ms * scale, 26, STEP_COLOUR),
            _box(LEFT, top + 7, (bar.forward_ms or 0.0) * scale, 12, MODEL_COLOUR),
            _box(LEFT + bar.limit_ms * scale - 1.5, top - 2, 3, 30, LIMIT_COLOUR),
            _text(
                LEFT + max(bar.step_ms, bar.limit_ms) * scale + 6,
                top + 17,
                f"{bar.step_ms:.2f} ms, {bar.share:.0%}",
            ),
        ]
    return _svg(26 + ROW * len(figure.bars), parts)


def _curves(figure: Curves) -> str:
    """Cumulative distributions on a logarithmic axis."""
    values = [value for curve in figure.curves.values() for value in curve if value > 0]
    low, high = min(values, default=1.0), max(values, default=10.0)
    if high < low * 1.01:
        high = low * 1.01
    span = math.log(high / low)
    width, height = WIDTH - CURVE_LEFT - 20, CURVE_HEIGHT - 50

    def at(value: float, share: float) -> tuple[float, float]:
        x = CURVE_LEFT + width * math.log(max(value, low) / low) / span
        return x, 10 + height * (1 - share)

    parts: list[str] = []
    for share in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0):
        parts.append(_line([at(low, share), at(high, share)], "#ddd"))
        parts.append(_text(CURVE_LEFT - 8, at(low, share)[1] + 4, f"{share:.0%}", "end"))
    for value in ticks(low, high):
        x = at(value, 0)[0]
        parts.append(_line([(x, 10), (x, 10 + height)], "#eee"))
        parts.append(_text(x, height + 26, f"{value:g}", "middle"))
    parts.append(_text(CURVE_LEFT + width, height + 42, "milliseconds", "end"))
    for index, (name, curve) in enumerate(figure.curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        points = [at(value, step / (len(curve) - 1)) for step, value in enumerate(curve)]
        parts.append(_line(points, colour, 2.0))
        parts.append(_box(CURVE_LEFT + index * 200, height + 34, 12, 12, colour))
        parts.append(_text(CURVE_LEFT + index * 200 + 18, height + 44, name))
    return _svg(CURVE_HEIGHT, parts)


def _roofline(figure: Roofline) -> str:
    """The roof on two logarithmic axes, a circle per decode step and a square per prefill."""
    cases = figure.cases
    corners = figure.corners
    left, right, low, high = corners[0][0], corners[-1][0], figure.floor, figure.ceiling
    width, height = WIDTH - CURVE_LEFT - 20, ROOF_HEIGHT - 60

    def at(intensity: float, rate: float) -> tuple[float, float]:
        x = CURVE_LEFT + width * math.log(intensity / left) / math.log(right / left)
        return x, 10 + height * (1 - math.log(rate / low) / math.log(high / low))

    parts: list[str] = []
    for value in ticks(left, right):
        x = at(value, low)[0]
        parts.append(_line([(x, 10), (x, 10 + height)], "#eee"))
        parts.append(_text(x, height + 26, f"{value:g}", "middle"))
    for value in ticks(low, high):
        y = at(left, value)[1]
        parts.append(_line([(CURVE_LEFT, y), (CURVE_LEFT + width, y)], "#eee"))
        parts.append(_text(CURVE_LEFT - 8, y + 4, f"{value / 1e12:g}", "end"))
    parts.append(_line([at(*corner) for corner in corners], "#222", 2.0))
    parts.append(_text(CURVE_LEFT + 8, 24, "TFLOP/s"))
    parts.append(_text(CURVE_LEFT + width, height + 42, ROOF_AXIS, "end"))
    for index, (case, points) in enumerate(cases.items()):
        colour, top = COLOURS[index % len(COLOURS)], ROOF_HEIGHT + index * 20
        for point in points:
            x, y = at(point.flops_per_byte, point.flops_per_s)
            circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}" />'
            parts.append(_box(x - 5, y - 5, 10, 10, colour) if point.prefill else circle)
        share = ", ".join(
            f"{'prefill' if point.prefill else 'decode'} {point.flops_per_s / 1e12:.3g} TFLOP/s"
            for point in points
        )
        parts.append(_box(CURVE_LEFT, top, 12, 12, colour))
        parts.append(_text(CURVE_LEFT + 18, top + 11, f"{case}: {share}"))
    return _svg(ROOF_HEIGHT + 20 * len(cases), parts)
