"""The decoder of every family: `__init__` chooses its parts from the `ModelSpec`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.kinds import KINDS
from engine.layers.attention import Attention
from engine.layers.batch import Batch
from engine.layers.linear import Embedding, Linear, LinearMethod, Plain
from engine.layers.mlp import Mlp
from engine.layers.norm import LayerNorm, RmsNorm, norm
from engine.layers.rotary import cos_sin_table
from engine.models.spec import DOWN, EMBEDDING, HEAD, OUT, QKV, UP, ModelSpec, Rope, layout_of
from engine.ops.layout import ShardLayout
from engine.ops.targets import Shard

Head = Callable[[Tensor], Tensor]  # [tokens of a chunk, hidden] -> [size of the vector]


class Layer:
    """Attention, then the MLP, each after a norm. With sandwich norms, their outputs are normalised too."""

    def __init__(self, model: Decoder, layer: int) -> None:
        spec, names = model.spec, model.spec.names
        attention, mlp = spec.attention, spec.mlp
        self.attention = Attention(
            model.linear(layer, QKV),
            model.linear(layer, OUT),
            shape=(attention.heads, attention.kv_heads, attention.head_dim),
            cos_sin=model.cos_sin_of(layer),
            scale=attention.scale,
            softcap=attention.softcap,
            window=attention.window(layer),
            interleaved=isinstance(spec.position, Rope) and spec.position.interleaved,
            norms=model.qk_norms(),
        )
        self.mlp = Mlp(
            model.linear(layer, UP),
            model.linear(layer, DOWN),
            mlp.act,
            mlp.gated,
        )
        self.residual_scale = spec.scales.residual
        self.attention_norm = model.norm() if names.attention_norm else None
        self.mlp_norm = model.norm() if names.mlp_norm else None
        self.after_attention = model.norm() if names.after_attention_norm else None
        self.after_mlp = model.norm() if names.after_mlp_norm else None

    def __call__(self, x: Tensor, residual: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        """x: output of the previous layer, not yet added to the residual. Returns the same pair for this layer."""
        x, residual = _before(self.attention_norm, x, residual)
        x = self.attention(x, batch)
        if self.after_attention is not None:
            x = self.after_attention(x)
        if self.residual_scale != 1.0:
            x = x * self.residual_scale
        x, residual = _before(self.mlp_norm, x, residual)
        x = self.mlp(x, batch.lora)
        if self.after_mlp is not None:
            x = self.after_mlp(x)
        if self.residual_scale != 1.0:
            x = x * self.residual_scale
        return x, residual


def _before(
    norm: RmsNorm | LayerNorm | None, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The input of attention or MLP, and the residual with `x` added."""
    if norm is None:
        residual = x if residual is None else residual.add_(x)
        return residual, residual
    if residual is None:
        return norm(x), x
    return norm(x, residual), residual


class Decoder:
    """Tokens in, logits out."""

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device,
        method: Callable[[torch.dtype, torch.device], LinearMethod] = Plain,
        shard: Shard | None = None,
        max_added_tokens: int = 0,
    ) -> None:
        """`max_added_tokens`: tokens behind the vocabulary that adapters may have rows for."""
        self.spec, self.dtype, self.device, self.method = spec, dtype, device, method
        self.layout: ShardLayout = layout_of(spec, str(dtype).removeprefix("torch."), shard)
        last = spec.num_layers
        self.embedding = Embedding(self.layout.ends[EMBEDDING], (last, EMBEDDING), dtype, device)
        # by (layer, group number), as in the records
        self.linears: dict[tuple[int, int], Linear | Embedding] = {
            (last, EMBEDDING): self.embedding
        }
        # Rounded before the multiplication, as in transformers.
        self.embedding_scale = torch.tensor(spec.scales.embedding, dtype=dtype).item()
        self.position_table: Tensor | None = None
        if isinstance(spec.position, Rope):
            self.cos_sin = self._rotations(spec.position, spec.position.parameters)
            if spec.position.local is not None:
                self.local_cos_sin = self._rotations(spec.position, spec.position.local)
        else:
            shape = (spec.max_positions, spec.hidden)
            self.position_table = torch.empty(shape, dtype=dtype, device=device)
            self.cos_sin = torch.empty(spec.max_positions, 0, device=device)
        self.layers = [Layer(self, number) for number in range(spec.num_layers)]
        self.final_norm = self.norm()
        self.vocabulary = Plain(dtype, device, self.embedding.table if spec.tied else None)
        self.heads: dict[str, Head] = {}  # by name of the request kind
        self.head = Linear(self.vocabulary, self.layout.ends[HEAD], (last, HEAD), max_added_tokens)
        self.linears[last, HEAD] = self.head

    @property
    def kinds(self) -> list[str]:
        """Names of the request kinds that the model serves."""
        return [kind.name for kind in KINDS.values() if not kind.pools or kind.name in self.heads]

    def linear(self, layer: int, number: int) -> Linear:
        method = self.method(self.dtype, self.device)
        made = Linear(method, self.layout.groups[number], (layer, number))
        self.linears[layer, number] = made
        return made

    def cos_sin_of(self, layer: int) -> Tensor:
        """The rotations of a layer; of width 0 if it has none."""
        position = self.spec.position
        if isinstance(position, Rope):
            if layer in position.without:
                return self.cos_sin[:, :0]
            if position.local is not None and self.spec.attention.window(layer):
                return self.local_cos_sin
        return self.cos_sin

    def _rotations(self, position: Rope, parameters: dict[str, Any]) -> Tensor:
        spec = self.spec
        table = cos_sin_table(spec.config, parameters, position.rotary_dim, spec.max_positions)
        return table.to(self.device)

    def qk_norms(self) -> tuple[RmsNorm, RmsNorm] | None:
        """Of q and k."""
        attention, eps = self.spec.attention, self.spec.norm.eps
        if attention.qk_norms == "none":
            return None
        heads = (1, 1) if attention.qk_norms == "head" else (attention.heads, attention.kv_heads)
        q, k = (RmsNorm(n * attention.head_dim, eps, self.dtype, self.device) for n in heads)
        return q, k

    def norm(self) -> RmsNorm | LayerNorm:
        spec = self.spec
        return norm(spec.norm.kind, spec.norm.eps, spec.hidden, self.dtype, self.device)

    def __call__(self, batch: Batch) -> Tensor:
        """Logits of the output tokens, [O, vocab]; see `logits`."""
        return self.logits(self.body(batch), batch)

    def body(self, batch: Batch) -> Tensor:
        """Hidden states of the output tokens after the last norm, [O, hidden]."""
        scales = self.spec.scales
        x = self.embedding(batch.ids, batch.lora)
        if scales.embedding != 1.0:
            x = x * self.embedding_scale
        if self.position_table is not None:
            x = x + self.position_table[batch.positions]
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, batch)
        assert residual is not None
        if batch.outputs is not None:
            x, residual = (t.index_select(0, batch.outputs) for t in (x, residual))
        return self.final_norm(x, residual)

    def logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[O, hidden] -> [O, vocab], in the model's dtype, or in float32 with a softcap.

        With an adapter that has own rows, there are `max_added_tokens` more columns, -inf where it has no token.
        """
        scales = self.spec.scales
        logits = self.head(hidden, batch.lora_outputs)
        if scales.logit_divisor != 1.0:
            logits = logits / scales.logit_divisor
        if scales.softcap:
            capped = scales.softcap * torch.tanh(logits.float() / scales.softcap)
            if logits.shape[1] > self.spec.vocab:  # tokens that only some adapters have
                capped = torch.where(logits == float("-inf"), logits.float(), capped)
            logits = capped
        return logits
