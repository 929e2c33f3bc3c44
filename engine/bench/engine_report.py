"""The results of engines in this process. `to_json` and `engine_report_from` are inverses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from engine.bench.machine import Machine
from engine.bench_options import Workload


@dataclass(frozen=True, slots=True)
class Work:
    """The least computation and data movement of one decode step, or of the prefill of a batch."""

    flops: int  # of matrix products and attention; a multiply-add counts as two
    weight_bytes: int
    kv_bytes: int  # that a step reads, or a prefill writes
    adapter_bytes: int  # of the distinct adapters of the batch

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.adapter_bytes


@dataclass(frozen=True, slots=True)
class Measurement:
    """One case. Times and rates are medians over the rounds."""

    case: str
    adapters: int  # number of distinct adapters in the batch
    step_ms: float  # (wall time of all tokens - wall time of the first) / (tokens - 1)
    rounds_ms: tuple[float, ...]  # `step_ms` of each round
    forward_ms: float | None  # time of the model within a step; None: no step was timed
    tokens_per_s: float  # generated tokens of the whole round
    prefill_tokens_per_s: float  # prompt tokens
    prefill_ms: float  # until every request has its first token
    decode: Work  # of a step at the mean context
    prefill: Work
    limit_ms: float  # least time of a step, at the measured copy bandwidth
    share: float  # limit_ms / step_ms
    ratio: float  # step_ms of the first case / step_ms
    resident: bool  # no adapter was placed during the rounds


@dataclass(frozen=True, slots=True)
class Placed:
    """Copies from host memory to the device: requests for all adapters at once on an idle engine."""

    adapters: int
    num_bytes: int
    seconds: float  # until the last request has its token
    adapters_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """Loads from files (in the page cache) through the exchange, one after the other, on an idle engine."""

    adapters: int
    bytes_each: int
    first_token_ms: float  # from the request to its first token
    warm_first_token_ms: float  # the same when the adapter is on the device
    staged_ms: float  # from the request to the image in host memory
    bytes_per_s: float  # from the request to the image in host memory


@dataclass(frozen=True, slots=True)
class EngineReport:
    """All cases, and the conditions of the run."""

    machine: Machine
    workload: Workload
    model_id: str
    dtype: str
    backends: dict[str, str]
    copy_bytes_per_s: float  # read plus written, of a large copy on the device
    product_flops_per_s: float  # of large square matrices; a multiply-add counts as two
    adapter_bytes: int  # of all random adapters
    adapter_memory_fraction: float  # in use
    needed_memory_fraction: float  # the least that keeps all adapters on the device
    make_seconds: float  # time to make the adapters
    measurements: list[Measurement]
    placed: Placed | None = None
    loaded: Loaded | None = None

    def to_json(self) -> dict[str, Any]:
        value = msgspec.to_builtins(self)
        assert isinstance(value, dict)
        return value


def engine_report_from(value: dict[str, Any]) -> EngineReport:
    """The report that `to_json` made `value` from."""
    return msgspec.convert(value, EngineReport)
