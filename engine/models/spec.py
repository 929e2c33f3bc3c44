"""The description of a model: everything that makes the decoder a llama, gemma or gpt2.

A family is a function from its Hugging Face config to a `ModelSpec` (see `architectures.py`). The spec chooses the
parts once, when the model is built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from engine.ops.layout import ShardLayout
from engine.ops.targets import Group, ModelTargets, Shard, Target


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention (Ainslie et al. 2023)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    softcap: float = 0.0  # of the scores; 0: none
    windows: tuple[int, ...] = ()  # sliding window of each layer; 0 or empty: none
    # RMS norms of q and of k, before they are rotated: of each head, or of all heads together.
    qk_norms: Literal["none", "head", "all"] = "none"

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions; `parameters` is transformers' `rope_parameters` of the config."""

    rotary_dim: int
    parameters: dict[str, Any]
    interleaved: bool = (
        False  # features 2i and 2i + 1 of a head turn together, else i and i + rotary_dim / 2
    )
    without: frozenset[int] = frozenset()  # layers that rotate nothing
    local: dict[str, Any] | None = (
        None  # parameters of layers with a sliding window, if they have others
    )


@dataclass(frozen=True, slots=True)
class Learned:
    """A table of position embeddings, added to the input (gpt2)."""

    name: str  # of the table in the checkpoint


@dataclass(frozen=True, slots=True)
class Norm:
    kind: Literal["rms", "layer"]
    eps: float
    plus_one: bool = False  # the checkpoint stores weight - 1 (gemma)


@dataclass(frozen=True, slots=True)
class Mlp:
    act: str  # silu | gelu | gelu_tanh | relu | relu2
    size: int
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Scales:
    """Factors (1: none), and the softcap of the logits (0: none)."""

    embedding: float = 1.0
    residual: float = 1.0  # of the outputs of attention and MLP
    logit_divisor: float = 1.0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class Names:
    """Checkpoint names. `{layer}` stands for the layer's number; each linear lists the modules it is fused from."""

    layer: str = "model.layers.{layer}"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    attention_norm: str | None = "input_layernorm"  # None: only the outputs are normalised
    mlp_norm: str | None = "post_attention_layernorm"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    after_attention_norm: str | None = None  # sandwich: norms of the outputs too
    after_mlp_norm: str | None = None
    transposed: bool = False  # linears are stored [in, out] (Conv1D)
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)  # endings of tensors that are not weights


@dataclass(frozen=True, slots=True)
class ModelSpec:
    model_type: str
    num_layers: int
    hidden: int
    vocab: int
    max_positions: int
    attention: Attention
    position: Rope | Learned
    norm: Norm
    mlp: Mlp
    tied: bool  # the head is the embedding
    config: Any  # the Hugging Face config it was made from
    scales: Scales = Scales()
    names: Names = field(default_factory=Names)


QKV, OUT, UP, DOWN = range(4)  # group numbers of a layer
EMBEDDING, HEAD = range(2)  # group numbers of the ends


def targets_of(spec: ModelSpec) -> ModelTargets:
    """Every linear, as groups and targets: the model is built from it, and adapters are checked against it."""
    names, attention, mlp = spec.names, spec.attention, spec.mlp
    q, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    up = (mlp.size, mlp.size) if mlp.gated else (mlp.size,)

    def column(
        name: str, modules: tuple[str, ...], sizes: tuple[int, ...], unit: int, bias: bool
    ) -> Group:
        """Column-parallel. One module with several sizes: the checkpoint stores it fused."""
        if len(modules) == 1 < len(sizes):
            target = _target(spec, modules[0], sum(sizes), unit, sizes)
            return Group(name, spec.hidden, (target,), bias=bias)
        pairs = zip(modules, sizes, strict=True)
        targets = tuple(_target(spec, module, size, unit) for module, size in pairs)
        return Group(name, spec.hidden, targets, bias=bias)

    def row(name: str, module: str, size: int, unit: int, bias: bool) -> Group:
        target = _target(spec, module, spec.hidden)
        return Group(name, size, (target,), cut="inputs", unit=unit, bias=bias)

    groups = (
        column("qkv", names.qkv, (q, kv, kv), attention.head_dim, attention.qkv_bias),
        row("o", names.out, q, attention.head_dim, attention.out_bias),
        column("gate_up" if mlp.gated else "up", names.up, up, 1, mlp.bias),
        row("down", names.down, mlp.size, 1, mlp.bias),
    )
    table = Target(names.embedding.rsplit(".", 1)[-1], names.embedding, spec.hidden)
    head = Target(names.head, names.head, spec.vocab)
    ends = (
        Group("embedding", spec.vocab, (table,), embedding=True, cut="inputs"),
        Group("head", spec.hidden, (head,)),
    )
    return ModelTargets(spec.num_layers, groups, ends, spec.tied)


def _target(
    spec: ModelSpec, module: str, size: int, unit: int = 1, fused: tuple[int, ...] = ()
) -> Target:
    path = f"{spec.names.layer}.{module}"
    return Target(module.rsplit(".", 1)[-1], path, size, unit, fused)


def layout_of(spec: ModelSpec, dtype: str, shard: Shard | None = None) -> ShardLayout:
    """A shard's part of the model's targets; `shard` None: one shard holds all."""
    return ShardLayout(targets_of(spec), dtype, shard or Shard())
