"""What every layer reads of a step besides x: its tokens, the KV cache, and the adapter of each token.

Letters in shapes, here and in the ops: T tokens of the step, S sequences, G adapter segments (runs of consecutive
tokens that use one slot), O outputs (tokens whose logits are wanted).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.ops.attention import Attend, builtin_attend


@dataclass(frozen=True, slots=True)
class KVView:
    """The KV cache as one step sees it. Tokens after the last sequence are padding."""

    cache: Tensor  # [blocks, layers, 2, block_size, kv_heads, head_dim]
    block_tables: Tensor  # [S, blocks of the longest sequence, or more] int32
    cu_seqlens_q: Tensor  # [S + 1] int32: first token of each sequence, then the end of the last
    context_lens: Tensor  # [S] int32: positions of each sequence, this step's included
    slot_mapping: Tensor  # [T] int64: where each token's k and v go: block * block_size + offset
    num_decodes: int  # the first `num_decodes` sequences have one token each
    attend: Attend = builtin_attend  # made for this step by the attention backend


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """Which tokens use which adapter: contiguous segments of one slot each."""

    arena: Tensor  # [bytes] uint8
    records: Tensor  # [slots, layers + 1, groups, 8] int32
    slots: Tensor  # [G] int32: the slot of each segment
    segment_starts: Tensor  # [G + 1] int32: first token of each segment, then the end of the last
    stacked_rank: int  # at least the largest stacked rank in the batch: the number of columns of t
    touched: list[list[int]]  # [layers + 1][groups]: what the adapters of the batch do there


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. `lora` is None when every token uses the base model."""

    ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    kv: KVView
    lora: LoraBatch | None
    outputs: Tensor | None  # [O] int32: tokens whose logits are wanted; None: all
    lora_outputs: LoraBatch | None  # as `lora`, with segments of outputs instead of tokens
