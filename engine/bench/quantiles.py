"""Quantiles of times. Without numpy, so that `lorax bench --url` starts quickly."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

CURVE_POINTS = 101


class Ordered(Protocol):
    """Sorted values by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> float: ...


class Repeated:
    """Sorted values, each repeated as often as its count says."""

    def __init__(self, counts: Iterable[tuple[float, int]]) -> None:
        """(value, count) pairs, sorted."""
        self._values: list[float] = []
        self._ends: list[int] = []
        end = 0
        for value, count in counts:
            end += count
            self._values.append(value)
            self._ends.append(end)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int, /) -> float:
        return self._values[bisect(self._ends, index)]


def quantile(ordered: Ordered, share: float) -> float:
    """The quantile of sorted values, with linear interpolation.

    Equals numpy's default (Hyndman and Fan 1996, type 7).
    """
    if not len(ordered):
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
        return cls._of(ordered, math.fsum(ordered))

    @classmethod
    def of_counts(cls, seconds: Mapping[float, int]) -> Times | None:
        """Of values that occur several times: value -> how often."""
        counts = sorted((1000 * value, count) for value, count in seconds.items())
        return cls._of(Repeated(counts), math.fsum(value * count for value, count in counts))

    @classmethod
    def _of(cls, ordered: Ordered, total: float) -> Times | None:
        if not len(ordered):
            return None
        steps = [index / (CURVE_POINTS - 1) for index in range(CURVE_POINTS)]
        return cls(
            count=len(ordered),
            mean=total / len(ordered),
            p50=quantile(ordered, 0.5),
            p90=quantile(ordered, 0.9),
            p99=quantile(ordered, 0.99),
            max=ordered[len(ordered) - 1],
            curve=tuple(quantile(ordered, step) for step in steps),
        )
