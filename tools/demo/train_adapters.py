"""Train the demo's LoRA adapters with PEFT on the stored base model, on the CPU.

Examples are packed into rows under a block-diagonal mask, each with positions from zero, so every
prompt is trained just as it will be served; only answers carry loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from tools.demo.chat import BOS, EOS
from tools.demo.task import Task, framed
from tools.demo.task_json import JSON
from tools.demo.task_math import MATH
from tools.demo.task_pirate import PIRATE
from tools.demo.train_base import STORED

IGNORED = -100
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One adapter: its task, its shape and its training run."""

    task: Task
    rank: int
    alpha: int
    targets: tuple[str, ...]
    steps: int
    rate: float
    rslora: bool = False
    rows: int = 16
    row: int = 256
    seed: int = 20261123


RECIPES = {
    recipe.task.name: recipe
    for recipe in (
        Recipe(MATH, 16, 32, ATTENTION + FEED_FORWARD, steps=1000, rate=4.5e-3),
        Recipe(JSON, 8, 16, ATTENTION, steps=450, rate=6e-3),
        Recipe(
            PIRATE, 12, 20, ("q_proj", "v_proj", *FEED_FORWARD), steps=500, rate=6e-3, rslora=True
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Packed:
    """Training rows; every array is [rows, length]. `part` numbers a row's examples from one."""

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    part: np.ndarray


def pack(tokenizer: Tokenizer, recipe: Recipe) -> Packed:
    """Fill rows with whole examples; what does not fit starts the next row."""
    rng = Random(recipe.seed)
    shape = (recipe.steps * recipe.rows, recipe.row)
    packed = Packed(
        np.zeros(shape, np.int32),
        np.full(shape, IGNORED, np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
    )
    filled, at, part = 0, 0, 0
    while filled < shape[0]:
        context, answer = framed(rng, recipe.task, recipe.task.draw(rng, "train"))
        before = tokenizer.encode(BOS + context, add_special_tokens=False).ids
        after = tokenizer.encode(answer + EOS, add_special_tokens=False).ids
        count = len(before) + len(after)
        if at + count > recipe.row:
            filled, at, part = filled + 1, 0, 0
            if filled == shape[0]:
                break
        span, part = slice(at, at + count), part + 1
        packed.ids[filled, span] = before + after
        # The label of a position is the token after it.
        packed.labels[filled, at + len(before) - 1 : at + count - 1] = after
        packed.positions[filled, span] = np.arange(count)
        packed.part[filled, span] = part
        at += count
    return packed


def answer_loss(model: PeftModel) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The loss of the answers in packed rows; compiled where that pays."""
    llama = model.get_base_model()

    def loss(ids: Tensor, labels: Tensor, positions: Tensor, part: Tensor) -> Tensor:
        same = part[:, None, :, None] == part[:, None, None, :]
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        hidden = llama.model(
            input_ids=ids, position_ids=positions, attention_mask=same & causal, use_cache=False
        ).last_hidden_state
        logits = llama.lm_head(hidden).flatten(0, 1).float()
        return functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)

    return torch.compile(loss, dynamic=False, disable=model.device.type != "cpu")


def train(base: Path, folder: Path, recipe: Recipe, device: str = "cpu") -> dict[str, float]:
    """Train one adapter and save it in PEFT's format; returns a summary."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(2)
    began = time.time()
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    packed = pack(tokenizer, recipe)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=list(recipe.targets),
            use_rslora=recipe.rslora,
        ),
    ).to(device)
    loss_of = answer_loss(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0)
    recent: list[float] = []
    for step in range(recipe.steps):
        share = min((step + 1) / 30, 1 - step / recipe.steps)
        optimizer.param_groups[0]["lr"] = recipe.rate * share
        rows = slice(step * recipe.rows, (step + 1) * recipe.rows)
        arrays = (packed.ids, packed.labels, packed.positions, packed.part)
        batch = [torch.from_numpy(array[rows].astype(np.int64)).to(device) for array in arrays]
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if step % 25 == 0:
            mean = sum(recent[-25:]) / len(recent[-25:])
            took = time.time() - began
            print(f"{recipe.task.name} step {step} loss {mean:.4f} {took:.0f} s", flush=True)
    save(model, folder / recipe.task.name)
    return {
        "parameters": sum(p.numel() for p in trained),
        "loss": sum(recent[-25:]) / 25,
        "seconds": time.time() - began,
    }


def save(model: PeftModel, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, the weights in float16."""
    model.to(STORED)
    config = model.peft_config["default"]
    config.base_model_name_or_path = "demo"
    # PEFT keeps targets as a set; a sorted list makes the file the same every time.
    config.target_modules = sorted(config.target_modules)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
