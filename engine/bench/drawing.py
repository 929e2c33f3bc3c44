"""The content of a plot: figures as plain data. `html` and `png` draw them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#c44e52", "#937860", "#da8bc3", "#64b5cd")
STEP_COLOUR, MODEL_COLOUR, LIMIT_COLOUR = "#b8c7dc", "#4c72b0", "#c44e52"
ROOF_AXIS = "operations per byte that must move; circles: decode, squares: prefill"


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
    """Cumulative distributions: name -> quantiles from 0 to 1 in equal steps, in milliseconds."""

    title: str
    curves: dict[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Point:
    """The decode step or the prefill of a case."""

    label: str
    prefill: bool
    flops_per_byte: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """Measured rates under the limits of the device (Williams, Waterman and Patterson 2009)."""

    title: str
    bytes_per_s: float
    flops_per_s: float
    points: tuple[Point, ...]

    @property
    def ridge(self) -> float:
        """Operations per byte above which compute is the limit, not bandwidth."""
        return self.flops_per_s / self.bytes_per_s

    @property
    def corners(self) -> tuple[tuple[float, float], ...]:
        """The roof, from left to right: (operations per byte, operations per second)."""
        at = [self.ridge, *(point.flops_per_byte for point in self.points)]
        left, right = min(at) / 2, max(at) * 2
        return (
            (left, left * self.bytes_per_s),
            (self.ridge, self.flops_per_s),
            (right, self.flops_per_s),
        )

    @property
    def cases(self) -> dict[str, list[Point]]:
        """The points by label."""
        cases: dict[str, list[Point]] = {}
        for point in self.points:
            cases.setdefault(point.label, []).append(point)
        return cases

    @property
    def floor(self) -> float:
        """Lower end of the axis: below the roof and every point."""
        return min(self.corners[0][1], *(point.flops_per_s for point in self.points)) / 2

    @property
    def ceiling(self) -> float:
        """Upper end of the axis: above the roof."""
        return 2 * self.flops_per_s


Figure = Bars | Curves | Roofline


@dataclass(frozen=True, slots=True)
class Drawing:
    """Figures, and the conditions of the measurement."""

    title: str
    figures: tuple[Figure, ...]
    facts: tuple[tuple[str, str], ...]


def ticks(low: float, high: float) -> Iterator[float]:
    """1, 2 and 5 times the powers of ten from `low` to `high`."""
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for factor in (1, 2, 5):
            if low <= (value := factor * 10.0**power) <= high:
                yield value
