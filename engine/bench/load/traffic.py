"""The requests of a load on a server: an endless, seeded sequence."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.bench.cases import assign, weights_of
from engine.bench_options import Load


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request of the load."""

    adapter: str | None
    cold: bool
    input_tokens: int
    output_tokens: int
    gap: float  # seconds since the previous request, in an open loop


def requests_of(load: Load) -> Iterator[LoadRequest]:
    """Requests without end. The seed decides them; open and closed loops send the same ones."""
    chooser, clock = random.Random(load.seed), random.Random(load.seed + 1)
    popular = weights_of(len(load.adapters), load.popularity)
    index = num_cold = 0
    due = 0.0
    while True:
        due += load.cold_share if load.cold else 0.0
        cold = due >= 1.0 - 1e-9
        if cold:
            due -= 1.0
            adapter: str | None = load.cold[num_cold % len(load.cold)]
            num_cold += 1
        elif not load.adapters:
            adapter = None
        elif load.popularity == "identical":
            adapter = load.adapters[0]
        elif load.popularity == "distinct":
            adapter = load.adapters[index % len(load.adapters)]
            index += 1
        else:
            adapter = chooser.choices(load.adapters, popular)[0]
        yield LoadRequest(
            adapter,
            cold,
            input_tokens=chooser.randint(load.input_tokens.low, load.input_tokens.high),
            output_tokens=chooser.randint(load.output_tokens.low, load.output_tokens.high),
            gap=clock.expovariate(load.rate) if load.rate else 0.0,
        )


def background_adapters(load: Load) -> Sequence[str | None]:
    """The adapter of each background stream."""
    if not load.adapters:
        return [None] * load.background
    chooser = random.Random(load.seed + 2)
    return assign(load.adapters, load.background, load.popularity, chooser)
