"""Prometheus metrics: those of LoRAX under the same names, and more.

The HTTP front counts its own events. The engine's counters are read only when metrics are scraped. Each `Metrics` has
its own registry; nothing is global.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any, Protocol, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from engine.messages import AdapterStatus, Buckets, EngineStats, Tier, TierStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_ADAPTER_LABELS = 200  # adapters with their own label; further ones share the label `other`

DURATIONS = [0.00015 * 1.5**index for index in range(35)]  # seconds, as LoRAX
WAITS = [0.001 * 1.6**index for index in range(25)]  # seconds: 1 ms to 80 s

# LoRAX's counters do not end in `_total`, which prometheus_client always adds.
_PLAIN_COUNTERS = (
    "lorax_request_count",
    "lorax_request_success",
    "lorax_request_failure",
    "lorax_batch_inference_count",
    "lorax_batch_inference_success",
    "lorax_batch_inference_failure",
    "lorax_batch_concat",
)
_TOTAL = re.compile(rf"\b({'|'.join(_PLAIN_COUNTERS)})_total\b")

# Error type -> `err` label of lorax_request_failure, where LoRAX has another word.
_FAILURES = {
    "malformed_request": "bad_request",
    "request_too_large": "bad_request",
    "unsupported_encoding": "bad_request",
    "adapter_not_found": "download_adapter",
    "adapter_forbidden": "download_adapter",
    "adapter_load_failed": "download_adapter",
    "adapter_incompatible": "load_adapter",
    "adapter_too_large": "load_adapter",
}


def _linear(most: int, count: int = 100) -> list[float]:
    return [most * (index + 1) / count for index in range(count)]


def _cumulative(buckets: Buckets) -> list[tuple[str, float]]:
    """As Prometheus has them: counts of values up to each bound."""
    bounds = [*map(floatToGoString, buckets.bounds), "+Inf"]
    return list(zip(bounds, accumulate(buckets.counts), strict=False)) or [("+Inf", 0)]


_Family = GaugeMetricFamily | CounterMetricFamily
_Version = tuple[bytes, str, str, bytes | None]  # tenant, name, source, digest of an adapter


class _Collector(Protocol):
    def collect(self) -> Iterable[Metric]: ...


class Metrics:
    """All metrics of this server. `max_total_tokens` sets the buckets of lengths."""

    def __init__(self, max_total_tokens: int = 4096) -> None:
        self.registry = CollectorRegistry()
        self._adapters: set[str] = set()
        self._loads: dict[_Version, dict[str, float]] = {}  # stage -> seconds
        self._placed = 0  # placements observed
        self._engine = _EngineCollector()
        self.registry.register(self._engine)
        lengths = _linear(max_total_tokens)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, labels, registry=self.registry)

        def histogram(name: str, help: str, buckets: list[float], *labels: str) -> Histogram:
            return Histogram(name, help, labels, buckets=buckets, registry=self.registry)

        self._count = counter("lorax_request_count", "Requests received.")
        self._success = counter("lorax_request_success", "Requests answered in full.")
        self._failure = counter("lorax_request_failure", "Requests that failed, by cause.", "err")
        self._by_adapter = counter(
            "lorax_adapter_requests", "Requests by adapter; `base` is the base model.", "adapter"
        )
        duration = "lorax_request_duration"
        self._duration = histogram(duration, "Seconds from request to last byte.", DURATIONS)
        self._phases = {
            phase: histogram(f"lorax_request_{phase}_duration", help, DURATIONS)
            for phase, help in (
                ("validation", "Seconds to parse, check and tokenize."),
                ("queue", "Seconds of waiting for the adapter and for admission."),
                ("inference", "Seconds from admission to the last token."),
                ("mean_time_per_token", "Mean seconds per token of a request."),
            )
        }
        self._lengths = {
            what: histogram(f"lorax_request_{what}", help, lengths)
            for what, help in (
                ("input_length", "Tokens of the prompt."),
                ("generated_tokens", "Generated tokens."),
                ("max_new_tokens", "The request's max_new_tokens."),
                ("skipped_tokens", "Generated tokens that needed no step of their own."),
            )
        }
        self._lengths["input_count"] = histogram(
            "lorax_request_input_count",
            "Prompts of a request.",
            [2.0**power for power in range(11)],
        )
        self._first = histogram(
            "lorax_time_to_first_token_seconds", "Seconds from request to first token.", WAITS
        )
        self._hits = counter(
            "lorax_adapter_hits", "Requests with an adapter, by the tier where it was.", "tier"
        )
        for tier in get_args(Tier):
            self._hits.labels(tier)
        self._gap = histogram(
            "lorax_inter_token_latency_seconds", "Seconds between tokens of one stream.", WAITS
        )
        self._load = histogram(
            "lorax_adapter_load_seconds", "Seconds to load an adapter, by stage.", WAITS, "stage"
        )

    # -- the front

    def request(self) -> None:
        self._count.inc()

    def success(self, seconds: float) -> None:
        self._success.inc()
        self._duration.observe(seconds)

    def failure(self, error_type: str) -> None:
        self._failure.labels(_FAILURES.get(error_type, error_type)).inc()

    def adapter(self, name: str) -> None:
        """A request for adapter `name`. Only the first MAX_ADAPTER_LABELS adapters have their own label."""
        if name not in self._adapters and len(self._adapters) >= MAX_ADAPTER_LABELS:
            name = "other"
        else:
            self._adapters.add(name)
        self._by_adapter.labels(name).inc()

    def hit(self, tier: Tier) -> None:
        """A request found its adapter there."""
        self._hits.labels(tier).inc()

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def tokens(self, count: int, seconds: float) -> None:
        """`count` tokens that arrived `seconds` after the previous one."""
        gap = seconds / count
        for _ in range(count):
            self._gap.observe(gap)

    def phase(self, phase: str, seconds: float) -> None:
        self._phases[phase].observe(max(0.0, seconds))

    def length(self, what: str, value: int) -> None:
        self._lengths[what].observe(value)

    # -- scraping

    def render(
        self,
        stats: EngineStats,
        adapters: list[AdapterStatus],
        block_size: int,
        exchange_restarts: int = 0,
        tiers: TierStats | None = None,
    ) -> bytes:
        """All metrics in the Prometheus text format (0.0.4)."""
        self._read(stats, adapters, block_size, exchange_restarts, tiers or TierStats())
        lines = generate_latest(self.registry).decode().splitlines(keepends=True)
        text = "".join(line for line in lines if "_created" not in line.split("{")[0])
        return _TOTAL.sub(r"\1", text).encode()

    def render_json(
        self,
        stats: EngineStats,
        adapters: list[AdapterStatus],
        block_size: int,
        exchange_restarts: int = 0,
        tiers: TierStats | None = None,
    ) -> dict[str, Any]:
        """All metrics as an object: metric -> type, help and samples."""
        self._read(stats, adapters, block_size, exchange_restarts, tiers or TierStats())
        return {
            family.name: {
                "type": family.type,
                "help": family.documentation,
                "samples": [
                    {
                        "name": _TOTAL.sub(r"\1", sample.name),
                        "labels": sample.labels,
                        "value": sample.value,
                    }
                    for sample in family.samples
                    if not sample.name.endswith("_created")
                ],
            }
            for family in self.registry.collect()
        }

    def _read(
        self,
        stats: EngineStats,
        adapters: list[AdapterStatus],
        block_size: int,
        exchange_restarts: int,
        tiers: TierStats,
    ) -> None:
        self._engine.tiers = tiers
        self._engine.stats, self._engine.adapters = stats, adapters
        self._engine.block_size = block_size
        self._engine.exchange_restarts = exchange_restarts
        new = min(stats.placed - self._placed, len(stats.place_seconds))
        for seconds in stats.place_seconds[len(stats.place_seconds) - new :]:
            self._load.labels("place").observe(seconds)
        self._placed = stats.placed
        loads: dict[_Version, dict[str, float]] = {}
        for status in adapters:
            if status.state in ("fetching", "parsing"):
                continue
            version = (status.tenant, status.name, status.source, status.digest)
            before = self._loads.get(version, {})
            for stage, seconds in status.seconds.items():
                if before.get(stage) != seconds:
                    self._load.labels(stage).observe(seconds)
            loads[version] = dict(status.seconds)
        self._loads = loads


class _EngineCollector(_Collector):
    """The engine's counters and gauges, from the newest stats."""

    def __init__(self) -> None:
        self.stats = EngineStats()
        self.adapters: list[AdapterStatus] = []
        self.tiers = TierStats()
        self.block_size = 0
        self.exchange_restarts = 0

    def collect(self) -> Iterator[Metric]:
        for name, help, value in self._gauges():
            yield GaugeMetricFamily(name, help, value=value)
        for name, help, value in self._counters():
            yield CounterMetricFamily(name, help, value=value)
        yield from self._by_tier()
        yield from self._of_steps()

    def _of_steps(self) -> Iterator[Metric]:
        """LoRAX's metrics of batches. A step has prompts and decoding sequences, so there is one method."""
        stats = self.stats
        for name, help, label, value, count in (
            ("inference_count", "Steps of the engine.", "method", "step", stats.steps),
            ("inference_success", "Steps of the engine.", "method", "step", stats.steps),
            ("inference_failure", "Steps that failed.", "method", "step", stats.failed_steps),
            ("concat", "Sequences that joined others.", "reason", "running", stats.joined),
        ):
            steps = CounterMetricFamily(f"lorax_batch_{name}", help, labels=[label])
            steps.add_metric([value], count)
            yield steps
        for name, help, labels, buckets in (
            ("inference_duration", "Seconds of a step.", {"method": "step"}, stats.step_seconds),
            ("next_size", "Sequences of a step.", {}, stats.step_sizes),
        ):
            family = HistogramMetricFamily(f"lorax_batch_{name}", help, labels=list(labels))
            family.add_metric(list(labels.values()), _cumulative(buckets), buckets.total)
            yield family

    def _by_tier(self) -> Iterator[Metric]:
        """Levels and counters of device, host memory and disk; times of loads by stage."""
        stats, tiers, counts = self.stats, self.tiers, self.tiers.counts
        used = (stats.arena_used, tiers.host_used, tiers.disk_used)
        capacity = (stats.arena_bytes, tiers.host_capacity, tiers.disk_capacity)
        evicted = (stats.evictions, counts.host_evictions, counts.disk_evictions)
        families: tuple[tuple[type[_Family], str, str, tuple[int, int, int]], ...] = (
            (GaugeMetricFamily, "bytes", "Bytes of adapters, by tier.", used),
            (
                GaugeMetricFamily,
                "capacity_bytes",
                "Room for adapters, by tier; 0: no limit.",
                capacity,
            ),
            (CounterMetricFamily, "evictions", "Adapters that left a tier to make room.", evicted),
        )
        for kind, name, help, values in families:
            family = kind(f"lorax_adapter_{name}", help, labels=["tier"])
            for tier, value in zip(("device", "host", "disk"), values, strict=True):
                family.add_metric([tier], value)
            yield family
        seconds = CounterMetricFamily(
            "lorax_adapter_seconds", "Seconds of loading adapters, by stage.", labels=["stage"]
        )
        for stage in ("fetch", "parse"):
            seconds.add_metric([stage], counts.seconds.get(stage, 0.0))
        yield seconds

    def _gauges(self) -> Iterator[tuple[str, str, float]]:
        stats = self.stats
        used = stats.total_blocks - stats.free_blocks
        capacity = used * self.block_size
        ready = [status for status in self.adapters if status.state == "ready"]
        host_bytes = sum(status.data_bytes for status in ready)
        yield "lorax_queue_length", "Requests waiting for admission.", stats.waiting
        yield "lorax_batch_current_size", "Sequences in the batch.", stats.running
        yield (
            "lorax_batch_current_max_tokens",
            "Token capacity of the KV blocks in use.",
            capacity,
        )
        yield "lorax_kv_blocks_used", "KV blocks in use.", used
        yield "lorax_kv_blocks", "All KV blocks.", stats.total_blocks
        yield (
            "lorax_kv_blocks_cached",
            "Unused KV blocks kept for the prefix cache.",
            stats.cached_blocks,
        )
        yield "lorax_adapters_resident", "Adapters on the device.", len(stats.resident)
        yield (
            "lorax_adapter_arena_bytes",
            "Bytes reserved for adapters on the device.",
            stats.arena_bytes,
        )
        yield (
            "lorax_adapter_arena_used_bytes",
            "Bytes of adapters on the device.",
            stats.arena_used,
        )
        yield "lorax_adapters_host", "Adapters ready in host memory.", len(ready)
        yield "lorax_adapter_host_bytes", "Bytes of adapters in host memory.", host_bytes
        yield (
            "lorax_adapters_unconfirmed",
            "Adapters in host memory whose source did not answer when they were last requested.",
            sum(status.unconfirmed for status in ready),
        )

    def _counters(self) -> Iterator[tuple[str, str, float]]:
        stats = self.stats
        yield "lorax_preemptions", "Preemptions of sequences.", stats.preemptions
        yield (
            "lorax_prefix_cache_hit_tokens",
            "Prompt tokens found in the prefix cache.",
            stats.prefix_hits,
        )
        yield (
            "lorax_prefix_cache_lookup_tokens",
            "Prompt tokens looked up in the prefix cache.",
            stats.prefix_lookups,
        )
        yield "lorax_step_tokens", "Tokens computed by steps.", stats.step_tokens
        yield "lorax_adapter_placements", "Adapters copied to the device.", stats.placements
        counts = self.tiers.counts
        yield "lorax_adapter_loads", "Adapters loaded into host memory.", counts.loads
        yield "lorax_adapter_load_failures", "Loads that failed.", counts.failed_loads
        yield (
            "lorax_adapter_loaded_bytes",
            "Bytes of adapters loaded into host memory.",
            counts.loaded_bytes,
        )
        yield (
            "lorax_exchange_restarts",
            "Restarts of the adapter exchange.",
            self.exchange_restarts,
        )
