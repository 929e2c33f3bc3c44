"""The engine: requests in, updates out, one synchronous step at a time. No processes, no threads of its own.

`step` is plan, run, commit: the scheduler says what the next step holds, the runner computes it, and the result goes
back to the scheduler, which says what each request learns of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress

import torch

from engine import models, ops
from engine.adapters.slots import SlotTable
from engine.adapters.tiers import HostRegion
from engine.checkpoint import cache_folder, folder_of
from engine.config import EngineConfig
from engine.errors import EngineDead, InvalidRequest, LoraxError, OutOfMemory
from engine.layers import quantised
from engine.lora.pinning import Pinning
from engine.lora.placement import CudaPlacer, Placer, pin
from engine.messages import (
    AdapterImageRef,
    EngineInfo,
    EngineStats,
    Request,
    StepPlan,
    Update,
)
from engine.models import weights
from engine.models.decoder import Decoder
from engine.ops.attention import Backend, Gpu, Needs, Room, choose
from engine.ops.layout import RECORD_WORDS, AdapterLayout
from engine.platform import detect
from engine.runner.batch import Adapters
from engine.runner.faults import empty_cache, first_line, fitting, out_of_memory
from engine.runner.memory import compared, plan_memory
from engine.runner.rows import RowTable
from engine.runner.runner import Runner
from engine.runner.shapes import decode_words, mixed_words
from engine.scheduler.blocks import BlockPool
from engine.scheduler.scheduler import Scheduler, SchedulerLimits

logger = logging.getLogger(__name__)

WEIGHTS_REMEDY = "quantise them with --quantize, serve a smaller model, or free what other processes hold on the device"
TABLES_REMEDY = "lower --cuda-memory-fraction (--cpu-memory-gb on a CPU), --adapter-memory-fraction or --max-batch-size"
GRAPHS_REMEDY = (
    "lower --cuda-memory-fraction, --max-batch-size or --max-adapter-rank, or set --eager"
)
STEP_REMEDY = "lower --max-batch-prefill-tokens or --cuda-memory-fraction"


class Engine:
    """One base model on one device, its KV cache, its adapters.

    Not thread-safe: one thread calls it. Raises ModelError or ConfigError from the constructor.
    """

    def __init__(
        self,
        config: EngineConfig,
        region: HostRegion,
        clock: Callable[[], float] = time.monotonic,
        run_ahead: int | None = None,
    ) -> None:
        """`run_ahead`: steps launched before the oldest is read back, 0 or 1; None: 1 on a GPU, 0 on a CPU."""
        started = time.perf_counter()
        self.platform = detect(config)
        self.run_ahead = int(self.platform.is_cuda) if run_ahead is None else run_ahead
        if self.platform.is_cuda and not config.memory.slow_reference:
            ops.require_cuda()
        pinning = pin(region, self.platform.device) if self.platform.is_cuda else None
        try:
            self._build(config, region, pinning)
        except BaseException:
            if pinning is not None:
                pinning.release()
            raise
        self._start_scheduler(config, clock)
        self.info = self._info(config)
        self._log_start(time.perf_counter() - started, config.model.quantize)

    def _build(self, config: EngineConfig, region: HostRegion, pinning: Pinning | None) -> None:
        """Everything that takes memory, each part named if it finds no room."""
        dtype = self._load(config)
        self.layout: AdapterLayout = self.model.layout
        self.plan = plan_memory(
            config,
            self.platform,
            self.spec,
            dtype.itemsize,
            (
                weights.size(self.model),
                weights.scratch(self.model),
                self.layout.record_bytes,
                region.size,
            ),
            self.attention,
        )
        with fitting("KV cache, adapter arena and tables", TABLES_REMEDY):
            self._allocate(config, region, dtype, pinning)
        if self.platform.is_cuda and not (config.memory.eager or config.memory.slow_reference):
            with fitting("the CUDA graphs", GRAPHS_REMEDY):
                targets = max(len(group.targets) for _, _, group in self.layout.places())
                width = targets * config.adapters.max_adapter_rank
                self.runner.capture(width, self.plan.max_step_tokens)

    def _load(self, config: EngineConfig) -> torch.dtype:
        """The model; returns the type of what it computes in."""
        method = quantised.method_of(config.model.quantize)
        folder = folder_of(config.model, weights=config.model.load_format != "dummy")
        self.spec = models.spec_from(folder)
        dtype = models.dtype_of(config.model, self.spec.config, self.platform.device)
        self.attention = self._attention(config, dtype)
        with fitting("the weights", WEIGHTS_REMEDY):
            self.model = Decoder(self.spec, dtype, self.platform.device, method)
            if config.model.load_format == "dummy":
                weights.make_up(self.model)
            else:
                weights.load(self.model, folder, cache_folder(config.model.huggingface_hub_cache))
        return dtype

    def _log_start(self, seconds: float, quantize: str | None) -> None:
        device = self.platform.device
        served = ", ".join(f"{op}: {backend}" for op, backend in self.info.backends.items())
        logger.info("ops on %s: %s", device.type, served)
        if self.platform.is_cuda:
            free, _ = torch.cuda.mem_get_info(device)
            logger.info("%s", compared(self.plan, torch.cuda.memory_stats(device), free))
        logger.info(
            "engine ready in %.1f s on %s, linears %s",
            seconds,
            self.platform.name,
            quantize or self.layout.dtype,
        )

    def _attention(self, config: EngineConfig, dtype: torch.dtype) -> Backend:
        """The backend that is asked for; before anything large is loaded."""
        attention, device = self.spec.attention, self.platform.device
        needs = Needs(
            attention.heads,
            attention.kv_heads,
            attention.head_dim,
            attention.scale,
            attention.softcap,
            frozenset(attention.window(layer) for layer in range(self.spec.num_layers)),
            dtype,
            device,
            Gpu.of(device),
        )
        chosen = choose(config.memory.attention_backend, needs)
        logger.info("attention backend: %s", chosen.name)
        return chosen

    def _allocate(
        self,
        config: EngineConfig,
        region: HostRegion,
        dtype: torch.dtype,
        pinning: Pinning | None,
    ) -> None:
        """KV cache, arena, records and rows: all memory that the engine will ever hold, touched now."""
        plan, spec, device = self.plan, self.spec, self.platform.device
        heads = (spec.attention.kv_heads, spec.attention.head_dim)
        shape = (plan.num_blocks, spec.num_layers, 2, plan.block_size, *heads)
        cache = torch.empty(shape, dtype=dtype, device=device).zero_()
        arena = torch.empty(plan.arena, dtype=torch.uint8, device=device).zero_()
        slots = config.adapters.max_active_adapters + 1
        records = torch.empty(
            (slots, spec.num_layers + 1, self.layout.num_groups, RECORD_WORDS),
            dtype=torch.int32,
            device=device,
        ).zero_()
        blocks = -(-plan.max_total_tokens // plan.block_size)
        rows = RowTable(
            plan.max_rows + 1,
            plan.max_total_tokens,
            blocks,
            device,
            decode_words(plan.max_rows) + mixed_words(plan.max_rows, plan.max_step_tokens),
        )
        self.attention.start(Room(plan.max_rows, blocks, plan.block_size))
        host = (arena, records, region)
        placer = Placer(*host) if pinning is None else CudaPlacer(*host, pinning)
        parts = (self.model, rows, cache, Adapters(arena, records), placer)
        self.runner = Runner(*parts, self.attention)

    def _start_scheduler(self, config: EngineConfig, clock: Callable[[], float]) -> None:
        plan = self.plan
        limits = SchedulerLimits(
            max_rows=plan.max_rows,
            max_step_tokens=plan.max_step_tokens,
            max_input_length=plan.max_input_length,
            max_total_tokens=plan.max_total_tokens,
            adapter_cycle_time=config.adapters.adapter_cycle_time_s,
            chunk_tokens=plan.chunk_tokens,
            max_scored_tokens=plan.max_scored_tokens,
        )
        self.blocks = BlockPool(plan.num_blocks, plan.block_size, config.scheduler.prefix_caching)
        self.slots = SlotTable(config.adapters.max_active_adapters + 1, plan.arena)
        self.scheduler = Scheduler(limits, self.blocks, self.slots, clock)

    def _info(self, config: EngineConfig) -> EngineInfo:
        plan, layout = self.plan, self.layout
        device = self.platform.device.type
        targets = {target.name for _, _, group in layout.places() for target in group.targets}
        return EngineInfo(
            model_id=config.model.model_id,
            model_type=self.spec.model_type,
            revision=config.model.revision,
            dtype=layout.dtype,
            device=device,
            device_name=self.platform.name,
            vocab_size=self.spec.vocab,
            max_input_length=plan.max_input_length,
            max_total_tokens=plan.max_total_tokens,
            max_batch_total_tokens=(plan.num_blocks - 1) * plan.block_size,
            max_batch_size=plan.max_rows,
            max_step_tokens=plan.max_step_tokens,
            block_size=plan.block_size,
            adapter_bytes=plan.arena,
            host_bytes=plan.host_tier,
            backends={op: served[device] for op, served in ops.backends().items()}
            | dict(self.attention.serves),
            memory_plan=plan.lines,
            targets=sorted(targets),
            quantize=config.model.quantize,
        )

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def preload(self, image: AdapterImageRef) -> None:
        """Places an adapter and never evicts it; before any request. Raises AdapterTooLarge."""
        self.scheduler.preload(image)

    def submit(self, request: Request) -> None:
        """Takes a request; raises InvalidRequest or AdapterTooLarge, and then nothing has changed."""
        vocab = self.spec.vocab
        if any(not 0 <= token < vocab for token in request.tokens):
            raise InvalidRequest(
                f"a prompt token is outside the vocabulary of {vocab}", field="tokens"
            )
        self.scheduler.add(request)

    def cancel(self, id: str) -> None:
        """Ends a request early; its last update says so. An unknown id is ignored."""
        self.scheduler.cancel(id)

    def step(self) -> list[Update]:
        """One step of the batch, or nothing if there is nothing to do.

        A step that does not fit into the device's memory is taken back, to be tried in parts by the steps to come.
        """
        plan = self.scheduler.plan()
        if plan is not None and (reason := self._launch(plan)) is not None:
            return self._take_back(reason)
        if len(self.runner.launched) > (0 if plan is None else self.run_ahead):
            return self.scheduler.commit(self.runner.collect())
        return self.scheduler.take_updates()

    def _launch(self, plan: StepPlan) -> str | None:
        """Starts the step. Returns why the device's memory is too small for it; None if it is not."""
        try:
            self.runner.launch(plan)
        except RuntimeError as error:
            if (reason := out_of_memory(error)) is None:
                raise
            return reason  # the error itself would keep the step's activations alive
        return None

    def _take_back(self, reason: str) -> list[Update]:
        """Undoes the step that was planned last; those before it count. Raises OutOfMemory if nobody was in it."""
        updates: list[Update] = []
        while self.runner.launched:
            updates += self.scheduler.commit(self.runner.collect())
        self.runner.abandon()
        empty_cache(self.platform.device)
        error = OutOfMemory(
            f"the request does not fit into the device's memory: {reason}", hint=STEP_REMEDY
        )
        involved = self.scheduler.take_back(error)
        if not involved:
            raise OutOfMemory(f"the device's memory is full: {reason}", hint=STEP_REMEDY)
        logger.warning(
            "a step of %d requests did not fit into memory and is tried in parts (%s): %s",
            len(involved),
            STEP_REMEDY,
            reason,
        )
        return updates + self.scheduler.take_updates()

    def fail(self, error: LoraxError) -> list[Update]:
        """Ends the requests of a step that failed, with an error; all others go on.

        Raises EngineDead if the device works no more: what follows an illegal access fails too, in every step.
        """
        try:
            self.runner.abandon()
        except RuntimeError as broken:
            raise EngineDead(f"the device works no more: {first_line(broken)}") from broken
        self.scheduler.fail(None, error)
        return self.scheduler.take_updates()

    def close(self) -> None:
        """Lets go of the memory."""
        with suppress(RuntimeError):  # of a device that works no more
            self.runner.abandon()
            self.runner.placer.close()
        del self.runner, self.model
