"""Offline measurement of one engine: decode steps, prefill and throughput, with adapters and without.

Adapters are random and made straight in the host tier; every case runs in the same engine, in turn, so that the base
model is a reference under the same conditions. What a decode step must move (weights, KV cache, the adapters of the
batch) is set beside what the machine's memory could deliver, measured by a copy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from engine.adapters.tiers import UNIT, HostRegion
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.lora.image import image_size, write_image
from engine.lora.weights import LoraWeights, Pair, Place, TensorMatrix
from engine.messages import AdapterImageRef, Request, SamplingParams
from engine.models import adapter_layout
from engine.ops.layout import AdapterLayout
from engine.platform import device_type

Popularity = Literal["distinct", "uniform", "zipf", "identical"]

SCALE = 0.5  # of every adapter; not 1, so that a forgotten scale would show
DEVIATION = 0.02  # of every value of A and B
SPARE_TOKENS = (
    64  # for each request: the scheduler admits none that would have to be preempted soon
)
COPY_BYTES = 1 << 28
COPIES = 8


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured."""

    batch: int = 8
    input_tokens: int = 64
    output_tokens: int = 32
    adapters: int = 8
    ranks: tuple[int, ...] = (16,)  # given out in turn
    targets: tuple[str, ...] = ()  # empty: every linear of the layers
    popularity: tuple[Popularity, ...] = ("distinct",)
    repeat: int = 3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Measurement:
    """One case. Seconds and rates are medians over the rounds."""

    case: str
    step_ms: float  # of decode steps with the whole batch
    step_ms_best: float
    step_ms_p90: float
    prefill_tokens_per_s: float  # prompt tokens until every request has its first token
    tokens_per_s: float  # generated tokens of the whole round
    ratio: float  # step_ms of the base / step_ms
    must_move_bytes: (
        int  # weights, KV cache and distinct adapters that a decode step reads at least
    )
    must_move_ms: float  # at the measured copy bandwidth
    adapters: int  # distinct ones in the batch
    resident: bool  # no adapter was placed during the rounds


@dataclass(frozen=True, slots=True)
class Report:
    """All cases and the conditions they ran under."""

    workload: Workload
    device: str
    dtype: str
    model_id: str
    backends: dict[str, str]
    copy_bytes_per_s: float
    measurements: list[Measurement]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(slots=True)
class _Round:
    """One batch from submission to its last token."""

    steps: list[float]  # seconds of decode steps with the whole batch
    prefill_s: float
    total_s: float


def random_adapter(layout: AdapterLayout, rank: int, targets: Sequence[str]) -> LoraWeights:
    """A LoRA of one rank on `targets` (none: every linear of the layers), with values that are not zero."""
    pairs: dict[Place, Pair] = {}
    for layer, number, group in layout.places():
        for index, target in enumerate(group.targets):
            wanted = target.name in targets if targets else layer < layout.num_layers
            if not wanted:
                continue
            a = torch.randn(rank, group.in_features) * DEVIATION
            b = torch.randn(target.out_features, rank) * DEVIATION
            pairs[layer, number, index] = Pair(
                TensorMatrix(a), TensorMatrix(b), SCALE, target.module
            )
    return LoraWeights(pairs)


class Images:
    """The adapters of a workload in a host region of their own: one image for each rank, copied."""

    def __init__(self, layout: AdapterLayout, workload: Workload) -> None:
        known = {target.name for _, _, group in layout.places() for target in group.targets}
        if unknown := sorted(set(workload.targets) - known):
            raise ConfigError(
                f"--targets: the model has no {unknown[0]!r}",
                field="targets",
                hint=f"it has {', '.join(sorted(known))}",
            )
        torch.manual_seed(workload.seed)
        weights = {rank: random_adapter(layout, rank, workload.targets) for rank in workload.ranks}
        sizes = {rank: image_size(made, layout) for rank, made in weights.items()}
        ranks = [workload.ranks[i % len(workload.ranks)] for i in range(workload.adapters)]
        offsets = [0]
        for rank in ranks:
            offsets.append(offsets[-1] + -(-sizes[rank].total // UNIT) * UNIT)
        self.region = HostRegion.create(offsets[-1])
        self.refs: list[AdapterImageRef] = []
        first: dict[int, int] = {}
        for number, rank in enumerate(ranks):
            offset, size = offsets[number], sizes[rank]
            place = self.region.view[offset : offset + size.total]
            if rank not in first:
                write_image(weights[rank], layout, place)
                first[rank] = offset
            else:
                place[:] = self.region.view[first[rank] : first[rank] + size.total]
            place.release()
            digest = hashlib.blake2b(f"{workload.seed} {number}".encode(), digest_size=16).digest()
            ref = AdapterImageRef(
                digest, offset, size.data_bytes, size.max_rank, f"random-{number}"
            )
            self.refs.append(ref)


def assign(
    refs: Sequence[AdapterImageRef], batch: int, popularity: Popularity, chooser: random.Random
) -> list[AdapterImageRef]:
    """The adapter of each request of a batch."""
    if popularity == "distinct":
        return [refs[index % len(refs)] for index in range(batch)]
    if popularity == "identical":
        return [refs[0]] * batch
    weights = [1 / (rank + 1) if popularity == "zipf" else 1.0 for rank in range(len(refs))]
    return chooser.choices(refs, weights, k=batch)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of the best of a few large copies."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    best = float("inf")
    for _ in range(COPIES):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * COPY_BYTES / best


def fitting(config: EngineConfig, workload: Workload, longest: int) -> EngineConfig:
    """`config` with room for the workload where it says nothing itself; the model has `longest` positions."""
    scheduler = config.scheduler
    if scheduler.max_batch_size is None:
        scheduler = dataclasses.replace(scheduler, max_batch_size=workload.batch)
    if scheduler.max_total_tokens is None:
        total = workload.input_tokens + workload.output_tokens + SPARE_TOKENS
        scheduler = dataclasses.replace(scheduler, max_total_tokens=min(total, longest))
    return dataclasses.replace(config, scheduler=scheduler)


class Bench:
    """One engine and the adapters of one workload."""

    def __init__(self, config: EngineConfig, workload: Workload) -> None:
        if min(workload.batch, workload.input_tokens, workload.adapters, workload.repeat) < 1:
            raise ConfigError("--batch, --input-tokens, --adapters and --repeat must be above 0")
        if workload.output_tokens < 2:
            raise ConfigError(
                "--output-tokens must be above 1: a decode step follows the first token"
            )
        torch.set_num_threads(config.memory.num_threads or torch.get_num_threads())
        self.workload = workload
        layout, spec, _ = adapter_layout(config.model, device_type(config))
        self.images = Images(layout, workload)
        self.engine = Engine(fitting(config, workload, spec.max_positions), self.images.region)
        self.chooser = random.Random(workload.seed)
        self._ids = 0

    def run(self, tell: Callable[[str], None] = lambda _: None) -> Report:
        """Warms every case up, then measures them in turn."""
        cases: list[Popularity | None] = [None, *self.workload.popularity]
        rounds: dict[Popularity | None, list[_Round]] = {case: [] for case in cases}
        batches = {case: self._batch(case) for case in cases}
        for case in cases:
            tell(f"warming up: {case or 'base'}")
            self._round(batches[case])
        placed = self.engine.stats.placements
        for number in range(self.workload.repeat):
            for case in cases:
                tell(f"round {number + 1} of {self.workload.repeat}: {case or 'base'}")
                rounds[case].append(self._round(batches[case]))
        resident = self.engine.stats.placements == placed
        info = self.engine.info
        bandwidth = copy_bandwidth(self.engine.platform.device)
        base = self._step_ms(rounds[None])
        measurements = [
            self._measurement(case, rounds[case], batches[case], (base, bandwidth, resident))
            for case in cases
        ]
        return Report(
            self.workload,
            info.device_name,
            info.dtype,
            info.model_id,
            info.backends,
            bandwidth,
            measurements,
        )

    def close(self) -> None:
        self.engine.close()
        self.images.region.close()

    def _batch(self, case: Popularity | None) -> list[AdapterImageRef | None]:
        if case is None:
            return [None] * self.workload.batch
        return [*assign(self.images.refs, self.workload.batch, case, self.chooser)]

    def _requests(self, adapters: Sequence[AdapterImageRef | None]) -> Iterator[Request]:
        vocab = self.engine.spec.vocab
        for adapter in adapters:
            self._ids += 1
            yield Request(
                id=str(self._ids),
                tokens=[self.chooser.randrange(vocab) for _ in range(self.workload.input_tokens)],
                sampling=SamplingParams(),
                max_new_tokens=self.workload.output_tokens,
                eos_token_ids=[],
                adapter=adapter,
                arrival=time.monotonic(),
            )

    def _round(self, adapters: Sequence[AdapterImageRef | None]) -> _Round:
        for request in self._requests(adapters):
            self.engine.submit(request)
        started: set[str] = set()
        steps: list[float] = []
        begin = time.perf_counter()
        prefill_s = 0.0
        while self.engine.has_work:
            start = time.perf_counter()
            updates = self.engine.step()
            end = time.perf_counter()
            tokens = sum(len(update.tokens) for update in updates)
            if prefill_s and tokens == self.workload.batch:
                steps.append(end - start)
            started.update(update.id for update in updates if update.tokens)
            if not prefill_s and len(started) == self.workload.batch:
                prefill_s = end - begin
        if not steps:
            raise ConfigError(
                f"{self.workload.batch} requests never ran together",
                hint="raise --cpu-memory-gb or --adapter-memory-fraction, or lower --batch",
            )
        return _Round(steps, prefill_s, time.perf_counter() - begin)

    @staticmethod
    def _step_ms(rounds: Sequence[_Round]) -> float:
        return statistics.median(step for one in rounds for step in one.steps) * 1000

    def _measurement(
        self,
        case: Popularity | None,
        rounds: Sequence[_Round],
        batch: Sequence[AdapterImageRef | None],
        common: tuple[float, float, bool],
    ) -> Measurement:
        base_ms, bandwidth, resident = common
        workload = self.workload
        distinct = {ref.digest: ref.data_bytes for ref in batch if ref is not None}
        context = workload.input_tokens + workload.output_tokens // 2
        plan, spec = self.engine.plan, self.engine.spec
        itemsize = getattr(torch, self.engine.layout.dtype).itemsize
        weights = plan.weights - (0 if spec.tied else spec.vocab * spec.hidden * itemsize)
        kv = plan.kv_block // plan.block_size * context * workload.batch
        must_move = weights + kv + sum(distinct.values())
        steps = sorted(step for one in rounds for step in one.steps)
        prompts = workload.batch * workload.input_tokens
        outputs = workload.batch * workload.output_tokens
        step_ms = self._step_ms(rounds)
        return Measurement(
            case=case or "base",
            step_ms=step_ms,
            step_ms_best=steps[0] * 1000,
            step_ms_p90=steps[len(steps) * 9 // 10] * 1000,
            prefill_tokens_per_s=prompts / statistics.median(one.prefill_s for one in rounds),
            tokens_per_s=outputs / statistics.median(one.total_s for one in rounds),
            ratio=base_ms / step_ms,
            must_move_bytes=must_move,
            must_move_ms=must_move / bandwidth * 1000,
            adapters=len(distinct),
            resident=resident,
        )
