"""The simulation: requests arrive, wait for their adapters, and go through the real scheduler step by step.

As the engine does on a GPU, it launches a step before it reads back the previous one. The host's own work takes no
time: on a GPU it is hidden by the steps.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from math import inf

import engine
from engine.bench.quantiles import Times
from engine.bench.simulate.arrivals import Arrival, arrivals
from engine.bench.simulate.device import Launched, SimulatedDevice
from engine.bench.simulate.exchange import SimulatedExchange
from engine.bench.simulate.report import Acquisitions, SimulationReport
from engine.bench.simulate.tally import OpenRequest, Shares, Tally
from engine.bench_options import Simulation
from engine.bench_options.simulation import MB
from engine.messages import AdapterImageRef, Request, SamplingParams, Update
from engine.runner.shapes import chunk_bounds
from engine.scheduler import BlockPool, Scheduler, SchedulerLimits
from engine.scheduler.slots import SlotTable

RUN_AHEAD = 1  # steps launched before the oldest is read back
RESERVED = 10  # a tenth of the places is for tenants that hold less than their share
POLL_S = 0.001  # between two looks at a scheduler that waits for time to pass
SAMPLING = SamplingParams()


def simulate(options: Simulation) -> SimulationReport:
    """Runs until every request has ended. Raises ConfigError."""
    options.check()
    run = _Run(options)
    run.run()
    return run.report()


class _Run:
    """One simulation."""

    def __init__(self, options: Simulation) -> None:
        server = options.server
        self.options = options
        self.now = 0.0
        self.tally = Tally(Shares(options.tenancy.weight))
        self.device = SimulatedDevice(options.pace)
        self.exchange = SimulatedExchange(server.host_bytes, options.pace, options.tenancy)
        self.scheduler = _scheduler(options, lambda: self.now)
        self.slots = self.scheduler.slots
        self._arrivals = arrivals(options.traffic, options.tenancy)
        self._next = next(self._arrivals, None)
        self._sent = 0
        self._group = 0  # of the last request
        self._behind = 0  # tokens of the prompts before in that request
        self._held: Counter[int] = Counter()  # open prompts by tenant
        self._images: dict[int, AdapterImageRef] = {}
        self._requests: dict[str, Request] = {}  # that wait for their adapters
        self._open: dict[str, OpenRequest] = {}
        self._flights: deque[Launched] = deque()

    def run(self) -> None:
        while True:
            self._deliver()
            plan = self.scheduler.plan()
            if plan is not None:
                self._flights.append(self.device.launch(plan, self.now))
            if len(self._flights) > (0 if plan is None else RUN_AHEAD):
                self._commit()
            elif plan is None and not self._wait():
                return

    def _wait(self) -> bool:
        """Lets time pass until something happens; False: nothing will."""
        due = self._next.at if self._next is not None else inf
        due = min(due, self.exchange.next_end)
        if self.scheduler.has_work:
            due = min(due, self.now + POLL_S)
        if due == inf:
            return False
        self.now = max(self.now, due)
        return True

    # -- requests

    def _deliver(self) -> None:
        """Passes on the requests that have arrived, and those whose adapters have been loaded, by now."""
        while True:
            arrival, loaded = self._next, self.exchange.next_end
            if arrival is not None and arrival.at <= self.now and arrival.at <= loaded:
                self._arrive(arrival)
                self._next = next(self._arrivals, None)
            elif loaded <= self.now:
                for id, lease in self.exchange.take_loaded(loaded):
                    self._open[id].lease = lease
                    self.scheduler.add(self._requests.pop(id))
            else:
                return

    def _arrive(self, arrival: Arrival) -> None:
        self._sent += 1
        tally = self.tally
        if not arrival.prompt:
            self._group, self._behind = self._sent, 0
        if not self._has_place(arrival.tenant):
            tally.refused += 1
            return
        self._held[arrival.tenant] += 1
        tally.input_tokens += arrival.input_tokens
        image = self._image(arrival.adapter)
        request = Request(
            id=str(self._sent),
            tokens=[self._sent] * arrival.input_tokens,  # no two prompts share a prefix
            sampling=SAMPLING,
            max_new_tokens=arrival.output_tokens,
            eos_token_ids=[],
            adapter=image,
            arrival=arrival.at,
            group=str(self._group),
            behind=self._behind,
            tenant=str(arrival.tenant),
            weight=self.options.tenancy.weight(arrival.tenant),
        )
        self._behind += arrival.input_tokens + arrival.output_tokens
        opened = OpenRequest(
            arrival.adapter, arrival.at, arrival.output_tokens, tenant=arrival.tenant
        )
        self._open[request.id] = opened
        resident = self.slots.slot_of(image.digest) is not None
        opened.lease = self.exchange.acquire(image, request.id, request.tenant, arrival.at)
        if opened.lease is None:
            tally.reloaded += resident
            self._requests[request.id] = request
        else:
            opened.tier = "device" if resident else "host"
            self.scheduler.add(request)
        tally.tiers[opened.tier] += 1

    def _has_place(self, tenant: int) -> bool:
        """As `engine.server.places` decides."""
        most, tenancy = self.options.server.max_concurrent_requests, self.options.tenancy
        if len(self._open) < most - most // RESERVED:
            return True
        share = most * tenancy.share(tenant)
        return len(self._open) < most and self._held[tenant] < share

    def _image(self, adapter: int) -> AdapterImageRef:
        image = self._images.get(adapter)
        if image is None:
            sizes = self.options.traffic.adapter_mb
            image = self._images[adapter] = AdapterImageRef(
                digest=adapter.to_bytes(16, "little"),
                offset=0,
                data_bytes=int(sizes[adapter % len(sizes)] * MB),
                stacked_rank=16,
            )
        return image

    # -- steps

    def _commit(self) -> None:
        """Waits for the oldest step and passes on its tokens."""
        end, result = self._flights.popleft()
        self.now = max(self.now, end)
        if self.now >= self.tally.shares.window_end:
            self.tally.shares.end_windows(self._open.values(), self.now)
        updates = self.scheduler.commit(result)
        for update in updates:
            self._learn(update)

    def _learn(self, update: Update) -> None:
        request, tally = self._open[update.id], self.tally
        tally.token(request, self.now)
        if update.admitted is not None:
            tally.longest_wait = max(tally.longest_wait, update.admitted - request.arrival)
        if update.finish is not None:
            assert request.received == request.wanted, "a request ended early"
            tally.ended(request)
            assert request.lease is not None
            self.exchange.release(request.lease, self.now)
            del self._open[update.id]
            self._held[request.tenant] -= 1

    def report(self) -> SimulationReport:
        """The report, after `run`."""
        assert not self._open, "a request has not ended"
        tally, stats = self.tally, self.scheduler.stats()
        seconds = self.now
        ttft = tally.ttft()
        return SimulationReport(
            version=engine.__version__,
            options=self.options,
            seconds=seconds,
            sent=self._sent,
            completed=len(tally.latencies),
            refused=tally.refused,
            input_tokens=tally.input_tokens,
            output_tokens=tally.output_tokens,
            tokens_per_s=tally.output_tokens / seconds,
            requests_per_s=len(tally.latencies) / seconds,
            acquisitions=Acquisitions(**tally.tiers, reloaded=tally.reloaded),
            loads=self.exchange.num_loads,
            host_evictions=self.exchange.num_evictions,
            placements=stats.placements,
            device_evictions=stats.evictions,
            preemptions=stats.preemptions,
            steps=self.device.num_steps,
            step_tokens=tally.output_tokens / self.device.num_steps,
            ttft=ttft["all"],
            ttft_device=ttft["device"],
            ttft_host=ttft["host"],
            ttft_source=ttft["source"],
            itl=Times.of_counts(tally.gaps),
            latency=Times.of(tally.latencies),
            fairness=tally.shares.fairness(tally.longest_wait),
            tenants=tally.shares.tenants(),
        )


def _scheduler(options: Simulation, clock: Callable[[], float]) -> Scheduler:
    """A scheduler as `engine.build` makes it."""
    server, traffic = options.server, options.traffic
    longest = traffic.input_tokens.high + traffic.output_tokens.high
    limits = SchedulerLimits(
        max_rows=server.max_batch_size,
        max_step_tokens=max(server.max_batch_prefill_tokens, server.max_batch_size),
        max_input_length=longest,
        max_total_tokens=longest,
        adapter_cycle_time=server.adapter_cycle_time_s,
        chunk_tokens=chunk_bounds(server.max_batch_size, server.max_chunk_tokens),
    )
    blocks = BlockPool(server.max_batch_total_tokens // server.block_size + 1, server.block_size)
    slots = SlotTable(server.max_active_adapters + 1, server.arena_bytes)
    return Scheduler(limits, blocks, slots, clock)
