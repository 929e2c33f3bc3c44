"""Quantiles are numpy's."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from engine.bench.quantiles import CURVE_POINTS, Times, quantile


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101, 1000])
def test_quantiles_are_numpys(size: int) -> None:
    chooser = random.Random(size)
    values = [chooser.expovariate(3.0) for _ in range(size)]
    ordered = sorted(values)
    for share in (0.0, 0.1, 1 / 3, 0.5, 0.9, 0.99, 1.0):
        assert quantile(ordered, share) == pytest.approx(np.quantile(values, share), rel=1e-12)
    times = Times.of(values)
    assert times is not None and times.count == size
    assert times.mean == pytest.approx(1000 * np.mean(values))
    assert times.p99 == pytest.approx(1000 * np.percentile(values, 99))
    assert times.max == 1000 * max(values)
    steps = np.linspace(0, 1, CURVE_POINTS)
    assert times.curve == pytest.approx(list(1000 * np.quantile(values, steps)))


def test_of_nothing() -> None:
    assert Times.of([]) is None
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_counted_values_are_the_repeated_ones() -> None:
    chooser = random.Random(0)
    counts = {chooser.expovariate(3.0): chooser.randrange(1, 9) for _ in range(50)}
    counted = Times.of_counts(counts)
    repeated = Times.of(value for value, count in counts.items() for _ in range(count))
    assert counted is not None and repeated is not None
    assert counted.mean == pytest.approx(repeated.mean)
    assert dataclasses.replace(counted, mean=repeated.mean) == repeated
    assert Times.of_counts({}) is None
