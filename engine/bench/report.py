"""What the benchmark of an engine in this process found. `to_json` and `report_from` are inverses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from engine.bench.machine import Machine
from engine.bench.workload import Workload


@dataclass(frozen=True, slots=True)
class Work:
    """What must be computed and moved at least, by one decode step or by the prefill of a batch."""

    flops: int  # of matrix products and attention, a multiply-add as two
    weight_bytes: int
    kv_bytes: int  # read, or by a prefill written
    adapter_bytes: int  # of the distinct ones of the batch

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.adapter_bytes


@dataclass(frozen=True, slots=True)
class Measurement:
    """One case. Times and rates are medians over the rounds."""

    case: str
    adapters: int  # distinct ones in the batch
    step_ms: float  # (wall time of all tokens - wall time of the first) / (tokens - 1)
    rounds_ms: tuple[float, ...]  # `step_ms` of each round
    forward_ms: float | None  # of a step, what the model takes on the device; None: not seen
    tokens_per_s: float  # generated tokens of the whole round
    prefill_tokens_per_s: float  # of prompts
    prefill_ms: float  # until every request has its first token
    decode: Work  # of a step at the mean context
    prefill: Work
    limit_ms: float  # of a step, at the measured copy bandwidth
    share: float  # limit_ms / step_ms
    ratio: float  # step_ms of the first case / step_ms
    resident: bool  # no adapter was placed during the rounds


@dataclass(frozen=True, slots=True)
class Placed:
    """Adapters from host memory to the device, all asked for at once by an idle engine."""

    adapters: int
    num_bytes: int
    seconds: float  # until the last gave a token
    adapters_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """Adapters from files (in the page cache) through the exchange, one after the other, engine idle."""

    adapters: int
    bytes_each: int
    first_token_ms: float  # from the request to its first token
    warm_first_token_ms: float  # the same again, with the adapter in place
    staged_ms: float  # from the request to the image in host memory
    bytes_per_s: float  # of that


@dataclass(frozen=True, slots=True)
class Report:
    """All cases and the conditions they ran under."""

    machine: Machine
    workload: Workload
    model_id: str
    dtype: str
    backends: dict[str, str]
    copy_bytes_per_s: float  # read and written, of the largest copy on the device
    product_flops_per_s: (
        float  # of large square matrices of the model's type, a multiply-add as two
    )
    adapter_bytes: int  # of all that were made
    adapter_memory_fraction: float  # used
    needed_memory_fraction: float  # at which all of them are resident
    make_seconds: float  # to make them
    measurements: list[Measurement]
    placed: Placed | None = None
    loaded: Loaded | None = None

    def to_json(self) -> dict[str, Any]:
        value = msgspec.to_builtins(self)
        assert isinstance(value, dict)
        return value


def report_from(value: dict[str, Any]) -> Report:
    """The report that `to_json` made `value` from."""
    return msgspec.convert(value, Report)
