"""Every adapter format that PEFT and Ludwig write: the engine's log-probabilities are those of PEFT's model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.adapters.ref import AdapterRef
from engine.adapters.sources import LocalSource, open_folder
from engine.checkpoint import DEMO_FOLDER
from engine.lora.formats import load_peft
from engine.lora.own import CheckpointTables, without_base_rows
from tests.engine.harness import Harness, Outcome, config_of, request
from tests.tiny import VOCAB, make_model

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = [3, 99, 41, 41, 7, 150, 2, 88, 60, 5, 33, 121]
NEW = 8
TOLERANCE = 1e-4
DATA = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True)
class Row:
    """One row of the table in docs/adapter-formats.md."""

    family: str
    fields: dict[str, Any]
    trained: Callable[[str], bool] = field(default=lambda name: "lora_" in name)
    vocab: int = VOCAB  # after the vocabulary was resized
    save: bool | str = False  # save_embedding_layers
    own: int = 0  # own rows of embedding and head that differ from the base's


def _biases(name: str) -> bool:
    return "lora_" in name or (name.endswith("bias") and "norm" not in name)


def _ends(name: str) -> bool:
    """LoRA, own matrices and own rows; not the base's that stay behind."""
    return "lora_" in name or "modules_to_save" in name or "trainable_tokens_delta" in name


ENDS = ["embed_tokens", "lm_head"]
TOKENS = [150, 3, 41]
ROWS = {
    "every linear": Row("llama", dict(r=5, lora_alpha=7, target_modules="all-linear")),
    "embedding and head": Row("llama", dict(r=4, lora_alpha=6, target_modules=["q_proj", *ENDS])),
    "rslora": Row("mistral", dict(r=9, lora_alpha=3, use_rslora=True, target_modules=["down_proj", "up_proj"])),
    "patterns": Row(
        "llama",
        dict(
            r=4, target_modules=LINEARS, rank_pattern={r".*\.1\..*": 2, "up_proj": 6}, alpha_pattern={"q_proj": 5},
        ),
    ),
    "some layers": Row("llama", dict(r=3, target_modules=["v_proj"], layers_to_transform=[0, 2])),
    "conv1d": Row("gpt2", dict(r=4, fan_in_fan_out=True, target_modules=["c_attn", "c_fc", "wte"])),
    "fused by the base": Row("gpt2", dict(r=3, use_rslora=True, fan_in_fan_out=True, target_modules=["c_attn"])),
    "tied and scaled embedding": Row("gemma2", dict(r=4, target_modules=["embed_tokens", "o_proj"])),
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
    "own matrices": Row("llama", dict(r=4, target_modules=["q_proj"], modules_to_save=ENDS), _ends, own=2 * VOCAB),
    "own head": Row("llama", dict(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]), _ends, own=VOCAB),
    "own embedding of a tied base": Row(
        "gemma2", dict(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]), _ends, own=VOCAB
    ),
    "copies of the base": Row("llama", dict(r=4, target_modules=["q_proj", *ENDS]), save=True),
    "trained tokens": Row(
        "llama", dict(r=4, target_modules=["q_proj"], trainable_token_indices=TOKENS), _ends, own=len(TOKENS)
    ),
    "trained tokens of both ends": Row(
        "llama",
        dict(r=4, target_modules=["v_proj"], trainable_token_indices={"embed_tokens": TOKENS, "lm_head": [9, 7]}),
        _ends,
        own=len(TOKENS) + 2,
    ),
    "trained tokens of a tied base": Row(
        "gemma2", dict(r=4, target_modules=["q_proj"], trainable_token_indices=TOKENS), _ends, own=2 * len(TOKENS)
    ),
    "added tokens": Row("llama", dict(r=4, target_modules=["q_proj"]), vocab=VOCAB + 5, save=True, own=10),
    "added tokens under LoRA": Row(
        "llama", dict(r=4, target_modules=["q_proj", *ENDS]), vocab=VOCAB + 5, save=True, own=10
    ),
    "added tokens of a tied base": Row(
        "gemma2", dict(r=4, target_modules=["q_proj", "lm_head"]), vocab=VOCAB + 3, save=True, own=6
    ),
    "added and trained tokens": Row(
        "llama",
        dict(r=4, target_modules=["q_proj"], trainable_token_indices=[VOCAB + 1, 3]),
        _ends, vocab=VOCAB + 2, save=True, own=5,
    ),
    "a smaller vocabulary": Row("llama", dict(r=4, target_modules=["q_proj", *ENDS]), vocab=VOCAB - 6, save=True),
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


@pytest.fixture(scope="module")
def demo() -> Iterator[Scene]:
    folder = DEMO_FOLDER / "base"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    harness = Harness(config_of(folder, arena_mib=4))
    yield Scene(folder, model, harness)
    harness.close()


def resized(model: PreTrainedModel, vocab: int) -> PreTrainedModel:
    """A copy of the model with another vocabulary; new rows are as large as the others."""
    found = copy.deepcopy(model)
    if vocab != VOCAB:
        found.resize_token_embeddings(vocab, mean_resizing=False)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for module in (found.get_input_embeddings(), found.get_output_embeddings()):
                added = module.weight[VOCAB:]
                added.copy_(torch.randn(added.shape, generator=generator) * 0.3)
    return found


def adapt(row: Row, model: PreTrainedModel, folder: Path) -> None:
    """Saves an adapter whose trained parameters are random to `folder`. Changes the model."""
    generator = torch.Generator().manual_seed(1)
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
    adapted.save_pretrained(str(folder), save_embedding_layers=row.save)


def peft_logprobs(adapted: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Log-probability of every token but the first."""
    with torch.no_grad():
        logits = adapted(torch.tensor([tokens])).logits[0].float()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROWS)
def test_parity(name: str, scenes: Callable[[str], Scene], tmp_path: Path) -> None:
    """Prompt and decoding, in one batch with the base model; the adapter is what PEFT loads from its files."""
    row = ROWS[name]
    scene = scenes(row.family)
    adapt(row, resized(scene.model, row.vocab), tmp_path)
    tables = CheckpointTables(scene.folder, scene.harness.engine.layout.targets)
    image = scene.harness.stage(tmp_path, tables)
    prompt = [row.vocab - 1 if token == 33 else token for token in PROMPT]
    run = scene.harness.run(
        [
            request("base", PROMPT, None, NEW, prompt_logprobs=True),
            request("adapter", prompt, image, NEW, prompt_logprobs=True),
        ]
    )
    adapted = PeftModel.from_pretrained(resized(scene.model, row.vocab), str(tmp_path)).eval()
    assert_like(run["adapter"], adapted, prompt)
    assert_like(run["base"], scene.model, PROMPT)
    assert run["adapter"].tokens != run["base"].tokens
    assert image.vocab == (row.vocab if row.vocab != VOCAB else 0)
    with open_folder(tmp_path) as files:
        layout = scene.harness.engine.layout
        weights = load_peft(files.config, files.weights, layout.targets)
        kept = without_base_rows(weights, layout, tables)
    assert sum(len(own.ids) for own in kept.own.values()) == row.own


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ludwig", "ludwig/model"])
def test_ludwig(name: str, demo: Scene) -> None:
    """Files that Ludwig wrote, by the id of a training run and by that of what LudwigModel.save writes."""
    source = LocalSource([DATA])
    version = source.resolve(AdapterRef.parse(name), None)
    with source.fetch(version, None, lambda done, total: None) as files:
        image = demo.harness.stage(files.folder)
    run = demo.harness.run(
        [
            request("base", PROMPT, None, NEW, prompt_logprobs=True),
            request("adapter", PROMPT, image, NEW, prompt_logprobs=True),
        ]
    )
    assert_like(run["base"], demo.model, PROMPT)
    folder = DATA / "ludwig/model/model_weights"
    adapted = PeftModel.from_pretrained(copy.deepcopy(demo.model), str(folder)).eval()
    assert_like(run["adapter"], adapted, PROMPT)
    assert run["adapter"].tokens != run["base"].tokens


def assert_like(outcome: Outcome, model: torch.nn.Module, prompt: list[int]) -> None:
    tokens = prompt + outcome.tokens
    assert outcome.prompt_logprobs is not None and len(outcome.tokens) == NEW
    found = torch.tensor(outcome.prompt_logprobs + outcome.logprobs)
    torch.testing.assert_close(found, peft_logprobs(model, tokens), atol=TOLERANCE, rtol=0)
