"""Tiny random models and adapters, made with transformers and peft and written to a folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    Ernie4_5Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
    Starcoder2Config,
)

VOCAB = 160
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "bos_token_id": 0,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama3-rope": lambda: LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama-yarn-bias": lambda: LlamaConfig(
        **(SMALL | {"tie_word_embeddings": True}),
        attention_bias=True,
        mlp_bias=True,
        head_dim=24,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=24),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "gemma2": lambda: Gemma2Config(
        **(SMALL | {"tie_word_embeddings": True}),
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=20,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma": lambda: GemmaConfig(**(SMALL | {"tie_word_embeddings": True}), head_dim=32),
    "gemma3_text": lambda: Gemma3TextConfig(
        **(SMALL | {"tie_word_embeddings": True}),
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=20,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "olmo2": lambda: Olmo2Config(**SMALL, pad_token_id=2),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=32),
    "ministral": lambda: MinistralConfig(
        **SMALL,
        head_dim=16,
        sliding_window=24,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "seed_oss": lambda: SeedOssConfig(**SMALL, head_dim=16),
    "smollm3": lambda: SmolLM3Config(**SMALL, pad_token_id=2, no_rope_layers=[1, 0, 1]),
    "arcee": lambda: ArceeConfig(**SMALL),
    "granite": lambda: GraniteConfig(
        **SMALL,
        embedding_multiplier=3.0,
        logits_scaling=1.7,
        residual_multiplier=0.6,
        attention_multiplier=0.2,
    ),
    "ernie4_5": lambda: Ernie4_5Config(
        **(SMALL | {"tie_word_embeddings": True}), head_dim=16, use_bias=True
    ),
    "phi3": lambda: Phi3Config(
        **SMALL,
        pad_token_id=2,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1000.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "glm": lambda: GlmConfig(**SMALL, head_dim=16, pad_token_id=2, attention_bias=True),
    "glm4": lambda: Glm4Config(**SMALL, head_dim=16, pad_token_id=2, attention_bias=True),
    "starcoder2": lambda: Starcoder2Config(
        **(SMALL | {"tie_word_embeddings": True}), sliding_window=24
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=256, eos_token_id=1
    ),
}

TARGETS = {
    "attention": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "mlp": ["gate_proj", "down_proj"],
    "ends": ["k_proj", "o_proj", "lm_head", "embed_tokens"],
}
_UNGATED = {
    "attention": ["q_proj", "v_proj"],
    "ends": ["k_proj", "o_proj", "lm_head", "embed_tokens"],
}
_FUSED = {
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
    "mlp": ["gate_up_proj", "down_proj"],
}
OTHER_TARGETS: dict[str, dict[str, list[str]]] = {  # by model type
    "gpt2": {
        "attention": ["c_attn"],
        "all": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
        "mlp": ["c_fc"],
        "ends": ["attn.c_proj", "lm_head", "wte"],
    },
    "phi3": {
        "attention": ["qkv_proj"],
        "all": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        "mlp": ["gate_up_proj"],
        "ends": ["o_proj", "lm_head", "embed_tokens"],
    },
    "glm": TARGETS | _FUSED,
    "glm4": TARGETS | _FUSED,
    "arcee": _UNGATED
    | {
        "all": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        "mlp": ["up_proj", "down_proj"],
    },
    "starcoder2": _UNGATED
    | {
        "all": ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"],
        "mlp": ["c_fc", "c_proj"],
    },
}


def make_model(family: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """A tiny model with weights large enough that its text is not one repeated token."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.normal_(0.0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(folder)
    return model


def make_adapter(
    model: PreTrainedModel,
    folder: Path,
    seed: int,
    rank: int = 8,
    targets: str = "all",
    **options: Any,
) -> PeftModel:
    """A random adapter whose A and B are both non-zero; the wrapped model is returned, the files are in `folder`.

    The base weights are shared with `model`; call `.unload()` on the result before wrapping `model` again.
    """
    torch.manual_seed(seed)
    names = OTHER_TARGETS.get(model.config.model_type, TARGETS)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=names[targets], **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # peft's advice on tied weights, and its calls of deprecated functions
        wrapped = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    factor_a = "lora_A" in name or "embedding_A" in name
                    parameter.normal_(0.0, 0.2 if factor_a else 0.1)
        wrapped.eval().save_pretrained(folder, save_embedding_layers=False)
    return wrapped
