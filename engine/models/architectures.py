"""The model families: each turns a Hugging Face config into a `ModelSpec`, in a few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.errors import ModelError
from engine.models.spec import (
    Attention,
    Learned,
    Mlp,
    ModelSpec,
    Names,
    Norm,
    Rope,
    Scales,
)

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ModelError(f"activation {name!r} is not supported", field="hidden_act")
    return ACTIVATIONS[name]


def _windows(config: Any) -> tuple[int, ...]:
    """The sliding window of each layer, from `layer_types` where the config has them."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return ()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _llama(config: Any, *, qkv_bias: bool, **parts: Any) -> ModelSpec:
    """The spec of llama and the families like it; `parts` override its defaults."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = dict(parts.pop("rope", config.rope_parameters))
    rotary_dim = int(head_dim * (rope.get("partial_rotary_factor") or 1.0))
    attention = Attention(
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        scale=parts.pop("scale", head_dim**-0.5),
        qkv_bias=qkv_bias,
        out_bias=parts.pop("out_bias", False),
        softcap=parts.pop("softcap", 0.0),
        windows=_windows(config),
        qk_norms=parts.pop("qk_norms", "none"),
    )
    return ModelSpec(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        attention=attention,
        position=Rope(
            rotary_dim,
            rope,
            interleaved=parts.pop("interleaved", False),
            without=parts.pop("without", frozenset()),
            local=parts.pop("local", None),
        ),
        norm=parts.pop("norm", None) or Norm("rms", config.rms_norm_eps),
        mlp=parts.pop("mlp", None)
        or Mlp(
            _activation(config.hidden_act),
            config.intermediate_size,
            bias=getattr(config, "mlp_bias", False),
        ),
        tied=config.tie_word_embeddings,
        config=config,
        **parts,
    )


def _ropes(config: Any) -> dict[str, Any]:
    """Parts of a family whose layers with a sliding window rotate differently."""
    kinds = config.rope_parameters
    return {"rope": kinds["full_attention"], "local": dict(kinds["sliding_attention"])}


def llama(config: Any) -> ModelSpec:
    bias = config.attention_bias
    return _llama(config, qkv_bias=bias, out_bias=bias)


def mistral(config: Any) -> ModelSpec:
    return _llama(config, qkv_bias=False)


def qwen2(config: Any) -> ModelSpec:
    return _llama(config, qkv_bias=True)


def gemma2(config: Any, **parts: Any) -> ModelSpec:
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError("bidirectional attention is not supported for generation")
    return _llama(
        config,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        scale=config.query_pre_attn_scalar**-0.5,
        softcap=config.attn_logit_softcapping or 0.0,
        norm=Norm("rms", config.rms_norm_eps, plus_one=True),
        mlp=Mlp(_activation(config.hidden_activation), config.intermediate_size),
        scales=Scales(
            embedding=config.hidden_size**0.5, softcap=config.final_logit_softcapping or 0.0
        ),
        names=Names(
            mlp_norm="pre_feedforward_layernorm",
            after_attention_norm="post_attention_layernorm",
            after_mlp_norm="post_feedforward_layernorm",
        ),
        **parts,
    )


def qwen3(config: Any) -> ModelSpec:
    bias = config.attention_bias
    return _llama(config, qkv_bias=bias, out_bias=bias, qk_norms="head")


def ministral(config: Any) -> ModelSpec:
    return _llama(config, qkv_bias=False)


def seed_oss(config: Any) -> ModelSpec:
    return _llama(config, qkv_bias=config.attention_bias, out_bias=config.attention_out_bias)


def smollm3(config: Any) -> ModelSpec:
    without = frozenset(at for at, rotates in enumerate(config.no_rope_layers) if not rotates)
    bias = config.attention_bias
    return _llama(config, qkv_bias=bias, out_bias=bias, without=without)


def arcee(config: Any) -> ModelSpec:
    return _llama(
        config,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        mlp=Mlp(
            _activation(config.hidden_act),
            config.intermediate_size,
            gated=False,
            bias=config.mlp_bias,
        ),
        names=Names(up=("mlp.up_proj",)),
    )


def granite(config: Any) -> ModelSpec:
    return _llama(
        config,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        scale=config.attention_multiplier,
        scales=Scales(
            embedding=config.embedding_multiplier,
            residual=config.residual_multiplier,
            logit_divisor=config.logits_scaling,
        ),
    )


def ernie4_5(config: Any) -> ModelSpec:
    return _llama(
        config,
        qkv_bias=config.use_bias,
        out_bias=config.use_bias,
        mlp=Mlp(_activation(config.hidden_act), config.intermediate_size, bias=config.use_bias),
        interleaved=True,
    )


def phi3(config: Any) -> ModelSpec:
    names = Names(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",))
    return _llama(config, qkv_bias=False, names=names)


def glm(config: Any) -> ModelSpec:
    names = Names(up=("mlp.gate_up_proj",))
    return _llama(config, qkv_bias=config.attention_bias, interleaved=True, names=names)


def glm4(config: Any) -> ModelSpec:
    names = Names(
        up=("mlp.gate_up_proj",),
        mlp_norm="post_attention_layernorm",
        after_attention_norm="post_self_attn_layernorm",
        after_mlp_norm="post_mlp_layernorm",
    )
    return _llama(config, qkv_bias=config.attention_bias, interleaved=True, names=names)


def starcoder2(config: Any) -> ModelSpec:
    return _llama(
        config,
        qkv_bias=config.use_bias,
        out_bias=config.use_bias,
        norm=Norm("layer", config.norm_epsilon),
        mlp=Mlp(
            _activation(config.hidden_act),
            config.intermediate_size,
            gated=False,
            bias=config.use_bias,
        ),
        names=Names(up=("mlp.c_fc",), down="mlp.c_proj"),
    )


def gemma(config: Any) -> ModelSpec:
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError("bidirectional attention is not supported for generation")
    return _llama(
        config,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        norm=Norm("rms", config.rms_norm_eps, plus_one=True),
        mlp=Mlp(_activation(config.hidden_act), config.intermediate_size),
        scales=Scales(embedding=config.hidden_size**0.5),
    )


def gemma3_text(config: Any) -> ModelSpec:
    """Layers with a sliding window have rotations of their own."""
    return gemma2(config, qk_norms="head", **_ropes(config))


def olmo2(config: Any) -> ModelSpec:
    """Only the outputs of attention and MLP are normalised, and q and k over all heads."""
    return _llama(
        config,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        qk_norms="all",
        names=Names(
            attention_norm=None,
            mlp_norm=None,
            after_attention_norm="post_attention_layernorm",
            after_mlp_norm="post_feedforward_layernorm",
        ),
    )


def gpt2(config: Any) -> ModelSpec:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise ModelError("gpt2 with scale_attn_by_inverse_layer_idx is not supported")
    head_dim = config.n_embd // config.n_head
    return ModelSpec(
        model_type=config.model_type,
        num_layers=config.n_layer,
        hidden=config.n_embd,
        vocab=config.vocab_size,
        max_positions=config.n_positions,
        attention=Attention(
            config.n_head, config.n_head, head_dim, head_dim**-0.5, qkv_bias=True, out_bias=True
        ),
        position=Learned("transformer.wpe"),
        norm=Norm("layer", config.layer_norm_epsilon),
        mlp=Mlp(
            _activation(config.activation_function),
            config.n_inner or 4 * config.n_embd,
            gated=False,
            bias=True,
        ),
        tied=config.tie_word_embeddings,
        config=config,
        names=Names(
            layer="transformer.h.{layer}",
            embedding="transformer.wte",
            norm="transformer.ln_f",
            qkv=("attn.c_attn",),
            out="attn.c_proj",
            up=("mlp.c_fc",),
            down="mlp.c_proj",
            attention_norm="ln_1",
            mlp_norm="ln_2",
            transposed=True,
            ignored=(".attn.bias", ".attn.masked_bias"),
        ),
    )


FAMILIES: dict[str, Callable[[Any], ModelSpec]] = {
    family.__name__: family
    for family in (
        *(llama, mistral, ministral, qwen2, qwen3, gemma, gemma2, gpt2, phi3, granite, smollm3),
        *(gemma3_text, olmo2, glm, glm4, starcoder2, ernie4_5, seed_oss, arcee),
    )
}


def spec_of(config: Any) -> ModelSpec:
    """The spec of a Hugging Face config; ModelError names the supported families."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"model type {config.model_type!r} is not supported",
            field="model_id",
            hint=f"supported: {', '.join(sorted(FAMILIES))}",
        )
    if getattr(config, "quantization_config", None):
        raise ModelError("quantized checkpoints are not supported", field="model_id")
    return family(config)
