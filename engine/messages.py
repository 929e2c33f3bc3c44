"""Messages between processes: front -> engine -> runner and back. Plain lists and numbers, never tensors.

A *request* comes from a client and never changes. A *plan* is one step for every shard; a *result* is the output of
that step; an *update* is the part of a result that belongs to one request.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, Protocol

from msgspec import Struct, field

IMAGE_ALIGN = 256  # bytes: images, their data and placements start at multiples of it

FinishReason = Literal["length", "eos", "cancelled", "pooled"]  # pooled: the vector is complete
AdapterPhase = Literal["listed", "fetching", "parsing", "ready", "failed"]
Tier = Literal["device", "host", "disk", "source"]  # where an adapter is, the fastest first


def aligned(num_bytes: int) -> int:
    """`num_bytes` rounded up to IMAGE_ALIGN."""
    return -(-num_bytes // IMAGE_ALIGN) * IMAGE_ALIGN


class SamplingParams(Struct, frozen=True):
    """How the next token is chosen.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `typical_p` 1 and `min_p` 0 are off. `seed` is always set: the
    front draws one where the client gave none. Sampling is Philox keyed by (seed, position), so a seed gives the same
    text whatever else is in the batch. Repetition penalty counts prompt and output (Keskar et al. 2019, CTRL);
    frequency and presence penalties count the output only (OpenAI API). The watermark is that of Kirchenbauer et al.
    2023: the token before decides which tokens it favours.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    logprobs: bool = False  # the log-probability of every chosen token
    num_alternatives: int = 0  # the most likely tokens of every position, with log-probabilities
    prompt_logprobs: bool = False  # the log-probability of every prompt token but the first
    logit_bias: dict[int, float] = {}  # added to the logits of these tokens
    min_tokens: int = 0  # of the output, before one of `delayed`
    delayed: tuple[int, ...] = ()
    watermark_gamma: float = (
        0.0  # part of the vocabulary that the watermark favours; 0: no watermark
    )
    watermark_delta: float = 0.0  # added to their logits


class AdapterImageRef(Struct, frozen=True):
    """An adapter's image in the host region: its position, size and identity.

    The image is records (relative, `[layers + 1, groups, 8]` int32) followed by data; see `engine.lora.image`.
    """

    digest: bytes  # content digest: identity for residency and for the prefix cache
    offset: int  # bytes from the start of the host region
    data_bytes: int  # bytes of data, without the records: its size in the arena
    stacked_rank: int  # largest stacked rank of any group
    name: str = ""  # for logs and metrics only
    source: str = ""  # where it was found, for responses
    merged: bool = False  # from several adapters
    vocab: int = 0  # its vocabulary, if its own rows change it; 0: that of the base
    tenant: bytes = b""  # digest of the token whose holder may see its name; empty: everybody


class TenantRef(Struct, frozen=True):
    """Whose request it is: loads of different tenants take turns, and each has a share of the host tier."""

    name: str = ""  # empty: the server has no keys
    share: float = 1.0  # by weight, of all tenants


NO_TENANT = TenantRef()


class AddedToken(Struct, frozen=True):
    """A token that a tokenizer finds before its model sees the text; the fields are those of tokenizer.json."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class AdapterText(Struct, frozen=True):
    """How an adapter's text becomes tokens and back, where that differs from the base model."""

    digest: bytes  # of the other fields
    tokens: tuple[AddedToken, ...] = ()  # by id; they replace the base's tokens with the same ids
    template: str | None = None  # Jinja, of a stranger; None: the base's
    specials: dict[str, str] | None = None  # name, such as eos_token -> content; None: the base's
    named_templates: dict[str, str] = {}  # next to `template`, such as tool_use


class MergedAdapter(Struct, frozen=True):
    """The adapter of --adapter-id, merged into the weights of the base model."""

    name: str  # as --adapter-id has it
    source: str  # where it was found
    prefix: str  # of ids in this source
    id: str  # there, without the prefix
    revision: str  # commit, or a fingerprint of the files
    text: AdapterText | None = None  # None: the base model's


class Request(Struct, frozen=True):
    """A prompt to continue with at most `max_new_tokens` tokens, or to process as another `kind` says."""

    id: str
    tokens: list[int]
    sampling: SamplingParams
    max_new_tokens: int
    eos_token_ids: list[int]  # empty: end-of-sequence tokens are ordinary tokens
    adapter: AdapterImageRef | None = None  # None: the base model
    cache_salt: bytes = b""  # only requests with equal salts share cached prompts
    arrival: float = 0.0  # time.monotonic() when the front accepted it
    group: str = ""  # the client's request that it belongs to; "": it is alone
    behind: int = 0  # tokens of the sequences before it in its group, outputs included
    kind: str = "generate"  # a name of `engine.kinds.KINDS`
    tenant: str = ""  # whose request it is; "": the server has no keys
    weight: float = 1.0  # the tenant's share of the engine, in proportion to the others'
    priority: int = 0  # higher: before others
    grammar: str = ""  # of the output, see `engine.grammar`; "": free


class Admit(Struct, frozen=True):
    """A sequence takes a row. Its tokens so far (prompt, and output if it was preempted) are written to the row."""

    row: int
    slot: int
    tokens: list[int]
    prompt_length: int  # the first tokens, which the client sent
    computed: int  # positions already in the KV cache (prefix cache)
    blocks: list[int]
    sampling: SamplingParams
    kind: str = "generate"


# Outputs of a chunk; flags to be combined.
NOTHING = 0  # only keys and values in the cache
TOKEN = 1  # the next token, sampled after the chunk: it ends the row's tokens
SCORES = 2  # after each position, the log-probability of the row's next token
POOLED = 4  # the vector that the head of the request's kind computes from the hidden states


class Chunk(Struct, frozen=True):
    """Tokens of a row to compute in one step: positions start .. start + count."""

    row: int
    start: int
    count: int
    wants: int = NOTHING  # TOKEN, SCORES and POOLED, combined

    @property
    def sample(self) -> bool:
        return bool(self.wants & TOKEN)

    @property
    def scores(self) -> bool:
        return bool(self.wants & SCORES)

    @property
    def pooled(self) -> bool:
        return bool(self.wants & POOLED)


class Placement(Struct, frozen=True):
    """Copy an adapter's image into the arena and its records into a slot."""

    slot: int
    offset: int  # bytes into the arena, 16-byte aligned
    image: AdapterImageRef


class StepPlan(Struct, frozen=True):
    """One step. The lists are applied in the order of the fields."""

    step: int
    release: list[int]  # rows that ended
    unplace: list[int]  # slots whose adapter left the arena; no row uses them from this step on
    placements: list[Placement]
    admit: list[Admit]
    extend: list[tuple[int, list[int]]]  # (row, blocks appended to its block table)
    decode: list[int] | None  # rows that advance by one token, by slot; None: the previous rows
    chunks: list[Chunk]  # sorted by slot


class TokenOutput(Struct, frozen=True):
    """One sampled token. Log-probabilities are of the model's own distribution, before penalties and filters."""

    token: int  # -1: the logits were not finite
    logprob: float | None = None
    alternatives: list[tuple[int, float]] | None = None


class StepResult(Struct, frozen=True):
    """The outputs of a step: one per decode row, then one per sampling chunk, in the plan's order."""

    step: int
    outputs: list[TokenOutput]
    prompt_logprobs: dict[int, list[float]]  # by chunk: of tokens start + 1 .. start + count
    resident: list[int]  # slots whose copies have completed since the last result
    pooled: dict[int, list[float]] = {}  # by chunk: vector
    prompt_tops: dict[
        int, list[tuple[int, float]]
    ] = {}  # as prompt_logprobs: the most likely token there


class Usage(Struct, frozen=True):
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    generated_tokens: int
    preemptions: int = 0


class Update(Struct, frozen=True):
    """New output of one request. Only its last update sets `finish` or `error`."""

    id: str
    tokens: list[TokenOutput]
    finish: FinishReason | None = None
    error: dict[str, Any] | None = None  # LoraxError.to_wire()
    usage: Usage | None = None  # with `finish`
    admitted: float | None = None  # time.monotonic() of first admission, once
    cached_tokens: int = 0  # of the prompt, found in the prefix cache; with `admitted`
    prompt_logprobs: list[float] | None = None  # with the first token, if requested
    prompt_tops: list[tuple[int, float]] = []  # with them: the most likely token there
    pooled: list[float] | None = None  # with `finish`, for kinds that pool

    @property
    def is_last(self) -> bool:
        """Whether the request is closed."""
        return self.finish is not None or self.error is not None


class EngineInfo(Struct, frozen=True):
    """Facts about a started engine, for the front and `/info`."""

    model_id: str
    model_type: str
    revision: str | None
    dtype: str
    device: str  # "cpu" | "cuda"
    device_name: str
    vocab_size: int
    max_input_length: int
    max_total_tokens: int
    max_batch_total_tokens: int  # positions in the KV cache
    max_batch_size: int
    max_step_tokens: int
    block_size: int
    adapter_bytes: int  # arena
    host_bytes: int  # host tier
    backends: dict[str, str]  # op -> its implementation on this device
    memory_plan: list[tuple[str, int]]  # (name, bytes)
    targets: list[str]  # names that adapters may target
    quantize: str | None = None  # how the linears are quantised
    merged_adapter: MergedAdapter | None = None  # then no other adapter is served


class Buckets(Struct, frozen=True):
    """A histogram: counts of values up to each bound and, as the last one, of larger ones."""

    bounds: list[float] = []
    counts: list[int] = []
    total: float = 0.0  # of all values


class EngineStats(Struct, frozen=True):
    """Counters and levels of the engine, sent with updates a few times a second."""

    waiting: int = 0
    running: int = 0
    rows: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    cached_blocks: int = 0
    steps: int = 0
    step_tokens: int = 0  # tokens computed, in total
    preemptions: int = 0
    prefix_hits: int = 0  # prompt tokens found in the cache, in total
    prefix_lookups: int = 0  # prompt tokens looked up, in total
    resident: list[tuple[str, bytes, int]] = []  # (adapter name, digest, bytes in the arena)
    arena_bytes: int = 0
    arena_used: int = 0
    in_use: int = 0  # adapters that running sequences use
    placements: int = 0  # started, in total
    placed: int = 0  # completed, in total
    place_seconds: list[float] = []  # from start to completion, of the newest
    evictions: int = 0
    step_seconds: Buckets = Buckets()
    step_sizes: Buckets = Buckets()  # sequences of a step
    failed_steps: int = 0
    joined: int = 0  # sequences that joined others in a step, in total


class AdapterStatus(Struct, frozen=True):
    """One adapter in the exchange."""

    name: str  # as the client named it
    source: str
    digest: bytes | None
    state: AdapterPhase  # listed: not requested yet, or no longer in host memory
    data_bytes: int = 0
    stacked_rank: int = 0
    targets: list[str] = []
    base_model: str | None = None
    leases: int = 0  # open requests that use it
    seconds: dict[str, float] = {}  # stage -> seconds of the last load: fetch, parse
    error: dict[str, Any] | None = None
    tenant: bytes = b""  # digest of the token whose holder may see it; empty: everybody
    merged: bool = (
        False  # its `name` joins the ids of several adapters, so no `adapter_id` means it
    )
    unconfirmed: bool = False  # its source did not answer the last time: the version known before
    revision: str | None = None  # commit, or a fingerprint of the files
    ranks: list[int] = []  # of its matrices, without repetitions
    preloaded: bool = False
    on_disk: bool = False  # its downloaded files are on this machine


class Named(Protocol):
    """An adapter of a tenant, or of everybody."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def tenant(self) -> bytes: ...


def is_meant(
    adapter: Named, name: str, source: str | None, tenants: Collection[bytes] | None
) -> bool:
    """Whether `name` means this adapter to those `tenants`. None: in any source, and to all."""
    return (
        adapter.name == name
        and source in (None, adapter.source)
        and (tenants is None or adapter.tenant in tenants)
    )


class TierCounts(Struct):
    """What the exchange has counted since it started."""

    host_hits: int = 0  # requests for an adapter that was in host memory
    loads: int = 0
    failed_loads: int = 0
    disk_hits: int = 0  # loads of files that had been downloaded before
    disk_misses: int = 0  # loads that downloaded files
    loaded_bytes: int = 0
    host_evictions: int = 0
    disk_evictions: int = 0
    seconds: dict[str, float] = {}  # stage -> seconds of all loads: fetch, parse

    def plus(self, other: TierCounts) -> TierCounts:
        """The sums of both."""
        names = [name for name in self.__struct_fields__ if name != "seconds"]
        seconds = dict(self.seconds)
        for stage, more in other.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + more
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return TierCounts(**sums, seconds=seconds)


class TierStats(Struct, frozen=True):
    """Levels and counters of the tiers that the exchange owns: host memory, and downloads on disk."""

    host_capacity: int = 0
    host_used: int = 0  # bytes of images, and of loads in progress
    host_leased: int = 0  # bytes of images that a request, a pin or the start keeps
    host_images: int = 0
    disk_capacity: int = 0  # 0: no limit
    disk_used: int = 0
    disk_entries: int = 0
    counts: TierCounts = field(default_factory=TierCounts)
