"""Quantiles of times. Without numpy, so that `lorax bench --url` starts quickly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CURVE_POINTS = 101


def quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile of sorted values, with linear interpolation.

    Equals numpy's default (Hyndman and Fan 1996, type 7).
    """
    if not ordered:
        raise ValueError("no values")
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass(frozen=True, slots=True)
class Times:
    """Statistics of times in milliseconds. `curve` holds quantiles from 0 to 1 in equal steps."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float
    curve: tuple[float, ...] = ()

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Times | None:
        """None if there are no values."""
        ordered = sorted(1000 * value for value in seconds)
        if not ordered:
            return None
        steps = [index / (CURVE_POINTS - 1) for index in range(CURVE_POINTS)]
        return cls(
            count=len(ordered),
            mean=math.fsum(ordered) / len(ordered),
            p50=quantile(ordered, 0.5),
            p90=quantile(ordered, 0.9),
            p99=quantile(ordered, 0.99),
            max=ordered[-1],
            curve=tuple(quantile(ordered, step) for step in steps),
        )
