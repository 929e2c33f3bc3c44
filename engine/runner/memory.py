"""The memory plan: divides the budget once, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from engine.config import GIB, EngineConfig, flag_of
from engine.errors import ConfigError
from engine.models.spec import ModelSpec
from engine.ops.attention import AttentionBackend, KVFormat
from engine.platform import Platform
from engine.runner.shapes import chunk_bounds, mixed_shapes

DEFAULT_TOTAL_TOKENS = 4096
DEFAULT_ROWS = {"cpu": 64, "cuda": 256}
DEFAULT_STEP_TOKENS = {"cpu": 128, "cuda": 8192}
DEFAULT_CHUNK_TOKENS = 128  # on a GPU: they at most double the time of a step
SHRINK_CHUNK = 4096  # inputs of a linear per partial sum of the GPU's shrink
COMMON_RANK = 64  # assumed rank of adapters in steps without a CUDA graph
SCORED_BYTES = 256 << 20  # per step, for logits of prompts that need log-probabilities
LIBRARIES = 1 << 30  # bytes: workspaces of libraries, CUDA graphs, fragmentation
ARENA_UNIT = 1 << 20  # the arena is a whole number of these


@dataclass(frozen=True, slots=True)
class Footprint:
    """The bytes that one shard's model and its adapters take."""

    itemsize: int  # of an activation
    kv: KVFormat
    weights: int
    scratch: int  # of a linear's matmul, besides its input and output
    widest_output: int  # features, of the shard's linears
    widest_input: int
    records: int  # of one adapter
    host_tier: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes of everything the engine holds, and the limits that follow from them."""

    budget: int  # bytes; on a CPU without the weights
    budget_flag: str
    unused: int  # bytes of the budget
    weights: int  # bytes
    kv_block: int  # bytes of one block over all layers
    num_blocks: int  # with the scratch block
    block_size: int  # positions
    arena: int  # bytes
    slots: int  # of adapters, and slot 0
    records: int  # bytes
    working: int  # bytes of the largest step on a GPU: activations, logits, library workspaces
    host_tier: int  # bytes
    max_rows: int
    max_step_tokens: int
    chunk_tokens: list[int]  # prompt tokens of a step, by the number of decoding rows
    max_scored_tokens: int  # prompt tokens of a step that need log-probabilities
    max_total_tokens: int
    max_input_length: int

    @property
    def lines(self) -> list[tuple[str, int]]:
        """(name, bytes), as logged at start."""
        return [
            ("weights", self.weights),
            (
                f"KV cache, {(self.num_blocks - 1) * self.block_size} tokens",
                self.num_blocks * self.kv_block,
            ),
            ("adapter arena", self.arena + self.records),
            *([("working memory of a step", self.working)] if self.working else []),
            ("adapters in host memory, at most", self.host_tier),
            (f"unused, of {self.budget / GIB:.3f} GiB ({self.budget_flag})", self.unused),
        ]


def compared(plan: MemoryPlan, stats: Mapping[str, int], free: int) -> str:
    """One line with planned and actual memory of a GPU; `stats` are those of torch's allocator."""

    def gib(num_bytes: int) -> str:
        return f"{num_bytes / GIB:.2f}"

    kept = plan.weights + plan.num_blocks * plan.kv_block + plan.arena + plan.records
    used, held, peak = (
        stats.get(name, 0)
        for name in (
            "allocated_bytes.all.current",
            "reserved_bytes.all.current",
            "reserved_bytes.all.peak",
        )
    )
    return (
        f"memory in GiB: planned {gib(kept)} and {gib(plan.working)} for a step; in use {gib(used)}, held by torch "
        f"{gib(held)}, at most {gib(peak)} so far; free on the device {gib(free)}"
    )


def _positive(value: int | None, default: int, name: str) -> int:
    if value is not None and value < 1:
        raise ConfigError(f"{flag_of(name)} must be above 0", field=name)
    return value or default


def plan_memory(
    config: EngineConfig,
    platform: Platform,
    spec: ModelSpec,
    footprint: Footprint,
    backend: AttentionBackend,
) -> MemoryPlan:
    """Divides the budget. Raises ConfigError that names the flag to change if a part does not fit.

    With --merge-adapter-weights, adapters get no memory.
    """
    config = _as_served(config)
    weights, itemsize = footprint.weights, footprint.itemsize
    scheduler, device = config.scheduler, platform.device.type
    block = block_size(scheduler.block_size, backend)
    rows = _positive(scheduler.max_batch_size, DEFAULT_ROWS[device], "max_batch_size")
    step = _positive(
        scheduler.max_batch_prefill_tokens, DEFAULT_STEP_TOKENS[device], "max_batch_prefill_tokens"
    )
    tokens = max(step, rows)
    most = DEFAULT_CHUNK_TOKENS if platform.is_cuda else step
    most = _positive(scheduler.max_chunk_tokens, most, "max_chunk_tokens")
    chunk_tokens = chunk_bounds(rows, most) if platform.is_cuda else [most] * (rows + 1)
    fraction = _adapter_fraction(config)
    working = backend.workspace(rows)
    if platform.is_cuda:
        working += _working(config, spec, footprint, (rows, tokens)) + footprint.scratch
    budget = platform.budget - (weights + working if platform.is_cuda else 0)
    arena = int(platform.budget * fraction) // ARENA_UNIT * ARENA_UNIT
    slots = config.adapters.max_active_adapters + 1
    records = footprint.records * slots
    attention = spec.attention
    kv_block = footprint.kv.block_bytes(
        spec.num_layers, block, attention.kv_heads, attention.head_dim
    )
    room = max(budget - arena - records, 0) // kv_block
    shares = {"weights": weights if platform.is_cuda else 0, "a step": working}
    shares |= {"adapter arena": arena, "adapter records": records}
    total = _total_tokens(config, spec, (room - 1) * block, _shortage(platform, shares))
    blocks = _num_blocks(config, min(room, rows * -(-total // block) + 1), block, total)
    return MemoryPlan(
        budget=platform.budget,
        budget_flag=flag_of(_budget_field(platform)),
        unused=budget - arena - records - blocks * kv_block,
        weights=weights,
        kv_block=kv_block,
        num_blocks=blocks,
        block_size=block,
        arena=arena,
        slots=slots,
        records=records,
        working=working,
        host_tier=footprint.host_tier,
        max_rows=rows,
        max_step_tokens=tokens,
        chunk_tokens=chunk_tokens,
        max_scored_tokens=scored_tokens(spec, itemsize, tokens),
        max_total_tokens=total,
        max_input_length=_input_length(config, total),
    )


def _as_served(config: EngineConfig) -> EngineConfig:
    """The configuration; with --merge-adapter-weights it has no room for adapters."""
    if not config.adapters.merge_adapter_weights:
        return config
    none = replace(
        config.adapters,
        adapter_memory_fraction=0.0,
        max_active_adapters=0,
        max_added_tokens=0,
        max_adapter_rank=0,
    )
    return replace(config, adapters=none)


def block_size(given: int | None, backend: AttentionBackend) -> int:
    """Positions of a KV block: --block-size if the attention backend supports it, or the backend's default."""
    block = _positive(given, backend.default_block_size, "block_size")
    if block % backend.block_unit:
        raise ConfigError(
            f"--block-size {block} is not a multiple of {backend.block_unit}, which"
            f" --attention-backend {backend.name} needs",
            field="block_size",
            hint="leave it out, or choose another backend",
        )
    return block


def _adapter_fraction(config: EngineConfig) -> float:
    """Share of the budget that holds adapters."""
    fraction = config.adapters.adapter_memory_fraction
    if not 0 <= fraction < 1:
        raise ConfigError(
            "--adapter-memory-fraction must be at least 0 and below 1",
            field="adapter_memory_fraction",
        )
    return fraction


def _num_blocks(config: EngineConfig, most: int, block: int, total: int) -> int:
    """Blocks of the KV cache with the scratch block: `most`, or fewer with --max-batch-total-tokens."""
    given = config.scheduler.max_batch_total_tokens
    if given is None:
        return most
    blocks = min(most, given // block + 1)
    if (blocks - 1) * block < total:
        raise ConfigError(
            f"--max-batch-total-tokens {given} is less than one sequence of --max-total-tokens {total}",
            field="max_batch_total_tokens",
        )
    return blocks


def _working(
    config: EngineConfig, spec: ModelSpec, footprint: Footprint, limits: tuple[int, int]
) -> int:
    """Bytes that a step takes on a GPU while it runs, an upper estimate; `limits`: rows and tokens of a step."""
    itemsize, (rows, tokens) = footprint.itemsize, limits
    vocab = spec.vocab + config.adapters.max_added_tokens
    logits = rows * vocab * 4 * 6  # in 16 and 32 bits, and sorted copies for sampling
    logits += scored_tokens(spec, itemsize, tokens) * scored_bytes(spec, itemsize)
    working = _activations(spec, footprint, tokens, COMMON_RANK) + logits + LIBRARIES
    if config.memory.eager or config.memory.slow_reference:
        return working
    # all graphs share the memory of the largest, with room for any rank, and one copy of the logits
    shapes = mixed_shapes(rows, tokens)
    captured = _activations(spec, footprint, shapes[-1].tokens, config.adapters.max_adapter_rank)
    outputs = max(rows, *(shape.outputs for shape in shapes))
    return working + captured + 2 * outputs * vocab * 4


def scored_bytes(spec: ModelSpec, itemsize: int) -> int:
    """Bytes per prompt token that needs a log-probability: logits, also in float32, and their logarithms."""
    return spec.vocab * (itemsize + 3 * 4)


def scored_tokens(spec: ModelSpec, itemsize: int, tokens: int) -> int:
    """Prompt tokens with log-probabilities that a step of `tokens` may hold."""
    return min(max(SCORED_BYTES // scored_bytes(spec, itemsize), 1), tokens)


def _activations(spec: ModelSpec, footprint: Footprint, tokens: int, rank: int) -> int:
    """Bytes of the activations of `tokens` tokens."""
    # x, residual and a norm's output; the widest linear's output, before and after the activation
    activations = tokens * (4 * spec.hidden + 2 * footprint.widest_output) * footprint.itemsize
    # the shrink's partial sums in float32, with this rank on each of three targets
    return activations + tokens * 3 * rank * 4 * -(-footprint.widest_input // SHRINK_CHUNK)


def _input_length(config: EngineConfig, total: int) -> int:
    """Longest prompt, at least one token below the longest sequence."""
    longest = _positive(config.scheduler.max_input_length, total - 1, "max_input_length")
    if longest >= total:
        raise ConfigError(
            f"--max-input-length {longest} must be below --max-total-tokens {total}",
            field="max_input_length",
        )
    return longest


def _budget_field(platform: Platform) -> str:
    """The setting that determines the budget."""
    return "cuda_memory_fraction" if platform.is_cuda else "cpu_memory_gb"


def _shortage(platform: Platform, shares: dict[str, int]) -> ConfigError:
    """The error if too little is left for the KV cache."""
    taken = ", ".join(f"{what} {_shown(size)}" for what, size in shares.items() if size)
    less = "--max-total-tokens, --adapter-memory-fraction or --max-active-adapters"
    if platform.is_cuda:
        less = f"--max-batch-prefill-tokens, --max-batch-size, {less}"
    field = _budget_field(platform)
    flag = flag_of(field)
    return ConfigError(
        f"{flag} allows {_shown(platform.budget)}; other parts need: {taken or 'nothing'}",
        field=field,
        hint=f"raise {flag}, or lower {less}",
    )


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= 10 << 20 else f"{num_bytes / 2**20:.1f} MiB"


def _total_tokens(config: EngineConfig, spec: ModelSpec, room: int, shortage: ConfigError) -> int:
    """Longest sequence: --max-total-tokens, or as model and memory allow. Raises `shortage`, with the tokens."""
    given = config.scheduler.max_total_tokens
    if given is not None and given > spec.max_positions:
        raise ConfigError(
            f"--max-total-tokens {given} is more than the model's {spec.max_positions} positions",
            field="max_total_tokens",
        )
    total = _positive(given, min(spec.max_positions, DEFAULT_TOTAL_TOKENS), "max_total_tokens")
    if room < (2 if given is None else total):
        raise ConfigError(
            f"the KV cache has room for only {max(room, 0)} tokens: {shortage.message}",
            field=shortage.field,
            hint=shortage.hint,
        )
    return min(total, room)
