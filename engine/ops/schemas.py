"""Every op of the engine, defined once with the dispatcher; the reference serves whatever no extension serves.

`T` tokens of a step, `S` segments (runs of consecutive tokens that share a slot, or a sequence), `R` stacked rank.
An op that ends in an underscore changes the arguments marked `!`. Semantics are the bodies in `reference.py`.
"""

from __future__ import annotations

import torch

from engine.ops import reference

NAMESPACE = "lorax"

SCHEMAS = {
    # y[T, N] = x[T, K] @ weight[N, K].T + bias[N]. For few tokens the weight may be read before the op that was
    # launched last has ended: it is not one that this op makes
    "linear": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    # residual += x, in place; returns rms_norm(residual) * weight. Without residual: rms_norm(x) * weight.
    "add_rms_norm": "(Tensor x, Tensor(a!)? residual, Tensor weight, float eps) -> Tensor",
    # x[T, 2I] -> act(x[:, :I]) * x[:, I:];  act: silu | gelu | gelu_tanh
    "act_and_mul": "(Tensor x, str act) -> Tensor",
    # rotates q and k in place by cos_sin[position] = [cos | sin] (width 0: not at all), then stores k and v in the
    # cache at `slot_mapping`
    "rope_store_kv_": (
        "(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor cos_sin, Tensor positions, Tensor(c!) kv, Tensor slot_mapping,"
        " int layer, bool interleaved) -> ()"
    ),
    # causal attention of q[T, heads, head_dim] over each sequence's blocks; softcap 0 and window 0 are off; each of the
    # first `num_decodes` sequences is known to have one token
    "paged_attention": (
        "(Tensor q, Tensor kv, int layer, Tensor block_tables, Tensor cu_seqlens_q, Tensor context_lens, float scale,"
        " float softcap, int window, int num_decodes=0) -> Tensor"
    ),
    # edits: words[destination : destination + count] = patch[source : source + count] of every run; the runs are
    # (destination, count, source) at the end of `patch`, the last one first
    "write_runs_": "(Tensor(a!) words, Tensor patch, int runs) -> ()",
    # ids, positions and slot_mapping of the T new tokens of S sequences; their block_tables[S, max_blocks] and
    # context_lens[S]; counts `computed` on
    "prepare_step_": (
        "(Tensor(a!) computed, Tensor tokens, Tensor blocks, Tensor rows, Tensor first, Tensor cu_seqlens_q,"
        " int num_tokens, int block_size, int max_blocks)"
        " -> (Tensor ids, Tensor positions, Tensor slot_mapping, Tensor block_tables, Tensor context_lens)"
    ),
    # the largest logit's column of every row, also written to tokens[rows, lengths]
    "pick_greedy_": "(Tensor logits, Tensor rows, Tensor lengths, Tensor(a!) tokens) -> Tensor",
    # floor[n, 1]: the least probability inside the smallest set of mass top_p[n] or more
    "top_p_floor": "(Tensor probs, Tensor top_p) -> Tensor",
    # t[P, T, width] float32, to be summed over P: x @ A(slot).T. overlap: x was complete before the op launched
    # last, so the two may overlap
    "lora_shrink": (
        "(Tensor x, Tensor arena, Tensor records, Tensor slots, Tensor starts, int layer, int group, int width,"
        " bool overlap=False) -> Tensor"
    ),
    # the same for an embedding: t[1, T, width] = A(slot)[ids]
    "lora_gather": (
        "(Tensor ids, Tensor arena, Tensor records, Tensor slots, Tensor starts, int layer, int group, int width,"
        " ScalarType dtype) -> Tensor"
    ),
    # y[i, cols(t)] += scale(t) * sum(t[:, i, ranks(t)]) @ B(slot, t)
    "lora_expand_": (
        "(Tensor(a!) y, Tensor t, Tensor arena, Tensor records, Tensor slots, Tensor starts, int layer, int group,"
        " int[] splits) -> ()"
    ),
}

_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
