"""Builds the parts of an engine from a configuration: a runner for each shard, and a scheduler.

Every shard builds a runner from (config, plan, shard); shard 0 also builds the scheduler from (plan). All memory is
allocated here. If a part does not fit, the error names it and the flags that change its size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine import models, ops
from engine.adapters.tiers import HostRegion
from engine.checkpoint import cache_folder, folder_of
from engine.config import EngineConfig
from engine.layers.methods import method_of
from engine.lora.fold import Fold
from engine.messages import EngineInfo, MergedAdapter
from engine.models import weights
from engine.models.decoder import Decoder
from engine.models.spec import ModelSpec, layout_of
from engine.ops.attention import AttentionBackend, Capacity, Gpu, KVFormat, Needs, choose
from engine.ops.layout import RECORD_WORDS, ShardLayout
from engine.ops.targets import Shard
from engine.platform import Platform, detect
from engine.runner.batch import Adapters
from engine.runner.extras import Finisher
from engine.runner.faults import fitting
from engine.runner.memory import Footprint, MemoryPlan, compared, plan_memory
from engine.runner.pinning import Pinning
from engine.runner.placement import CudaPlacer, Placer, pin
from engine.runner.rows import RowTable
from engine.runner.runner import Runner
from engine.runner.shapes import decode_words, mixed_words
from engine.scheduler.blocks import BlockPool
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.slots import SlotTable

if TYPE_CHECKING:
    from engine.adapters.static import StaticAdapter

logger = logging.getLogger(__name__)

WEIGHTS_REMEDY = (
    "quantise them with --quantize, serve a smaller model, or free memory that other processes use"
)
TABLES_REMEDY = "lower --cuda-memory-fraction (--cpu-memory-gb on a CPU), --adapter-memory-fraction or --max-batch-size"
GRAPHS_REMEDY = (
    "lower --cuda-memory-fraction, --max-batch-size or --max-adapter-rank, or set --eager"
)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its weights, its dtype and its attention backend."""

    spec: ModelSpec
    decoder: Decoder
    dtype: torch.dtype  # of its activations
    attention: AttentionBackend
    merged: MergedAdapter | None  # the adapter in its weights
    folder: Path

    @property
    def kv(self) -> KVFormat:
        """The storage format of keys and values."""
        return self.attention.kv_format(self.dtype)

    @property
    def layout(self) -> ShardLayout:
        return self.decoder.layout


@dataclass(frozen=True, slots=True)
class BuiltShard:
    """Everything of one shard: machine, model, memory plan, and the runner that holds the memory."""

    platform: Platform
    model: LoadedModel
    plan: MemoryPlan
    runner: Runner


def build_shard(config: EngineConfig, region: HostRegion, shard: Shard | None = None) -> BuiltShard:
    """One shard's part of an engine. Raises ModelError or ConfigError."""
    assert (shard or Shard()) == Shard(), "a model has one shard"
    platform = detect(config)
    if platform.is_cuda and not config.memory.slow_reference:
        ops.require_cuda()
    pinning = pin(region, platform.device) if platform.is_cuda else None
    try:
        model = load_model(config, platform)
        plan = plan_memory(config, platform, model.spec, footprint(model, region), model.attention)
        with fitting("KV cache, adapter arena and tables", TABLES_REMEDY):
            runner = make_runner(
                config=config,
                plan=plan,
                model=model,
                platform=platform,
                region=region,
                pinning=pinning,
            )
        if platform.is_cuda and not (config.memory.eager or config.memory.slow_reference):
            with fitting("the CUDA graphs", GRAPHS_REMEDY):
                groups = (*model.layout.groups, *model.layout.ends)
                targets = max(len(group.targets) for group in groups)
                runner.capture(targets * config.adapters.max_adapter_rank, plan.max_step_tokens)
    except BaseException:
        if pinning is not None:
            pinning.release()
        raise
    return BuiltShard(platform, model, plan, runner)


def load_model(config: EngineConfig, platform: Platform) -> LoadedModel:
    """The model of --model-id with its weights on the device."""
    method = method_of(config.model.quantize)
    folder = folder_of(config.model, weights=config.model.load_format != "dummy")
    spec = models.spec_from(folder)
    dtype = models.dtype_of(config.model, spec.config, platform.device)
    attention = choose_attention(config, spec, dtype, platform.device)
    with fitting("the weights", WEIGHTS_REMEDY), _to_merge(config, spec, dtype, folder) as static:
        fold = None if static is None else Fold(static.weights, spec, dtype)
        spec = spec if fold is None else fold.spec
        room = config.adapters.max_added_tokens
        decoder = Decoder(spec, dtype, platform.device, method, max_added_tokens=room)
        if config.model.load_format == "dummy":
            weights.init_random(decoder)
        else:
            cache = cache_folder(config.model.huggingface_hub_cache)
            weights.load(decoder, folder, cache, iter if fold is None else fold)
    about = None if static is None else static.about
    return LoadedModel(spec, decoder, dtype, attention, about, folder)


def _to_merge(
    config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, folder: Path
) -> AbstractContextManager[StaticAdapter | None]:
    """The adapter of --merge-adapter-weights, open in the block."""
    if not config.adapters.merge_adapter_weights:
        return nullcontext()
    from engine.adapters.static import static_adapter  # it imports every source

    layout = layout_of(spec, str(dtype).removeprefix("torch."))
    return static_adapter(config, layout, folder)


def choose_attention(
    config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    """The backend of --attention-backend. It runs before anything large is loaded."""
    attention = spec.attention
    needs = Needs(
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        scale=attention.scale,
        softcap=attention.softcap,
        windows=frozenset(attention.window(layer) for layer in range(spec.num_layers)),
        dtype=dtype,
        device=device,
        gpu=Gpu.of(device),
    )
    chosen = choose(config.memory.attention_backend, needs)
    logger.info("attention backend: %s", chosen.name)
    return chosen


def footprint(model: LoadedModel, region: HostRegion) -> Footprint:
    """The bytes that the model and its adapters take."""
    return Footprint(
        itemsize=model.dtype.itemsize,
        kv=model.kv,
        weights=weights.size(model.decoder),
        scratch=weights.scratch(model.decoder),
        widest_output=max(group.out_features for group in model.layout.groups),
        widest_input=max(group.in_features for group in model.layout.groups),
        records=model.layout.record_bytes,
        host_tier=region.size,
    )


def make_runner(
    config: EngineConfig,
    plan: MemoryPlan,
    model: LoadedModel,
    platform: Platform,
    region: HostRegion,
    pinning: Pinning | None,
) -> Runner:
    """Allocates and touches all memory of the engine: KV cache, arena, records and rows."""
    spec, device = model.spec, platform.device
    heads = (spec.attention.kv_heads, spec.attention.head_dim)
    shape = (plan.num_blocks, spec.num_layers, 2, plan.block_size, *heads)
    assert not model.kv.scale_bytes, "a block holds only keys and values"
    cache = torch.empty(shape, dtype=model.kv.dtype, device=device).zero_()
    arena = torch.empty(plan.arena, dtype=torch.uint8, device=device).zero_()
    records = torch.empty(
        (plan.slots, spec.num_layers + 1, model.layout.num_groups, RECORD_WORDS),
        dtype=torch.int32,
        device=device,
    ).zero_()
    blocks = -(-plan.max_total_tokens // plan.block_size)
    rows = RowTable(
        num_rows=plan.max_rows + 1,
        max_tokens=plan.max_total_tokens,
        max_blocks=blocks,
        device=device,
        spare=decode_words(plan.max_rows) + mixed_words(plan.max_rows, plan.max_step_tokens),
    )
    model.attention.start(Capacity(plan.max_rows, blocks, plan.block_size))
    embedding = model.decoder.embedding
    finisher = Finisher(
        arena, model.decoder.linears, model.dtype, [(embedding.layer, embedding.number)]
    )
    host = (arena, records, region, finisher)
    placer = Placer(*host) if pinning is None else CudaPlacer(*host, pinning)
    return Runner(
        model=model.decoder,
        rows=rows,
        cache=cache,
        adapters=Adapters(arena, records),
        placer=placer,
        attention=model.attention,
    )


def make_scheduler(
    config: EngineConfig, plan: MemoryPlan, clock: Callable[[], float] = time.monotonic
) -> Scheduler:
    """The scheduler, from the memory plan."""
    limits = SchedulerLimits(
        max_rows=plan.max_rows,
        max_step_tokens=plan.max_step_tokens,
        max_input_length=plan.max_input_length,
        max_total_tokens=plan.max_total_tokens,
        adapter_cycle_time=config.adapters.adapter_cycle_time_s,
        chunk_tokens=plan.chunk_tokens,
        max_scored_tokens=plan.max_scored_tokens,
    )
    blocks = BlockPool(plan.num_blocks, plan.block_size, config.scheduler.prefix_caching)
    slots = SlotTable(plan.slots, plan.arena)
    return Scheduler(limits, blocks, slots, clock)


def info_of(config: EngineConfig, built: BuiltShard) -> EngineInfo:
    """The facts for the front and `/info`."""
    plan, layout, model = built.plan, built.model.layout, built.model
    device = built.platform.device.type
    return EngineInfo(
        model_id=config.model.model_id,
        model_type=model.spec.model_type,
        revision=config.model.revision,
        dtype=layout.dtype,
        device=device,
        device_name=built.platform.name,
        vocab_size=model.spec.vocab,
        max_input_length=plan.max_input_length,
        max_total_tokens=plan.max_total_tokens,
        max_batch_total_tokens=(plan.num_blocks - 1) * plan.block_size,
        max_batch_size=plan.max_rows,
        max_step_tokens=plan.max_step_tokens,
        block_size=plan.block_size,
        adapter_bytes=plan.arena,
        host_bytes=plan.host_tier,
        backends={op: devices[device] for op, devices in ops.backends().items()}
        | dict(model.attention.serves),
        memory_plan=plan.lines,
        targets=layout.targets.names,
        quantize=config.model.quantize,
        merged_adapter=model.merged,
    )


def log_start(built: BuiltShard, info: EngineInfo, seconds: float) -> None:
    """Logs in a few lines what was built."""
    device = built.platform.device
    served = ", ".join(f"{op}: {backend}" for op, backend in info.backends.items())
    logger.info("ops on %s: %s", device.type, served)
    if built.platform.is_cuda:
        free, _ = torch.cuda.mem_get_info(device)
        logger.info("%s", compared(built.plan, torch.cuda.memory_stats(device), free))
    linears = info.quantize or info.dtype
    logger.info("engine ready in %.1f s on %s, linears %s", seconds, built.platform.name, linears)
