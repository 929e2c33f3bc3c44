"""Model folders without weights: a config.json in the shape of a known model, and a tokenizer of its vocabulary size.

With `--load-format dummy` the engine uses random weights, so anyone can reproduce a figure without a download. Every
token of the tokenizer is text: printable ASCII characters first, then invented words. A prompt of N characters has N
tokens, and every generated token has text.
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
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    positions: int,
    **more: Any,
) -> dict[str, Any]:
    return family | {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **more,
    }


# As in the published config.json files. Values that do not matter for random weights (rotary base, norm epsilon) are
# the family's defaults.
SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": _shape(
        _MISTRAL,
        layers=32,
        hidden=4096,
        intermediate=14336,
        heads=32,
        kv_heads=8,
        vocab=32000,
        positions=32768,
        head_dim=128,
        sliding_window=None,
    ),
    "llama-3-8b": _shape(
        _LLAMA,
        layers=32,
        hidden=4096,
        intermediate=14336,
        heads=32,
        kv_heads=8,
        vocab=128256,
        positions=8192,
    ),
    "qwen2.5-0.5b": _shape(
        _QWEN2,
        layers=24,
        hidden=896,
        intermediate=4864,
        heads=14,
        kv_heads=2,
        vocab=151936,
        positions=32768,
        tie_word_embeddings=True,
    ),
    "smollm2-135m": _shape(
        _LLAMA,
        layers=30,
        hidden=576,
        intermediate=1536,
        heads=9,
        kv_heads=3,
        vocab=49152,
        positions=8192,
        tie_word_embeddings=True,
    ),
}

SPECIAL = ("<s>", "</s>", "<unk>")


def write_model(folder: Path, shape: str, **changes: Any) -> Path:
    """Writes config.json and the tokenizer of a shape. `changes` override entries of the config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape] | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(folder, config["vocab_size"])
    return folder


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Writes a tokenizer of `vocab` tokens: the ASCII characters, then invented words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ascii_bytes = [*range(ord("!"), ord("~") + 1), ord(" "), ord("\n"), ord("\t")]
    # Byte-level names: a printable byte is its own name, other bytes are moved by 256.
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
