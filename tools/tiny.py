"""A tiny random llama with a tokenizer of whole words, and prompts for it: what the soaks serve."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

WORDS = [f"word{i}" for i in range(500)]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def write_model(folder: Path, **sizes: int) -> None:
    """A llama for --load-format dummy, and its tokenizer. `sizes`: fields of its config other than SIZES."""
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3, bos_token_id=0, eos_token_id=1, **(SIZES | sizes)
    )
    config.save_pretrained(folder)
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {w: i + 3 for i, w in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def prompt(chosen: random.Random) -> str:
    """1 to 60 random words; 3 of 10 prompts share their first 40."""
    shared = " ".join(WORDS[:40]) + " " if chosen.random() < 0.3 else ""
    return shared + " ".join(chosen.choices(WORDS, k=chosen.randint(1, 60)))
