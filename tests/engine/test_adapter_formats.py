"""Every adapter format that PEFT writes: the engine's log-probabilities are those of PEFT's model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from tests.engine.harness import Harness, Outcome, config_of, request
from tests.tiny import VOCAB, make_model

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = [3, 99, 41, 41, 7, 150, 2, 88, 60, 5, 121, 33]
NEW = 8
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """One row of the table in docs/adapter-formats.md."""

    family: str
    fields: dict[str, Any]
    trained: Callable[[str], bool] = field(default=lambda name: "lora_" in name)


def _biases(name: str) -> bool:
    return "lora_" in name or (name.endswith("bias") and "norm" not in name)


ROWS = {
    "dora": Row("llama", dict(r=4, lora_alpha=6, use_dora=True, target_modules=LINEARS)),
    "dora of one linear of a group": Row("llama", dict(r=3, use_dora=True, target_modules=["k_proj", "up_proj"])),
    "dora of embedding and head": Row(
        "llama", dict(r=4, use_dora=True, use_rslora=True, target_modules=["embed_tokens", "lm_head", "o_proj"])
    ),
    "dora on biases": Row("qwen2", dict(r=5, use_dora=True, target_modules=LINEARS)),
    "dora with trained biases": Row("qwen2", dict(r=5, use_dora=True, bias="all", target_modules=LINEARS), _biases),
    "dora of gpt2": Row("gpt2", dict(r=4, use_dora=True, fan_in_fan_out=True, target_modules=["c_attn", "mlp.c_proj"])),
    "lora_bias": Row("llama", dict(r=4, lora_alpha=6, lora_bias=True, target_modules=LINEARS)),
    "lora_bias on biases": Row("qwen2", dict(r=4, lora_bias=True, target_modules=["q_proj", "lm_head"])),
    "trained biases": Row("qwen2", dict(r=4, bias="all", target_modules=["q_proj", "down_proj"]), _biases),
    "trained biases of the adapted": Row("qwen2", dict(r=4, bias="lora_only", target_modules=["q_proj"]), _biases),
    "both biases": Row("qwen2", dict(r=4, bias="all", lora_bias=True, target_modules=["v_proj"]), _biases),
}  # fmt: skip


@dataclass
class Scene:
    """One base model of a family and an engine of it."""

    folder: Path
    model: PreTrainedModel
    harness: Harness


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Scene]]:
    made: dict[str, Scene] = {}

    def scene(family: str) -> Scene:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = make_model(family, folder)
            made[family] = Scene(folder, model, Harness(config_of(folder, arena_mib=8)))
        return made[family]

    yield scene
    for one in made.values():
        one.harness.close()


def adapt(row: Row, model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with an adapter whose trained parameters are random, saved to `folder`. Biases are the base's own."""
    generator = torch.Generator().manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **row.fields)).eval()
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if not row.trained(name):
                    continue
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name:
                    parameter.mul_(1 + 0.3 * noise)
                else:
                    parameter.copy_(0.15 * noise)
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return adapted


def peft_logprobs(adapted: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Log-probability of every token but the first."""
    with torch.no_grad():
        logits = adapted(torch.tensor([tokens])).logits[0].float()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", ROWS)
def test_parity(name: str, scenes: Callable[[str], Scene], tmp_path: Path) -> None:
    """Prompt and decoding, in one batch with the base model."""
    row = ROWS[name]
    scene = scenes(row.family)
    state = {key: value.clone() for key, value in scene.model.state_dict().items()}
    adapt(row, scene.model, tmp_path).unload().load_state_dict(state)
    image = scene.harness.stage(tmp_path)
    run = scene.harness.run(
        [
            request("base", PROMPT, None, NEW, prompt_logprobs=True),
            request("adapter", PROMPT, image, NEW, prompt_logprobs=True),
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(scene.model, str(tmp_path)).eval()
    assert_like(run["adapter"], adapted)
    base = adapted.unload()
    base.load_state_dict(state)
    assert_like(run["base"], base)
    assert run["adapter"].tokens != run["base"].tokens


def assert_like(outcome: Outcome, model: torch.nn.Module) -> None:
    tokens = PROMPT + outcome.tokens
    assert outcome.prompt_logprobs is not None and len(outcome.tokens) == NEW
    found = torch.tensor(outcome.prompt_logprobs + outcome.logprobs)
    torch.testing.assert_close(found, peft_logprobs(model, tokens), atol=TOLERANCE, rtol=0)


def test_the_prompt_is_in_the_vocabulary() -> None:
    assert max(PROMPT) < VOCAB
