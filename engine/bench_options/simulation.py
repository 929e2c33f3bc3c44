"""Options of `lorax bench simulate`: the requests, the server, and how long its work takes.

The times are those of one H200 with Mistral 7B's shape and adapters of rank 16 on all linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from engine.bench_options.options import BenchOption, Span, amount, count, fill, number, rate, rates
from engine.config import GIB, AdapterConfig, ServerConfig
from engine.errors import ConfigError
from engine.messages import IMAGE_ALIGN, aligned

MB = 10**6  # bytes
_ADAPTERS, _SERVER = AdapterConfig(), ServerConfig()


@dataclass(frozen=True, slots=True)
class Traffic:
    """The requests."""

    requests: Annotated[int, BenchOption("Number of requests.", count, "100000")] = 100_000
    rate: Annotated[float, BenchOption("Requests per second, as Poisson arrivals.", rate, "60")] = (
        60.0
    )
    adapters: Annotated[int, BenchOption("Number of adapters.", count, "5000")] = 5000
    zipf: Annotated[
        float,
        BenchOption(
            "Exponent of the adapters' popularity (Zipf). 0: all alike. Higher: fewer adapters get most requests.",
            number,
            "1",
        ),
    ] = 1.0
    input_tokens: Annotated[
        Span, BenchOption("Prompt length in tokens, or a range: 64-256.", Span.read, "128")
    ] = Span(128, 128)
    output_tokens: Annotated[
        Span, BenchOption("Tokens to generate per request, or a range.", Span.read, "64")
    ] = Span(64, 64)
    adapter_mb: Annotated[
        tuple[float, ...],
        BenchOption("Sizes in MB to give to the adapters in turn: 42,84,168.", rates, "84"),
    ] = (84.0,)
    burst_every: Annotated[
        float,
        BenchOption(
            "Mean seconds between bursts: --burst-size further requests at the same time. 0: no bursts.",
            number,
            "0",
        ),
    ] = 0.0
    burst_size: Annotated[int, BenchOption("Requests of a burst.", count, "100")] = 100
    flood_every: Annotated[
        float,
        BenchOption(
            "Mean seconds between floods: --flood-size further requests at the same time, each for an adapter that "
            "no other request names. 0: no floods.",
            number,
            "0",
        ),
    ] = 0.0
    flood_size: Annotated[int, BenchOption("Requests of a flood.", count, "100")] = 100
    seed: Annotated[int, BenchOption("Seed of arrivals, adapters and lengths.", amount, "0")] = 0


@dataclass(frozen=True, slots=True)
class Tenancy:
    """The tenants. The first one sends more than the others, if so wished."""

    tenants: Annotated[
        int, BenchOption("Number of tenants. They get the adapters in turn.", count, "1")
    ] = 1
    weights: Annotated[
        tuple[float, ...], BenchOption("Weights to give to the tenants in turn: 4,1.", rates, "1")
    ] = (1.0,)
    greed: Annotated[
        float,
        BenchOption("Requests of the first tenant, in multiples of another's.", rate, "1"),
    ] = 1.0
    greedy_prompts: Annotated[
        int, BenchOption("Prompts of each request of the first tenant.", count, "1")
    ] = 1

    def weight(self, tenant: int) -> float:
        return self.weights[tenant % len(self.weights)]

    def share(self, tenant: int) -> float:
        """Of all weights."""
        return self.weight(tenant) / sum(map(self.weight, range(self.tenants)))


@dataclass(frozen=True, slots=True)
class SimulatedServer:
    """The server. Fields with the name of a setting have its meaning."""

    arena_gb: Annotated[
        float,
        BenchOption(
            "GiB of device memory for adapters. 12.5 is what --adapter-memory-fraction 0.1 gives on an H200.",
            rate,
            "12.5",
        ),
    ] = 12.5
    host_cache_gb: Annotated[
        float, BenchOption("GiB of host memory to cache adapters.", rate, "4")
    ] = 4.0
    max_active_adapters: Annotated[
        int,
        BenchOption("Maximum adapters on the device.", count, f"{_ADAPTERS.max_active_adapters}"),
    ] = _ADAPTERS.max_active_adapters
    adapter_cycle_time_s: Annotated[
        float,
        BenchOption(
            "Seconds that a request waits for room on the device before other adapters are drained.",
            number,
            f"{_ADAPTERS.adapter_cycle_time_s:g}",
        ),
    ] = _ADAPTERS.adapter_cycle_time_s
    max_batch_size: Annotated[int, BenchOption("Maximum sequences per step.", count, "256")] = 256
    max_batch_prefill_tokens: Annotated[
        int, BenchOption("Maximum tokens per step.", count, "8192")
    ] = 8192
    max_chunk_tokens: Annotated[
        int, BenchOption("Prompt tokens per step while other requests decode.", count, "128")
    ] = 128
    max_batch_total_tokens: Annotated[
        int, BenchOption("Maximum tokens in the KV cache.", count, "800000")
    ] = 800_000
    block_size: Annotated[int, BenchOption("Tokens per KV cache block.", count, "16")] = 16
    max_concurrent_requests: Annotated[
        int,
        BenchOption(
            "Maximum open requests. Further ones are refused.",
            count,
            f"{_SERVER.max_concurrent_requests}",
        ),
    ] = _SERVER.max_concurrent_requests

    @property
    def arena_bytes(self) -> int:
        return int(self.arena_gb * GIB)

    @property
    def host_bytes(self) -> int:
        return int(self.host_cache_gb * GIB) // IMAGE_ALIGN * IMAGE_ALIGN


@dataclass(frozen=True, slots=True)
class Pace:
    """The times. A step takes step_ms, lora_ms if it has an adapter, and so much for each row, token and adapter."""

    step_ms: Annotated[float, BenchOption("Milliseconds of any step.", number, "4.2")] = 4.2
    lora_ms: Annotated[
        float, BenchOption("Milliseconds that a step with any adapter takes longer.", number, "0.8")
    ] = 0.8
    row_us: Annotated[
        float, BenchOption("Microseconds of a step for each decoding sequence.", number, "13")
    ] = 13.0
    token_us: Annotated[
        float, BenchOption("Microseconds of a step for each prompt token.", number, "24")
    ] = 24.0
    adapter_us: Annotated[
        float, BenchOption("Microseconds of a step for each of its adapters.", number, "15")
    ] = 15.0
    place_gb_s: Annotated[
        float, BenchOption("GB/s of copies from host memory to the device.", rate, "43")
    ] = 43.0
    load_s: Annotated[
        float,
        BenchOption("Seconds to load an adapter of 0 bytes into host memory.", number, "0.05"),
    ] = 0.05
    load_gb_s: Annotated[
        float, BenchOption("GB/s of one load from its source into host memory.", rate, "1")
    ] = 1.0
    loads: Annotated[int, BenchOption("Loads at the same time.", count, "8")] = 8


@dataclass(frozen=True, slots=True)
class Simulation:
    """All options of a simulation."""

    traffic: Traffic = field(default_factory=Traffic)
    server: SimulatedServer = field(default_factory=SimulatedServer)
    pace: Pace = field(default_factory=Pace)
    tenancy: Tenancy = field(default_factory=Tenancy)

    @classmethod
    def of(cls, given: Mapping[str, str | list[str]]) -> Simulation:
        """The options with the texts of `given`. Raises ConfigError that names the flag."""
        return cls(
            fill(Traffic, given),
            fill(SimulatedServer, given),
            fill(Pace, given),
            fill(Tenancy, given),
        )

    def check(self) -> None:
        """Raises ConfigError for options under which a request could never be served."""
        if self.tenancy.tenants > self.traffic.adapters:
            raise ConfigError(
                f"{self.tenancy.tenants} tenants share {self.traffic.adapters} adapters",
                field="tenants",
                hint="give each tenant an adapter or more: raise --adapters",
            )
        largest = aligned(int(max(self.traffic.adapter_mb) * MB))
        for field_name, room in (
            ("arena_gb", self.server.arena_bytes),
            ("host_cache_gb", self.server.host_bytes),
        ):
            if largest > room:
                raise ConfigError(
                    f"an adapter of {largest / MB:.1f} MB does not fit into {room / MB:.1f} MB",
                    field=field_name,
                    hint=f"raise --{field_name.replace('_', '-')} or lower --adapter-mb",
                )
        longest = self.traffic.input_tokens.high + self.traffic.output_tokens.high
        blocks = self.server.max_batch_total_tokens // self.server.block_size
        if longest > blocks * self.server.block_size:
            raise ConfigError(
                f"a request of {longest} tokens does not fit into {blocks} blocks of "
                f"{self.server.block_size} tokens",
                field="max_batch_total_tokens",
                hint="raise --max-batch-total-tokens, or lower --input-tokens or --output-tokens",
            )
