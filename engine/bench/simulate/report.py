"""The results of a simulation. `to_json` and `simulation_report_from` are inverses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from engine.bench.quantiles import Times
from engine.bench_options import Simulation


@dataclass(frozen=True, slots=True)
class Fairness:
    """An adapter's share: tokens that it received in each window over those that its requests wanted there.

    It is 1 if every request ends in the window of its arrival. Jain's index (Jain, Chiu and Hawe 1984) of the shares is
    1 if all are equal, and 1 / adapters if one adapter gets everything.
    """

    window_s: float
    adapters: int  # with requests
    lowest: float
    p10: float
    p50: float
    jain: float
    longest_wait_s: float  # from arrival to the first step


@dataclass(frozen=True, slots=True)
class TenantShare:
    """What a tenant received, and what it was due: in each window, its part by weight of all tokens received there."""

    tenant: int
    weight: float
    tokens: int
    due: float

    @property
    def ratio(self) -> float:
        """1 is exactly its share."""
        return self.tokens / self.due if self.due else 1.0


@dataclass(frozen=True, slots=True)
class Acquisitions:
    """Requests by the tier in which their adapter was when they arrived."""

    device: int  # in host memory too
    host: int
    source: int  # loaded for them, or for an earlier request that still waited
    reloaded: int  # of these: on the device, but no longer in host memory

    @property
    def total(self) -> int:
        return self.device + self.host + self.source

    def share(self, count: int) -> float:
        """Of all requests."""
        return count / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class SimulationReport:
    """Times are in milliseconds, and virtual."""

    version: str  # of lorax
    options: Simulation
    seconds: float  # from the start to the last token
    sent: int
    completed: int
    refused: int  # too many open requests
    input_tokens: int
    output_tokens: int
    tokens_per_s: float
    requests_per_s: float
    acquisitions: Acquisitions
    loads: int  # from the source into host memory
    host_evictions: int
    placements: int  # from host memory to the device
    device_evictions: int
    preemptions: int
    steps: int
    step_tokens: float  # generated tokens per step, mean
    ttft: Times | None  # from arrival to the first token
    ttft_device: Times | None  # by tier, as in `acquisitions`
    ttft_host: Times | None
    ttft_source: Times | None
    itl: Times | None  # between tokens of one request
    latency: Times | None  # from arrival to the last token
    fairness: Fairness | None
    tenants: list[TenantShare]

    def to_json(self) -> dict[str, Any]:
        value = msgspec.to_builtins(self)
        assert isinstance(value, dict)
        return value


def simulation_report_from(value: dict[str, Any]) -> SimulationReport:
    """The report that `to_json` made `value` from."""
    return msgspec.convert(value, SimulationReport)
