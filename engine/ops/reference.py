"""Every op in plain PyTorch, for any device and dtype: slow and obviously right.

The kernels are tested against these functions. The CPU uses them where the extension is missing. Letters in shapes are
those of `engine.layers.batch` and `engine.ops.schemas`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.layout import (
    ALIGN,
    EXTRAS,
    FLAG_OWN_ROWS,
    FLAG_SHIFT,
    FLAGS_SHIFT,
    SCALED,
    WORD_A,
    WORD_B,
    WORD_EXTRA,
    WORD_OWN,
    WORD_RANK2,
    WORD_RANKS,
    WORD_SCALE,
    own_ids_start,
    own_rows_start,
    padded,
    row_stride,
)
from engine.ops.targets import MAX_TARGETS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x[T, K] @ weight[N, K].T + bias[N]`."""
    return F.linear(x, weight, bias)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Zhang and Sennrich 2019. Adds x to the residual in place first, then normalises it, in float32."""
    if residual is not None:
        residual.add_(x)
        x = residual
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def act_and_mul(x: Tensor, act: str) -> Tensor:
    """Gated activation: `act(x[:, :size]) * x[:, size:]` of x[T, 2 * size]."""
    gate, up = x.chunk(2, dim=-1)
    if act == "silu":
        return F.silu(gate) * up
    if act not in ("gelu", "gelu_tanh"):
        raise ValueError(f"unknown activation {act!r}")
    return F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none") * up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Su et al. 2021 (RoFormer). Rotates the first 2 * cos.shape[-1] features of x[T, heads, head_dim] in place."""
    half = cos.shape[-1]
    part = x[..., : 2 * half]
    a, b = (
        (part[..., 0::2], part[..., 1::2]) if interleaved else (part[..., :half], part[..., half:])
    )
    cos, sin = cos[:, None].float(), sin[:, None].float()
    new_a = a.float() * cos - b.float() * sin
    new_b = b.float() * cos + a.float() * sin
    a.copy_(new_a)
    b.copy_(new_b)


def rope_store_kv_(
    q: Tensor,  # [T, heads, head_dim]
    k: Tensor,  # [T, kv_heads, head_dim]
    v: Tensor,  # [T, kv_heads, head_dim]
    cos_sin: Tensor,  # [max positions, rotary dim], float32: cosines, then sines
    positions: Tensor,  # [T] int64
    kv: Tensor,  # [blocks, layers, 2, block_size, kv_heads, head_dim]
    slot_mapping: Tensor,  # [T] int64: block * block_size + offset
    layer: int,
    interleaved: bool,
) -> None:
    """Rotates q and k in place, then stores k and v in the cache at `slot_mapping`."""
    if cos_sin.shape[-1]:
        cos, sin = cos_sin[positions].chunk(2, dim=-1)
        _rotate(q, cos, sin, interleaved)
        _rotate(k, cos, sin, interleaved)
    block_size = kv.shape[3]
    index, offset = slot_mapping // block_size, slot_mapping % block_size
    kv[index, layer, 0, offset] = k.to(kv.dtype)
    kv[index, layer, 1, offset] = v.to(kv.dtype)


def paged_attention(
    q: Tensor,  # [T, heads, head_dim]
    kv: Tensor,  # [blocks, layers, 2, block_size, kv_heads, head_dim]
    layer: int,
    block_tables: Tensor,  # [S, blocks of the longest] int32
    cu_seqlens_q: Tensor,  # [S + 1] int32: first token of each sequence, then the end of the last
    context_lens: Tensor,  # [S] int32: positions of each sequence, this step's included
    scale: float,
    softcap: float,
    window: int,
    num_decodes: int = 0,
) -> Tensor:
    """Causal attention; the queries of a sequence are its last positions. Softmax in float32.

    A window of w lets position i see i - w + 1 .. i (Mistral). Softcap c: c * tanh(score / c) (Gemma 2). `num_decodes`
    is for kernels that treat sequences of one token separately; it changes no result. Tokens after the last sequence
    are padding, and their output is not defined.
    """
    out = torch.empty_like(q)
    block_size, kv_heads = kv.shape[3], kv.shape[4]
    bounds = cu_seqlens_q.tolist()
    for s, length in enumerate(context_lens.tolist()):
        first, last = bounds[s], bounds[s + 1]
        if first == last:
            continue
        table = block_tables[s, : (length + block_size - 1) // block_size].long()
        pages = kv[table, layer]  # [blocks, 2, block_size, kv_heads, head_dim]
        k = pages[:, 0].flatten(0, 1)[:length].float()
        v = pages[:, 1].flatten(0, 1)[:length].float()
        gqa_ratio = q.shape[1] // kv_heads
        k, v = k.repeat_interleave(gqa_ratio, 1), v.repeat_interleave(gqa_ratio, 1)
        scores = torch.einsum("qhd,khd->hqk", q[first:last].float(), k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(length - (last - first), length, device=q.device)[:, None]
        key = torch.arange(length, device=q.device)[None]
        hidden = key > at
        if window:
            hidden |= key <= at - window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out


def write_runs_(
    words: Tensor,  # 1-d int32
    patch: Tensor,  # 1-d int32, on the host or with `words`: values, and from the end backwards the runs
    runs: int,
) -> None:
    """`words[to : to + count] = patch[source : source + count]` of each run (to, count, source)."""
    for run in range(runs):
        at = len(patch) - 3 * (run + 1)
        to, count, source = patch[at : at + 3].tolist()
        words[to : to + count] = patch[source : source + count].to(words.device)


def prepare_step_(
    computed: Tensor,  # [rows] int32: positions in the KV cache
    tokens: Tensor,  # [rows, positions] int32
    blocks: Tensor,  # [rows, blocks] int32
    rows: Tensor,  # [S] int32; 0: padding, which stays at position 0
    first: Tensor,  # [S] int32: position of the first new token; below 0: take it from `computed`
    cu_seqlens_q: Tensor,  # [S + 1] int32: first new token of each sequence, then the end of the last
    num_tokens: int,  # T; tokens after the last sequence are padding
    block_size: int,
    max_blocks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ids[T], positions[T], slot_mapping[T] int64, block_tables[S, max_blocks], context_lens[S] int32.

    `computed[rows]` becomes `context_lens`. `block_tables[s]` is `blocks[rows[s]]` up to the last block that
    `context_lens[s]` needs. Its other entries are not defined.
    """
    index, at = rows.long(), torch.arange(num_tokens, dtype=torch.int32, device=rows.device)
    begin = torch.where(first < 0, computed[index], first)
    context_lens = begin + cu_seqlens_q.diff()
    computed[index] = context_lens
    computed[:1] = 0
    owner = torch.searchsorted(cu_seqlens_q, at, right=True) - 1
    inside = owner < len(rows)
    owner = owner.clamp(max=len(rows) - 1)
    positions = torch.where(inside, begin[owner] + at - cu_seqlens_q[owner], 0).long()
    row = index[owner]
    ids = torch.where(inside, tokens[row, positions], 0).long()
    slots = blocks[row, positions // block_size].long() * block_size + positions % block_size
    slot_mapping = torch.where(inside, slots, 0)
    return ids, positions, slot_mapping, blocks[index, :max_blocks], context_lens


def pick_greedy_(
    logits: Tensor,  # [n, vocab]
    rows: Tensor,  # [n] int32 or int64
    lengths: Tensor,  # [n] int32 or int64
    tokens: Tensor,  # [rows, positions] int32
) -> Tensor:
    """[n] int64: the column of each row's largest logit, the first among equals. Also in tokens[rows, lengths].

    A row whose largest logit is infinite or not a number has no token: -1, and 0 in `tokens`.
    """
    largest, chosen = logits.max(-1)
    broken = largest.isnan() | (largest == float("inf"))
    tokens[rows.long(), lengths.long()] = torch.where(broken, 0, chosen).to(torch.int32)
    return torch.where(broken, -1, chosen)


NUCLEUS = 1024  # tokens in which a top-p set is searched, the likeliest ones, before all are sorted


def top_p_floor(
    probs: Tensor,  # [n, vocab] float32
    top_p: Tensor,  # [n] float32
) -> Tensor:
    """[n, 1]: the smallest probability in the smallest set of mass top_p or more (Holtzman et al. 2020)."""
    count = min(NUCLEUS, probs.shape[1])
    values = probs.topk(count).values
    if count < probs.shape[1] and bool((values.sum(-1) < top_p).any()):
        values = probs.sort(descending=True).values
    before = values.cumsum(-1) - values
    inside = (before < top_p[:, None]).sum(-1, keepdim=True).clamp_(min=1)
    return values.gather(1, inside - 1)


def _segments(
    records: Tensor, slots: Tensor, segment_starts: Tensor, layer: int, group: int
) -> Iterator[tuple[int, int, list[int], list[int], list[float]]]:
    """(first token, last token + 1, words, ranks, scales) of each segment whose slot adapts this group."""
    bounds = segment_starts.tolist()
    for s, slot in enumerate(slots.tolist()):
        first, last = bounds[s], bounds[s + 1]
        record = records[slot, layer, group]
        ranks = record[WORD_RANKS : WORD_RANK2 + 1].view(torch.uint16).tolist()[:MAX_TARGETS]
        if first == last or not any(ranks):
            continue
        words = record.view(torch.uint32).tolist()
        scales = record[WORD_SCALE : WORD_SCALE + MAX_TARGETS].view(torch.float32).tolist()
        yield first, last, words, ranks, scales


def matrix(arena: Tensor, offset: int, rows: int, length: int, dtype: torch.dtype) -> Tensor:
    """The `[rows, length]` matrix at `offset` (in units of ALIGN) in the arena."""
    size = dtype.itemsize
    stride = row_stride(length, size)
    start = offset * ALIGN
    flat = arena[start : start + rows * stride * size].view(dtype)
    return flat.view(rows, stride)[:, :length]


def lora_shrink(
    x: Tensor,  # [T, K]
    arena: Tensor,  # [bytes] uint8
    records: Tensor,  # [slots, layers + 1, groups, 8] int32
    slots: Tensor,  # [G] int32
    segment_starts: Tensor,  # [G + 1] int32
    layer: int,
    group: int,
    stacked_rank: int,
    overlap: bool = False,
) -> Tensor:
    """Partial sums t[P, T, stacked_rank] of x @ A.T, in float32. Columns past a slot's stacked rank are not defined."""
    t = x.new_zeros((1, x.shape[0], stacked_rank), dtype=torch.float32)
    for first, last, words, ranks, _ in _segments(records, slots, segment_starts, layer, group):
        a = matrix(arena, words[WORD_A], sum(ranks), x.shape[1], x.dtype)
        t[0, first:last, : sum(ranks)] = x[first:last].float() @ a.float().T
    return t


def lora_gather(
    ids: Tensor,  # [T] int64
    arena: Tensor,
    records: Tensor,
    slots: Tensor,
    segment_starts: Tensor,
    layer: int,
    group: int,
    stacked_rank: int,
    dtype: torch.dtype,
) -> Tensor:
    """The shrink of an embedding: rows of A[vocab, r] by token id, as t[1, T, stacked_rank] float32."""
    t = torch.zeros((1, ids.shape[0], stacked_rank), dtype=torch.float32, device=ids.device)
    for first, last, words, ranks, _ in _segments(records, slots, segment_starts, layer, group):
        rows = int(ids[first:last].max()) + 1
        a = matrix(arena, words[WORD_A], rows, ranks[0], dtype)
        t[0, first:last, : ranks[0]] = a[ids[first:last]].float()
    return t


def lora_expand_(
    y: Tensor,  # [T, sum(splits)]
    t: Tensor,  # [P, T, stacked_rank] float32
    arena: Tensor,
    records: Tensor,
    slots: Tensor,
    segment_starts: Tensor,
    layer: int,
    group: int,
    splits: list[int],
) -> None:
    """`y[i, columns(j)] += scale(j) * sum(t)[i, ranks(j)] @ B(j)` for every target j, in float32, rounded once."""
    size = y.dtype.itemsize
    for first, last, words, ranks, scales in _segments(
        records, slots, segment_starts, layer, group
    ):
        total = t[:, first:last].sum(0)
        offset, column, row = words[WORD_B], 0, 0
        for rank, scale, n in zip(ranks, scales, splits, strict=False):
            b = matrix(arena, offset, rank, n, y.dtype)
            part = y[first:last, column : column + n]
            part.copy_(part.float() + scale * (total[:, row : row + rank] @ b.float()))
            offset += rank * padded(n * size) // ALIGN
            column, row = column + n, row + rank


def extras(
    arena: Tensor, offset: int, flags: int, columns: int
) -> tuple[Tensor | None, Tensor | None]:
    """The scale row and the shift row of the extras at `offset` (in units of ALIGN): float32 [columns] views."""
    at, found = offset * ALIGN, []
    for flag in (SCALED, FLAG_SHIFT):
        row = arena[at : at + 4 * columns].view(torch.float32) if flags & flag else None
        found.append(row)
        at += padded(4 * columns) if row is not None else 0
    return found[0], found[1]


def lora_rescale_(
    y: Tensor,  # [T, N]
    arena: Tensor,
    records: Tensor,
    slots: Tensor,
    segment_starts: Tensor,
    layer: int,
    group: int,
) -> None:
    """`y[i] = scale * y[i] + shift` with the extras of token i's adapter, in float32, rounded once."""
    for first, last, words in _flagged(records, slots, segment_starts, layer, group, EXTRAS):
        flags = words[WORD_RANK2] >> FLAGS_SHIFT
        scale, shift = extras(arena, words[WORD_EXTRA], flags, y.shape[1])
        part = y[first:last]
        scaled = part.float() if scale is None else part.float() * scale
        part.copy_(scaled if shift is None else scaled + shift)


def _flagged(
    records: Tensor, slots: Tensor, segment_starts: Tensor, layer: int, group: int, flags: int
) -> Iterator[tuple[int, int, list[int]]]:
    """(first token, last token + 1, words) of each segment whose slot has one of the flags."""
    bounds = segment_starts.tolist()
    for s, slot in enumerate(slots.tolist()):
        words = records[slot, layer, group].view(torch.uint32).tolist()
        if words[WORD_RANK2] >> FLAGS_SHIFT & flags and bounds[s] < bounds[s + 1]:
            yield bounds[s], bounds[s + 1], words


def own_rows(
    arena: Tensor, offset: int, hidden: int, dtype: torch.dtype
) -> tuple[int, Tensor, Tensor]:
    """(vocabulary, ids [n] int32, rows [n, hidden]) of the own rows at `offset` (in units of ALIGN)."""
    at = offset * ALIGN
    count, vocab = arena[at : at + 8].view(torch.int32).tolist()
    ids_at, rows_at = own_ids_start(at), own_rows_start(at, count)
    ids = arena[ids_at : ids_at + 4 * count].view(torch.int32)
    return vocab, ids, matrix(arena, rows_at // ALIGN, count, hidden, dtype)


def lora_own_rows_(
    y: Tensor,  # [T, hidden]
    ids: Tensor,  # [T] int64
    arena: Tensor,
    records: Tensor,
    slots: Tensor,
    segment_starts: Tensor,
    layer: int,
    group: int,
) -> None:
    """`y[i] = rows[j]` where `own ids[j] == ids[i]`, with the own rows of token i's adapter."""
    for first, last, words in _flagged(records, slots, segment_starts, layer, group, FLAG_OWN_ROWS):
        _, own, rows = own_rows(arena, words[WORD_OWN], y.shape[1], y.dtype)
        if not len(own):
            continue
        wanted = ids[first:last].to(torch.int32)
        at = torch.searchsorted(own, wanted).clamp_(max=len(own) - 1)
        found = own[at] == wanted
        part = y[first:last]
        part.copy_(torch.where(found[:, None], rows[at], part))


def lora_own_logits_(
    y: Tensor,  # [T, vocab and room for more]
    x: Tensor,  # [T, hidden]
    arena: Tensor,
    records: Tensor,
    slots: Tensor,
    segment_starts: Tensor,
    layer: int,
    group: int,
) -> None:
    """`y[i, own ids] = x[i] @ rows.T` with the own rows of token i's adapter; -inf behind its vocabulary."""
    for first, last, words in _flagged(records, slots, segment_starts, layer, group, FLAG_OWN_ROWS):
        vocab, own, rows = own_rows(arena, words[WORD_OWN], x.shape[1], x.dtype)
        part = y[first:last]
        part[:, own.long()] = F.linear(x[first:last], rows).to(y.dtype)
        part[:, vocab:] = float("-inf")
