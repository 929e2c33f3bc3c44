"""The requests of a simulation: Poisson arrivals of popular adapters, bursts, and floods of new adapters."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Iterator
from heapq import merge
from itertools import accumulate, islice, repeat
from operator import attrgetter
from typing import NamedTuple

from engine.bench_options import Traffic


class Arrival(NamedTuple):
    """One request."""

    at: float  # seconds
    adapter: int
    input_tokens: int
    output_tokens: int


def arrivals(traffic: Traffic) -> Iterator[Arrival]:
    """The requests in the order of their times. The seed decides them."""
    number, exponent = traffic.adapters, traffic.zipf
    shares = list(accumulate((index + 1) ** -exponent for index in range(number)))
    fresh = iter(range(number, number + traffic.requests))

    def popular(chooser: random.Random) -> int:
        return bisect(shares, chooser.random() * shares[-1], hi=number - 1)

    streams = [_stream(traffic, 0, 1 / traffic.rate, 1, popular)]
    if traffic.burst_every:
        streams.append(_stream(traffic, 1, traffic.burst_every, traffic.burst_size, popular))
    if traffic.flood_every:
        new = _stream(
            traffic, 2, traffic.flood_every, traffic.flood_size, lambda chooser: next(fresh)
        )
        streams.append(new)
    return islice(merge(*streams, key=attrgetter("at")), traffic.requests)


def _stream(
    traffic: Traffic,
    number: int,
    interval: float,
    size: int,
    adapter: Callable[[random.Random], int],
) -> Iterator[Arrival]:
    """`size` requests at each event of a Poisson process with the mean `interval` in seconds."""
    chooser = random.Random(f"{traffic.seed} {number}")
    prompt, output = traffic.input_tokens, traffic.output_tokens
    at = 0.0
    while True:
        at += chooser.expovariate(1 / interval)
        for _ in repeat(None, size):
            yield Arrival(
                at,
                adapter(chooser),
                chooser.randint(prompt.low, prompt.high),
                chooser.randint(output.low, output.high),
            )
