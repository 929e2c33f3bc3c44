"""Pretrain the demo's base model: one pass over generated text, on the CPU.

Matrices are trained with Muon and the rest with AdamW; the learning rate falls linearly over the last
part. The text is generated, encoded and packed before the first step, so the training threads never
wait for it. The last steps use long rows, so that every position has been seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tools.demo.base_text import documents
from tools.demo.tokenizer import MAX_POSITIONS, VOCABULARY, save_tokenizer, train_tokenizer

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
STORED = torch.float16


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes and rates of a pretraining run."""

    seed: int = 20261123
    steps: int = 2600
    long_steps: int = 180
    row: int = 256
    rows: int = 16
    muon_rate: float = 0.005
    adam_rate: float = 0.0015
    warmup: int = 60
    decay: float = 0.6  # share of the steps over which the rate falls to zero


def model_config() -> LlamaConfig:
    """About 4.3 million parameters, grouped-query attention, tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


def pack(tokenizer: Tokenizer, seed: int, num_rows: int, row: int) -> np.ndarray:
    """Rows of whole documents, each `<s> ... </s>`; a row's last document is cut off.

    Returns uint16 [num_rows, row].
    """
    out = np.zeros((num_rows, row), dtype=np.uint16)
    stream = documents(seed)
    filled, at = 0, 0
    while True:
        batch = tokenizer.encode_batch_fast(list(islice(stream, 512)))
        for encoding in batch:
            ids = [*encoding.ids, EOS_ID]
            count = min(len(ids), row - at)
            out[filled, at : at + count] = ids[:count]
            at += count
            if at == row:
                filled, at = filled + 1, 0
                if filled == num_rows:
                    return out


def _pack_part(job: tuple[str, int, int, int]) -> np.ndarray:
    path, seed, num_rows, row = job
    return pack(Tokenizer.from_file(path), seed, num_rows, row)


def pack_parallel(path: Path, seed: int, num_rows: int, row: int, parts: int = 8) -> np.ndarray:
    """`pack` over two processes; the rows do not depend on how many processes there are."""
    share = math.ceil(num_rows / parts)
    jobs = [(str(path), seed + 1 + part, share, row) for part in range(parts)]
    with Pool(2) as pool:
        return np.concatenate(pool.map(_pack_part, jobs))[:num_rows]


def language_loss(model: LlamaForCausalLM) -> Callable[[Tensor], Tensor]:
    """The next-token loss of a batch of rows [rows, length]; compiled where that pays."""

    def loss(ids: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
        logits = model.lm_head(hidden).flatten(0, 1).float()
        return functional.cross_entropy(logits, ids[:, 1:].flatten())

    return torch.compile(loss, dynamic=False, disable=model.device.type != "cpu")


def rate(step: int, total: int, recipe: Recipe) -> float:
    """The learning rate's factor: warm-up, flat, linear fall to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return min(1.0, (total - step) / (recipe.decay * total))


def optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_rate, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def batches(short: np.ndarray, long: np.ndarray, recipe: Recipe) -> Iterator[Tensor]:
    """Batches of short rows, then batches of as many tokens in long rows."""
    for at in range(0, len(short), recipe.rows):
        yield torch.from_numpy(short[at : at + recipe.rows].astype(np.int64))
    rows = recipe.rows * recipe.row // long.shape[1]
    for at in range(0, len(long), rows):
        yield torch.from_numpy(long[at : at + rows].astype(np.int64))


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config, float16 weights and generation config."""
    stored = LlamaForCausalLM(model.config).to(STORED)
    stored.load_state_dict({k: v.to(STORED).cpu() for k, v in model.state_dict().items()})
    stored.config.dtype = STORED
    stored.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, max_new_tokens=128
    )
    stored.save_pretrained(folder)
    model.config.dtype = torch.float32


def train(folder: Path, recipe: Recipe, device: str = "cpu") -> dict[str, float]:
    """Train tokenizer and model, write them to the folder and return a summary."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(2)
    began = time.time()
    save_tokenizer(train_tokenizer(recipe.seed), folder)
    path = folder / "tokenizer.json"
    short_steps = recipe.steps - recipe.long_steps
    rows_long = recipe.rows * recipe.row // MAX_POSITIONS
    # One token more than the row's length: the last one is only ever a label.
    short = pack_parallel(path, recipe.seed, short_steps * recipe.rows, recipe.row + 1)
    long = pack_parallel(path, recipe.seed + 1000, recipe.long_steps * rows_long, MAX_POSITIONS + 1)
    print(
        f"text ready after {time.time() - began:.0f} s: {short.size + long.size} tokens", flush=True
    )
    model = LlamaForCausalLM(model_config()).to(device)
    loss_of = language_loss(model)
    opts = optimizers(model, recipe)
    base_rates = [opt.param_groups[0]["lr"] for opt in opts]
    recent: list[float] = []
    for step, ids in enumerate(batches(short, long, recipe)):
        for opt, base_rate in zip(opts, base_rates, strict=True):
            opt.param_groups[0]["lr"] = base_rate * rate(step, recipe.steps, recipe)
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(ids.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if step % 50 == 0:
            mean = sum(recent[-50:]) / len(recent[-50:])
            print(f"step {step} loss {mean:.4f} {time.time() - began:.0f} s", flush=True)
    save(model, folder)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": short.size + long.size,
        "loss": sum(recent[-50:]) / 50,
        "seconds": time.time() - began,
    }
