"""Tiny base models, PEFT adapters made from them, and the layouts that the engine would have for them."""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
import warnings
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from engine.adapters.sources import open_files
from engine.files import OpenFile
from engine.lora import report
from engine.lora.formats import load_peft
from engine.lora.report import AdapterReport
from engine.lora.weights import LoraWeights
from engine.ops.layout import ShardLayout
from engine.ops.targets import Group, ModelTargets, Shard, Target
from engine.sandbox import Converter, is_pickle

HIDDEN, INNER, VOCAB, LAYERS, HEADS, KV_HEADS = 24, 40, 50, 3, 4, 2
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(hidden: int = HIDDEN) -> nn.Module:
    """A llama of odd sizes: rows of its matrices are no multiples of 16 bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    """A GPT-2: Conv1D layers, a fused c_attn."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=32
    )
    return GPT2LMHeadModel(config).eval()


def llama_layout(dtype: str = "float32", shard: Shard | None = None) -> ShardLayout:
    head = HIDDEN // HEADS
    kv = head * KV_HEADS

    def target(block: str, name: str, out_features: int, unit: int = 1) -> Target:
        return Target(name, f"model.layers.{{layer}}.{block}.{name}", out_features, unit)

    qkv = (
        target("self_attn", "q_proj", HIDDEN, head),
        target("self_attn", "k_proj", kv, head),
        target("self_attn", "v_proj", kv, head),
    )
    gate_up = (target("mlp", "gate_proj", INNER), target("mlp", "up_proj", INNER))
    o, down = target("self_attn", "o_proj", HIDDEN), target("mlp", "down_proj", HIDDEN)
    table = Target("embed_tokens", "model.embed_tokens", HIDDEN)
    targets = ModelTargets(
        num_layers=LAYERS,
        groups=(
            Group("qkv", HIDDEN, qkv),
            Group("o", HIDDEN, (o,), cut="inputs", unit=head),
            Group("gate_up", HIDDEN, gate_up),
            Group("down", INNER, (down,), cut="inputs"),
        ),
        ends=(
            Group("embed", VOCAB, (table,), embedding=True, cut="inputs"),
            Group("head", HIDDEN, (Target("lm_head", "lm_head", VOCAB),)),
        ),
    )
    return ShardLayout(targets, dtype, shard or Shard())


def gpt2_layout(dtype: str = "float32", shard: Shard | None = None) -> ShardLayout:
    head = HIDDEN // HEADS

    def column(path: str, *sizes: int, unit: int = 1) -> Group:
        name, module = path.split(".")[-1], f"transformer.h.{{layer}}.{path}"
        return Group(path, HIDDEN, (Target(name, module, sum(sizes), unit, sizes),))

    def row(path: str, size: int, unit: int = 1) -> Group:
        target = Target(path.split(".")[-1], f"transformer.h.{{layer}}.{path}", HIDDEN)
        return Group(path, size, (target,), cut="inputs", unit=unit)

    table = Target("wte", "transformer.wte", HIDDEN)
    targets = ModelTargets(
        num_layers=LAYERS,
        groups=(
            column("attn.c_attn", HIDDEN, HIDDEN, HIDDEN, unit=head),
            row("attn.c_proj", HIDDEN, head),
            column("mlp.c_fc", 4 * HIDDEN),
            row("mlp.c_proj", 4 * HIDDEN),
        ),
        ends=(Group("wte", VOCAB, (table,), embedding=True, cut="inputs"),),
    )
    return ShardLayout(targets, dtype, shard or Shard())


def adapt(model: nn.Module, seed: int = 1, **fields: Any) -> PeftModel:
    """The model with a LoRA whose halves are both random, so that nothing is zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return adapted


def save(adapted: PeftModel, folder: Path, safetensors: bool = True, **given: Any) -> Path:
    """Saves the adapter as PEFT does, without copies of the base's embedding and head."""
    given = {"save_embedding_layers": False} | given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(str(folder), safe_serialization=safetensors, **given)
    return folder


@cache
def converter() -> Converter:
    """One for all tests, in a folder of its own that is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="lorax-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Converter(folder)


def opened(config: Path, weights: Path) -> tuple[OpenFile, OpenFile]:
    """Two open files, a `.bin` converted."""
    found = open_files(config, weights)
    if not is_pickle(found.weights):
        return found.config, found.weights
    with found.weights, ExitStack() as stack:
        stack.callback(found.config.close)
        readable = converter().convert(found.weights)
        stack.pop_all()
    return found.config, readable


def files(folder: Path) -> tuple[OpenFile, OpenFile]:
    """Configuration and weights of a saved adapter, open."""
    return opened(*paths(folder))


def paths(folder: Path) -> tuple[Path, Path]:
    """Configuration and weights of a saved adapter."""
    weights = folder / "adapter_model.safetensors"
    return folder / "adapter_config.json", weights if weights.exists() else weights.with_suffix(
        ".bin"
    )


def load(folder: Path, layout: ShardLayout, **given: Any) -> LoraWeights:
    """`load_peft` of a folder. Closing the result closes the files."""
    return loaded(*paths(folder), layout, **given)


def loaded(config: Path, weights: Path, layout: ShardLayout, **given: Any) -> LoraWeights:
    """`load_peft` of two paths. Closing the result closes the files."""
    with ExitStack() as stack:
        config_file, weights_file = opened(config, weights)
        stack.callback(weights_file.close)
        with config_file:
            result = load_peft(config_file, weights_file, layout.targets, **given)
        stack.pop_all()
        return result


def inspect(folder: Path, layout: ShardLayout, **given: Any) -> AdapterReport:
    """The report of a folder."""
    with ExitStack() as stack:
        config, weights = map(stack.enter_context, files(folder))
        return report.inspect(config, weights, layout, **given)
