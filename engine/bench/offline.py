"""The benchmark of engines in this process: decode steps, prefill and throughput, without and with adapters.

Every round runs each case once; all engines stay loaded. The base case and the long context have their own engines (no
arena; room for one long sequence). The limit of a decode step follows from its bytes and the bandwidth of a copy, which
is measured before an engine is loaded.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from engine.adapters.tiers import HostRegion
from engine.bench.adapters import Images, size_of
from engine.bench.cases import Case, assign, cases_of
from engine.bench.engine_report import EngineReport, Loaded, Measurement, Placed
from engine.bench.files import load_files
from engine.bench.limits import (
    chosen_fraction,
    fitting,
    needed_fraction,
    rates,
    without_adapters,
)
from engine.bench.machine import machine
from engine.bench.shapes import write_model
from engine.bench.timing import ended, forward_ms, step_ms, submit, wall
from engine.bench.work import Model
from engine.bench_options import Workload
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.messages import IMAGE_ALIGN, AdapterImageRef, Request, SamplingParams
from engine.models import adapter_layout
from engine.platform import detect, device_type, set_threads

WARM_UP_TOKENS = 4

Tell = Callable[[str], None]


def measure(config: EngineConfig, workload: Workload, tell: Tell = lambda _: None) -> EngineReport:
    """Runs all cases. `tell` receives lines of progress. Raises ConfigError or ModelError."""
    workload.check()
    set_threads(config)
    with ExitStack() as stack:
        if workload.shape:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lorax-bench-"))
            config = _shaped(config, workload.shape, Path(folder))
        bench = Bench(config, workload, tell)
        stack.callback(bench.close)
        return bench.run()


def _shaped(config: EngineConfig, shape: str, folder: Path) -> EngineConfig:
    if config.model.model_id != ModelConfig().model_id:
        raise ConfigError("--shape and --model-id exclude each other", field="shape")
    model_id = str(write_model(folder / shape, shape))
    return replace(config, model=replace(config.model, model_id=model_id, load_format="dummy"))


@dataclass(slots=True)
class _Rounds:
    """The measurements of one case, one entry per round; seconds."""

    forward_ms: float | None = None
    first_token: list[float] = field(default_factory=list)  # wall time of 1 token
    all_tokens: list[float] = field(default_factory=list)  # wall time of all tokens


class Bench:
    """The engines and the adapters of one workload."""

    def __init__(self, config: EngineConfig, workload: Workload, tell: Tell) -> None:
        self.workload, self.tell = workload, tell
        self.cases = cases_of(workload)
        self.chooser = random.Random(workload.seed)
        self.device = torch.device(device_type(config))
        self.layout, self.spec, _ = adapter_layout(config.model, self.device.type)
        self.dtype = getattr(torch, self.layout.dtype)
        self.bandwidth, self.product_rate = rates(self.device, self.dtype)
        self.engines: dict[str, Engine] = {}
        self.images: Images | None = None
        self.regions: list[HostRegion] = []
        self.make_seconds = self.needed = 0.0
        self.config = config
        self._ids = 0
        kinds = {case.kind for case in self.cases}
        if kinds & {"enabled", "adapters"} or self._with_files:
            self._start_lora("adapters" in kinds)
        for kind in ("base", "long"):
            if kind in kinds:
                room = fitting(config, workload, self.spec.max_positions, kind == "long")
                self.regions.append(HostRegion.create(16 * IMAGE_ALIGN))
                self._start(kind, without_adapters(room), self.regions[-1])
        if not self.engines:
            raise ConfigError(
                "no case to measure: check --cases, --files and --long-context", field="cases"
            )

    @property
    def _with_files(self) -> bool:
        return "files" in self.workload.cases and self.workload.files > 0

    def _start_lora(self, with_images: bool) -> None:
        """Starts the engine with an arena, with the adapters in its host region."""
        workload = self.workload
        one = size_of(self.layout, workload.ranks[0][0], workload.targets)
        num_files = workload.files if self._with_files else 0
        self.tell("making random adapters")
        started = time.perf_counter()
        self.images = Images(
            self.layout,
            workload.ranks if with_images else (),
            workload.adapters,
            workload.targets,
            workload.seed,
            room=num_files * (one.total + IMAGE_ALIGN),
        )
        self.make_seconds = time.perf_counter() - started
        config = fitting(self.config, workload, self.spec.max_positions, long=False)
        least = one.data_bytes if self._with_files else 0
        if wanted := max(self.images.arena_bytes, least):
            self.needed = needed_fraction(wanted, detect(config).budget)
            fraction = chosen_fraction(config, self.needed)
            adapters = replace(config.adapters, adapter_memory_fraction=fraction)
            config = replace(config, adapters=adapters)
        self.tell(
            f"made {self.images.arena_bytes / 1e6:.1f} MB of adapters in {self.make_seconds:.1f} s; "
            f"--adapter-memory-fraction is {config.adapters.adapter_memory_fraction:.4f}, "
            f"they need {self.needed:.4f}"
        )
        self.lora_config = config
        self._start("lora", config, self.images.region)

    def _start(self, name: str, config: EngineConfig, region: HostRegion) -> None:
        self.tell(f"starting the engine {name!r}")
        try:
            self.engines[name] = Engine(config, region)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"not enough memory for the engine {name!r}; already loaded: {', '.join(self.engines) or 'none'}",
                field="cases",
                hint="run twice: with --cases base, then with --cases enabled,adapters,files",
            ) from None

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()
        if self.images is not None:
            self.images.region.close()
        for region in self.regions:
            region.close()

    # -- measuring

    def run(self) -> EngineReport:
        """Warms up every case, then runs the rounds."""
        placed = self._place()
        rounds = {case: _Rounds() for case in self.cases}
        batches = {case: self._batch(case) for case in self.cases}
        for case in self.cases:
            self.tell(f"warming up: {case.name}")
            with self._long_request(case):
                self._wall(case, batches[case], WARM_UP_TOKENS)
                wanted = self._requests(batches[case], self.workload.output_tokens)
                rounds[case].forward_ms = forward_ms(self._engine(case), wanted)
        before = {kind: engine.stats.placements for kind, engine in self.engines.items()}
        for number in range(self.workload.repeat):
            for case in self.cases:
                self.tell(f"round {number + 1} of {self.workload.repeat}: {case.name}")
                with self._long_request(case):
                    rounds[case].first_token.append(self._wall(case, batches[case], 1))
                    wanted_tokens = self.workload.output_tokens
                    rounds[case].all_tokens.append(self._wall(case, batches[case], wanted_tokens))
        after = {kind: engine.stats.placements for kind, engine in self.engines.items()}
        steady = before == after
        loaded = self._load() if self._with_files else None
        return self._report(rounds, batches, steady, placed, loaded)

    def _engine(self, case: Case) -> Engine:
        return self.engines[case.kind if case.kind in ("base", "long") else "lora"]

    def _batch(self, case: Case) -> list[AdapterImageRef | None]:
        """The adapter of each request, without the long one of the long case."""
        batch = self.workload.batch
        if case.kind != "adapters":
            return [None] * (batch - (case.kind == "long"))
        assert self.images is not None
        refs = self.images.mixes[case.mix][: case.distinct]
        return [*assign(refs, batch, case.popularity, self.chooser)]

    def _requests(
        self, adapters: Sequence[AdapterImageRef | None], tokens: int, prompt: int | None = None
    ) -> Iterator[Request]:
        prompt = prompt or self.workload.input_tokens
        for adapter in adapters:
            self._ids += 1
            yield Request(
                id=str(self._ids),
                tokens=self.chooser.choices(range(self.spec.vocab), k=prompt),
                sampling=SamplingParams(),
                max_new_tokens=tokens,
                eos_token_ids=[],
                adapter=adapter,
                arrival=time.monotonic(),
            )

    def _wall(self, case: Case, adapters: Sequence[AdapterImageRef | None], tokens: int) -> float:
        requests = [*self._requests(adapters, tokens)]
        return wall(self._engine(case), requests, synchronize=self._synchronize)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _long_request(self, case: Case) -> ExitStack:
        """While open, the one request of the long case decodes. Empty for other cases."""
        stack = ExitStack()
        if case.kind == "long":
            engine = self._engine(case)
            prompt, most = self._long_lengths(engine)
            (request,) = self._requests([None], most, prompt)
            running = submit(engine, [request])
            begun = False
            while not begun:
                updates = engine.step()
                begun = any(update.tokens for update in updates)
                ended(running, updates)

            def end() -> None:
                lasted = engine.has_work
                engine.cancel(request.id)
                while engine.has_work:
                    engine.step()
                assert lasted, "the long request outlasts the short ones"

            stack.callback(end)
        return stack

    def _long_lengths(self, engine: Engine) -> tuple[int, int]:
        """(prompt, new tokens): the context reaches about --long-context while the short requests run twice."""
        workload = self.workload
        chunks = -(-workload.batch * workload.input_tokens // engine.plan.max_step_tokens)
        steps = 2 * workload.output_tokens + 4 * (chunks + workload.batch) + WARM_UP_TOKENS
        if workload.long_context <= steps + 1:
            raise ConfigError(
                f"--long-context {workload.long_context} is too short: the case takes {steps} steps",
                field="long_context",
                hint="raise --long-context or lower --output-tokens",
            )
        return workload.long_context - steps, steps

    def _place(self) -> Placed | None:
        """Copies all adapters at once into an empty arena."""
        if self.images is None or not (refs := [ref for mix in self.images.mixes for ref in mix]):
            return None
        self.tell("copying all adapters to the device")
        requests = [*self._requests(refs, 1, prompt=1)]
        seconds = wall(self.engines["lora"], requests, synchronize=self._synchronize)
        total = sum(ref.data_bytes for ref in refs)
        return Placed(len(refs), total, seconds, len(refs) / seconds, total / seconds)

    def _load(self) -> Loaded:
        """Comes last: the exchange overwrites the host region."""
        assert self.images is not None
        self.tell("loading adapters from files")
        engine, region = self.engines["lora"], self.images.region
        return load_files(
            engine,
            self.lora_config,
            region,
            self.workload,
            lambda ref: [*self._requests([ref], 1)],
        )

    # -- the report

    def _report(
        self,
        rounds: dict[Case, _Rounds],
        batches: dict[Case, list[AdapterImageRef | None]],
        steady: bool,
        placed: Placed | None,
        loaded: Loaded | None,
    ) -> EngineReport:
        engine = next(iter(self.engines.values()))
        info = engine.info
        lora = self.engines.get("lora")
        fraction = self.lora_config.adapters.adapter_memory_fraction if lora else 0.0
        measured: list[Measurement] = []
        for case in self.cases:
            first = measured[0].step_ms if measured else None
            measured.append(self._measurement(case, rounds[case], batches[case], steady, first))
        return EngineReport(
            machine=machine(info.device_name),
            workload=self.workload,
            model_id=f"{self.workload.shape}, random weights"
            if self.workload.shape
            else info.model_id,
            dtype=info.dtype,
            backends=info.backends,
            copy_bytes_per_s=self.bandwidth,
            product_flops_per_s=self.product_rate,
            adapter_bytes=self.images.arena_bytes if self.images else 0,
            adapter_memory_fraction=fraction,
            needed_memory_fraction=self.needed,
            make_seconds=self.make_seconds,
            measurements=measured,
            placed=placed,
            loaded=loaded,
        )

    def _measurement(
        self,
        case: Case,
        rounds: _Rounds,
        batch: Sequence[AdapterImageRef | None],
        steady: bool,
        first: float | None,
    ) -> Measurement:
        workload, tokens = self.workload, self.workload.output_tokens
        steps = [
            step_ms(whole, one, tokens)
            for whole, one in zip(rounds.all_tokens, rounds.first_token, strict=True)
        ]
        step = statistics.median(steps)
        contexts = [workload.input_tokens + tokens / 2] * len(batch)
        if case.kind == "long":
            contexts.append(workload.long_context - tokens / 2)
        model = Model(self.spec, self.layout, self._engine(case).plan, self.dtype.itemsize)
        decode = model.decode(contexts, batch)
        limit = decode.num_bytes / self.bandwidth * 1000
        first_token = statistics.median(rounds.first_token)
        return Measurement(
            case=case.name,
            adapters=len({ref.digest for ref in batch if ref is not None}),
            step_ms=step,
            rounds_ms=tuple(steps),
            forward_ms=rounds.forward_ms,
            tokens_per_s=len(batch) * tokens / statistics.median(rounds.all_tokens),
            prefill_tokens_per_s=len(batch) * workload.input_tokens / first_token,
            prefill_ms=first_token * 1000,
            decode=decode,
            prefill=model.prefill(workload.input_tokens, batch),
            limit_ms=limit,
            share=limit / step,
            ratio=(first or step) / step,
            resident=steady,
        )
