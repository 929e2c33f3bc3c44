"""Every op of the engine, defined once with the dispatcher; the reference serves every op that no extension serves.

Letters in shapes: T, S and G as in `engine.layers.batch`; K and N are the inputs and outputs of a linear, P the parts
of a sum. The *stacked rank* of a group is the sum of its targets' ranks. An op whose name ends in an underscore changes
the arguments marked `!`. The semantics are the bodies in `reference.py`.
"""

from __future__ import annotations

import torch

from engine.ops import reference

NAMESPACE = "lorax"

SCHEMAS = {
    # y[T, N] = x[T, K] @ weight[N, K].T + bias[N]. With few tokens, the op may read the weight before the previously
    # launched op has ended: the weight must not be that op's output.
    "linear": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    # residual += x, in place; returns rms_norm(residual) * weight. Without residual: rms_norm(x) * weight.
    "add_rms_norm": "(Tensor x, Tensor(a!)? residual, Tensor weight, float eps) -> Tensor",
    # x[T, 2 * size] -> act(x[:, :size]) * x[:, size:];  act: silu | gelu | gelu_tanh
    "act_and_mul": "(Tensor x, str act) -> Tensor",
    # Rotates q and k in place by cos_sin[position] = [cos | sin] (width 0: not at all), then stores k and v in the
    # cache at `slot_mapping`.
    "rope_store_kv_": (
        "(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor cos_sin, Tensor positions, Tensor(c!) kv, Tensor slot_mapping,"
        " int layer, bool interleaved) -> ()"
    ),
    # Causal attention of q[T, heads, head_dim] over each sequence's blocks. Softcap 0 and window 0 are off. Each of the
    # first `num_decodes` sequences has one token.
    "paged_attention": (
        "(Tensor q, Tensor kv, int layer, Tensor block_tables, Tensor cu_seqlens_q, Tensor context_lens, float scale,"
        " float softcap, int window, int num_decodes=0) -> Tensor"
    ),
    # words[destination : destination + count] = patch[source : source + count] for every run. The runs are
    # (destination, count, source) at the end of `patch`, the last run first.
    "write_runs_": "(Tensor(a!) words, Tensor patch, int runs) -> ()",
    # ids, positions and slot_mapping of the T new tokens of S sequences; their block_tables[S, max_blocks] and
    # context_lens[S]. Adds the new tokens to `computed`.
    "prepare_step_": (
        "(Tensor(a!) computed, Tensor tokens, Tensor blocks, Tensor rows, Tensor first, Tensor cu_seqlens_q,"
        " int num_tokens, int block_size, int max_blocks)"
        " -> (Tensor ids, Tensor positions, Tensor slot_mapping, Tensor block_tables, Tensor context_lens)"
    ),
    # The column of the largest logit of every row, also written to tokens[rows, lengths]. If that logit is not finite:
    # -1, and 0 in `tokens`.
    "pick_greedy_": "(Tensor logits, Tensor rows, Tensor lengths, Tensor(a!) tokens) -> Tensor",
    # floor[n, 1]: the smallest probability in the smallest set of mass top_p[n] or more.
    "top_p_floor": "(Tensor probs, Tensor top_p) -> Tensor",
    # t[P, T, stacked_rank] float32, to be summed over P: x @ A(slot).T. overlap: x was complete before the previously
    # launched op, so this op may run at the same time as that one.
    "lora_shrink": (
        "(Tensor x, Tensor arena, Tensor records, Tensor slots, Tensor segment_starts, int layer, int group,"
        " int stacked_rank, bool overlap=False) -> Tensor"
    ),
    # The same for an embedding: t[1, T, stacked_rank] = A(slot)[ids].
    "lora_gather": (
        "(Tensor ids, Tensor arena, Tensor records, Tensor slots, Tensor segment_starts, int layer, int group,"
        " int stacked_rank, ScalarType dtype) -> Tensor"
    ),
    # For every target j of the group: y[i, columns(j)] += scale(j) * sum(t[:, i, ranks(j)]) @ B(slot, j).
    "lora_expand_": (
        "(Tensor(a!) y, Tensor t, Tensor arena, Tensor records, Tensor slots, Tensor segment_starts, int layer,"
        " int group, int[] splits) -> ()"
    ),
    # y[i] = scale(slot) * y[i] + shift(slot) for every token whose adapter has extras in the group.
    "lora_rescale_": (
        "(Tensor(a!) y, Tensor arena, Tensor records, Tensor slots, Tensor segment_starts, int layer, int group) -> ()"
    ),
    # y[i] = the own row of token id ids[i], where its adapter has one.
    "lora_own_rows_": (
        "(Tensor(a!) y, Tensor ids, Tensor arena, Tensor records, Tensor slots, Tensor segment_starts, int layer,"
        " int group) -> ()"
    ),
    # y[i, id] = x[i] @ row for every own row of token i's adapter, and -inf behind the adapter's vocabulary.
    "lora_own_logits_": (
        "(Tensor(a!) y, Tensor x, Tensor arena, Tensor records, Tensor slots, Tensor segment_starts, int layer,"
        " int group) -> ()"
    ),
}

_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
