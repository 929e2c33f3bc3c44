"""The results of a load on a server. `to_json` and `load_report_from` are inverses."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.bench.load.client import Record
from engine.bench.load.run import Outcome
from engine.bench.machine import Machine, machine
from engine.bench.quantiles import Times
from engine.bench_options import Load

Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Background:
    """The background streams: gaps between their tokens, in three periods that do not overlap."""

    streams: int
    restarts: int
    tokens_per_s: float
    alone: Times | None  # before the other requests
    outside: Times | None  # in the measurement, while no cold adapter loads
    inside: Times | None  # in the measurement, while one loads: from its request to its first token
    inside_s: float  # seconds of the measurement in which one loads


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Times are in milliseconds. All figures but the rates are of requests that were due in the measurement."""

    machine: Machine  # of the client
    url: str
    model: str
    server: dict[str, str]  # its version, dtype and device, if it reports them
    load: Load
    seconds: float  # of the measurement
    sent: int
    completed: int
    errors: dict[str, int]  # kind -> requests, with those of the background and the warm-up
    reasons: dict[str, str]  # kind -> the server's message for the first
    tokens_per_s: float  # that arrived in the measurement, without the background's
    requests_per_s: float  # that ended in the measurement
    ttft: Times | None  # from the due time to the first token
    ttft_warm: Times | None  # without requests for --cold adapters
    ttft_cold: Times | None
    itl: Times | None  # between tokens of one request
    latency: Times | None  # from the due time to the end
    background: Background | None
    client_lag: Times | None  # of the client's event loop: it may be part of any other time
    client_cpu: float  # share of one core that the client used

    def to_json(self) -> dict[str, Any]:
        value = msgspec.to_builtins(self)
        assert isinstance(value, dict)
        return value


def load_report_from(value: dict[str, Any]) -> LoadReport:
    """The report that `to_json` made `value` from."""
    return msgspec.convert(value, LoadReport)


def gaps(times: Sequence[float]) -> Iterator[tuple[float, float]]:
    """(begin, end) between each token and the next."""
    return zip(times, times[1:], strict=False)


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same time as spans that do not touch, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def touches(begin: float, end: float, spans: Sequence[Span], ends: Sequence[float]) -> bool:
    """Whether a gap overlaps one of the merged spans. `ends` are the ends of the spans."""
    index = bisect_right(ends, begin)
    return index < len(spans) and spans[index][0] < end


def cold_spans(records: Iterable[Record]) -> list[Span]:
    """Times when cold adapters loaded: from each request to its first token, or to its end if it failed."""
    return merged((one.due, one.first or one.end) for one in records if one.request.cold)


def report_of(outcome: Outcome, load: Load) -> LoadReport:
    """The report of a run."""
    begin, end = outcome.window
    seconds = end - begin
    counted = [record for record in outcome.records if record.counted]
    good = [record for record in counted if record.error is None]
    firsts = [(one, one.times[0] - one.due) for one in good]
    everyone = (*outcome.records, *outcome.background)
    failed = [record for record in everyone if record.error is not None]
    kinds = Counter(str(record.error) for record in failed)
    reasons = {str(one.error): one.reason for one in reversed(failed) if one.reason}
    return LoadReport(
        machine=machine("client"),
        url=outcome.server.url,
        model=outcome.server.model,
        server=outcome.server.about,
        load=load,
        seconds=seconds,
        sent=len(counted),
        completed=len(good),
        errors=dict(kinds),
        reasons=reasons,
        tokens_per_s=_rate(outcome.records, begin, end),
        requests_per_s=sum(begin <= one.end <= end for one in outcome.records if not one.error)
        / seconds
        if seconds
        else 0.0,
        ttft=Times.of(first for _, first in firsts),
        ttft_warm=Times.of(first for one, first in firsts if not one.request.cold),
        ttft_cold=Times.of(first for one, first in firsts if one.request.cold),
        itl=Times.of(b - a for one in good for a, b in gaps(one.times)),
        latency=Times.of(one.end - one.due for one in good),
        background=_background(outcome, load.background) if load.background else None,
        client_lag=Times.of(outcome.lag),
        client_cpu=outcome.cpu_share,
    )


def _rate(records: Iterable[Record], begin: float, end: float) -> float:
    """Tokens per second in the window. A request's tokens are spread evenly over its events."""
    total = 0.0
    for record in records:
        if record.times:
            inside = sum(begin <= at <= end for at in record.times)
            total += inside * record.tokens / len(record.times)
    return total / (end - begin) if end > begin else 0.0


def _background(outcome: Outcome, streams: int) -> Background:
    begin, end = outcome.window
    spans = cold_spans(outcome.records)
    ends = [until for _, until in spans]
    alone, outside, inside = array("d"), array("d"), array("d")
    for record in outcome.background:
        for before, after in gaps(record.times):
            if outcome.alone and outcome.alone[0] <= before and after <= outcome.alone[1]:
                alone.append(after - before)
            elif begin <= after <= end:
                loading = touches(before, after, spans, ends)
                (inside if loading else outside).append(after - before)
    within = [(max(a, begin), min(b, end)) for a, b in spans if a < end and b > begin]
    return Background(
        streams=streams,
        restarts=len(outcome.background) - streams,
        tokens_per_s=_rate(outcome.background, begin, end),
        alone=Times.of(alone),
        outside=Times.of(outside),
        inside=Times.of(inside),
        inside_s=sum(b - a for a, b in within),
    )
