"""What the benchmark of a server over HTTP is asked for, and the requests that follow from it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from engine.bench.options import Ask, Span, amount, count, number, one_of, rate, share
from engine.bench.workload import POPULARITIES, Popularity, assign, weights_of
from engine.errors import ConfigError

DEFAULT_CONCURRENCY = 8
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def names(text: str) -> tuple[str, ...]:
    """`a,b`, `a{0..3}` or `@file` with one name a line."""
    if text.startswith("@"):
        try:
            lines = Path(text[1:]).read_text().splitlines()
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None
        return tuple(line.strip() for line in lines if line.strip())
    found: list[str] = []
    for part in text.split(","):
        found += _expanded(part.strip())
    return tuple(name for name in found if name)


def _expanded(pattern: str) -> list[str]:
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for i in range(first, last + 1) for name in _expanded(f"{before}{i}{after}")]


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the server."""

    input_tokens: Annotated[Span, Ask("Tokens of every prompt.", Span.read, "64")] = Span(64, 64)
    output_tokens: Annotated[Span, Ask("Tokens of every answer.", Span.read, "32")] = Span(32, 32)
    adapters: Annotated[tuple[str, ...], Ask("Names of adapters.", names, "none")] = ()
    popularity: Annotated[
        Popularity, Ask("Who uses which adapter.", one_of(*POPULARITIES), "uniform")
    ] = "uniform"
    seed: Annotated[int, Ask("Seed.", amount, "0")] = 0
    cold: Annotated[
        tuple[str, ...],
        Ask("Names of adapters of which each is asked for in turn, as --adapters.", names, "none"),
    ] = ()
    cold_share: Annotated[
        float, Ask("Share of the requests that ask for the next one of --cold.", share, "0.5")
    ] = 0.5
    rate: Annotated[
        float | None,
        Ask("Poisson arrivals, in requests a second, whatever the answers take.", rate, "none"),
    ] = None
    concurrency: Annotated[
        int | None,
        Ask("Requests that are open at any time.", count, f"{DEFAULT_CONCURRENCY} without --rate"),
    ] = None
    requests: Annotated[
        int | None, Ask("Ends after so many requests.", count, "as --duration says")
    ] = None
    duration: Annotated[
        float | None, Ask("Ends after so many seconds.", rate, "30 without --requests")
    ] = None
    warm_up: Annotated[
        float, Ask("Seconds of the same before, which do not count.", number, "2")
    ] = 2.0
    background: Annotated[
        int, Ask("Endless streams beside, whose gaps are told apart.", amount, "0")
    ] = 0
    background_tokens: Annotated[
        int | None,
        Ask(
            "Tokens after which such a stream begins anew.",
            count,
            "2048, or what there is room for",
        ),
    ] = None
    alone: Annotated[float, Ask("Seconds that the background runs alone first.", number, "5")] = 5.0
    api: Annotated[
        Literal["openai", "native"],
        Ask(
            "Route: openai is /v1/completions, native is /generate_stream.",
            one_of("openai", "native"),
            "openai",
        ),
    ] = "openai"
    timeout: Annotated[
        float, Ask("Seconds after which a request counts as failed.", rate, "600")
    ] = 600.0

    def check(self) -> None:
        """Raises ConfigError for what contradicts itself."""
        if self.rate is not None and self.concurrency is not None:
            raise ConfigError(
                "--rate opens requests at their own times, --concurrency when others end",
                field="rate",
                hint="give one of them",
            )

    @property
    def seconds(self) -> float | None:
        """How long the measurement lasts; None: as long as the requests."""
        return 30.0 if self.duration is None and self.requests is None else self.duration

    @property
    def open_at_once(self) -> int | None:
        """In a closed loop."""
        return None if self.rate is not None else self.concurrency or DEFAULT_CONCURRENCY


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of the load."""

    adapter: str | None
    cold: bool
    input_tokens: int
    output_tokens: int
    gap: float  # seconds after the request before, in an open loop


def requests_of(load: Load) -> Iterator[Asked]:
    """Requests without end, the same for the same seed; how they arrive does not change what they ask."""
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
        yield Asked(
            adapter,
            cold,
            chooser.randint(load.input_tokens.low, load.input_tokens.high),
            chooser.randint(load.output_tokens.low, load.output_tokens.high),
            clock.expovariate(load.rate) if load.rate else 0.0,
        )


def background_adapters(load: Load) -> Sequence[str | None]:
    """The adapter of each endless stream."""
    if not load.adapters:
        return [None] * load.background
    chooser = random.Random(load.seed + 2)
    return assign(load.adapters, load.background, load.popularity, chooser)
