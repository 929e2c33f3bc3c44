"""The memory plan: what the budget is spent on, decided once before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.config import GIB, EngineConfig, flag_of
from engine.errors import ConfigError
from engine.models.spec import ModelSpec
from engine.ops.attention import AttentionBackend, KVFormat
from engine.platform import Platform
from engine.runner.shapes import chunk_bounds, mixed_shapes

DEFAULT_TOTAL_TOKENS = 4096
DEFAULT_ROWS = {"cpu": 64, "cuda": 256}
DEFAULT_STEP_TOKENS = {"cpu": 128, "cuda": 8192}
DEFAULT_CHUNK_TOKENS = 128  # on a GPU: a step that takes at most twice as long as without them
SHRINK_CHUNK = 4096  # of a linear's inputs, that the GPU's shrink adds up into one partial sum
COMMON_RANK = 64  # of adapters, for the plan of steps that are not captured
SCORED_BYTES = 256 << 20  # of logits of prompts whose log-probabilities are wanted, in a step
LIBRARIES = 1 << 30  # bytes: workspaces of libraries, captured graphs, fragmentation
ARENA_UNIT = 1 << 20  # the arena is a whole number of these


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one shard's model and its adapters take, in bytes."""

    itemsize: int  # of one value that the model computes with
    kv: KVFormat
    weights: int
    scratch: int  # that a linear takes while it multiplies, besides its input and output
    widest_output: int  # features, of the shard's linears
    widest_input: int
    records: int  # of one adapter
    host_tier: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes of everything the engine holds, and the limits that follow from them."""

    budget: int  # bytes; on a CPU the weights are beside it
    budget_flag: str
    unused: int  # bytes of it
    weights: int  # bytes
    kv_block: int  # bytes of one block over all layers
    num_blocks: int  # with the scratch block
    block_size: int  # positions
    arena: int  # bytes
    records: int  # bytes
    working: (
        int  # bytes of activations, logits and libraries' workspaces of the largest step, on a GPU
    )
    host_tier: int  # bytes
    max_rows: int
    max_step_tokens: int
    chunk_tokens: list[int]  # of prompts in a step, beside so many rows that decode
    max_scored_tokens: int  # of prompts whose log-probabilities are wanted, in a step
    max_total_tokens: int
    max_input_length: int

    @property
    def lines(self) -> list[tuple[str, int]]:
        """(what, bytes), as shown at start."""
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
    """One line: what a GPU was planned to hold, and what it holds; `stats` are those of torch's allocator."""

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
    """Splits the budget. Raises ConfigError that names the flag to change when something does not fit."""
    weights, itemsize = footprint.weights, footprint.itemsize
    scheduler, device = config.scheduler, platform.device.type
    block = block_size(scheduler.block_size, backend)
    rows = _positive(scheduler.max_batch_size, DEFAULT_ROWS[device], "max_batch_size")
    step = _positive(
        scheduler.max_batch_prefill_tokens, DEFAULT_STEP_TOKENS[device], "max_batch_prefill_tokens"
    )
    tokens = max(step, rows)
    chunks = DEFAULT_CHUNK_TOKENS if platform.is_cuda else step
    chunks = _positive(scheduler.max_chunk_tokens, chunks, "max_chunk_tokens")
    beside = chunk_bounds(rows, chunks) if platform.is_cuda else [chunks] * (rows + 1)
    fraction = _adapter_fraction(config)
    working = backend.workspace(rows)
    if platform.is_cuda:
        working += _working(config, spec, footprint, (rows, tokens)) + footprint.scratch
    budget = platform.budget - (weights + working if platform.is_cuda else 0)
    arena = int(platform.budget * fraction) // ARENA_UNIT * ARENA_UNIT
    records = footprint.records * (config.adapters.max_active_adapters + 1)
    attention = spec.attention
    kv_block = footprint.kv.block_bytes(
        spec.num_layers, block, attention.kv_heads, attention.head_dim
    )
    room = max(budget - arena - records, 0) // kv_block
    shares = {"weights": weights if platform.is_cuda else 0, "a step": working}
    shares |= {"adapter arena": arena, "adapter records": records}
    total = _total_tokens(config, spec, (room - 1) * block, _shortage(platform, shares))
    blocks = _num_blocks(config, min(room, rows * -(-total // block) + 1), block, total)
    longest = _input_length(config, total)
    return MemoryPlan(
        budget=platform.budget,
        budget_flag=flag_of(_budget_field(platform)),
        unused=budget - arena - records - blocks * kv_block,
        weights=weights,
        kv_block=kv_block,
        num_blocks=blocks,
        block_size=block,
        arena=arena,
        records=records,
        working=working,
        host_tier=footprint.host_tier,
        max_rows=rows,
        max_step_tokens=tokens,
        chunk_tokens=beside,
        max_scored_tokens=scored_tokens(spec, itemsize, tokens),
        max_total_tokens=total,
        max_input_length=longest,
    )


def block_size(given: int | None, backend: AttentionBackend) -> int:
    """Positions of a KV block: what the user says, if the attention backend can read it, else what that likes."""
    block = _positive(given, backend.default_block_size, "block_size")
    if block % backend.block_unit:
        raise ConfigError(
            f"--block-size {block} is not a multiple of {backend.block_unit}, which"
            f" --attention-backend {backend.name} wants",
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
    """Blocks of the KV cache, with the scratch block: `most`, or less where the user says so."""
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
    """Bytes that steps take on a GPU beside what they keep, an upper estimate; `limits`: rows and tokens of a step."""
    itemsize, (rows, tokens) = footprint.itemsize, limits
    logits = rows * spec.vocab * 4 * 6  # in 16 and 32 bits, and what sampling sorts
    logits += scored_tokens(spec, itemsize, tokens) * scored_bytes(spec, itemsize)
    working = _activations(spec, footprint, tokens, COMMON_RANK) + logits + LIBRARIES
    if config.memory.eager or config.memory.slow_reference:
        return working
    # all graphs share what the largest needs, which has room for any rank, and one copy of logits
    shapes = mixed_shapes(rows, tokens)
    captured = _activations(spec, footprint, shapes[-1].tokens, config.adapters.max_adapter_rank)
    outputs = max(rows, *(shape.outputs for shape in shapes))
    return working + captured + 2 * outputs * spec.vocab * 4


def scored_bytes(spec: ModelSpec, itemsize: int) -> int:
    """Of one prompt token whose log-probability is wanted: its logits, in float32 too, and their logarithms."""
    return spec.vocab * (itemsize + 3 * 4)


def scored_tokens(spec: ModelSpec, itemsize: int, tokens: int) -> int:
    """How many of them a step of `tokens` may hold."""
    return min(max(SCORED_BYTES // scored_bytes(spec, itemsize), 1), tokens)


def _activations(spec: ModelSpec, footprint: Footprint, tokens: int, rank: int) -> int:
    """Bytes of what the layers hand each other for `tokens` tokens."""
    # x, residual and a norm's output; the widest linear's output and what an activation makes of it
    activations = tokens * (4 * spec.hidden + 2 * footprint.widest_output) * footprint.itemsize
    # of a step's shrink: partial sums in float32 of a rank on each of three targets
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
    """The setting that decides how much there is."""
    return "cuda_memory_fraction" if platform.is_cuda else "cpu_memory_gb"


def _shortage(platform: Platform, shares: dict[str, int]) -> ConfigError:
    """Why so little is left for the KV cache."""
    taken = ", ".join(f"{what} {size / GIB:.2f}" for what, size in shares.items() if size)
    less = "--max-total-tokens, --adapter-memory-fraction or --max-active-adapters"
    if platform.is_cuda:
        less = f"--max-batch-prefill-tokens, --max-batch-size, {less}"
    field = _budget_field(platform)
    flag = flag_of(field)
    return ConfigError(
        f"{flag} allows {platform.budget / GIB:.2f} GiB, of which the others take: {taken or 'nothing'}",
        field=field,
        hint=f"raise {flag}, or lower {less}",
    )


def _total_tokens(config: EngineConfig, spec: ModelSpec, room: int, shortage: ConfigError) -> int:
    """Longest sequence: what the user says, else what model and memory allow. Raises `shortage`, with the tokens."""
    given = config.scheduler.max_total_tokens
    if given is not None and given > spec.max_positions:
        raise ConfigError(
            f"--max-total-tokens {given} is more than the model's {spec.max_positions} positions",
            field="max_total_tokens",
        )
    total = _positive(given, min(spec.max_positions, DEFAULT_TOTAL_TOKENS), "max_total_tokens")
    if room < (2 if given is None else total):
        raise ConfigError(
            f"the KV cache has room for {max(room, 0)} tokens only: {shortage.message}",
            field=shortage.field,
            hint=shortage.hint,
        )
    return min(total, room)
