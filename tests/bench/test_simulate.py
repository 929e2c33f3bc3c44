"""The simulation against simpler ways to the same answer: sums, a plain LRU, and times worked out by hand."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from dataclasses import replace
from math import inf

import pytest

from engine.adapters.tier_shares import TierShares
from engine.bench.simulate.arrivals import arrivals
from engine.bench.simulate.report import SimulationReport, simulation_report_from
from engine.bench.simulate.run import simulate
from engine.bench.simulate.tally import OpenRequest, Shares, fair_parts
from engine.bench_options import Pace, SimulatedServer, Simulation, Span, Tenancy, Traffic
from engine.config import GIB
from engine.errors import ConfigError

IMAGE = 84_000_000  # bytes of an adapter
BUSY = Traffic(
    requests=2000,
    rate=80.0,
    adapters=300,
    input_tokens=Span(1, 200),
    output_tokens=Span(1, 60),
    adapter_mb=(84.0, 20.0, 168.0),
    burst_every=10.0,
    burst_size=60,
    flood_every=8.0,
    flood_size=40,
)
ALONE = Traffic(  # each request ends before the next one arrives
    requests=400,
    rate=0.001,
    adapters=60,
    input_tokens=Span(100, 100),
    output_tokens=Span(8, 8),
)


def room_for(images: int) -> float:
    """GiB that hold this many adapters."""
    return (images * IMAGE + IMAGE / 2) / GIB


def tight(**changes: object) -> SimulatedServer:
    """A server that lacks room for everything."""
    server = SimulatedServer(
        arena_gb=room_for(20),
        host_cache_gb=room_for(40),
        adapter_cycle_time_s=0.2,
        max_batch_size=48,
        max_batch_total_tokens=4000,
    )
    return replace(server, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def busy() -> SimulationReport:
    return simulate(Simulation(BUSY, tight()))


def test_every_request_ends_and_every_sum_agrees(busy: SimulationReport) -> None:
    sent = list(arrivals(BUSY, Tenancy()))
    assert busy.sent == busy.completed == len(sent) and busy.refused == 0
    assert busy.input_tokens == sum(one.input_tokens for one in sent)
    assert busy.output_tokens == sum(one.output_tokens for one in sent)
    found = busy.acquisitions
    assert found.total == len(sent) and min(found.device, found.host, found.source) > 0
    counts = [
        0 if times is None else times.count
        for times in (busy.ttft, busy.ttft_device, busy.ttft_host, busy.ttft_source)
    ]
    assert counts == [len(sent), found.device, found.host, found.source]
    assert busy.itl is not None and busy.itl.count == busy.output_tokens - len(sent)
    assert busy.loads <= found.source and 0 < found.reloaded < found.source
    assert busy.fairness is not None
    assert busy.fairness.adapters == len({one.adapter for one in sent})
    assert 0 < busy.fairness.lowest <= busy.fairness.p10 <= busy.fairness.p50 <= 1
    assert busy.preemptions > 0 and busy.device_evictions > 0 and busy.host_evictions > 0


def test_the_options_decide_the_report(busy: SimulationReport) -> None:
    assert simulate(busy.options) == busy
    assert simulation_report_from(json.loads(json.dumps(busy.to_json()))) == busy
    assert list(arrivals(BUSY, Tenancy())) != list(arrivals(replace(BUSY, seed=1), Tenancy()))


def test_refused_requests_are_counted() -> None:
    report = simulate(Simulation(BUSY, tight(max_concurrent_requests=20)))
    assert 0 < report.refused == report.sent - report.completed
    assert report.acquisitions.total == report.completed


def lru_hits(capacity: int) -> int:
    """Requests of ALONE that a plain LRU of this many adapters would serve."""
    kept: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for one in arrivals(ALONE, Tenancy()):
        hits += one.adapter in kept
        kept[one.adapter] = None
        kept.move_to_end(one.adapter)
        if len(kept) > capacity:
            kept.popitem(last=False)
    return hits


def test_each_tier_is_an_lru_and_more_room_never_hits_less() -> None:
    last = -1
    for capacity in (1, 2, 5, 20, 60):
        small, large = room_for(capacity), room_for(100)
        arena = simulate(Simulation(ALONE, SimulatedServer(arena_gb=small, host_cache_gb=large)))
        host = simulate(Simulation(ALONE, SimulatedServer(arena_gb=large, host_cache_gb=small)))
        hits = lru_hits(capacity)
        assert arena.acquisitions.device == host.acquisitions.device == hits > last
        assert arena.acquisitions.host == lru_hits(100) - hits and arena.acquisitions.reloaded == 0
        assert host.acquisitions.host == 0 and host.loads == ALONE.requests - hits
        assert host.acquisitions.reloaded == lru_hits(100) - hits
        assert arena.placements - arena.device_evictions == min(capacity, arena.loads)
        last = hits


def test_times_are_those_of_the_pace() -> None:
    pace = Pace()
    report = simulate(
        Simulation(ALONE, SimulatedServer(arena_gb=room_for(5), host_cache_gb=room_for(20)))
    )
    prompt = pace.step_ms + pace.lora_ms + (100 * pace.token_us + pace.adapter_us) / 1e3
    place = IMAGE / (pace.place_gb_s * 1e6)
    load = 1e3 * pace.load_s + IMAGE / (pace.load_gb_s * 1e6)
    for times, wanted in (
        (report.ttft_device, prompt),
        (report.ttft_host, prompt + place),
        (report.ttft_source, prompt + place + load),
    ):
        assert times is not None and times.curve == pytest.approx([wanted] * len(times.curve))
    decode = pace.step_ms + pace.lora_ms + (pace.row_us + pace.adapter_us) / 1e3
    assert report.itl is not None
    assert report.itl.curve == pytest.approx([decode] * len(report.itl.curve))
    assert report.latency is not None
    ended = [first + 7 * decode for first in report.ttft.curve] if report.ttft else []
    assert report.latency.curve == pytest.approx(ended)
    assert report.step_tokens == 1 and report.steps == report.output_tokens


def test_a_request_waits_for_the_step_that_runs_and_the_one_launched_ahead() -> None:
    pace = Pace(load_s=0.0, load_gb_s=inf, place_gb_s=inf)
    lengths = Span(100, 100), Span(400, 400)
    traffic = Traffic(2, 2.0, 1, input_tokens=lengths[0], output_tokens=lengths[1])
    first, second = (one.at for one in arrivals(traffic, Tenancy()))
    report = simulate(Simulation(traffic, SimulatedServer(), pace))
    decode = pace.step_ms + pace.lora_ms + (pace.row_us + pace.adapter_us) / 1e3
    prompt = pace.step_ms + pace.lora_ms + (100 * pace.token_us + pace.adapter_us) / 1e3
    after = 1e3 * (second - first) - prompt  # milliseconds of decoding before the second arrives
    assert 0 < after < 300 * decode
    both = prompt + pace.row_us / 1e3
    assert report.ttft is not None
    assert report.ttft.max == pytest.approx((int(after / decode) + 2) * decode + both - after)


def test_loads_that_take_no_time_make_cold_requests_hot() -> None:
    pace = Pace(load_s=0.0, load_gb_s=inf, place_gb_s=inf)
    report = simulate(
        Simulation(ALONE, SimulatedServer(arena_gb=room_for(5), host_cache_gb=room_for(9)), pace)
    )
    hot, cold = report.ttft_device, report.ttft_source
    assert hot is not None and cold is not None and cold.count > 100
    assert cold.curve == pytest.approx(hot.curve)


def test_loads_wait_for_workers_and_for_leases() -> None:
    """A flood of new adapters: with one worker they load one after the other; so they do with room for one image."""
    flood = Traffic(
        requests=30, rate=1e-6, flood_every=1.0, flood_size=30, output_tokens=Span(1, 1)
    )
    pace = Pace(load_s=1.0, load_gb_s=inf, place_gb_s=inf)
    parallel = simulate(Simulation(flood, SimulatedServer(), replace(pace, loads=30)))
    single = simulate(Simulation(flood, SimulatedServer(), replace(pace, loads=1)))
    narrow = simulate(Simulation(flood, SimulatedServer(host_cache_gb=room_for(1)), pace))
    step = pace.step_ms + pace.lora_ms + (128 * pace.token_us + pace.adapter_us) / 1e3
    for report, longest in ((parallel, 1e3), (single, 30e3), (narrow, 30e3 + 29 * step)):
        assert report.ttft is not None and report.acquisitions.source == 30
        most = 2 * pace.step_ms + 30 * step
        assert longest < report.ttft.max < longest + most


def test_shares() -> None:
    """One adapter gets everything at once, one a part in the first window, nothing in the second, then the rest."""
    shares = Shares(lambda tenant: 1.0)
    slow, quick = OpenRequest(0, 0.0, 40), OpenRequest(1, 0.0, 10)
    quick.received = 10
    shares.count(quick)
    slow.received = 10
    shares.end_windows([slow], 25.0)
    assert shares.window_end == 30.0
    slow.received = 40
    shares.count(slow)
    found = shares.fairness(3.0)
    assert found is not None
    share = (10 + 30) / (40 + 30 + 30)
    assert (found.lowest, found.p50) == pytest.approx((share, (1 + share) / 2))
    assert found.jain == pytest.approx((1 + share) ** 2 / (2 * (1 + share**2)))


def test_arrivals() -> None:
    traffic = Traffic(requests=20_000, rate=100.0, adapters=50, zipf=1.2)
    found = list(arrivals(traffic, Tenancy()))
    assert found[-1].at == pytest.approx(200.0, rel=0.05)
    counts = Counter(one.adapter for one in found)
    weights = [(index + 1) ** -1.2 for index in range(50)]
    for adapter in (0, 1, 5, 20):
        expected = 20_000 * weights[adapter] / sum(weights)
        assert counts[adapter] == pytest.approx(expected, abs=5 * expected**0.5)
    flooded = replace(traffic, burst_every=1.0, burst_size=7, flood_every=2.0, flood_size=5)
    requests = list(arrivals(flooded, Tenancy()))
    assert [one.at for one in requests] == sorted(one.at for one in requests)
    together = Counter(one.at for one in requests)
    assert set(together.values()) >= {1, 5, 7}
    new = [one.adapter for one in requests if one.adapter >= 50]
    assert new == list(range(50, 50 + len(new))) and len(new) % 5 == 0


@pytest.mark.parametrize(
    ("simulation", "words"),
    [
        (Simulation(server=SimulatedServer(arena_gb=0.01)), "84.0 MB does not fit into 10.7 MB"),
        (
            Simulation(server=SimulatedServer(host_cache_gb=0.01)),
            "84.0 MB does not fit into 10.7 MB",
        ),
        (
            Simulation(server=SimulatedServer(max_batch_total_tokens=191)),
            "192 tokens does not fit into 11",
        ),
    ],
)
def test_options_that_cannot_be_served(simulation: Simulation, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        simulate(simulation)
    assert raised.value.hint is not None


def test_fair_parts_are_those_of_pouring_little_by_little() -> None:
    """Weighted max-min fairness: everybody who still wants more gets a drop by weight, until nothing is left."""
    wanted, weights = {0: 100.0, 1: 5.0, 2: 40.0, 3: 1000.0}, {0: 1.0, 1: 4.0, 2: 0.5, 3: 2.0}
    for total in (0.0, 12.0, 90.0, 400.0, 1145.0):
        poured, left = dict.fromkeys(wanted, 0.0), total
        while left > 1e-9:
            thirsty = [one for one in wanted if poured[one] < wanted[one] - 1e-9]
            if not thirsty:
                break
            sum_of = sum(weights[one] for one in thirsty)
            drop = min(
                left / sum_of, *((wanted[one] - poured[one]) / weights[one] for one in thirsty)
            )
            for one in thirsty:
                poured[one] += drop * weights[one]
            left -= drop * sum_of
        assert fair_parts(total, wanted, weights.__getitem__) == pytest.approx(poured)


EVEN = Traffic(6000, 600.0, 100, zipf=0.0)  # more than the server can do
FLOODS = {
    "50 adapters": (EVEN, Tenancy(2, greed=4.0)),
    "half the weight": (EVEN, Tenancy(2, (1.0, 2.0), greed=3.0)),
    "among four": (EVEN, Tenancy(4, greed=10.0)),
    "many prompts": (
        Traffic(60_000, 60.0, 2, zipf=0.0),
        Tenancy(2, greed=0.1, greedy_prompts=1024),
    ),
}


@pytest.mark.parametrize(("traffic", "tenancy"), FLOODS.values(), ids=FLOODS)
def test_a_flooding_tenant_takes_nobodys_share(traffic: Traffic, tenancy: Tenancy) -> None:
    """The arena holds 20 adapters, the host cache 40; the requests of the first tenant alone would fill the server."""
    server = tight(max_batch_total_tokens=40_000, max_concurrent_requests=2048)
    report = simulate(Simulation(traffic, server, tenancy=tenancy))
    assert report.refused and all(one.tokens > 5000 for one in report.tenants)
    assert min(one.ratio for one in report.tenants[1:]) > 0.95


def test_shares_of_the_host_cache() -> None:
    shares = TierShares(1000)
    assert shares.may_take("few", 0.5, 900), "nobody holds anything"
    for digest in (b"a", b"b", b"c"):
        assert shares.may_take("many", 0.5, 250)
        shares.take("many", digest, 250)
    assert not shares.may_take("many", 0.5, 1) and shares.may_take("one tenant alone", 1.0, 900)
    assert shares.may_take("few", 0.5, 500) and not shares.may_take("few", 0.5, 501)
    shares.take("many", b"a", 250)  # again: it counts once
    shares.take("few", b"d", 100)
    shares.give_back("many", b"b", 250)
    assert shares.may_take("many", 0.5, 150) and not shares.may_take("many", 0.5, 151)
    for tenant, digest, size in (("many", b"a", 250), ("many", b"a", 250), ("many", b"c", 250)):
        shares.give_back(tenant, digest, size)
    assert shares.may_take("many", 0.1, 650) and not shares.may_take("many", 0.1, 651)


def test_arrivals_of_tenants() -> None:
    """Tenants have adapters of their own. The first sends more, every prompt of a request at once."""
    traffic = Traffic(requests=30_000, rate=100.0, adapters=50, zipf=1.0)
    found = list(arrivals(traffic, Tenancy(3, greed=4.0, greedy_prompts=5)))
    assert all(one.adapter % 3 == one.tenant and one.adapter < 50 for one in found)
    requests = Counter(one.tenant for one in found if not one.prompt)
    assert requests[0] == pytest.approx(4 * requests[1], rel=0.1)
    assert requests[1] == pytest.approx(requests[2], rel=0.1)
    assert [one.prompt for one in found if not one.tenant][:10] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert not any(one.prompt for one in found if one.tenant)
