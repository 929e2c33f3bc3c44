"""What `lorax bench` measures: engines in its process (`Workload`), or a running server (`Load`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from engine.bench_options.options import (
    BenchOption,
    Span,
    amount,
    count,
    counts,
    names,
    number,
    one_of,
    rate,
    share,
    some_of,
    words,
)
from engine.errors import ConfigError

Popularity = Literal["distinct", "uniform", "zipf", "identical"]
POPULARITIES: tuple[Popularity, ...] = get_args(Popularity)
CASES = ("base", "enabled", "adapters", "long", "files")
SHAPE_NAMES = (
    "mistral-7b",
    "llama-3-8b",
    "qwen2.5-0.5b",
    "smollm2-135m",
)  # in `engine.bench.shapes`
DEFAULT_CONCURRENCY = 8
DEFAULT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Workload:
    """What to measure on engines in this process."""

    batch: Annotated[int, BenchOption("Number of concurrent requests.", count, "8")] = 8
    input_tokens: Annotated[
        int,
        BenchOption("Prompt length in tokens. With --url also a range: 64-256.", count, "64"),
    ] = 64
    output_tokens: Annotated[
        int,
        BenchOption("Tokens to generate per request. With --url also a range.", count, "32"),
    ] = 32
    adapters: Annotated[
        int,
        BenchOption(
            "Number of random adapters. With --url: names as a,b or a{0..63}, or @FILE with one name per line.",
            count,
            "8; with --url none",
        ),
    ] = 8
    ranks: Annotated[
        tuple[tuple[int, ...], ...],
        BenchOption(
            "Ranks to give to the adapters in turn: 8,16,32. Repeat to add a case.",
            counts,
            "16",
            repeated=True,
        ),
    ] = ((16,),)
    targets: Annotated[
        tuple[str, ...],
        BenchOption("Target modules of the adapters: q_proj,v_proj.", words, "all linear layers"),
    ] = ()
    popularity: Annotated[
        tuple[Popularity, ...],
        BenchOption(
            "How requests choose adapters: distinct, uniform, zipf or identical. Without --url, a list adds cases.",
            some_of(*POPULARITIES),
            "distinct; with --url uniform",
        ),
    ] = ("distinct",)
    long_context: Annotated[
        int,
        BenchOption("Add a case with one request of this context length.", amount, "none"),
    ] = 0
    files: Annotated[
        int, BenchOption("Number of adapters to load from files. 0: skip the case.", amount, "4")
    ] = 4
    cases: Annotated[
        tuple[str, ...],
        BenchOption(
            "Cases to run: base (LoRA disabled), enabled (LoRA without adapters), adapters, long, files.",
            some_of(*CASES),
            "all",
        ),
    ] = CASES
    shape: Annotated[
        str,
        BenchOption(
            f"Use random weights in the shape of a known model: {', '.join(SHAPE_NAMES)}.",
            one_of(*SHAPE_NAMES),
            "none",
        ),
    ] = ""
    repeat: Annotated[
        int, BenchOption("Rounds; each runs every case once. More: less noise.", count, "3")
    ] = 3
    seed: Annotated[
        int, BenchOption("Seed of prompts, adapters, popularity and arrival times.", amount, "0")
    ] = 0

    def check(self) -> None:
        """Raises ConfigError for options that cannot be measured."""
        if self.output_tokens < 2:
            raise ConfigError(
                "--output-tokens must be at least 2: the first token comes from the prefill",
                field="output_tokens",
            )
        if self.long_context and self.batch < 2:
            raise ConfigError(
                "--long-context runs one long request together with short ones",
                field="batch",
                hint="set --batch to 2 or more",
            )


@dataclass(frozen=True, slots=True)
class Load:
    """What to send to a server. Options that `Workload` has too take their help from there."""

    input_tokens: Annotated[Span, BenchOption("Prompt length in tokens.", Span.read, "64")] = Span(
        64, 64
    )
    output_tokens: Annotated[Span, BenchOption("Tokens to generate.", Span.read, "32")] = Span(
        32, 32
    )
    adapters: Annotated[tuple[str, ...], BenchOption("Adapter names.", names, "none")] = ()
    popularity: Annotated[
        Popularity, BenchOption("How requests choose adapters.", one_of(*POPULARITIES), "uniform")
    ] = "uniform"
    seed: Annotated[int, BenchOption("Seed.", amount, "0")] = 0
    cold: Annotated[
        tuple[str, ...],
        BenchOption(
            "Adapters to request one after the other, to measure cold loads. Names as in --adapters.",
            names,
            "none",
        ),
    ] = ()
    cold_share: Annotated[
        float, BenchOption("Fraction of requests that use the next --cold adapter.", share, "0.5")
    ] = 0.5
    rate: Annotated[
        float | None,
        BenchOption("Requests per second, as Poisson arrivals (open loop).", rate, "none"),
    ] = None
    concurrency: Annotated[
        int | None,
        BenchOption(
            "Number of open requests; a new one starts when one ends (closed loop).",
            count,
            f"{DEFAULT_CONCURRENCY} without --rate",
        ),
    ] = None
    requests: Annotated[
        int | None, BenchOption("Stop after this many requests.", count, "no limit")
    ] = None
    duration: Annotated[
        float | None,
        BenchOption(
            "Stop after this many seconds.", rate, f"{DEFAULT_SECONDS:.0f} without --requests"
        ),
    ] = None
    warm_up: Annotated[
        float, BenchOption("Seconds of load before the measurement starts.", number, "2")
    ] = 2.0
    background: Annotated[
        int,
        BenchOption(
            "Long-running streams to keep open; their latency is reported separately.",
            amount,
            "0",
        ),
    ] = 0
    background_tokens: Annotated[
        int | None,
        BenchOption(
            "Length of a background stream in tokens; then it restarts.",
            count,
            "2048, or the server's limit",
        ),
    ] = None
    alone: Annotated[
        float, BenchOption("Seconds to run only the background streams, at the start.", number, "5")
    ] = 5.0
    api: Annotated[
        Literal["openai", "native"],
        BenchOption(
            "Route: openai is /v1/completions, native is /generate_stream.",
            one_of("openai", "native"),
            "openai",
        ),
    ] = "openai"
    timeout: Annotated[
        float, BenchOption("Seconds after which a request counts as failed.", rate, "600")
    ] = 600.0

    def check(self) -> None:
        """Raises ConfigError for options that contradict each other."""
        if self.rate is not None and self.concurrency is not None:
            raise ConfigError(
                "--rate and --concurrency exclude each other",
                field="rate",
                hint="--rate sends requests at random times, --concurrency when others end",
            )

    @property
    def seconds(self) -> float | None:
        """Duration of the measurement; None: until the last request ends."""
        return DEFAULT_SECONDS if self.duration is None and self.requests is None else self.duration

    @property
    def open_at_once(self) -> int | None:
        """Open requests of a closed loop; None: an open loop."""
        return None if self.rate is not None else self.concurrency or DEFAULT_CONCURRENCY
