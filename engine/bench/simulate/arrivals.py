"""The requests of a simulation: Poisson arrivals of popular adapters, bursts, and floods of new adapters."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Iterator
from heapq import merge
from itertools import accumulate, islice, repeat
from operator import attrgetter
from typing import NamedTuple

from engine.bench_options import Tenancy, Traffic


class Arrival(NamedTuple):
    """One prompt of a request."""

    at: float  # seconds
    adapter: int
    input_tokens: int
    output_tokens: int
    tenant: int = 0
    prompt: int = 0  # its number in the request


def arrivals(traffic: Traffic, tenancy: Tenancy) -> Iterator[Arrival]:
    """The prompts in the order of their times, `traffic.requests` in all. The seed decides them."""
    number, exponent = traffic.adapters, traffic.zipf
    shares = list(accumulate((index + 1) ** -exponent for index in range(number)))
    tenants = tenancy.tenants
    rates = list(accumulate([tenancy.greed, *repeat(1.0, tenants - 1)]))
    fresh = iter(range(number, number + traffic.requests))

    def popular(chooser: random.Random) -> tuple[int, int]:
        adapter = bisect(shares, chooser.random() * shares[-1], hi=number - 1)
        if tenants == 1:
            return adapter, 0
        tenant = bisect(rates, chooser.random() * rates[-1], hi=tenants - 1)
        adapter += tenant - adapter % tenants
        return adapter if adapter < number else tenant, tenant

    def new(chooser: random.Random) -> tuple[int, int]:
        return next(fresh), 0

    every = tenancy.greedy_prompts
    streams = [_stream(traffic, 0, 1 / traffic.rate, 1, popular, every)]
    if traffic.burst_every:
        streams.append(_stream(traffic, 1, traffic.burst_every, traffic.burst_size, popular, every))
    if traffic.flood_every:
        streams.append(_stream(traffic, 2, traffic.flood_every, traffic.flood_size, new, 1))
    return islice(merge(*streams, key=attrgetter("at")), traffic.requests)


def _stream(
    traffic: Traffic,
    number: int,
    interval: float,
    size: int,
    adapter: Callable[[random.Random], tuple[int, int]],
    greedy_prompts: int,
) -> Iterator[Arrival]:
    """`size` requests at each event of a Poisson process with the mean `interval` in seconds.

    `adapter` draws an adapter and its tenant.
    """
    chooser = random.Random(f"{traffic.seed} {number}")
    prompt, output = traffic.input_tokens, traffic.output_tokens
    at = 0.0
    while True:
        at += chooser.expovariate(1 / interval)
        for _ in repeat(None, size):
            chosen, tenant = adapter(chooser)
            for index in range(1 if tenant else greedy_prompts):
                yield Arrival(
                    at,
                    chosen,
                    chooser.randint(prompt.low, prompt.high),
                    chooser.randint(output.low, output.high),
                    tenant,
                    index,
                )
