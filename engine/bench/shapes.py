"""Model folders without weights: a config.json of a well-known shape and a tokenizer of as many tokens.

With `--load-format dummy` the engine makes the weights up, so anyone can reproduce a figure without a download. In
the tokenizer every token is text: printable ASCII characters first, then made-up words, so that a prompt of N
characters has N tokens and every generated token brings something to show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
_MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
_QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def _shape(
    family: dict[str, Any],
    layers: int,
    hidden: int,
    wide: int,
    heads: tuple[int, int],
    vocab: int,
    positions: int,
    **more: Any,
) -> dict[str, Any]:
    return family | {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **more,
    }


# As in the config.json that the models' makers published; what random weights do not feel (rotary base, norm epsilon)
# is left at the family's default.
SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": _shape(
        _MISTRAL, 32, 4096, 14336, (32, 8), 32000, 32768, head_dim=128, sliding_window=None
    ),
    "llama-3-8b": _shape(_LLAMA, 32, 4096, 14336, (32, 8), 128256, 8192),
    "qwen2.5-0.5b": _shape(_QWEN2, 24, 896, 4864, (14, 2), 151936, 32768, tie_word_embeddings=True),
    "smollm2-135m": _shape(_LLAMA, 30, 576, 1536, (9, 3), 49152, 8192, tie_word_embeddings=True),
}

SPECIAL = ("<s>", "</s>", "<unk>")


def write_model(folder: Path, shape: str, **changes: Any) -> Path:
    """Writes config.json and the tokenizer of a shape; `changes` to the config make it smaller."""
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape] | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(folder, config["vocab_size"])
    return folder


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A tokenizer of `vocab` tokens: one for each ASCII character, and words that only a model says."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ascii_bytes = [*range(ord("!"), ord("~") + 1), ord(" "), ord("\n"), ord("\t")]
    # Byte-level names: a printable byte is itself, others are moved beyond the Latin alphabet.
    shown = [chr(byte) if byte > ord(" ") else chr(256 + byte) for byte in ascii_bytes]
    tokens = [*SPECIAL, *shown]
    tokens += [f"\u0120w{number}" for number in range(vocab - len(tokens))]
    names = {token: id for id, token in enumerate(tokens[:vocab])}
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[], unk_token=SPECIAL[2]))
    tokenizer.add_special_tokens([name for name in SPECIAL if name in names])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "unk_token": SPECIAL[2],
        "pad_token": SPECIAL[1],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
