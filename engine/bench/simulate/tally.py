"""Collects the figures of a simulation while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from math import fsum
from typing import Literal

from engine.bench.quantiles import Times, quantile
from engine.bench.simulate.exchange import SimulatedLease
from engine.bench.simulate.report import Fairness, TenantShare

Tier = Literal["device", "host", "source"]
TIERS: tuple[Tier, ...] = ("device", "host", "source")
WINDOW_S = 10.0  # of the shares


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request that has arrived and not ended."""

    adapter: int
    arrival: float  # seconds
    wanted: int  # tokens
    tier: Tier = "source"  # where its adapter was when it arrived
    lease: SimulatedLease | None = None
    received: int = 0  # tokens
    counted: int = 0  # tokens received before this window
    last: float = 0.0  # time of its last token
    tenant: int = 0


class Shares:
    """Tokens that adapters received in each window, over those that their open requests still wanted.

    A request is in every window in which it is open, with what it had not received before. A tenant's *due* in a window
    is its part of all tokens received in it: by weight, and what some do not want goes to the others.
    """

    def __init__(self, weight: Callable[[int], float]) -> None:
        """`weight`: of a tenant."""
        self._weight = weight
        self._received: Counter[int] = Counter()
        self._wanted: Counter[int] = Counter()
        self._window_received: Counter[int] = Counter()  # by tenant
        self._window_wanted: Counter[int] = Counter()
        self._tenants: dict[int, TenantShare] = {}
        self.window_end = WINDOW_S

    def count(self, request: OpenRequest) -> None:
        """At the end of a window, or of the request."""
        self._wanted[request.adapter] += request.wanted - request.counted
        self._received[request.adapter] += request.received - request.counted
        self._window_wanted[request.tenant] += request.wanted - request.counted
        self._window_received[request.tenant] += request.received - request.counted
        request.counted = request.received

    def end_windows(self, open_requests: Collection[OpenRequest], now: float) -> None:
        """Ends every window up to `now`."""
        while self.window_end <= now:
            for request in open_requests:
                self.count(request)
            self._end_window()
            self.window_end += WINDOW_S

    def _end_window(self) -> None:
        wanted, received = self._window_wanted, self._window_received
        due = fair_parts(received.total(), wanted, self._weight)
        for tenant, tokens in received.items():
            before = self._tenants.get(tenant) or TenantShare(tenant, self._weight(tenant), 0, 0.0)
            self._tenants[tenant] = replace(
                before, tokens=before.tokens + tokens, due=before.due + due[tenant]
            )
        self._window_wanted, self._window_received = Counter(), Counter()

    def tenants(self) -> list[TenantShare]:
        """At the end."""
        self._end_window()
        return [self._tenants[tenant] for tenant in sorted(self._tenants)]

    def fairness(self, longest_wait: float) -> Fairness | None:
        """None without requests."""
        shares = sorted(self._received[one] / wanted for one, wanted in self._wanted.items())
        if not shares:
            return None
        squares = fsum(share * share for share in shares)
        return Fairness(
            window_s=WINDOW_S,
            adapters=len(shares),
            lowest=shares[0],
            p10=quantile(shares, 0.1),
            p50=quantile(shares, 0.5),
            jain=fsum(shares) ** 2 / (len(shares) * squares) if squares else 0.0,
            longest_wait_s=longest_wait,
        )


def fair_parts(
    total: float, wanted: Mapping[int, float], weight: Callable[[int], float]
) -> dict[int, float]:
    """Divides `total` by weight; nobody gets more than it wants (weighted max-min fairness)."""
    parts: dict[int, float] = {}
    rest = sorted(wanted, key=lambda one: wanted[one] / weight(one))
    weights = fsum(map(weight, rest))
    for one in rest:
        parts[one] = min(wanted[one], total * weight(one) / weights)
        total -= parts[one]
        weights -= weight(one)
    return parts


@dataclass(slots=True)
class Tally:
    """Sums over the requests and steps so far."""

    shares: Shares
    refused: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    reloaded: int = 0  # loads for requests whose adapter was on the device, but not in host memory
    longest_wait: float = 0.0  # seconds from arrival to admission
    tiers: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))  # requests
    first: dict[Tier, list[float]] = field(default_factory=lambda: {tier: [] for tier in TIERS})
    latencies: list[float] = field(default_factory=list)  # seconds from arrival to the last token
    gaps: Counter[float] = field(default_factory=Counter)  # seconds between tokens -> how often

    def token(self, request: OpenRequest, now: float) -> None:
        """The request received a token."""
        if request.received:
            self.gaps[now - request.last] += 1
        else:
            self.first[request.tier].append(now - request.arrival)
        request.received += 1
        request.last = now

    def ended(self, request: OpenRequest) -> None:
        """The request received its last token."""
        self.latencies.append(request.last - request.arrival)
        self.output_tokens += request.received
        self.shares.count(request)

    def ttft(self) -> dict[str, Times | None]:
        """Times to the first token, by tier and of `all`."""
        everything = [second for tier in TIERS for second in self.first[tier]]
        return {"all": Times.of(everything)} | {one: Times.of(self.first[one]) for one in TIERS}
