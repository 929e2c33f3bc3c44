"""What a step computes and moves, against transformers' own operations and against the sum of its steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from engine.bench.adapters import Images
from engine.bench.engine_report import Work
from engine.bench.work import Model
from engine.config import EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.models import adapter_layout
from tests.tiny import make_model

CONTEXT = 11  # below every window


def model_of(folder: Path, family: str, step_tokens: int = 1000) -> Model:
    make_model(family, folder)
    config = EngineConfig(
        model=ModelConfig(model_id=str(folder), dtype="float32"),
        scheduler=SchedulerConfig(max_batch_prefill_tokens=step_tokens),
        memory=MemoryConfig(device="cpu", cpu_memory_gb=0.1),
    )
    layout, spec, _ = adapter_layout(config.model)
    images = Images(layout, [[4]], 1)
    engine = Engine(config, images.region)
    engine.close()
    images.region.close()
    return Model(spec, layout, engine.plan, 4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_decode_step_computes_what_transformers_does(tmp_path: Path, family: str) -> None:
    model = model_of(tmp_path, family)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = torch.arange(1, CONTEXT + 1)[None]
    with torch.no_grad():
        cache = theirs(ids[:, :-1], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            theirs(ids[:, -1:], past_key_values=cache)
    assert model.decode([CONTEXT], [None]).flops == counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_prefill_is_its_positions_one_by_one(tmp_path: Path, family: str) -> None:
    """But for the logits, which only the last of them has; across windows too."""
    model, tokens = model_of(tmp_path, family, step_tokens=64), 100
    whole = model.prefill(tokens, [None, None, None])
    steps = [model.decode([context], [None]) for context in range(1, tokens + 1)]
    head = 2 * model.spec.hidden * model.spec.vocab
    assert whole.flops == 3 * (sum(step.flops for step in steps) - (tokens - 1) * head)
    assert whole.weight_bytes == 5 * steps[0].weight_bytes  # 300 tokens in steps of 64
    assert whole.kv_bytes == 3 * tokens * steps[0].kv_bytes  # each position is written once


def test_adapters_are_moved_once_and_computed_for_every_token(tmp_path: Path) -> None:
    model = model_of(tmp_path, "llama")
    images = Images(model.layout, [[4], [12]], 2)
    one, other = images.mixes[0][0], images.mixes[1][0]
    elements = {}
    for ref, rank in ((one, 4), (other, 12)):
        elements[ref.digest] = sum(
            rank * len(group.targets) * group.in_features
            + rank * sum(target.out_features for target in group.targets)
            for layer, _, group in model.layout.each_group()
            if layer < model.layout.num_layers
        )
    for adapters in ([one], [one, one, other, None]):
        contexts = [5.0] * len(adapters)
        base = [None] * len(adapters)
        named = [ref for ref in adapters if ref is not None]
        computed = 2 * sum(elements[ref.digest] for ref in named)
        moved = 4 * sum(elements[digest] for digest in {ref.digest for ref in named})
        for found, plain, tokens in (
            (model.decode(contexts, adapters), model.decode(contexts, base), 1),
            (model.prefill(7, adapters), model.prefill(7, base), 7),
        ):
            assert found == replace(
                plain, flops=plain.flops + tokens * computed, adapter_bytes=moved
            )
    images.region.close()


def test_keys_and_values_within_windows(tmp_path: Path) -> None:
    mistral = model_of(tmp_path / "mistral", "mistral")  # windows of 24 in all 3 layers
    found = mistral.decode([10, 24, 100], [None] * 3).kv_bytes
    assert found == (10 + 24 + 24) * 3 * 2 * 2 * 16 * 4
    gemma = model_of(tmp_path / "gemma2", "gemma2")  # 20 in layers 0 and 2
    assert gemma.decode([100], [None]).kv_bytes == (20 + 100 + 20) * 2 * 2 * 32 * 4


def test_bytes_are_of_weights_keys_values_and_adapters() -> None:
    assert Work(1, 20, 300, 4000).num_bytes == 4320
