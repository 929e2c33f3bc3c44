"""Attention over the paged KV cache: qkv projection, rotary embedding, store, attention, output projection."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.layers.batch import Batch
from engine.layers.linear import Linear
from engine.layers.norm import RmsNorm

ops = torch.ops.lorax


class Attention:
    def __init__(
        self,
        qkv: Linear,
        out: Linear,
        shape: tuple[int, int, int],
        cos_sin: Tensor,
        scale: float,
        softcap: float,
        window: int,
        interleaved: bool = False,
        norms: tuple[RmsNorm, RmsNorm] | None = None,
    ) -> None:
        """`shape` is (heads, kv_heads, head_dim). A `cos_sin` of width 0 rotates nothing; feature j of a head turns
        with j + half, or, `interleaved`, with its neighbour. `norms`: of q and of k, of each head or of all heads."""
        self.qkv, self.out = qkv, out
        self.heads, self.kv_heads, self.head_dim = shape
        self.cos_sin, self.scale, self.softcap, self.window = cos_sin, scale, softcap, window
        self.interleaved, self.norms = interleaved, norms
        self.layer = qkv.layer

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        qkv = self.qkv(x, batch.lora).view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.norms is not None:
            q, k = (_normed(*pair) for pair in zip((q, k), self.norms, strict=True))
        kv = batch.kv
        ops.rope_store_kv_(
            q,
            k,
            v,
            self.cos_sin,
            batch.positions,
            kv.cache,
            kv.slot_mapping,
            self.layer,
            self.interleaved,
        )
        y = kv.attend(q, kv, self.layer, scale=self.scale, softcap=self.softcap, window=self.window)
        return self.out(y.view(-1, self.heads * self.head_dim), batch.lora)


def _normed(heads: Tensor, norm: RmsNorm) -> Tensor:
    """[T, heads, head_dim], normalised in groups as wide as the norm."""
    return norm(heads.reshape(-1, norm.weight.shape[0])).view(heads.shape)
