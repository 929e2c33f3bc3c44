"""Tensors that belong to no LoRA pair: what they are, and the remedy."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

from engine.errors import RESAVE
from engine.lora.peft_fields import FIELDS, RETRAIN
from engine.names import shown

FULL_MODEL = "serve a fully fine-tuned model as the base model, with --model-id"
FUSE_MLX = "merge it into the base model with mlx_lm.fuse and serve the result with --model-id"
_NO_COPIES = "save the adapter with save_embedding_layers=False"

_BASE_COPY = re.compile(r"(?P<module>.+)\.base_layer\.weight")
_MLX = re.compile(r".+\.lora_[ab]")
_HEAD = re.compile(r"(?:.+\.)?(?:score|classifier|classification_head|qa_outputs|v_head)\..+")

# (part of a tensor's name, only at the end?, what it is, field)
_KNOWN_KEYS = (
    (
        ".lora_magnitude_vector",
        False,
        "a DoRA magnitude of a module that cannot be adapted",
        "use_dora",
    ),
    (".lora_A.bias", True, "a bias of lora_A", "lora_bias"),
    (".lora_B.bias", True, "a bias of a module that cannot be adapted", "lora_bias"),
    (".trainable_tokens_", False, "trained rows of the embedding", "trainable_token_indices"),
    (".lora_diag", False, "a KaSA diagonal", "kasa_config"),
    (".modules_to_save.", False, "a whole module", "modules_to_save"),
    (".bias", True, "a bias outside of the linear layers", "bias"),
)


@dataclass(frozen=True, slots=True)
class Leftover:
    """Why a tensor cannot be served."""

    kind: str  # equal for tensors that have the same problem
    text: str
    field: str
    remedy: str


def describe(key: str, kind: str, linears: Container[str], targets: Container[str]) -> Leftover:
    """Why `key` is left over. `kind`: the key without layer numbers. `linears`: the paths of all LoRA targets.

    `targets`: their names.
    """
    name = shown(key)
    module, _, last = key.rpartition(".")
    if match := _BASE_COPY.fullmatch(key):
        return Leftover(
            f"base copy {kind}",
            f"{name} is a copy of the base model's matrix, which may have been trained or resized",
            match["module"],
            f"if it was not trained, {_NO_COPIES}",
        )
    if _MLX.fullmatch(key):
        return Leftover("mlx", f"{name} is a tensor of an mlx-lm adapter", key, FUSE_MLX)
    if _HEAD.fullmatch(key):
        return Leftover(
            f"head {kind}",
            f"{name} belongs to a classification head; this server generates text only",
            "modules_to_save",
            "use an adapter that was trained with task_type CAUSAL_LM",
        )
    for part, at_end, what, field in _KNOWN_KEYS:
        if key.endswith(part) if at_end else part in key:
            remedy = FIELDS[field].remedy or RETRAIN
            return Leftover(f"left {field}", f"{name} is {what}", field, remedy)
    if key.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight")):
        text = f"{name} is a whole matrix: the vocabulary was resized or trained"
        return Leftover(
            f"left {kind}", text, "modules_to_save", f"if it was not trained, {_NO_COPIES}"
        )
    if last == "weight" and (module in linears or module.rpartition(".")[2] in targets):
        text = f"{name} is a whole matrix of the model, not a LoRA update"
        return Leftover(f"left {kind}", text, key, FULL_MODEL)
    return Leftover(f"left {kind}", f"{name} is not a LoRA tensor", key, RESAVE)
